"""Elo from comparisons: maximum likelihood of Bradley-Terry, with intervals over prompts (Bai et al. 2022, section 2.3, appendix B.5)."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import evalica
import numpy as np

ELO = 400 / math.log(10)  # points of Elo a nat of a preference model's score: 174


class Rating(NamedTuple):
    """Elo above the anchor's and its 95 % interval. won, played: comparisons.

    inf where the player has beaten its way to the anchor and never lost one back, -inf the reverse, nan where no comparisons join
    the two: the comparisons hold no estimate, and an end of an interval may be so too.
    """

    elo: float
    low: float
    high: float
    won: int
    played: int


def win_chance(elo):
    """The chance to win against a player `elo` points below: 1 / (1 + 10^(-elo / 400)) (Eq. 2.1)."""
    return 1 / (1 + 10 ** (-np.asarray(elo, float) / 400))


def count_wins(winners: Sequence[int], losers: Sequence[int], groups: Sequence, players: int) -> np.ndarray:
    """wins[g, i, j]: how often player i beat player j within group g, in order of the groups' values. A choice that the rater was unsure of
    is left out before (appendix B.5)."""
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    wins = np.zeros((index.max(initial=-1) + 1, players, players))
    np.add.at(wins, (index, np.asarray(winners, int), np.asarray(losers, int)), 1)
    return wins


def fit_elo(wins: np.ndarray, anchor: int = 0) -> np.ndarray:
    """Elo [P] above the anchor's that makes the wins [P, P] most likely; infinite or nan as in `Rating`.

    The likelihood has a maximum only among players of whom each has won, by way of others, against each (Ford 1957).
    """
    wins = np.asarray(wins, float)
    reached = _reaches(wins)
    elo = np.select([reached[:, anchor] & reached[anchor], reached[:, anchor], reached[anchor]], [0.0, np.inf, -np.inf], np.nan)
    same = np.flatnonzero(elo == 0)
    first, second = np.nonzero(wins[np.ix_(same, same)])
    if len(first):
        found = evalica.bradley_terry(same[first], same[second], [evalica.Winner.X] * len(first), weights=wins[same[first], same[second]],
                                      tolerance=1e-10, limit=100_000)  # fmt: skip
        nats = np.log(found.scores.reindex(same).to_numpy(float))
        elo[same] = ELO * (nats - nats[same.searchsorted(anchor)])
    return elo


def _reaches(wins: np.ndarray) -> np.ndarray:
    """[P, P]: whether a chain of wins leads from the first player to the second; each reaches itself."""
    count = len(wins)
    step = (wins > 0) | np.eye(count, dtype=bool)
    for _ in range(max(1, math.ceil(math.log2(max(count, 2))))):
        step = (step.astype(int) @ step.astype(int)) > 0
    return step


def rate(winners: Sequence[int], losers: Sequence[int], groups: Sequence, players: int, anchor: int = 0, resamples: int = 1000,
         seed: int = 0) -> list[Rating]:  # fmt: skip
    """The rating of each player, from comparisons in which one of two won. groups: the prompt of each, which is what is
    resampled, since comparisons on one prompt are not independent."""
    by_group = count_wins(winners, losers, groups, players)
    total = by_group.sum(0)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(by_group), np.full(len(by_group), 1 / max(1, len(by_group))), size=resamples) if len(by_group) else []
    draws = np.array([fit_elo(np.tensordot(weights, by_group, 1), anchor) for weights in counts]).reshape(-1, players)
    ends = _interval(draws) if len(draws) else np.full((2, players), np.nan)
    won = total.sum(1).astype(int)
    return [Rating(*map(float, (elo, low, high)), int(w), int(p))
            for elo, low, high, w, p in zip(fit_elo(total, anchor), *ends, won, won + total.sum(0).astype(int))]  # fmt: skip


def _interval(draws: np.ndarray) -> np.ndarray:
    """The 2.5 and 97.5 percentiles [2, P] of draws [N, P] that may be infinite; of those that are no number there is none."""
    ordered = np.sort(draws, axis=0)  # nan last
    places = np.array([math.floor(0.025 * (len(draws) - 1)), math.ceil(0.975 * (len(draws) - 1))])
    return ordered[places]
