"""Experiments: references, sweeps, and what makes two stages the same."""

import dataclasses
import json
from dataclasses import dataclass, replace

import jax.numpy as jnp
import pytest

from hhjax import identity
from hhjax.data.comparisons import ComparisonData
from hhjax.data.sources import TextData
from hhjax.experiment import Experiment, Run, as_runs, edit, grid, override
from hhjax.fields import ConfigError, names_in
from hhjax.objectives.preference import PreferenceLoss, preference_objective
from hhjax.placing import canonical_data, place
from hhjax.sharding import MeshConfig
from hhjax.stages import LM, PM, Evaluate, Report, Tokenizer, split_step

TEXT, PAIRS = TextData(("text.jsonl",)), ComparisonData(("pairs.jsonl",))
BASE = Experiment(
    "pm_hh",
    (
        Tokenizer("tok", data=TEXT, vocab=320),
        LM("lm", tokenizer="tok", model="0.1M", data=TEXT),
        PM("pm", init="lm", data=PAIRS),
        Evaluate("eval", of="pm", data=PAIRS),
        Report("report", of=("eval",)),
    ),
)


def ids(experiment, data_dir) -> dict[str, str]:
    return {p.stage.name: p.id for p in place(Run(experiment), "runs", data_dir)}


def changed_stages(experiment, data_dir) -> set[str]:
    before, after = ids(BASE, data_dir), ids(experiment, data_dir)
    return {name for name in before if before[name] != after[name]}


def with_objective(objective, loss=PreferenceLoss()) -> Experiment:
    return edit(edit(BASE, "pm.objective", objective), "pm.loss", loss)


# Edits and grids


def test_edit_replaces_one_field_and_shares_the_rest():
    changed = edit(BASE, "pm.optim.lr", 1e-4)
    assert changed.stage("pm").optim.lr == 1e-4 and BASE.stage("pm").optim.lr != 1e-4
    assert changed.stage("lm") is BASE.stage("lm")
    assert edit(BASE, "seed", 3).seed == 3
    assert edit(BASE, "pm.data", ComparisonData(("helpful-base",))).stage("pm").data.sources == ("helpful-base",)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("pm.optim.lrr", 1, "unknown field 'pm.optim.lrr'; did you mean 'pm.optim.lr'"),
        ("mp.optim.lr", 1, "did you mean 'pm.optim.lr'"),
        ("pm.optim.lr", -1e-3, r"optim.lr=-0.001; it must be at least 0"),
        ("pm.optim.lr", float("nan"), r"optim.lr=nan; it must be at least 0"),
        ("pm.optim.warmup_steps", -5, "optim.warmup_steps=-5"),
        ("pm.optim.b2", 1.0, "optim.b2=1.0; it must be at least 0 and below 1"),
        ("pm.optim.lr.x", 1, "unknown field"),
        ("pm", 1, "unknown field 'pm'"),
        ("pm.name", "rm", "other stages refer to it"),
        ("pm.batch_size", "8", "pm.batch_size='8' is of type str; it must be int"),
        ("pm.batch_size", True, "is of type bool"),
        ("pm.optim.lr", "fast", "pm.optim.lr='fast' is of type str; it must be float"),
        ("pm.init", 3, "it must be str or None"),
        ("pm.data", TEXT, "it must be ComparisonData"),
        ("pm.objective", 3, "is of type int"),
        ("pm.model", "1M", "has no effect beside init='lm'"),
        ("pm.batch_size", 0, "it must be at least 1"),
        ("lm.tokenizer", None, "neither init nor tokenizer"),
    ],
)
def test_a_wrong_edit_says_what_and_what_instead(path, value, message):
    with pytest.raises(ConfigError) as error:
        edit(BASE, path, value)
    assert message in str(error.value)


def test_steps_and_epochs_do_not_stand_together():
    counted = edit(BASE, "lm.steps", 10)
    with pytest.raises(ConfigError, match="epochs=2.0 has no effect beside steps=10"):
        edit(counted, "lm.epochs", 2.0)
    assert edit(edit(counted, "lm.steps", None), "lm.epochs", 2.0).stage("lm").epochs == 2


def test_numbers_take_the_type_of_their_field(tiny_data):
    assert ids(edit(BASE, "pm.epochs", 2), tiny_data) == ids(edit(BASE, "pm.epochs", 2.0), tiny_data)
    assert isinstance(edit(BASE, "pm.epochs", 2).stage("pm").epochs, float)
    assert edit(BASE, "pm.data.sources", ["a.jsonl"]).stage("pm").data.sources == ("a.jsonl",)


def test_grid_is_a_product_with_readable_names():
    runs = grid(BASE, {"lm.model": ("0.1M", "0.4M"), "seed": (0, 1, 2)})
    assert [r.name for r in runs][:4] == [
        "lm.model=0.1M,seed=0", "lm.model=0.1M,seed=1", "lm.model=0.1M,seed=2", "lm.model=0.4M,seed=0",
    ]  # fmt: skip
    assert runs[4].experiment.stage("lm").model == "0.4M" and runs[4].experiment.seed == 1


