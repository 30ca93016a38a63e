"""Reward curves from run directories: fits of known lines, where two curves part, and what the figure says."""

import json

import numpy as np
import pytest

from hhjax.analysis.rlhf import find_peak, gao_fit, linear_fit, load_curves, parting, partings_in_words, pm_names, reward_figure, smoothed


def test_a_line_is_found():
    x = np.linspace(0, 4, 50)
    fit = linear_fit(x, 0.3 + 1.7 * x)
    assert (fit.slope, fit.intercept, fit.r2, fit.most) == pytest.approx((1.7, 0.3, 1.0, 4.0))
    bent = np.minimum(x, 2)
    assert linear_fit(x, bent, most=2).r2 == pytest.approx(1) and linear_fit(x, bent).r2 < 0.9
    assert np.isnan(linear_fit(x, x, most=0.01)).all()  # one point
    still = linear_fit(np.zeros(4), [0.0, 1.0, 2.0, 3.0])
    assert np.isnan(still.slope) and np.isnan(still.r2) and still.intercept == 1.5


def test_smoothing_keeps_lines_and_ends():
    np.testing.assert_allclose(smoothed(np.ones(20)), 1)
    np.testing.assert_allclose(smoothed(np.arange(20.0))[5:-5], np.arange(5.0, 15.0))


def test_where_two_curves_part():
    """Over 200 draws of noise: seen within two windows of where it is, and hardly ever where it is not."""
    found, false = [], 0
    apart = np.maximum(np.arange(200) - 100, 0) / 100
    for seed in range(200):
        train, test = 0.125 * np.random.default_rng(seed).normal(size=(2, 200)) + np.linspace(0, 2, 200)
        false += parting(train, test) is not None
        found.append(parting(train + apart, test))
    assert false <= 2
    back = np.where(np.arange(200) < 150, apart, 0)  # it comes back: they have not parted
    assert parting(back, 0 * back) is None
    assert all(at is not None and 100 <= at <= 160 for at in found) and abs(np.median(found) - 130) <= 10
    assert parting(np.zeros(3), np.zeros(3)) is None


@pytest.fixture
def index(tmp_path):
    """Two seeds whose training score is twice sqrt(KL), and a test score that stays behind; and a best of n."""
    runs = {}
    for seed in (0, 1):
        folder = tmp_path / "ppo" / f"0.4M-s{seed}"
        folder.mkdir(parents=True)
        x = np.linspace(0, 3, 60)
        rng = np.random.default_rng(seed)
        rows = [{"step": i + 1, "score": 2 * k + 0.02 * rng.normal(), "score_p50": 0.0, "test/pm_test": min(k, 1.5) * 2,
                 "test/pm_test_p50": 0.0, "sqrt_kl": k} for i, k in enumerate(x)]  # fmt: skip
        look = {"eval/score_p10": -1.0, "eval/score_p90": 1.563, "eval/test/pm_test_p10": -1.0, "eval/test/pm_test_p90": 1.563}
        rows = [{"step": 0, "eval/score": 0.0} | look, *rows]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        (folder / "config.json").write_text(json.dumps({"seed": seed, "config": {"reward": "pm", "batch_size": 64, "tests": ["pm_test"]}}))
        runs[f"lm.model=0.4M,seed={seed}"] = {"ppo": f"ppo/0.4M-s{seed}"}
    best = tmp_path / "best_of_n" / "x"
    (best / "evals").mkdir(parents=True)
    (best / "config.json").write_text(json.dumps({"config": {"reward": "pm", "tests": ["pm_test"]}}))
    scores = lambda x: {"reward": {"mean": x, "se": 0.1}, "pm_test": {"mean": x / 2, "se": 0.1}}  # noqa: E731
    rows = [{"n": n, "kl": k, "scores": scores(s)} for n, k, s in ((1, 0.0, 0.0), (16, 1.84, 2.5))]
    (best / "evals" / "best_of_n.json").write_text(json.dumps({"prompts": 8, "rows": rows}))
    runs["lm.model=0.4M,seed=0"]["best"] = "best_of_n/x"
    path = tmp_path / "experiments" / "rlhf.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"experiment": "rlhf", "file": "", "runs": runs}))
    return path


def test_the_figure_holds_the_rows_and_says_the_fit(index, read, tmp_path):
    curves, best = load_curves(index)
    assert [c.label for c in curves] == ["rlhf: lm.model=0.4M"] * 2 and len(best) == 1
    assert curves[0].spread == pytest.approx({"pm": 1.0, "pm_test": 1.0})
    found = reward_figure(curves, best, tmp_path / "figure")
    points = read(tmp_path / "figure")
    np.testing.assert_allclose(points["samples", "lm.model=0.4M,seed=1: train pm"][:, 0], 64 * np.arange(1, 61))
    np.testing.assert_allclose(points["sqrt_kl", "lm.model=0.4M,seed=0: best of n, pm_test"][:, :2], [[0, 0], [1.84**0.5, 1.25]])
    assert "(2 seeds)" in found and "+2.00 sqrt(KL), R² 1.00" in found and "train and test part at sqrt(KL) 1.68, 1.68" in found
    assert "Best of 16 gains +2.50 on pm, +1.25 on pm_test" in found
    assert "up to 1.0" in reward_figure(curves, [], tmp_path / "less", most=1.0)


