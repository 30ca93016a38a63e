"""Figures: the numbers in their CSV are those of the scores, and the sentence says the same."""

import sys

import numpy as np
import pytest

from hhjax.analysis.figures import accuracy_figure, calibration_figure, mean_over_kinds, mixture_figure, turn_figure
from hhjax.analysis.plotting import plot
from hhjax.analysis.runs import alike
from hhjax.analysis.scores import write_summary


def accuracy(scores) -> float:
    return float(np.mean(scores.chosen > scores.rejected))


def test_accuracy_by_data_and_by_size(make_result, read, tmp_path):
    sizes = {"0.1M": 98_304, "1M": 1_000_000}
    grid = [(s, n) for s in sizes for n in (100, 200, 400)]
    results = [make_result(i, size=s, parameters=sizes[s], comparisons=n) for i, (s, n) in enumerate(grid)]
    found = accuracy_figure(results, tmp_path / "accuracy")
    points, y = read(tmp_path / "accuracy"), [accuracy(r.scores) for r in results]
    np.testing.assert_allclose(points["comparisons", "0.1M"][:, :2], [[100, y[0]], [200, y[1]], [400, y[2]]])
    np.testing.assert_allclose(points["parameters", "400 pairs"][:, :2], [[98_304, y[2]], [1_000_000, y[5]]])
    assert len(points) == 5
    slope = np.polyfit(np.log10([100, 200, 400]), y[3:], 1)[0]
    assert f"the 1M model: {y[3]:.3f} at 100 comparisons, {y[5]:.3f} at 400 ({slope:+.3f} a factor of ten, R²" in found
    assert f"400 pairs: {y[2]:.3f} at 98,304 parameters, {y[5]:.3f} at 1,000,000 (" in found


def test_seeds_of_a_point_are_pooled(make_result, read, tmp_path):
    results = [make_result(i) for i in range(3)]
    found = accuracy_figure(results, tmp_path / "one")
    mean = np.mean([accuracy(r.scores) for r in results])
    assert read(tmp_path / "one")["comparisons", "1M"][:, 1] == pytest.approx([mean]) and f"{mean:.3f} [" in found


def test_mixture(make_result, read, tmp_path):
    shares = (0.0, 0.5, 1.0)
    results = [make_result(i, shares={"harmless-base": s}) for i, s in enumerate(shares)]
    found = mixture_figure(results, tmp_path / "mixture")
    points = read(tmp_path / "mixture")
    for kind in ("helpful-base", "harmless-base"):
        expected = [accuracy(r.scores.only(r.scores.source == kind)) for r in results]
        np.testing.assert_allclose(points["kind", f"1M on {kind.removesuffix('-base')}"][:, :2], np.transpose([[0, 50, 100], expected]))
    means = [accuracy(r.scores) for r in results]  # of two kinds equally often
    np.testing.assert_allclose(points["mean", "1M, both tests"][:, 1], means)
    helpful, harmless = (points["kind", f"1M on {kind}"][0, 1] for kind in ("helpful", "harmless"))
    assert f"helpfulness alone {helpful:.3f} on helpful and {harmless:.3f} on harmless" in found
    assert f"best mean {max(means):.3f} at {100 * shares[int(np.argmax(means))]:.0f} % harmless" in found


def test_a_mixture_says_alone_only_of_what_was_alone(make_result, tmp_path):
    mixed = lambda i, share, **about: make_result(i, shares={"harmless-base": share, "helpful-base": 1 - share}, **about)  # noqa: E731
    found = mixture_figure([mixed(0, 0.5, size="0.1M", parameters=98_304), mixed(1, 0.25), mixed(2, 0.5)], tmp_path / "mixed")
    assert "alone" not in found and found.count("best mean") == 2 and found.startswith("0.1M: best mean")
    with pytest.raises(ValueError, match="differ in more than their mixture: 1M on 50 % harmless-base, 50 % helpful-base, about 100 pairs"):
        mixture_figure([mixed(0, 0.5, comparisons=100), mixed(1, 0.5, comparisons=6000)], tmp_path / "unlike")


def test_folds_are_alike_and_other_sizes_mixtures_and_numbers_are_not(make_result):
    folds = [make_result(i, comparisons=n) for i, n in enumerate((1831, 1890, 1860))]
    others = [make_result(3, comparisons=250), make_result(4, size="3M"), make_result(5, shares={"a": 0.25, "b": 0.75})]
    groups = alike([*folds, *others])
    assert sorted(map(len, groups.values())) == [1, 1, 1, 3]
    assert any("25 % a, 75 % b" in kind for kind in groups) and any("about 250 pairs" in kind for kind in groups)


