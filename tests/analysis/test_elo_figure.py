"""Elo against samples, from the files of Elo stages."""

import json

import numpy as np
import pytest

from hhjax.analysis.elo import Rated, elo_figure, load_ratings
from hhjax.analysis.stats import Estimate


def write_elo(folder, elos, guess, name="ppo"):
    """An Elo stage's result: the anchor, and a PPO run's two snapshots."""
    ends = lambda x: {"elo": x, "low": x - 10, "high": x + 10, "won": 5, "played": 9}  # noqa: E731
    guesses = lambda x: {name: {"value": v, "low": v - 1, "high": v + 1, "n": 8, "groups": 8} for name, v in (("pm", x), ("gold", x / 2))}  # noqa: E731
    rows = [{"policy": "lm", "samples": 0, "reward": None, "guesses": guesses(0.0)} | ends(0.0)]
    rows += [{"policy": ref, "samples": samples, "reward": "pm", "guesses": guesses(guess)} | ends(elo)
             for ref, samples, elo in zip((f"{name}@5", name), (320, 960), elos)]  # fmt: skip
    (folder / "evals").mkdir(parents=True)
    (folder / "DONE").touch()
    (folder / "evals" / "elo.json").write_text(json.dumps({"prompts": 8, "rows": rows}))


def test_elo_of_seeds_and_of_one(read, tmp_path):
    write_elo(tmp_path / "elo" / "a", (50.0, 100.0), 200.0)
    write_elo(tmp_path / "elo" / "b", (70.0, 140.0), 300.0)
    index = tmp_path / "experiments" / "e.json"
    index.parent.mkdir()
    index.write_text(json.dumps({"runs": {f"seed={n}": {"elo": f"elo/{n}"} for n in "ab"}}))
    found = elo_figure(load_ratings(index), tmp_path / "elo_figure")
    assert "means of 2 seeds, bars their range: ppo +120 [+100, +140] (highest +120, its PM guesses +250, gold +125)." in found
    lines = read(tmp_path / "elo_figure")
    np.testing.assert_allclose(lines["raters", "ppo"], [[0, 0, 0, 0], [320, 60, 50, 70], [960, 120, 100, 140]])
    np.testing.assert_allclose(lines["guess", "ppo"][1:, 1], [250, 250])
    one = elo_figure(load_ratings(index, "seed=a"), tmp_path / "one")
    assert "one seed: ppo +100 [+90, +110] (highest +100, its PM guesses +200, gold +100)." in one
    with pytest.raises(ValueError, match="no elo stage"):
        load_ratings(index, "seed=c")


def test_two_policies_are_compared_seed_by_seed(tmp_path):
    def rated(name, elo, samples=960, stage="s0"):
        return Rated(name, samples, *(Estimate(x, x - 1, x + 1, 9, 8) for x in (elo, 0.0, 0.0)), stage)

    seeds = [[rated("loop", 100.0), rated("control", 60.0)], [rated("loop", 90.0, stage="s1"), rated("control", 80.0, stage="s1")]]
    assert "loop above control by +25 at 960 samples (seeds +40, +10)" in elo_figure(seeds, tmp_path / "f")
    unbeaten = rated("loop", np.inf, 2000)
    found = elo_figure([[*seeds[0], unbeaten]], tmp_path / "g")
    assert "loop above control by +40 at 960 samples; without a finite rating and left out: loop at 2,000." in found
    lost = [[rated("loop", np.inf, stage="s2"), rated("control", 9.0, stage="s2")]]  # a seed that one arm is not rated in
    assert "by +25 at 960 samples (seeds +40, +10)" in elo_figure([*seeds, *lost], tmp_path / "i")
    with pytest.raises(ValueError, match="no snapshot has a finite rating"):
        elo_figure([[unbeaten]], tmp_path / "h")
