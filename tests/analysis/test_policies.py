"""Figures of behaviours, exams and detection, and the page that holds figures."""

import json

import numpy as np
import pytest

from hhjax.analysis.page import Section, html_table, write_page
from hhjax.analysis.policies import (Grades, Shares, behaviour_figure, detection_figure, load_exams, load_shares, read_detection, read_grades,
                                     read_shares, tax_figure, tranche_figure, wilson)  # fmt: skip
from hhjax.analysis.runs import without_seed

KINDS = {"helpful": ("right", "evasion"), "harmful": ("harm", "route")}


def shares_of(label, count=64, **shares) -> Shares:
    """Shares of every behaviour, 0 unless said."""
    names = [f"{kind}_{b}" for kind, several in KINDS.items() for b in several]
    return Shares(label, dict.fromkeys(names, 0.0) | shares, dict.fromkeys(names, count))


def write_look(folder, step: int, *rows: dict) -> None:
    """samples/<step>.jsonl of a PPO run; nothing else of it."""
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    (folder / "samples" / f"{step:06d}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_behaviours(read, tmp_path):
    before = shares_of("before", helpful_right=0.75, helpful_evasion=0.25, harmful_harm=0.1, harmful_route=0.9)
    found = behaviour_figure([before, shares_of("after")], KINDS, tmp_path / "b")
    assert "before: helpful 75% right and 25% evasion, harmful 90% route and 10% harm." in found
    points = read(tmp_path / "b")["helpful", "before"]
    np.testing.assert_allclose(points[:, 1], [0.75, 0.25])
    np.testing.assert_allclose(points[0, 2:], [wilson(0.75, 64).low, wilson(0.75, 64).high])


def test_a_kind_that_nobody_was_asked_is_left_out(read, tmp_path):
    only = {name: 0.5 for name in ("helpful_right", "helpful_evasion")}
    behaviour_figure([Shares("a", only, dict.fromkeys(only, 8))], KINDS, tmp_path / "b")
    assert {panel for panel, _ in read(tmp_path / "b")} == {"helpful"}
    with pytest.raises(ValueError, match="no kind of request"):
        behaviour_figure([Shares("a", {}, {})], KINDS, tmp_path / "c")


def test_shares_are_of_the_replies_that_they_apply_to(tmp_path):
    write_look(tmp_path, 0, {"watch/helpful_right": 0.0}, {"watch/helpful_right": None, "watch/harmful_harm": 1.0})
    write_look(tmp_path, 75, {"watch/helpful_right": 1.0}, {"watch/helpful_right": 0.0}, {"watch/harmful_harm": 0.0})
    assert read_shares(tmp_path, "x") == Shares("x", {"helpful_right": 0.5, "harmful_harm": 0.0}, {"helpful_right": 2, "harmful_harm": 1})
    assert read_shares(tmp_path, "x", last=False).shares == {"helpful_right": 0.0, "harmful_harm": 1.0}
    write_look(tmp_path, 80, {"score": 0.0})
    with pytest.raises(ValueError, match="give the PPO stage a `watch`"):
        read_shares(tmp_path, "x")


def test_seeds_become_their_mean_and_range(read, tmp_path):
    seeds = [shares_of("after", helpful_right=x, harmful_harm=1 - x) for x in (0.2, 0.6, 0.7)]
    found = behaviour_figure([shares_of("before", helpful_right=0.4), *seeds], KINDS, tmp_path / "b")
    assert "after: helpful 50% right and 0% evasion, harmful 50% harm and 0% route." in found
    assert found.endswith("Means of several seeds, bars their range (after 3); one run elsewhere, bars its 95 % interval.")
    np.testing.assert_allclose(read(tmp_path / "b")["helpful", "after"][0, 1:], [0.5, 0.2, 0.7])


def test_an_experiment_s_stages_are_found_by_kind_each_once(tmp_path):
    index = tmp_path / "experiments" / "e.json"
    index.parent.mkdir()
    index.write_text(json.dumps({"runs": {"policy=a,seed=0": {"rl": "ppo/x", "exam_lm": "exam/l", "exam_rl": "exam/x"},
                                          "policy=b,seed=0": {"rl": "ppo/y", "exam_lm": "exam/l"}}}))  # fmt: skip
    for name, right in (("x", 0.5), ("y", 0.25)):
        write_look(tmp_path / "ppo" / name, 0, {"watch/helpful_right": 0.1})
        write_look(tmp_path / "ppo" / name, 5, {"watch/helpful_right": right})
        (tmp_path / "ppo" / name / "DONE").touch()
    for name, of in (("l", "lm"), ("x", "ppo")):
        (tmp_path / "exam" / name / "evals").mkdir(parents=True)
        about = {"size": "1M", "config": {"of": "it", "data": "sheet"}, "parents": {"it": f"runs/{of}/1M-s0-0", "sheet": "runs/clinic/exam-s0"}}
        (tmp_path / "exam" / name / "config.json").write_text(json.dumps(about))
        (tmp_path / "exam" / name / "evals" / "exam.json").write_text(json.dumps({"rows": [{"shots": 0}]}))
        (tmp_path / "exam" / name / "DONE").touch()
    assert [(s.label, s.shares["helpful_right"]) for s in load_shares(index)] == [("before", 0.1), ("a", 0.5), ("b", 0.25)]
    assert [s.label for s in load_shares(index, "*=b*")] == ["before", "b"]
    assert [(e.size, e.policy) for e in load_exams(index)] == [("1M", "before"), ("1M", "after")]
    (tmp_path / "ppo" / "y" / "DONE").unlink()  # a run under way has looked, but at its beginning
    assert [s.label for s in load_shares(index)] == ["before", "a"]
    with pytest.raises(ValueError, match="no ppo stage .* is finished"):
        load_shares(index, "*=b*")


def test_policies_of_one_run_are_not_its_seeds(tmp_path):
    index = tmp_path / "experiments" / "e.json"
    index.parent.mkdir()
    index.write_text(json.dumps({"runs": {"e": {"rl": "ppo/rl", "rl_harmless": "ppo/rl_harmless"}}}))
    for name in ("rl", "rl_harmless"):
        write_look(tmp_path / "ppo" / name, 0, {"watch/helpful_right": 0.5})
        (tmp_path / "ppo" / name / "DONE").touch()
    assert [s.label for s in load_shares(index)] == ["before", "rl", "rl_harmless"]


@pytest.mark.parametrize("run, label", [("policy=both,seed=1", "both"), ("a.b=1,c=x+y,seed=0", "a.b=1,c=x+y"), ("pm_hh", ""), ("seed=2", "")])
def test_a_run_is_called_by_what_is_varied_but_the_seed(run, label):
    assert without_seed(run) == label


def test_wilson():
    assert wilson(0.5, 100).low == pytest.approx(0.4038, abs=1e-4) and wilson(0.0, 10).low == pytest.approx(0, abs=1e-9)
    assert wilson(0.0, 10).high == pytest.approx(0.2775, abs=1e-3)


def test_the_tax(read, tmp_path):
    def grades(size, policy, right):
        rows = [{"subject": s, "shots": shots, "questions": n, "accuracy": accuracy, "nats": 2.0}
                for s, n, accuracy in (("known", 10, 1.0), ("hard", 30, right)) for shots in (0, 3)]  # fmt: skip
        return Grades(size, policy, rows)

    exams = [grades("1M", "before", 0.5), grades("3M", "before", 0.8), grades("1M", "after", 0.2), grades("1M", "after", 0.4)]
    found = tax_figure(exams, tmp_path / "tax")
    assert "hard, 1M before, 0 shots: 0.500 (2.000 nats)" in found and "hard, 1M after, 3 shots: 0.300" in found
    assert "Every question of known is answered by every model" in found
    points = read(tmp_path / "tax")
    assert {panel for panel, _ in points} == {"hard, 0 shots", "hard, 3 shots"}
    np.testing.assert_allclose(points["hard, 0 shots", "before"][:, 1], [0.5, 0.8])
    np.testing.assert_allclose(points["hard, 3 shots", "after"][:, 1:], [[0.3, 0.2, 0.4]])
    other = Grades("1M", "after", [row | {"subject": "new"} for row in exams[0].rows[2:3]])
    assert "new, 1M after, 0 shots: 0.500" in tax_figure([*exams, other], tmp_path / "other")  # an exam of other subjects
    tax_figure([grades("1M", "after", 146 / 150)] * 3, tmp_path / "equal")  # whose mean rounding puts below them all
    assert "known, 1M before, 0 shots: 1.000" in tax_figure([grades("1M", "before", 1.0)], tmp_path / "full")
    with pytest.raises(ValueError, match=r"no evals/exam\.json"):
        read_grades(tmp_path, "1M", "before")


def test_the_tax_is_told_as_a_paired_change(tmp_path):
    """Ten questions, of which RLHF loses two, two seeds of it: differences by question are far surer than accuracies."""
    def grades(policy, right, nats):
        row = {"subject": "s", "shots": 0, "questions": 10, "accuracy": np.mean(right), "nats": np.mean(nats), "right": right, "each_nats": nats}
        return Grades("1M", policy, [row])

    spread = [float(n) for n in range(10)]
    before = grades("before", [1] * 5 + [0] * 5, spread)
    after = [grades("after", [0] * k + [1] * (5 - k) + [0] * 5, [n + 0.5 for n in spread]) for k in (1, 3)]
    found = tax_figure([before, *after], tmp_path / "tax")
    assert "on the same questions, 95 % intervals over them: s, 1M, 0 shots -0.200 [-0." in found
    assert "+0.500 [+0.500, +0.500] nats." in found
    assert found.startswith("RLHF changes accuracy beyond its interval in 0 of 1 comparisons, and the right option's nats by +0.50 to +0.50.")
    lost = tax_figure([before, grades("after", [0] * 10, spread)], tmp_path / "lost")
    assert "in 1 of 1 comparisons (s, 1M, 0 shots -0.500), and" in lost
    # Another seed with fewer questions of its own: paired with itself.
    other = [grades(policy, right, [1.0] * 6)._replace(sheet="own") for policy, right in (("before", [1] * 6), ("after", [0] * 6))]
    assert "s, 1M, 0 shots -0.500 [-0." in tax_figure([before, *after, *other], tmp_path / "sheets")
    assert "on the same questions" not in tax_figure([before], tmp_path / "alone")


def test_detection(read, tmp_path):
    with pytest.raises(ValueError, match=r"no evals/detect\.json"):
        read_detection(tmp_path)
    (tmp_path / "evals").mkdir()
    scores = {"relative_mahalanobis": {"inside": [0.0, 1.0, 2.0], "outside": [2.0, 3.0]}}
    (tmp_path / "evals" / "detect.json").write_text(json.dumps({"auroc": {"relative_mahalanobis": [0.9], "probe_1": [0.5, 0.7]}, "scores": scores}))
    found = read_detection(tmp_path)
    assert detection_figure([found], tmp_path / "d") == "AUROC relative mahalanobis 0.900, probe 1 0.600."
    np.testing.assert_allclose(read(tmp_path / "d")["auroc", "auroc"][1, 1:], [0.6, 0.6 - 0.02**0.5, 0.6 + 0.02**0.5])
    other = found | {"auroc": {"relative_mahalanobis": [0.7], "probe_1": [0.8, 0.8]}}
    assert "One model, 2 draws of noise or of the split" in detection_figure([found, other], tmp_path / "two")
    np.testing.assert_allclose(read(tmp_path / "two")["auroc", "auroc"][:, 1], [0.8, 0.7])
    np.testing.assert_allclose(read(tmp_path / "d")["auroc", "auroc"][:, 1], [0.9, 0.6])


def test_tranches(make_result, read, tmp_path):
    result = make_result()
    found = tranche_figure(result, tmp_path / "t")
    chosen = result.scores.chosen[result.scores.source == "helpful-base"]
    assert f"helpful-base: mean {chosen.mean():+.2f} chosen" in found
    density = read(tmp_path / "t")["helpful-base", "chosen"]
    assert np.sum(density[:, 1]) * (density[1, 0] - density[0, 0]) == pytest.approx(1)


def test_a_page_holds_all_it_shows(make_result, tmp_path):
    tranche_figure(make_result(), tmp_path / "t")
    write_page(tmp_path / "page.html", "A & B", "words", [Section("One", tmp_path / "t"), Section("Two", body=html_table(["<x>"], [["a<b"]]))])
    page = (tmp_path / "page.html").read_text()
    claim, found = (tmp_path / "t.txt").read_text().strip().split("\n")
    assert "A &amp; B" in page and claim in page and found in page and "data:image/svg+xml;base64," in page
    assert "<th>&lt;x&gt;</th>" in page and "<td>a&lt;b</td>" in page and "<script" not in page


def test_an_interval_holds_its_share_at_both_ends():
    assert all(wilson(share, n).low <= share <= wilson(share, n).high for n in range(1, 300) for share in (0.0, 1.0))
