"""Intervals cover, pairing helps, calibration knows a calibrated model from an overconfident one."""

import numpy as np
import pytest

from hhjax.analysis.stats import (
    calibration, calibration_error, correct, log_linear_fit, mean_estimate, paired_difference, win_probability,
)  # fmt: skip


def test_ties_count_half():
    assert correct([2.0, 0.0, -1.0]).tolist() == [1.0, 0.5, 0.0]


def test_interval_of_independent_items_is_the_binomial_one():
    values = np.repeat([1.0, 0.0], [600, 400])
    e = mean_estimate(values, np.arange(1000))
    half = 1.96 * np.sqrt(0.6 * 0.4 / 1000)
    assert e.value == 0.6 and e.groups == 1000
    assert e.low == pytest.approx(0.6 - half, abs=0.005) and e.high == pytest.approx(0.6 + half, abs=0.005)


def test_pairs_of_one_prompt_are_no_independent_evidence():
    values = np.repeat([1.0, 0.0], [600, 400])
    alone = mean_estimate(values, np.arange(1000))
    grouped = mean_estimate(values, np.arange(1000) // 10)
    assert grouped.high - grouped.low > 2.5 * (alone.high - alone.low)


def test_a_paired_difference_is_sharper_than_its_parts():
    rng = np.random.default_rng(0)
    b = (rng.random(2000) < 0.6).astype(float)
    a = np.where(rng.random(2000) < 0.04, 1.0, b)  # right wherever b is, and on a few more
    difference, p = paired_difference(a, b, np.arange(2000))
    assert difference.low > 0 and p < 0.01
    assert difference.high - difference.low < 0.02
    same, p_same = paired_difference(b, b, np.arange(2000))
    assert same.value == 0 and p_same == 1


def test_a_calibrated_model_is_on_the_curve_and_a_doubled_one_is_not():
    rng = np.random.default_rng(0)
    confidence = np.abs(rng.normal(0, 1.5, 40_000))
    margin = np.where(rng.random(40_000) < win_probability(confidence), confidence, -confidence)
    curve = calibration(margin, bins=8)
    np.testing.assert_allclose(curve.accuracy, win_probability(curve.margin), atol=0.02)
    assert curve.count.sum() == 40_000
    assert calibration_error(margin) < 0.012
    assert calibration_error(2 * margin) > 0.06


def test_log_linear_fit_recovers_the_line():
    x = np.array([1e3, 1e4, 1e5])
    intercept, slope, r2 = log_linear_fit(x, 0.5 + 0.01 * np.log(x))
    assert (intercept, slope, r2) == pytest.approx((0.5, 0.01, 1.0))
    with pytest.raises(ValueError, match="two different x"):
        log_linear_fit([5, 5], [0.1, 0.2])


def test_an_empty_test_set_is_an_error():
    with pytest.raises(ValueError, match="no values"):
        mean_estimate([], [])
