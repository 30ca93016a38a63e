"""Elo against samples, from the files of Elo stages."""

import json

import numpy as np
import pytest

from hhjax.analysis.elo import elo_figure, load_ratings


def write_elo(folder, elos, guess):
    """An Elo stage's result: the anchor, and a PPO run's two snapshots."""
    ends = lambda x: {"elo": x, "low": x - 10, "high": x + 10, "won": 5, "played": 9}  # noqa: E731
    guesses = lambda x: {"pm": {"value": x, "low": x - 1, "high": x + 1, "n": 8, "groups": 8}}  # noqa: E731
    rows = [{"policy": "lm", "samples": 0, "reward": None, "guesses": guesses(0.0)} | ends(0.0)]
    rows += [{"policy": ref, "samples": samples, "reward": "pm", "guesses": guesses(guess)} | ends(elo)
             for ref, samples, elo in zip(("ppo@5", "ppo"), (320, 960), elos)]  # fmt: skip
    (folder / "evals").mkdir(parents=True)
    (folder / "evals" / "elo.json").write_text(json.dumps({"prompts": 8, "rows": rows}))


def test_elo_of_seeds_and_of_one(read, tmp_path):
    write_elo(tmp_path / "elo" / "a", (50.0, 100.0), 200.0)
    write_elo(tmp_path / "elo" / "b", (70.0, 140.0), 300.0)
    index = tmp_path / "experiments" / "e.json"
    index.parent.mkdir()
    index.write_text(json.dumps({"runs": {f"seed={n}": {"elo": f"elo/{n}"} for n in "ab"}}))
    found = elo_figure(load_ratings(index), tmp_path / "elo_figure")
    assert "mean of 2 seeds and their range: ppo +120 [+100, +140] (highest +120), guessed +250." in found
    lines = read(tmp_path / "elo_figure")
    np.testing.assert_allclose(lines["raters", "ppo"], [[0, 0, 0, 0], [320, 60, 50, 70], [960, 120, 100, 140]])
    np.testing.assert_allclose(lines["guesses", "ppo"][1:, 1], [250, 250])
    one = elo_figure(load_ratings(index, "seed=a"), tmp_path / "one")
    assert "one seed: ppo +100 [+90, +110] (highest +100), guessed +200." in one
    with pytest.raises(ValueError, match="no Elo stage"):
        load_ratings(index, "seed=c")
