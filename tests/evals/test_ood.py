"""Out-of-distribution scores: closed forms, invariances, and two Gaussians whose AUROC is known."""

import numpy as np
import pytest
from scipy.stats import norm

from hhjax.evals.ood import auroc, exposed_scores, fit_gaussian, mahalanobis, relative_mahalanobis

RNG = np.random.default_rng(0)
MIXING = RNG.normal(size=(6, 6))
INSIDE = RNG.normal(size=(4000, 6)) @ MIXING


def test_mahalanobis_is_chi_square_and_does_not_see_linear_maps():
    fitted = fit_gaussian(INSIDE, ridge=0)
    assert mahalanobis(fitted, INSIDE).mean() == pytest.approx(6, rel=1e-3)
    other = RNG.normal(size=(6, 6))
    mapped = fit_gaussian(INSIDE @ other, ridge=0)
    np.testing.assert_allclose(mahalanobis(mapped, INSIDE[:50] @ other), mahalanobis(fitted, INSIDE[:50]), rtol=1e-6)


def test_the_relative_score_is_zero_where_axes_are_independent():
    x = np.array([[1.0, 0], [-1, 0], [0, 2], [0, -2]])  # covariance exactly diagonal
    fitted = fit_gaussian(x, ridge=0)
    np.testing.assert_allclose(relative_mahalanobis(fitted, RNG.normal(size=(9, 2))), 0, atol=1e-12)
    assert np.abs(relative_mahalanobis(fit_gaussian(INSIDE), INSIDE)).mean() > 0.1


def test_auroc():
    assert auroc([1, 2], [3, 4]) == 1 and auroc([3, 4], [1, 2]) == 0 and auroc([1, 1], [1]) == 0.5
    inside, outside = RNG.normal(size=5000), RNG.normal(1, size=5000)
    assert auroc(inside, outside) == pytest.approx(norm.cdf(1 / np.sqrt(2)), abs=0.01)


def test_more_examples_make_a_better_probe():
    outside = INSIDE[:1000] + 0.7
    few, many = (auroc(exposed_scores(INSIDE[1000:], outside[:n], INSIDE[:500]), exposed_scores(INSIDE[1000:], outside[:n], outside[500:]))
                 for n in (1, 400))  # fmt: skip
    assert many > few and many > 0.7
