"""Ratings from comparisons: worked values, the likelihood's maximum, and what cannot be estimated."""

import numpy as np
import pytest
from scipy.optimize import minimize

from hhjax.evals.elo import ELO, count_wins, fit_elo, rate, win_chance


def tournament(strength, prompts: int, seed: int = 0):
    """(winners, losers, prompts): everyone against everyone on every prompt, by Bradley-Terry."""
    rng, found = np.random.default_rng(seed), []
    for prompt in range(prompts):
        for i in range(len(strength)):
            for j in range(i):
                found.append((i, j, prompt) if rng.random() < 1 / (1 + np.exp(strength[j] - strength[i])) else (j, i, prompt))
    return tuple(zip(*found))


def test_a_nat_is_174_points_and_400_points_are_ten_to_one():
    assert round(ELO) == 174
    assert win_chance(400) == pytest.approx(10 / 11) and win_chance(0) == 0.5
    assert win_chance(ELO * 1.3) == pytest.approx(1 / (1 + np.exp(-1.3)))


def test_two_players_rating_is_the_log_of_their_odds():
    assert fit_elo([[0, 30], [10, 0]], anchor=1) == pytest.approx([400 * np.log10(3), 0], abs=1e-3)


def test_the_fit_is_the_likelihoods_maximum():
    winners, losers, groups = tournament([0.0, 1.0, -0.5, 0.3], 60)
    wins = count_wins(winners, losers, groups, 4).sum(0)

    def loss(x):
        return sum(wins[i, j] * np.logaddexp(0, x[j] - x[i]) for i in range(4) for j in range(4))

    best = minimize(loss, np.zeros(4), tol=1e-12).x
    assert fit_elo(wins, anchor=2) == pytest.approx(ELO * (best - best[2]), abs=0.01)


def test_a_rating_does_not_depend_on_the_players_order():
    wins = count_wins(*tournament([0.0, 1.0, -0.5], 40), 3).sum(0)
    order = [2, 0, 1]
    assert fit_elo(wins[np.ix_(order, order)], anchor=1) == pytest.approx(fit_elo(wins)[order], abs=1e-3)


def test_who_is_unbeaten_or_alone_has_no_finite_rating():
    wins = np.zeros((5, 5))
    wins[0, 1], wins[1, 0] = 3, 2  # these two are comparable
    wins[2, 0] = 4  # never lost
    wins[1, 3] = 1  # never won
    elo = fit_elo(wins)  # the fifth never played
    assert elo[0] == 0 and elo[1] == pytest.approx(400 * np.log10(2 / 3), abs=1e-3)
    assert elo[2] == np.inf and elo[3] == -np.inf and np.isnan(elo[4])


def test_beaten_only_by_way_of_others_is_still_rated():
    wins = np.zeros((3, 3))
    wins[0, 1] = wins[1, 2] = wins[2, 0] = 5  # a circle: all alike
    assert fit_elo(wins) == pytest.approx([0, 0, 0], abs=1e-6)


def test_intervals_hold_the_truth_and_shrink():
    truth, covered, widths = np.array([0.0, 0.6, -0.4]), [], {}
    for seed in range(40):
        for prompts in (30, 120):
            found = rate(*tournament(truth, prompts, seed), 3, resamples=200)
            covered += [r.low <= ELO * t <= r.high for r, t in zip(found[1:], truth[1:])]
            widths.setdefault(prompts, []).append(found[1].high - found[1].low)
    assert 0.88 < np.mean(covered) <= 1  # 95 % by design, of 160
    assert np.mean(widths[120]) == pytest.approx(np.mean(widths[30]) / 2, rel=0.25)


def test_an_interval_is_open_where_a_resample_may_leave_someone_unbeaten():
    found = rate([1, 1, 1, 0], [0, 0, 0, 1], [0, 1, 2, 3], 2)  # one win in four prompts: often not drawn
    assert found[1].elo == pytest.approx(400 * np.log10(3), abs=1e-3) and found[1].high == np.inf and np.isfinite(found[1].low)
    assert (found[1].won, found[1].played, found[0].played) == (3, 4, 4)
    assert found[0][:3] == (0, 0, 0)


def test_comparisons_of_one_prompt_count_as_one():
    alone = rate(*tournament([0.0, 0.5], 100), 2)[1]
    winners, losers, groups = tournament([0.0, 0.5], 100)
    repeated = rate(winners * 4, losers * 4, groups * 4, 2)[1]
    assert repeated.high - repeated.low == pytest.approx(alone.high - alone.low, rel=0.05)


def test_nothing_compared_is_no_rating():
    assert all(np.isnan(r.elo) for r in rate([], [], [], 2)[1:])
