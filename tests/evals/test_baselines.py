"""Baselines: length rules by hand, and a bag of words that finds the word that decides."""

import random

import numpy as np
import pytest

from hhjax.data.comparisons import Comparison
from hhjax.evals.baselines import baseline_margins, word_margins

WORDS = "river mill boat bird supper bread rain hill spring stone".split()


def pairs(count: int, winner: str, loser: str, source: str = "", seed: int = 0) -> list[Comparison]:
    """Comparisons whose chosen reply holds `winner` and whose rejected one holds `loser`, among common words."""
    rng = random.Random(seed)

    def reply(word):
        return " ".join(rng.sample([word, *rng.sample(WORDS, 4)], 5))

    return [Comparison(f"\n\nHuman: {source} {seed} {i}?\n\nAssistant:", reply(winner), reply(loser), source) for i in range(count)]


def swapped(rows):
    return [row._replace(chosen=row.rejected, rejected=row.chosen) for row in rows]


def test_length_rules_count_characters():
    test = [Comparison("\n\nHuman: a\n\nAssistant:", "four", "a"), Comparison("\n\nHuman: b\n\nAssistant:", "one", "equal")]
    margins = baseline_margins(pairs(40, "yes", "no"), test)
    np.testing.assert_array_equal(margins["longer"], [3, -2])
    np.testing.assert_array_equal(margins["shorter"], [-3, 2])
    assert list(margins) == ["longer", "shorter", "words"]


def test_the_bag_of_words_finds_the_word_that_decides():
    train, test = pairs(80, "thanks", "never"), pairs(50, "thanks", "never", seed=1)
    margins = word_margins(train, test)
    assert margins.shape == (50,) and np.all(margins > 0)
    # Without an intercept a pair the other way round has the opposite margin.
    np.testing.assert_allclose(word_margins(train, swapped(test)), -margins, atol=1e-9)
    same = [row._replace(rejected=row.chosen) for row in test]
    np.testing.assert_array_equal(word_margins(train, same), 0)


def test_a_one_source_bag_of_words_learns_from_that_source_only():
    helpful, harmless = pairs(60, "thanks", "never", "helpful"), pairs(60, "never", "thanks", "harmless")
    test = pairs(20, "thanks", "never", "helpful", seed=1)
    margins = baseline_margins(helpful + harmless, test)
    assert set(margins) == {"longer", "shorter", "words", "words:helpful", "words:harmless"}
    np.testing.assert_allclose(margins["words:helpful"], word_margins(helpful, test))
    assert np.all(margins["words:helpful"] > 0) and np.all(margins["words:harmless"] < 0)
    np.testing.assert_allclose(margins["words"], word_margins(helpful + harmless, test))
    few = baseline_margins(helpful + harmless[:3], test)  # three pairs teach nothing
    assert set(few) == {"longer", "shorter", "words", "words:helpful"}


def test_margins_do_not_depend_on_the_order_of_training_pairs():
    train, test = pairs(60, "thanks", "never"), pairs(20, "thanks", "never", seed=1)
    assert word_margins(train, test) == pytest.approx(word_margins(train[::-1], test), rel=1e-3)
