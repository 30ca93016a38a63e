"""What a preference model must beat: rules about length, and a bag of words."""

from collections.abc import Sequence

import numpy as np
from scipy.sparse import vstack
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

from hhjax.analysis.stats import correct
from hhjax.data.comparisons import Comparison, opening_hash

LEAST = 20  # opening prompts that a bag of words is learned from: fewer give no vocabulary, or no four folds
STRENGTHS = (0.001, 0.003, 0.01, 0.03, 0.1)  # inverse L2 penalties that cross-validation chooses from


def baseline_margins(train: Sequence[Comparison], test: Sequence[Comparison]) -> dict[str, np.ndarray]:
    """Name -> chosen minus rejected score of every test pair, [len(test)].

    "longer" and "shorter" reply wins (characters); "words": logistic regression on the difference of the replies'
    word counts, trained on all training pairs; and, where those come from several sources, "words:SOURCE"
    trained on one. A rule or a one-source model fits one kind of comparison and may fall below chance on another. Models of fewer than
    LEAST opening prompts are left out.
    """
    longer = np.array([len(row.chosen) - len(row.rejected) for row in test], float)
    sources = sorted({row.source for row in train})
    learners = {"words": train}
    if len(sources) > 1:
        learners |= {f"words:{source}": [row for row in train if row.source == source] for source in sources}
    able = {name: rows for name, rows in learners.items() if len({opening_hash(row.prompt) for row in rows}) >= LEAST}
    return {"longer": longer, "shorter": -longer} | {name: word_margins(rows, test) for name, rows in able.items()}


def word_margins(train: Sequence[Comparison], test: Sequence[Comparison]) -> np.ndarray:
    """Margins of a logistic regression without intercept on word-count differences of the two replies.

    The penalty is chosen by 4-fold cross-validation on the training pairs, by opening prompt.
    """
    vectorizer = CountVectorizer(min_df=3, token_pattern=r"\w+|[^\w\s]")
    vectorizer.fit([text for row in train for text in (row.chosen, row.rejected)])
    x, x_test = (_differences(vectorizer, rows) for rows in (train, test))
    groups = [opening_hash(row.prompt) for row in train]

    def held_out_accuracy(strength):
        folds = GroupKFold(4).split(x, groups=groups)
        return np.mean([correct(_fit(x[a], strength).decision_function(x[b])).mean() for a, b in folds])

    return _fit(x, max(STRENGTHS, key=held_out_accuracy)).decision_function(x_test)


def _differences(vectorizer, rows):
    chosen, rejected = (vectorizer.transform([getattr(r, side) for r in rows]) for side in ("chosen", "rejected"))
    return (chosen - rejected).astype(float)


def _fit(x, strength: float):
    """Each pair enters both ways round, so that the two classes mirror each other."""
    labels = np.repeat([1, 0], x.shape[0])
    return LogisticRegression(C=strength, fit_intercept=False, max_iter=1000).fit(vstack([x, -x]), labels)
