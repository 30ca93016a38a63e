"""Repetition, and the best of n against counting all choices."""

from itertools import combinations

import numpy as np
import pytest

from hhjax.evals.replies import best_of_n_kl, best_of_n_mean, repeated_ngram_share


def test_repetition():
    assert repeated_ngram_share([1, 2, 3, 4, 5]) == 0
    assert repeated_ngram_share([7] * 10) == pytest.approx(1 - 1 / 8)
    assert repeated_ngram_share([1, 2, 1, 2, 1], n=2) == pytest.approx(0.5)
    assert repeated_ngram_share([1, 2]) == 0


@pytest.mark.parametrize("n", range(1, 7))
def test_the_best_of_n_is_the_mean_over_all_choices(n):
    rng = np.random.default_rng(n)
    ranked, scored = rng.normal(size=(3, 6)), rng.normal(size=(3, 6))
    expected = [np.mean([scored[p, max(choice, key=lambda i: ranked[p, i])] for choice in combinations(range(6), n)]) for p in range(3)]
    np.testing.assert_allclose(best_of_n_mean(ranked, scored, n), expected)


def test_its_ends():
    scores = np.random.default_rng(0).normal(size=(5, 64))
    np.testing.assert_allclose(best_of_n_mean(scores, scores, 64), scores.max(1))
    np.testing.assert_allclose(best_of_n_mean(scores, scores, 1), scores.mean(1))
    assert best_of_n_kl(1) == 0 and best_of_n_kl(64) == pytest.approx(3.174, abs=1e-3)
    with pytest.raises(ValueError, match="best of 65"):
        best_of_n_mean(scores, scores, 65)