def test_names_with_dots_are_names(make_result, tmp_path):
    for name in ("0.4M-s0-aaaa", "0.4M-s0-bbbb"):
        calibration_figure([make_result()], tmp_path / f"calibration_{name}")
    assert len(list(tmp_path.glob("*.png"))) == len(list(tmp_path.glob("*.csv"))) == 2


def test_the_mean_over_kinds_is_the_mean_of_their_accuracies(make_result):
    scores = make_result(kinds=("helpful-base", "helpful-base", "harmless-base")).scores
    kinds = [accuracy(scores.only(scores.source == k)) for k in ("helpful-base", "harmless-base")]
    found = mean_over_kinds(scores)
    assert found.value == pytest.approx(np.mean(kinds)) != pytest.approx(accuracy(scores))
    assert found.low < found.value < found.high


def test_models_of_different_training_are_not_pooled(make_result, tmp_path):
    results = [make_result(0), make_result(1, shares={"harmless-base": 1.0})]
    for figure in (calibration_figure, turn_figure, accuracy_figure):
        with pytest.raises(ValueError, match="helpful-base / harmless-base; choose one kind with --only, or with --stage"):
            figure(results, tmp_path / "mixed")


def test_seeds_do_not_narrow_the_intervals_of_calibration(make_result, read, tmp_path):
    widths = []
    for count in (1, 4):
        calibration_figure([make_result(0)] * count, tmp_path / f"c{count}", bins=2)
        points = read(tmp_path / f"c{count}")["difference", "helpful-base"]
        widths.append(np.mean(points[:, 3] - points[:, 2]))
    assert widths[1] > 0.9 * widths[0]


def test_calibration(make_result, read, tmp_path):
    result = make_result(0, rows=400, kinds=("helpful-base",))
    found = calibration_figure([result], tmp_path / "calibration", bins=4)
    size = np.abs(result.scores.margin)
    bins = np.argsort(size).reshape(4, 100)
    right = result.scores.margin > 0
    expected = np.transpose([size[bins].mean(1), right[bins].mean(1)])
    np.testing.assert_allclose(read(tmp_path / "calibration")["difference", "helpful-base"][:, :2], expected)
    sigmoid = 1 / (1 + np.exp(-size))
    error, gap = np.abs(right[bins].mean(1) - sigmoid[bins].mean(1)).mean(), right.mean() - sigmoid.mean()
    word = "under" if gap > 0 else "over"
    assert found == f"helpful-base: calibration error {error:.3f}, {word}-confident by {abs(gap):.3f} on average."


def test_turns(make_result, read, tmp_path):
    result = make_result(0, rows=600)
    found = turn_figure([result], tmp_path / "turns", most_turns=3)
    turn = np.minimum(result.scores.turns, 3)
    expected = [accuracy(result.scores.only(turn == t)) for t in (1, 2, 3)]
    np.testing.assert_allclose(read(tmp_path / "turns")["turn", "all"][:, :2], np.transpose([[1, 2, 3], expected]))
    assert f"First turn {expected[0]:.3f} [" in found
    assert f"later turns {accuracy(result.scores.only(turn > 1)):.3f} [" in found


def test_turns_of_dialogues_that_have_but_one(make_result, tmp_path):
    assert turn_figure([make_result(turns=1)], tmp_path / "turns").endswith("later turns no pairs.")
    assert turn_figure([make_result(rows=10, turns=1)], tmp_path / "few").endswith("later turns no pairs.")  # too few to draw


def test_a_script_draws_beside_the_index_and_says_what_is_missing(make_result, tmp_path, monkeypatch, capsys):
    write_summary(tmp_path / "evaluate" / "a" / "evals", make_result().scores, make_result().about)
    index = tmp_path / "experiments" / "e.json"
    index.parent.mkdir()
    index.write_text('{"runs": {"e": {"eval": "evaluate/a"}}}')
    monkeypatch.setattr(sys, "argv", ["plot_turns.py", str(index)])
    plot(turn_figure, "turns", "what it draws")
    assert (tmp_path / "figures" / "e" / "turns.png").is_file() and "from 1 results" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["plot_turns.py", str(index), "--only", "z"])
    with pytest.raises(SystemExit, match="error: nothing of .* matches 'z'"):
        plot(turn_figure, "turns", "what it draws")
