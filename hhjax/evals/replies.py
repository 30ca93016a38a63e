"""What replies look like, without a model: repetition, and the best of n by scores."""

from collections.abc import Sequence

import numpy as np


def repeated_ngram_share(reply: Sequence[int], n: int = 3) -> float:
    """The share of a reply's n-grams that it has already used: 0 says nothing twice, near 1 is a loop; 0 below n + 1 tokens."""
    grams = [tuple(reply[i : i + n]) for i in range(len(reply) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def best_of_n_mean(ranked_by, scored_by, n: int) -> np.ndarray:
    """The expected score of the best of n, per prompt, over all choices of n from the N samples drawn.

    ranked_by: [prompts, N], what chooses; scored_by: [prompts, N], what is reported. Returns [prompts]. The i-th from below
    (from 1) wins in C(i - 1, n - 1) of the C(N, n) choices: no variance from a particular choice, and n = N is the plain maximum.
    Raises ValueError unless 1 <= n <= N.
    """
    total = ranked_by.shape[1]
    if not 1 <= n <= total:
        raise ValueError(f"best of {n}, but {total} samples a prompt were drawn; choose n from 1 to {total}")
    wins = np.zeros(total)
    wins[-1] = n / total
    for i in range(total - 1, n - 1, -1):  # C(i - 1, n - 1) / C(i, n - 1) = (i - n + 1) / i
        wins[i - 1] = wins[i] * (i - n + 1) / i
    order = np.argsort(ranked_by, axis=1, kind="stable")
    return np.take_along_axis(scored_by, order, axis=1) @ wins


def best_of_n_kl(n: int) -> float:
    """KL(best of n || one sample) in nats: log n - (n - 1) / n, an upper bound for discrete replies. Stiennon et al. 2020;
    the paper's figures use log n (appendix B.6)."""
    return float(np.log(n) - (n - 1) / n)
