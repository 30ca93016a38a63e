"""Out-of-distribution detection by a layer's activations (Bai et al. 2022, sections 5.4 and B.9). numpy, and scikit-learn's probe."""

from typing import NamedTuple

import numpy as np
from sklearn.linear_model import LogisticRegression


class Gaussian(NamedTuple):
    """Fitted to activations [N, D]: their mean, and the inverses of their covariance and of its diagonal."""

    mean: np.ndarray
    precision: np.ndarray
    diagonal: np.ndarray


def fit_gaussian(x, ridge: float = 1e-3) -> Gaussian:
    """ridge: added to the covariance's diagonal, as a share of its mean, since a few hundred prompts may span less than D."""
    x = np.asarray(x, float)
    covariance = np.atleast_2d(np.cov(x, rowvar=False))
    covariance += ridge * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    return Gaussian(x.mean(0), np.linalg.inv(covariance), 1 / np.diag(covariance))


def mahalanobis(fitted: Gaussian, x) -> np.ndarray:
    """(x - mean)' covariance^-1 (x - mean), [N]."""
    d = np.asarray(x, float) - fitted.mean
    return np.einsum("ni,ij,nj->n", d, fitted.precision, d)


def relative_mahalanobis(fitted: Gaussian, x) -> np.ndarray:
    """The paper's "simplified relative" score: the Mahalanobis distance minus that of a Gaussian with the diagonal alone, [N]."""
    d = np.asarray(x, float) - fitted.mean
    return mahalanobis(fitted, x) - (d**2) @ fitted.diagonal


def auroc(inside, outside) -> float:
    """The probability that an outside score is above an inside one; ties count half."""
    inside, outside = np.asarray(inside, float), np.asarray(outside, float)
    ordered = np.sort(inside)
    below, upto = (np.searchsorted(ordered, outside, side) for side in ("left", "right"))
    return float(np.mean(below + upto) / (2 * len(inside)))


def exposed_scores(inside, examples, x) -> np.ndarray:
    """Scores [N] of x by a linear probe that has seen inside activations and a few outside `examples`, copied to as many."""
    inside, examples = np.asarray(inside, float), np.asarray(examples, float)
    copies = np.repeat(examples, max(1, len(inside) // len(examples)), axis=0)
    scale = inside.std(0) + 1e-6
    rows, labels = np.concatenate([inside, copies]) / scale, np.repeat([0, 1], [len(inside), len(copies)])
    return LogisticRegression(max_iter=1000).fit(rows, labels).decision_function(np.asarray(x, float) / scale)