def test_an_axis_may_be_several_paths_and_may_be_labelled():
    mixes = {"helpful": ComparisonData(("helpful-base",)), "both": ComparisonData()}
    runs = grid(BASE, {("pm.data", "eval.data"): mixes, "pm.objective": (preference_objective,)})
    assert [r.name for r in runs] == [f"pm.data={m},pm.objective=preference_objective" for m in mixes]
    assert runs[0].experiment.stage("eval").data == mixes["helpful"]


def test_an_overridden_axis_renames_and_merges_runs():
    runs = grid(BASE, {"lm.model": ("0.1M",), "seed": (0, 1)})
    merged = as_runs([override(r, "seed", 7) for r in runs])
    assert [r.name for r in merged] == ["lm.model=0.1M,seed=7"] and merged[0].experiment.seed == 7


def test_runs_of_one_name_must_be_equal():
    with pytest.raises(ConfigError, match="two runs are called"):
        as_runs([BASE, edit(BASE, "seed", 1)])
    with pytest.raises(ConfigError, match="must be an Experiment"):
        as_runs([3])


# Validation


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((PM("pm", init="ml", data=PAIRS),), "pm.init='ml' is no earlier stage"),
        ((BASE.stages[0], BASE.stages[0]), "two stages are called 'tok'"),
        ((BASE.stages[0], PM("pm", init="tok", data=PAIRS)), "is a stage of kind 'tokenizer'; it must be lm or pm"),
        ((BASE.stages[0], LM("seed", tokenizer="tok")), "stage name 'seed'"),
        ((BASE.stages[0], LM("a/b", tokenizer="tok")), "stage name 'a/b'"),
        ((LM("lm", tokenizer="tok"), BASE.stages[0]), "lm.tokenizer='tok' is no earlier stage"),
        ((BASE.stages[0], LM("lm", tokenizer="toc")), "did you mean 'tok'"),
    ],
)
def test_a_wrong_experiment_is_refused(stages, message):
    with pytest.raises(ConfigError) as error:
        Experiment("x", stages)
    assert message in str(error.value)


def test_references_split_into_target_and_step():
    assert split_step("lm@200") == ("lm", 200) and split_step("lm") == ("lm", None)
    assert split_step("gs://b/lm@7") == ("gs://b/lm", 7) and split_step("me@home/lm") == ("me@home/lm", None)


# Identity


@pytest.fixture
def data_dir(tiny_data):
    return tiny_data


@pytest.mark.parametrize(
    ("path", "value", "changed"),
    [
        ("tok.vocab", 330, {"tok", "lm", "pm", "eval", "report"}),
        ("lm.model", "0.4M", {"lm", "pm", "eval", "report"}),
        ("seed", 1, {"lm", "pm", "eval", "report"}),
        ("pm.optim.lr", 1e-4, {"pm", "eval", "report"}),
        ("pm.init", "lm@3", {"pm", "eval", "report"}),
        ("eval.baselines", False, {"eval", "report"}),
        ("pm.mesh", MeshConfig(fsdp=2), set()),
        ("pm.run.remat", "full", set()),
        ("pm.save_every", 7, set()),
        ("pm.watchdog_s", 7, set()),
        ("pm.micro_batches", 2, set()),
    ],
)
def test_an_edit_changes_its_stage_and_what_needs_it(data_dir, path, value, changed):
    assert changed_stages(edit(BASE, path, value), data_dir) == changed


def test_a_stage_may_keep_a_seed_of_its_own(data_dir):
    fixed = edit(edit(BASE, "lm.seed", 0), "seed", 1)
    assert changed_stages(fixed, data_dir) == {"pm", "eval", "report"}


def test_names_of_stages_do_not_matter(data_dir):
    stages = (replace(BASE.stages[0], name="t"), replace(BASE.stages[1], name="m", tokenizer="t"))
    renamed = ids(Experiment("other", stages), data_dir)
    assert [renamed["t"], renamed["m"]] == [ids(BASE, data_dir)[n] for n in ("tok", "lm")]


def test_the_bytes_of_the_data_matter_and_their_place_does_not(data_dir, tmp_path):
    for name in ("text.jsonl", "pairs.jsonl"):
        (tmp_path / name).write_bytes((data_dir / name).read_bytes())
    assert ids(BASE, tmp_path) == ids(BASE, data_dir)
    by_path = edit(BASE, "pm.data.sources", (str(tmp_path / "pairs.jsonl"),))
    moved = edit(BASE, "pm.data.sources", (str(data_dir / "pairs.jsonl"),))
    assert ids(by_path, data_dir) == ids(moved, data_dir)
    (tmp_path / "pairs.jsonl").write_text((data_dir / "pairs.jsonl").read_text() * 2)
    assert {n for n, i in ids(BASE, tmp_path).items() if i != ids(BASE, data_dir)[n]} == {"pm", "eval", "report"}


