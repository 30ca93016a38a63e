"""--dry-run: true numbers of models that would not fit here, and no array made."""

from dataclasses import replace

import jax
import pytest

from hhjax import lowering, plan, roofline
from hhjax.data.comparisons import ComparisonData, load_comparisons
from hhjax.data.packing import MOST, PackedSource
from hhjax.data.sources import TextData
from hhjax.data.tokenizer import load_tokenizer
from hhjax.experiment import Experiment, Run
from hhjax.fields import ConfigError
from hhjax.model.generate import Sampling
from hhjax.model.sizes import model_config
from hhjax.model.transformer import make_model
from hhjax.objectives.ppo import ppo_objective
from hhjax.objectives.preference import pair_scores, preference_objective
from hhjax.sharding import MeshConfig, make_mesh, param_shardings
from hhjax.stages import LM, PM, PPO, Evaluate, Tokenizer
from hhjax.train.state import make_optimizer, state_shardings

TEXT, PAIRS = TextData(("text.jsonl",)), ComparisonData(("pairs.jsonl",))


def lines_of(stage, cfg) -> dict[str, str]:
    """What is said before anything is compiled: first word -> the rest of the line."""
    said = {}
    for line in plan.describe_training(stage, cfg):
        name, rest = line.split(maxsplit=1)
        said[name] = rest
        if name == "state":
            break
    return said


