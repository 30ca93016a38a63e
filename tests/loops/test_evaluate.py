"""The loops of Evaluate and Report: from a trained preference model to scores, tables and figures."""

import json
import sys

import numpy as np
import pytest

from hhjax import launch
from hhjax.analysis.scores import read_scores
from hhjax.data.comparisons import Comparison, ComparisonData, load_comparisons, opening_hash
from hhjax.data.records import DataError
from hhjax.fields import ConfigError
from hhjax.io.metrics import read_rows
from hhjax.loops.evaluate import training_data, unseen
from hhjax.model.sizes import matmul_params, model_config

EXPERIMENT = """
from hhjax.data.comparisons import ComparisonData
from hhjax.experiment import Experiment
from hhjax.stages import PM, Evaluate, Report

DATA = ComparisonData(("pairs.jsonl",), limit=120)
RUNS = Experiment("judged", (
    PM("pm", tokenizer={tokenizer!r}, model="0.1M", data=DATA, seq_len=96, batch_size=8, steps=12),
    Evaluate("eval", of="pm", data=DATA, batch_size=12),
    Report("report", of=("eval",)),
))
"""

RENAMED = """
from hhjax.data.comparisons import ComparisonData
from hhjax.experiment import Experiment, Run
from hhjax.stages import PM, Clinic, Evaluate

def made(name):
    pm = PM("pm", tokenizer={tokenizer!r}, model="0.1M", data=ComparisonData((name,)), seq_len=96, batch_size=8, steps=1)
    return Clinic(name, part="helpful", size=40), pm

RUNS = [Run(Experiment("renamed", made("rated")), (("raters", "rated"),)),
        Run(Experiment("renamed", (*made("helpful"), Evaluate("eval", of="pm", data=ComparisonData(("helpful",)), baselines=False))),
            (("raters", "none"),))]
"""


@pytest.fixture(scope="module")
def judged(tiny_data, tiny_tokenizer, tmp_path_factory):
    """(folder, call): the folder where EXPERIMENT has run, and call(*flags) to run it again."""
    folder = tmp_path_factory.mktemp("judged")
    (folder / "judged.py").write_text(EXPERIMENT.format(tokenizer=str(tiny_tokenizer)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HHJAX_DATA", str(tiny_data))
        patch.setattr(launch, "join_cluster", lambda seconds: lambda: False)
        patch.setattr(sys, "path", list(sys.path))
        call = lambda *flags: launch.run(["judged.py", *flags])  # noqa: E731
        assert call() == 0
        yield folder, call


def only_folder(folder):
    (found,) = folder.iterdir()
    return found


def test_an_evaluation_scores_every_test_pair_and_says_of_what(judged, tiny_data):
    folder = only_folder(judged[0] / "runs" / "evaluate")
    scores = read_scores(folder / "evals" / "scores.csv")
    test, _ = load_comparisons(ComparisonData(("pairs.jsonl",)), "test", tiny_data)
    assert scores.opening.tolist() == [opening_hash(row.prompt) for row in test] and set(scores.turns) == {1}
    assert np.mean(scores.margin > 0) > 0.95  # "good" against "bad" is learnt in twelve steps
    assert list(scores.baselines) == ["longer", "shorter", "words"]
    summary = json.loads((folder / "evals" / "summary.json").read_text())
    pm = only_folder(judged[0] / "runs" / "pm")
    assert summary["about"] == {
        "pm": str(pm.relative_to(judged[0])), "size": "0.1M", "seed": 0, "comparisons": 120, "shares": {"pairs.jsonl": 1.0},
        "parameters": matmul_params(model_config("0.1M", 320)), "left_out": 0,
    }  # fmt: skip
    # The periodic evaluation of training, on the same pairs, counts the same.
    held_out = [row["eval/accuracy"] for row in read_rows(pm / "metrics.jsonl") if "eval/accuracy" in row][-1]
    assert summary["accuracy"][0]["accuracy"]["value"] == pytest.approx(held_out)


def test_a_source_has_the_name_that_this_experiment_gives_it(judged, tiny_tokenizer):
    """The model is made by a run that calls its comparisons otherwise, and shared by the one that evaluates it."""
    folder, _ = judged
    (folder / "renamed.py").write_text(RENAMED.format(tokenizer=str(tiny_tokenizer)))
    assert launch.run(["renamed.py", "--out", "renamed"]) == 0
    made = json.loads((only_folder(folder / "renamed" / "pm") / "config.json").read_text())
    about = json.loads((only_folder(folder / "renamed" / "evaluate") / "evals" / "summary.json").read_text())["about"]
    assert made["config"]["data"]["sources"] == ["rated"] and about["shares"] == {"helpful": 1.0}


def test_a_report_has_the_table_and_the_figures(judged):
    folder = only_folder(judged[0] / "runs" / "report")
    table = (only_folder(judged[0] / "runs" / "evaluate") / "evals" / "table.txt").read_text()
    report = (folder / "report.txt").read_text()
    assert table in report and "later turns no pairs" in report
    names = {f"{figure}_eval.{kind}" for figure in ("calibration", "turns") for kind in ("png", "svg", "csv", "txt")}
    assert {p.name for p in (folder / "figures").iterdir()} == names


def test_another_fold_than_the_model_s_is_refused(judged):
    with pytest.raises(DataError, match=r"trained on the opening prompts of \d+ of \d+ test pairs: give this stage the data"):
        judged[1]("--eval.data.fold", "1")


def test_what_is_no_preference_model_is_refused(judged, hugging_face_folder):
    with pytest.raises(ConfigError, match="is no preference model; name a PM stage, or its folder"):
        judged[1]("--eval.of", str(hugging_face_folder))


def test_one_shared_opening_is_enough():
    row = lambda text: Comparison(f"\n\nHuman: {text}\n\nAssistant:", "a", "b")  # noqa: E731
    train = [row("one"), row("two")]
    assert unseen(train, [row("three")], "error") == [row("three")]
    with pytest.raises(DataError, match="of 1 of 2 test pairs"):
        unseen(train, [row("three"), row("two")], "error")
    assert unseen(train, [row("three"), row("two")], "drop") == [row("three")]
    with pytest.raises(DataError, match="of 1 of 1 test pairs"):  # nothing would be left
        unseen(train, [row("two")], "drop")


def test_the_training_data_of_a_model_is_read_from_its_config(judged):
    pm = json.loads((only_folder(judged[0] / "runs" / "pm") / "config.json").read_text())
    assert training_data(pm) == ComparisonData(("pairs.jsonl",), limit=120)