def test_every_test_pm_parts_for_itself(index, tmp_path):
    curves, _ = load_curves(index)
    both = [c._replace(scores=c.scores | {"other": c.scores["pm"]}, spread=c.spread | {"other": 1.0}) for c in curves]
    found = reward_figure(both, [], tmp_path / "figure")
    assert "train and pm_test part at sqrt(KL) 1.68, 1.68" in found and "train and other do not part" in found
    assert partings_in_words("test", [0.5, None]) == "train and test part at sqrt(KL) 0.50, never"


def test_experiments_are_told_apart_where_there_are_several(index, read, tmp_path):
    curves, _ = load_curves(index)
    plain = [curve._replace(label=label, run=label) for label, curve in zip(("small", "large"), curves)]
    reward_figure(plain, [], tmp_path / "plain")
    assert {name for _, name in read(tmp_path / "plain")} >= {"small: train pm", "large: train pm"}
    other = curves[1]._replace(label="other: lm.model=0.4M", run=curves[0].run)
    found = reward_figure([curves[0], other], [], tmp_path / "both")
    assert "rlhf: lm.model=0.4M, sqrt" in found and "other: lm.model=0.4M, sqrt" in found
    assert {"rlhf: lm.model=0.4M,seed=0: train pm", "other: lm.model=0.4M,seed=0: train pm"} <= {name for _, name in read(tmp_path / "both")}


def test_policies_of_one_run_are_told_apart(index, read, tmp_path):
    """A run with two PPO stages, by different PMs: neither fitted together nor lost in the table."""
    found = json.loads(index.read_text())
    stages = found["runs"]["lm.model=0.4M,seed=0"]
    ppo = next(name for name, folder in stages.items() if folder.startswith("ppo/"))
    other = next(folder for folder in found["runs"]["lm.model=0.4M,seed=1"].values() if folder.startswith("ppo/"))
    index.write_text(json.dumps(found | {"runs": {"lm.model=0.4M,seed=0": {ppo: stages[ppo], "second": other}}}))
    curves, _ = load_curves(index)
    assert [c.label for c in curves] == [f"rlhf: lm.model=0.4M, {ppo}", "rlhf: lm.model=0.4M, second"]
    reward_figure(curves, [], tmp_path / "two")
    assert {name for _, name in read(tmp_path / "two")} >= {f"lm.model=0.4M,seed=0, {name}: train pm" for name in (ppo, "second")}


def test_runs_and_stages_are_chosen_by_name(index):
    curves, best = load_curves(index, "*seed=0", "p*")
    assert [c.run for c in curves] == ["lm.model=0.4M,seed=0"] and not best
    assert load_curves(index, "*seed=0", "best,p*")[1]
    with pytest.raises(ValueError, match="that matches '[*]', 'best' has rows yet"):
        load_curves(index, stage="best")


def test_the_peak_of_a_curve_that_turns():
    x, rng = np.linspace(0, 3, 300), np.random.default_rng(0)
    peak = find_peak(x, 1 - (x - 1) ** 2 + 0.05 * rng.normal(size=300))
    assert peak.x == pytest.approx(1, abs=0.15) and peak.y == pytest.approx(1, abs=0.05) and peak.turned
    assert peak.end == pytest.approx(-3, abs=0.3)
    assert not find_peak(x, x + 0.05 * rng.normal(size=300)).turned
    assert sum(find_peak(x, rng.normal(size=300)).turned for _ in range(100)) <= 5  # noise alone seldom turns


def test_the_form_of_gao_is_recovered():
    d = np.linspace(0.0, 4, 50)
    y = d * (1.5 - 0.4 * np.log(np.maximum(d, 1e-9)))
    assert gao_fit(d, y) == pytest.approx((1.5, 0.4, 1.0))
    assert gao_fit(d, y, most=2) == pytest.approx((1.5, 0.4, 1.0))
    with pytest.raises(ValueError, match="2 points"):
        gao_fit([0, 1, 2], [0, 1, 1])


def test_gold_is_drawn_and_told(index, read, tmp_path):
    curves, _ = load_curves(index)
    golden = [c._replace(gold=1 - (c.sqrt_kl - 1) ** 2) for c in curves]
    found = reward_figure(golden, [], tmp_path / "gold")
    assert found.count("gold +") == 2 and "no clear turn" not in found
    line = read(tmp_path / "gold")["sqrt_kl", f"{curves[0].run}: gold"]
    np.testing.assert_allclose(line[:, 1], golden[0].gold)


def test_pms_are_called_as_in_the_run_that_is_drawn():
    """Two experiments that share a PPO folder may call its PMs differently."""
    about = {"config": {"reward": "pm_250", "tests": ["pm_test"]}, "parents": {"pm_250": "runs/pm/1M-s0-a", "pm_test": "runs/pm/1M-s0-b"}}
    assert pm_names(about, {"pm/1M-s0-a": "pm", "pm/1M-s0-b": "pm_test"}) == {"score": "pm", "test/pm_test": "pm_test"}
    assert pm_names(about) == {"score": "pm_250", "test/pm_test": "pm_test"}


def test_two_pms_of_one_last_name_stay_two():
    names = pm_names({"config": {"reward": "runs/x/pm", "tests": ["runs/y/pm"]}})
    assert names == {"score": "score: runs/x/pm", "test/runs/y/pm": "test/runs/y/pm: runs/y/pm"}


def test_without_runs_it_says_so(index, tmp_path):
    with pytest.raises(ValueError, match="no PPO run"):
        load_curves(index, only="nothing*")
    with pytest.raises(ValueError, match="is no experiment.s index"):
        load_curves(tmp_path / "none.json")