@pytest.mark.parametrize("mesh", [MeshConfig(1, 8, 1), MeshConfig(1, 4, 2)])
def test_the_largest_rung_in_numbers(mesh):
    layers, width, vocab, rows, length = 64, 8192, 32_000, 16, 2048
    stage = PM("pm", tokenizer="a/folder", model="52B", seq_len=length, batch_size=rows, steps=10, mesh=mesh, packed=False)
    before = {id(x) for x in jax.live_arrays()}
    said = lines_of(stage, model_config("52B", vocab))
    assert sum(x.nbytes for x in jax.live_arrays() if id(x) not in before) < 1 << 20
    blocks, vectors = 12 * layers * width**2, (4 * layers + 3) * width
    assert said["weights"].startswith(f"{blocks + vocab * width + vectors:,} parameters, {blocks:,} of them")
    # Matrices are split eight ways on either mesh, vectors are on every device; f32 weights and two moments.
    a_device = 12 * ((blocks + vocab * width) // 8 + vectors)
    assert said["state"].startswith(f"{a_device / 2**20:,.1f} MiB a device")
    assert said["batch"].startswith(f"16 pairs in 32 rows of 2048 tokens: {2 * rows * length:,} positions, {mesh.fsdp} ways")
    flops = 3 * 2 * rows * length * (2 * blocks + 2 * layers * width * length)
    assert said["length"] == f"10 updates; {flops:.3g} FLOPs an update, {10 * flops:.3g} in all"
    assert "P('tensor', 'fsdp')" in said["embed"] and "(64, 8192, 32768)" in said["blocks/up"]


def test_a_whole_experiment_that_has_not_begun(tiny_data, tmp_path):
    short = {"batch_size": 8, "steps": 2}
    stages = (
        Tokenizer("tok", data=TEXT, vocab=320),
        LM("lm", tokenizer="tok", model="0.1M", data=TEXT, seq_len=32, **short),
        PM("pm", init="lm", data=PAIRS, seq_len=64, mesh=MeshConfig(2, 2, 2), **short),
        Evaluate("eval", of="pm", data=PAIRS),
    )
    text = plan.describe(Run(Experiment("e", stages)), tmp_path / "runs", tiny_data)
    titles = [line.split(")")[0] for line in text.splitlines() if line and not line.startswith((" ", "run"))]
    assert titles == ["tok (tokenizer, to do", "lm (lm, to do", "pm (pm, to do", "eval (evaluate, to do"]
    assert text.count("2 layers, width 64, 2 heads, vocabulary 384") == 2  # the PM's is the LM's
    assert "{'data': 2, 'fsdp': 2, 'tensor': 2} over 8 devices" in text and text.count("MiB of temporaries a device") == 2
    assert not (tmp_path / "runs").exists()


def test_a_model_from_a_hugging_face_folder(hugging_face_folder, tiny_data, tmp_path):
    stage = PM("pm", init=str(hugging_face_folder), data=PAIRS, seq_len=32, batch_size=8, steps=1)
    (placed,) = plan.place(Run(Experiment("e", (stage,))), tmp_path, tiny_data)
    assert plan.architectures({"pm": stage}, placed.parents.__getitem__)("pm").vocab == 128


def test_what_the_run_would_refuse_is_refused():
    stage = LM("lm", tokenizer="a/folder", model="0.1M", batch_size=12, steps=1)
    with pytest.raises(ValueError, match=r"batch 12 is not divisible by data\*fsdp=8; use 8 or 16"):
        lines_of(stage, model_config("0.1M", 320))
    with pytest.raises(ValueError, match="does not fill 8 devices"):
        lines_of(LM("lm", tokenizer="a/folder", mesh=MeshConfig(3)), model_config("0.1M", 320))


def test_a_ppo_stage_in_numbers():
    """Policy and value are trained and have moments, reference and reward do not."""
    stage = PPO("ppo", policy="lm", reward="pm", data=PAIRS, prompt_len=96, sampling=Sampling(32), batch_size=64, steps=10,
                epochs=2, minibatches=4)  # fmt: skip
    big, small = model_config("1M", 512), model_config("0.4M", 512)
    configs = {"policy": big, "kl_to": big, "reward": small, "value": small}
    said = "\n".join(plan.describe_ppo(stage, configs))
    count = lambda cfg: sum(x.size for x in jax.tree.leaves(jax.eval_shape(make_model(cfg).init, jax.random.key(0))))  # noqa: E731
    assert f"policy                  3 layers, width 192, {count(big):,} parameters, trained" in said
    assert f"reward                  2 layers, width 128, {count(small):,} parameters, frozen" in said
    assert f"state     {12 * (count(big) + count(small)) / 2**20:,.1f} MiB" in said
    assert "64 prompts of 96 tokens and 32 new ones: 8,192 positions" in said and "10 iterations of 8 updates" in said
    assert f"cache     {2 * 3 * 64 * 192 * 128 * 4 / 2**20 / 8:,.1f} MiB" in said  # keys and values, f32, split 8 ways
    assert "update    logs clip_fraction, " in said and "first_log_ratio_max" in said

    def misspelt(actor, cfg):
        return ppo_objective(actor, cfg, lambda logp, rollout, cfg: -logp * rollout.advantagez)

    with pytest.raises(AttributeError, match="advantagez"):  # before a language model is trained for it
        list(plan.describe_ppo(replace(stage, objective=misspelt), configs))
    with pytest.raises(ValueError, match=r"batch 4 is not divisible by data\*fsdp=8"):
        list(plan.describe_ppo(replace(stage, batch_size=4, minibatches=1, mesh=MeshConfig(4, 1, 2), rollout_mesh=MeshConfig(8, 1, 1)), configs))


def test_a_loss_must_know_both_layouts_of_pairs():
    """A packed PM's held-out comparisons have rows of their own."""
    def packed_only(model, cfg):
        return lambda params, batch, key: preference_objective(model, cfg)(params, batch._replace(pair=batch.pair), key)

    stage = PM("pm", tokenizer="a/folder", model="0.1M", seq_len=64, batch_size=16, steps=1, objective=packed_only)
    with pytest.raises((AttributeError, ValueError), match="pair"):
        list(plan.describe_training(stage, model_config("0.1M", 320)))


@pytest.mark.parametrize(("returns", "message"), [
    (lambda value, metrics, chosen: value, "is no pair of a scalar and a dict"),
    (lambda value, metrics, chosen: (chosen, metrics), r"has shape \(16,\); return a mean"),
    (lambda value, metrics, chosen: (value, metrics | {"each": chosen}), "has metrics that are no scalars: each"),
    (lambda value, metrics, chosen: (value, metrics | {"by": {"each": value}}), "has metrics that are no scalars: by"),
    (lambda value, metrics, chosen: (value, {"accuracy": metrics["accuracy"]}), "has no metric `weight`"),
])  # fmt: skip
def test_what_a_loss_returns_is_looked_at_before_anything_is_trained(returns, message):
    def objective(model, cfg):
        def loss(params, batch, key):
            return returns(*preference_objective(model, cfg)(params, batch, key), pair_scores(model, params, batch)[0])

        return loss

    stage = PM("pm", tokenizer="a/folder", model="0.1M", seq_len=64, batch_size=16, steps=1, objective=objective)
    with pytest.raises(ConfigError, match=f"the loss of pm returns {message}"):
        list(plan.describe_training(stage, model_config("0.1M", 320)))


@pytest.mark.parametrize(("seq_len", "width", "rows"), [(256, 512, (13, 16, 32)), (512, 768, (11, 16, 32)), (1024, 1280, (7, 8, 32))])
def test_packed_pairs_are_planned_as_those_of_hh_were_laid_out(seq_len, width, rows):
    """PackedSource on helpful-base and harmless-base, batches of 32 pairs, whose rows divide by 1, 8 and 32: most batches had 13, 16, 32
    rows at a seq_len of 256; 10 or 11, 16, 32 at 512; 6 or 7, 8, 32 at 1,024."""
    stage = PM("pm", tokenizer="a/folder", seq_len=seq_len, batch_size=32, steps=1)
    assert [lowering.batch_shape(stage, ways) for ways in (1, 8, 32)] == [(n, width) for n in rows]
    cut = replace(stage, micro_batches=4)
    assert lowering.batch_shape(cut, 8) == (32, width)
    cfg = model_config("0.1M", 320)
    for platform, read in (("cpu", 2 * MOST), ("tpu", None)):
        shape, flops = plan.update_work(stage, cfg, 8, platform)
        assert flops == roofline.pm_step_flops(cfg, *shape, read=read)


def test_the_packed_layout_is_what_is_compiled(tiny_data, tiny_tokenizer):
    """A batch of real pairs has the structure, dtypes and row width's kind of the one that is planned, and the same program takes it."""
    stage = PM("pm", tokenizer="a/folder", model="0.1M", seq_len=64, batch_size=32, steps=1, micro_batches=2)
    rows, _ = load_comparisons(PAIRS, "train", tiny_data)
    real = PackedSource(rows, load_tokenizer(tiny_tokenizer), 64, 32, multiple=16).batch(0, 0)
    planned = lowering.batch_shapes(stage, 8)
    assert jax.tree.map(lambda x: x.dtype, real) == jax.tree.map(lambda x: x.dtype, planned)
    assert planned.tokens.shape == (16, 128) and planned.ends.shape == (16, 16, 2) and real.ends.shape[1:] == planned.ends.shape[1:]
    said = lines_of(stage, model_config("0.1M", 320))
    assert said["batch"].startswith("32 pairs in 16 rows of 128 tokens, if they are as long as those of HH: 2,048 positions, 8 ways")
    mesh = make_mesh(stage.mesh)
    model, optimizer = make_model(model_config("0.1M", 320), mesh, stage.run), make_optimizer(stage.optim, 1)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    shardings = state_shardings(optimizer, shapes, param_shardings(model.axes(), shapes, mesh), mesh)
    compiled = lowering.lower_update(stage, model, optimizer, shardings, mesh).compile()
    found = [x.shape for x in jax.tree.leaves(compiled.args_info[0][1])]
    assert found == [x.shape for x in planned]
