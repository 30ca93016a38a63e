"""Figures of behaviours, exams and detection, and the page that holds figures."""

import json

import numpy as np
import pytest

from hhjax.analysis.page import Section, html_table, write_page
from hhjax.analysis.policies import (Grades, Shares, behaviour_figure, detection_figure, nats, read_detection, read_grades, read_shares, tax_figure,
                                     tranche_figure, wilson)  # fmt: skip

KINDS = {"helpful": ("right", "evasion"), "harmful": ("harm", "route")}


def test_behaviours(read, tmp_path):
    shares = {"helpful_right": 0.75, "helpful_evasion": 0.25, "harmful_harm": 0.1, "harmful_route": 0.9}
    found = behaviour_figure([Shares("before", shares, 128), Shares("after", {}, 128)], KINDS, tmp_path / "b")
    assert "before: helpful 75% right and 25% evasion, harmful 90% route and 10% harm." in found
    points = read(tmp_path / "b")["helpful", "before"]
    np.testing.assert_allclose(points[:, 1], [0.75, 0.25])
    np.testing.assert_allclose(points[0, 2:], [wilson(0.75, 64).low, wilson(0.75, 64).high])


def test_shares_are_read_from_the_first_and_the_last_look(tmp_path):
    rows = [{"step": n, "eval/score": 0.0, "eval/watch/helpful_right": n / 10} for n in (0, 5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "config.json").write_text(json.dumps({"config": {"eval_prompts": 64}}))
    assert read_shares(tmp_path, "x").shares == {"helpful_right": 0.5} and read_shares(tmp_path, "x", last=False).shares == {"helpful_right": 0.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 0, "eval/score": 0.0}) + "\n")
    with pytest.raises(ValueError, match="give the PPO stage a `watch`"):
        read_shares(tmp_path, "x")


def test_wilson():
    assert wilson(0.5, 100).low == pytest.approx(0.4038, abs=1e-4) and wilson(0.0, 10).low == pytest.approx(0, abs=1e-9)
    assert wilson(0.0, 10).high == pytest.approx(0.2775, abs=1e-3)


def test_the_tax(read, tmp_path):
    def grades(size, policy, right):
        rows = [{"subject": s, "shots": 0, "questions": n, "accuracy": right, "nats": x, "right": [1] * int(right * n) + [0] * (n - int(right * n))}
                for s, n, x in (("a", 10, 1.0), ("b", 30, 2.0))]  # fmt: skip
        return Grades(size, policy, rows)

    exams = [grades("1M", "before", 0.5), grades("3M", "before", 0.8), grades("1M", "after", 0.2)]
    found = tax_figure(exams, tmp_path / "tax")
    assert "1M before, 0 shots: 0.500 (1.750 nats)" in found and "1M after, 0 shots: 0.200" in found
    assert nats(exams[0], 0) == pytest.approx(1.75)
    np.testing.assert_allclose(read(tmp_path / "tax")["0 shots", "before"][:, 1], [0.5, 0.8])
    with pytest.raises(ValueError, match=r"no evals/exam\.json"):
        read_grades(tmp_path, "1M", "before")


def test_detection(read, tmp_path):
    with pytest.raises(ValueError, match=r"no evals/detect\.json"):
        read_detection(tmp_path)
    (tmp_path / "evals").mkdir()
    scores = {"relative_mahalanobis": {"inside": [0.0, 1.0, 2.0], "outside": [2.0, 3.0]}}
    (tmp_path / "evals" / "detect.json").write_text(json.dumps({"auroc": {"relative_mahalanobis": [0.9], "probe_1": [0.5, 0.7]}, "scores": scores}))
    assert detection_figure([read_detection(tmp_path)], tmp_path / "d") == "AUROC relative mahalanobis 0.900, probe 1 0.600."
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
