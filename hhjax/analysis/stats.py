"""Statistics of comparisons: accuracy with intervals, paired differences, calibration. numpy only."""

from typing import NamedTuple

import numpy as np

RESAMPLES = 2000


class Estimate(NamedTuple):
    """A mean with its 95 % interval. n: items; groups: independent groups that were resampled."""

    value: float
    low: float
    high: float
    n: int
    groups: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def correct(margin) -> np.ndarray:
    """1 where chosen scores above rejected, 0.5 at a tie, else 0. margin: [N] chosen - rejected."""
    margin = np.asarray(margin, float)
    return (margin > 0) + 0.5 * (margin == 0)


def resampled_means(values, groups, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Means of `resamples` bootstrap samples in which whole groups are drawn, since pairs that share an opening
    prompt are not independent. values, groups: [N]. Returns [resamples].

    With the same groups and seed two calls draw the same groups, which is what makes differences paired.
    """
    values = np.asarray(values, float)
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    sums, counts = np.bincount(index, values), np.bincount(index)
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    for r in range(resamples):
        drawn = rng.integers(0, len(counts), len(counts))
        means[r] = sums[drawn].sum() / counts[drawn].sum()
    return means


def mean_estimate(values, groups, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """Mean and percentile interval over bootstrap samples of groups. Raises ValueError on no values."""
    values = np.asarray(values, float)
    if not len(values):
        raise ValueError("no values to estimate a mean from; is the test set empty?")
    means = resampled_means(values, groups, resamples, seed)
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(float(values.mean()), float(low), float(high), len(values), len(np.unique(groups)))


def paired_difference(a, b, groups, resamples: int = RESAMPLES, seed: int = 0) -> tuple[Estimate, float]:
    """Mean of a - b with its interval, and the one-sided bootstrap p: the share of samples where a does not lead.

    a, b: [N], e.g. the correctness of two models on the same pairs. p is at least 1 / (resamples + 1).
    """
    difference = np.asarray(a, float) - np.asarray(b, float)
    means = resampled_means(difference, groups, resamples, seed)
    p = (np.sum(means <= 0) + 1) / (resamples + 1)
    return mean_estimate(difference, groups, resamples, seed), float(p)


def over_seeds(estimates) -> Estimate:
    """Of one estimate, itself; of several seeds', their mean with the range from the lowest to the highest.

    Seeds share their test items, so their intervals do not add up to one of the mean.
    """
    if len(estimates) == 1:
        return estimates[0]
    values = [e.value for e in estimates]
    mean = float(np.clip(np.mean(values), min(values), max(values)))  # of equal values rounding can put it outside
    return Estimate(mean, min(values), max(values), estimates[0].n, estimates[0].groups)


class Calibration(NamedTuple):
    """Accuracy by predicted confidence. margin, accuracy, count: [bins], bins in order of |margin|."""

    margin: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray


def win_probability(margin):
    """1 / (1 + exp(-margin)): the accuracy that a calibrated preference model has at a score difference (Figure 9)."""
    return 1 / (1 + np.exp(-np.asarray(margin, float)))


def calibration(margin, bins: int = 10) -> Calibration:
    """Mean |margin| and accuracy in `bins` equally full bins of |margin|. margin: [N] chosen - rejected."""
    parts = [np.asarray(margin)[rows] for rows in confidence_bins(margin, bins)]
    return Calibration(
        np.array([np.abs(part).mean() for part in parts]),
        np.array([correct(part).mean() for part in parts]),
        np.array([len(part) for part in parts]),
    )


def confidence_bins(margin, bins: int) -> list[np.ndarray]:
    """Row numbers of margins [N] in at most `bins` equally full parts, the least confident first."""
    order = np.argsort(np.abs(np.asarray(margin, float)), kind="stable")
    return [rows for rows in np.array_split(order, bins) if len(rows)]


def calibration_error(margin, bins: int = 10) -> float:
    """Expected calibration error: the mean over bins, by count, of |accuracy - mean predicted confidence|.

    Biased upwards where bins are small: a calibrated model's is about 0.4 / sqrt(rows of a bin).
    """
    parts = [np.asarray(margin)[rows] for rows in confidence_bins(margin, bins)]
    gaps = [abs(correct(part).mean() - win_probability(np.abs(part)).mean()) for part in parts]
    return float(np.average(gaps, weights=[len(part) for part in parts]))


def log_linear_fit(x, y) -> tuple[float, float, float]:
    """Least squares of y on ln x: (intercept, slope, R^2). Raises ValueError with fewer than two distinct x."""
    x, y = np.log(np.asarray(x, float)), np.asarray(y, float)
    if len(np.unique(x)) < 2:
        raise ValueError("a fit needs at least two different x")
    slope, intercept = np.polyfit(x, y, 1)
    residual = y - (intercept + slope * x)
    spread = np.sum((y - y.mean()) ** 2)
    return float(intercept), float(slope), float(1 - np.sum(residual**2) / spread) if spread else 1.0
