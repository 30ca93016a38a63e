"""What replies look like, without a model: habits of wording, repetition, and the best of n by scores."""

import re
from collections.abc import Sequence

import numpy as np

# Phrases, not meanings: a reply may refuse in other words, and use these without refusing.
GUARDED = re.compile(
    r"\b(?:sorry|apologi[sz]e|unable to|rather not|not (?:able|comfortable|willing|sure)"
    r"|(?:i|we) (?:can|could|would|will|should|do) ?not|(?:i|we) (?:ca|could|would|wo|should|do)n't|(?:i'm|i am) not"
    r"|illegal|unethical|harmful|dangerous|(?:doctor|therapist|lawyer|professional|counsell?or)s?|seek help)\b"
)  # fmt: skip
HABITS = ("guarded", "asks", "repeats")


def habits(replies: Sequence[str]) -> dict[str, np.ndarray]:
    """1 or 0 a reply for each of HABITS, [len(replies)]: "guarded", it has a phrase of refusal or evasion; "asks", it holds a
    question; "repeats", it says three words in a row twice."""
    plain = [reply.lower().replace("\u2019", "'") for reply in replies]
    found = {"guarded": [bool(GUARDED.search(reply)) for reply in plain], "asks": ["?" in reply for reply in plain],
             "repeats": [repeated_ngram_share(re.findall(r"[\w']+", reply)) > 0 for reply in plain]}  # fmt: skip
    return {name: np.array(found[name], float) for name in HABITS}


def repeated_ngram_share(reply: Sequence, n: int = 3) -> float:
    """The share of a reply's n-grams, of tokens or of words, that it has already used: 0 says nothing twice, near 1 is a loop; 0 below
    n + 1 of them."""
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
