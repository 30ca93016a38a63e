"""Scores on disk, and the table they make."""

import json

import numpy as np
import pytest

from hhjax.analysis.runs import load_result, load_results
from hhjax.analysis.scores import Scores, accuracy_rows, accuracy_table, pooled, read_scores, write_scores, write_summary

# Five pairs of two kinds. The model is right on a, half right (a tie) on b, wrong on c; right on d and e.
HAND = Scores(
    source=np.array(["x", "x", "x", "y", "y"]),
    opening=np.array([1, 2, 3, 4, 5]),
    turns=np.array([1, 1, 2, 1, 3]),
    chosen=np.array([2.0, 1.0, 0.0, 5.0, 0.5]),
    rejected=np.array([1.0, 1.0, 0.5, 4.0, -0.5]),
    baselines={"longer": np.array([1.0, -1.0, -1.0, 0.0, -3.0])},
)


def test_accuracies_and_leads_by_hand():
    rows = {(r.scorer, r.source): r for r in accuracy_rows(HAND)}
    found = {where: (row.accuracy.value, row.accuracy.n) for where, row in rows.items()}
    assert found == {
        ("pm", "x"): (0.5, 3), ("longer", "x"): (pytest.approx(1 / 3), 3),
        ("pm", "y"): (1.0, 2), ("longer", "y"): (0.25, 2),
        ("pm", "all"): (0.7, 5), ("longer", "all"): (0.3, 5),
    }  # fmt: skip
    assert rows["longer", "all"].lead.value == pytest.approx(0.4) and rows["pm", "all"].lead is None
    assert rows["longer", "y"].p == 1 / 2001  # it leads in every resample
    assert [r.source for r in accuracy_rows(HAND.only(HAND.source == "y"))] == ["y", "y"]  # no "all" of one kind


def test_a_model_does_not_lead_itself(make_result):
    scores = make_result().scores
    (row,) = (r for r in accuracy_rows(scores._replace(baselines={"itself": scores.margin})) if r.lead and r.source == "all")
    assert (row.lead.value, row.lead.low, row.lead.high, row.p) == (0, 0, 0, 1)


def test_the_csv_gives_back_every_bit(tmp_path, make_result):
    scores = make_result(3).scores
    write_scores(tmp_path / "scores.csv", scores)
    again = read_scores(tmp_path / "scores.csv")
    for name in Scores._fields[:-1]:
        np.testing.assert_array_equal(getattr(again, name), getattr(scores, name), err_msg=name)
    assert list(again.baselines) == ["longer", "words"]
    np.testing.assert_array_equal(again.baselines["words"], scores.baselines["words"])
    write_scores(tmp_path / "empty.csv", scores.only(np.zeros(len(scores.source), bool)))
    with pytest.raises(ValueError, match="empty.csv has no scored comparisons"):
        read_scores(tmp_path / "empty.csv")


def test_pooled_seeds_are_no_independent_evidence(make_result):
    one = make_result(0).scores
    two = pooled([one, one])
    (before,), (after,) = ([r.accuracy for r in accuracy_rows(s) if r.scorer == "pm" and r.source == "all"] for s in (one, two))
    assert after.n == 2 * before.n and after.groups == before.groups
    assert (after.value, after.low, after.high) == pytest.approx((before.value, before.low, before.high))
    assert list(pooled([one, one._replace(baselines={"words": one.margin})]).baselines) == ["words"]  # those of all


def test_the_summary_says_what_the_rows_say(tmp_path):
    table = write_summary(tmp_path / "evals", HAND, {"size": "1M"})
    saved = json.loads((tmp_path / "evals" / "summary.json").read_text())
    assert saved["about"] == {"size": "1M"} and set(saved["calibration_error"]) == {"x", "y"}
    assert [r["accuracy"]["value"] for r in saved["accuracy"]] == [r.accuracy.value for r in accuracy_rows(HAND)]
    assert table + "\n" == (tmp_path / "evals" / "table.txt").read_text()
    header, first, *_ = table.splitlines()
    assert header.split()[:2] == ["test", "scorer"] and first.split()[:3] == ["x", "pm", "0.500"]
    assert table == accuracy_table(accuracy_rows(HAND))


def test_results_are_found_through_the_index(tmp_path):
    for name in ("a", "b"):
        write_summary(tmp_path / "evaluate" / name / "evals", HAND, {"size": name})
    runs = {f"seed={n}": {"pm": "pm/p", "eval": f"evaluate/{n}"} for n in ("a", "b", "unfinished")}
    index = tmp_path / "experiments" / "e.json"
    index.parent.mkdir()
    index.write_text(json.dumps({"runs": runs}))
    assert [(r.run, r.about["size"]) for r in load_results(index)] == [("seed=a", "a"), ("seed=b", "b")]
    assert [r.run for r in load_results(index, "*b")] == ["seed=b"]
    with pytest.raises(ValueError, match="nothing of .* that matches 'seed=unfinished', '[*]' is evaluated yet.* kind: "):
        load_results(index, "seed=unfinished")
    with pytest.raises(ValueError, match="none.json is no experiment's index"):
        load_results(tmp_path / "none.json")
    with pytest.raises(ValueError, match="has no evals/summary.json; finish that stage"):
        load_result(tmp_path / "evaluate" / "unfinished")
