"""Synthetic evaluations."""

from pathlib import Path

import numpy as np
import pytest

from hhjax.analysis.runs import Result
from hhjax.analysis.scores import Scores

KINDS = ("helpful-base", "harmless-base")


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