def test_a_size_is_known_by_its_settings(data_dir, monkeypatch):
    from hhjax.model import sizes

    before = ids(BASE, data_dir)
    monkeypatch.setitem(sizes.SIZES, "0.1M", dataclasses.replace(sizes.SIZES["0.1M"], width=96))
    assert ids(BASE, data_dir)["lm"] != before["lm"]
    with pytest.raises(ValueError, match="model size '2M'"):
        ids(edit(BASE, "lm.model", "2M"), data_dir)


def test_a_folder_is_known_by_what_it_holds(data_dir, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    outside = edit(BASE, "lm.tokenizer", str(folder))
    first = ids(outside, data_dir)["lm"]
    assert ids(outside, data_dir)["lm"] == first
    (folder / "tokenizer.json").write_text("{ }")
    assert ids(outside, data_dir)["lm"] != first
    (folder / "config.json").write_text(json.dumps({"id": ids(BASE, data_dir)["tok"]}))
    assert ids(outside, data_dir)["lm"] == ids(BASE, data_dir)["lm"]  # a run directory is the stage it came from
    with pytest.raises(ConfigError, match="no such folder"):
        ids(edit(BASE, "lm.tokenizer", "./nowhere"), data_dir)


def test_places_say_kind_size_seed_and_id(data_dir):
    placed = {p.stage.name: p for p in place(Run(edit(BASE, "seed", 2)), "out", data_dir)}
    folders = {n: str(p.dir).replace(p.id, "ID") for n, p in placed.items()}
    assert folders == {
        "tok": "out/tokenizer/v320-ID", "lm": "out/lm/0.1M-s2-ID", "pm": "out/pm/0.1M-s2-ID",
        "eval": "out/evaluate/0.1M-s2-ID", "report": "out/report/0.1M-s2-ID",
    }  # fmt: skip
    assert placed["pm"].parents == {"lm": placed["lm"].dir} and placed["report"].after == ("eval",)


# Functions


@dataclass(frozen=True)
class MarginLoss:
    margin: float = 1.0


MARGIN = 0.5


def helper(x):
    return jnp.maximum(x, MARGIN)


def margin_objective(model, cfg):
    """First wording."""

    def loss(params, batch, key):
        return helper(cfg.margin), {}  # a comment

    return loss


def test_a_changed_loss_is_a_new_stage_with_a_config_of_its_own(data_dir):
    before = ids(with_objective(margin_objective, MarginLoss()), data_dir)["pm"]
    assert before != ids(BASE, data_dir)["pm"]
    assert before != ids(with_objective(margin_objective, MarginLoss(2.0)), data_dir)["pm"]
    assert changed_stages(with_objective(margin_objective, MarginLoss()), data_dir) == {"pm", "eval", "report"}


def load(source: str, tmp_path, name="losses"):
    import importlib.util
    import linecache

    linecache.clearcache()
    path = tmp_path / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LOSS = """
MARGIN = 0.5

def helper(x):
    return x + MARGIN

def make(scale):
    def objective(model, cfg):
        '''Doc.'''
        return helper(scale)  # comment
    return objective

objective = make(1.0)
"""


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("  # comment", "", True),
        ("'''Doc.'''", "'''Another.'''", True),
        ("return helper(scale)", "return  helper( scale )", True),
        ("helper(scale)", "helper(2 * scale)", False),
        ("x + MARGIN", "x - MARGIN", False),
        ("MARGIN = 0.5", "MARGIN = 0.6", False),
        ("make(1.0)", "make(2.0)", False),
    ],
)
def test_a_function_is_known_by_what_it_computes(tmp_path, old, new, same):
    before = identity.canonical(load(LOSS, tmp_path).objective)
    after = identity.canonical(load(LOSS.replace(old, new), tmp_path).objective)
    assert (before == after) is same


def test_a_function_without_source_is_refused():
    with pytest.raises(ConfigError, match="cannot be read; define it with `def`"):
        identity.canonical(eval("lambda model, cfg: None"))
    with pytest.raises(ConfigError, match="cannot be part of a stage's identity"):
        identity.canonical({"x": {1, 2}})


def test_names_with_commas_between():
    assert names_in("b,a", {"a": 1, "b": 2}) == ["b", "a"]
    with pytest.raises(ConfigError, match="unknown name 'scrach' in 'lm,scrach'; did you mean 'scratch'"):
        names_in("lm,scrach", ("lm", "scratch"))


def test_a_stage_may_be_the_only_data_and_have_a_share(tmp_path):
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    alone = canonical_data(ComparisonData(("gen",)), {"gen": "0123456789"}, tmp_path)
    assert alone["sources"] == ["0123456789"] and alone["files"] == []
    mixed = ComparisonData(("gen", "pairs.jsonl"), shares=(0.5, 0.5))
    found = canonical_data(mixed, {"gen": "0123456789"}, tmp_path)
    assert found["files"] == [identity.file_digest(tmp_path / "pairs.jsonl")]
