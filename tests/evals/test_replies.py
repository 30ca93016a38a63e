"""Habits of wording, repetition, and the best of n against counting all choices."""

from itertools import combinations

import numpy as np
import pytest

from hhjax.evals.replies import HABITS, best_of_n_kl, best_of_n_mean, habits, repeated_ngram_share


@pytest.mark.parametrize("reply, expected", [
    ("I\u2019m sorry, I can\u2019t help with that.", (1, 0, 0)),
    ("You should talk to a doctor. Are you well?", (1, 1, 0)),
    ("We cannot say", (1, 0, 0)),
    ("I am not sure about it", (1, 0, 0)),
    ("Canned beans, and a note. Which size do you want?", (0, 1, 0)),
    ("the end of the end of the end", (0, 0, 1)),
    ("one two, one two", (0, 0, 0)),
    ("", (0, 0, 0)),
])  # fmt: skip
def test_habits(reply, expected):
    found = habits([reply, "Yes."])
    assert tuple(found) == HABITS and tuple(x[0] for x in found.values()) == expected and not any(x[1] for x in found.values())


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
