"""Synthetic evaluations, and a figure read back."""

import csv
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from hhjax.analysis.runs import Result
from hhjax.analysis.scores import Scores

KINDS = ("helpful-base", "harmless-base")


@pytest.fixture(scope="session")
def read():
    """The CSV of a figure as {(panel, line): [points, (x, y, low, high)]}; its PNG must be a picture with something on it."""

    def read_figure(path) -> dict:
        picture = matplotlib.image.imread(path.with_suffix(".png"))
        assert min(picture.shape[:2]) > 400 and picture.std() > 0.05
        found = {}
        with path.with_suffix(".csv").open() as f:
            for row in csv.DictReader(f):
                found.setdefault((row["panel"], row["line"]), []).append([float(row[n]) for n in ("x", "y", "low", "high")])
        points = {name: np.array(rows) for name, rows in found.items()}
        assert all(np.all(p[:, 2] <= p[:, 1]) and np.all(p[:, 1] <= p[:, 3]) for p in points.values())
        return points

    return read_figure


@pytest.fixture(scope="session")
def make_result():
    """make_result(seed, rows, **about) -> a Result whose pairs alternate between the two kinds, two an opening."""

    def make(seed=0, rows=240, kinds=KINDS, turns=8, **about):
        rng = np.random.default_rng(seed)
        scores = Scores(
            source=np.array(kinds)[np.arange(rows) % len(kinds)],
            opening=np.arange(rows) // 2,
            turns=rng.integers(1, turns + 1, rows),
            chosen=rng.normal(0.4, 1, rows),
            rejected=rng.normal(0, 1, rows),
            baselines={"longer": rng.normal(0, 1, rows), "words": rng.normal(0.1, 1, rows)},
        )
        given = {"size": "1M", "parameters": 1_000_000, "comparisons": 500, "shares": {"helpful-base": 1.0}, "seed": seed}
        return Result(f"seed={seed}", "eval", Path("nowhere"), given | about, scores)

    return make
