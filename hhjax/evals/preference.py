"""Scores of comparisons by a preference model."""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from hhjax.data.comparisons import MAX_CHARS, Comparison
from hhjax.data.records import DataError
from hhjax.data.stream import Host, PairSource
from hhjax.objectives.preference import pair_scores
from hhjax.sharding import batch_host, batch_ways, put_batch, replicated
from hhjax.types import Model


def score_comparisons(
    model: Model, params, tokenizer, rows: Sequence[Comparison], seq_len: int, batch_size: int, mesh, poll: Callable[[], None] = lambda: None
) -> np.ndarray:
    """Chosen and rejected score of every row, [len(rows), 2] f32.

    No row is left out: where a reply does not fit in seq_len the pair is scored at the length that it needs,
    since the dropped pairs would not be a random sample. batch_size: of pairs that fit; where the length doubles, attention takes four
    times the memory a row, and a batch has a quarter of the rows. poll() is called before every batch, on every process.
    """
    scores = np.full((len(rows), 2), np.nan, np.float32)
    left = np.arange(len(rows))
    host = Host(*batch_host(mesh))
    score = jax.jit(lambda p, pairs: pair_scores(model, p, pairs), out_shardings=replicated(mesh))
    while len(left):
        try:
            source = PairSource([rows[i] for i in left], tokenizer, seq_len, batch_size)
        except DataError:  # none of them fits
            if seq_len > 4 * MAX_CHARS:  # the bytes of the longest row: something else is wrong with them
                raise
            seq_len, batch_size = 2 * seq_len, quarter(batch_size, batch_ways(mesh))
            continue
        kept = {id(row) for row in source.rows}
        places = np.array([i for i in left if id(rows[i]) in kept])
        left = np.array([i for i in left if id(rows[i]) not in kept], int)
        by_length = np.argsort(source.lengths, kind="stable")
        for start in range(0, len(by_length), batch_size):
            poll()
            at = by_length[np.minimum(np.arange(start, start + batch_size), len(by_length) - 1)]
            mine = np.split(at, host.count)[host.index]
            found = jax.device_get(score(params, put_batch(source.take(mine, width_of=at), mesh)))
            scores[places[at]] = np.stack(found, 1)
        seq_len, batch_size = 2 * seq_len, quarter(batch_size, batch_ways(mesh))
    return scores


def quarter(rows: int, ways: int) -> int:
    """A quarter of a batch's rows: a multiple of the ways it is split, and at least that."""
    return max(1, rows // (4 * ways)) * ways
