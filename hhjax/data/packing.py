"""Comparisons laid end to end in rows, each prompt once."""

from collections.abc import Iterable, Sequence

import numpy as np

from hhjax.data.comparisons import Comparison
from hhjax.data.stream import PairSource
from hhjax.data.tokenizer import Tokenizer
from hhjax.types import PackedPairs

MOST = 16  # pairs a row
STEP = 64  # tokens that a row's width is a multiple of


class PackedSource(PairSource):
    """The comparisons of PairSource, truncated as there, in rows of `width` tokens; batches are PackedPairs of `batch_size` pairs.

    Two rows a pair compute the prompt twice and are padded to the longest: on HH at 512 tokens four times the positions. Every
    batch has short pairs and long ones: inside windows of 16 batches, pairs of about one length are dealt out, one a batch, so that
    nearly all batches fill equally many rows, and a program is compiled for one or two numbers of rows only.
    """

    def __init__(self, rows: Iterable[Comparison], tok: Tokenizer, seq_len: int, batch_size: int, multiple: int = 1):
        """multiple: what the rows of a batch, of all hosts together, must divide by."""
        super().__init__(rows, tok, seq_len, batch_size)
        self.tokens_of = np.array([len(prompt) + sum(map(len, replies)) for prompt, replies in zip(self._prompts, self._replies)])
        self.width, self.multiple = -(-int(self.tokens_of.max()) // STEP) * STEP, multiple

    def take(self, rows: np.ndarray, width_of: np.ndarray | None = None) -> PackedPairs:
        """PackedPairs of numpy arrays. width_of: all hosts' pairs; each host has as many rows as the fullest of them needs."""
        hosts = 1 if width_of is None else len(width_of) // len(rows)
        shares = np.split(rows if width_of is None else width_of, hosts)
        step = self.multiple // hosts
        count = -(-max(len(first_fit(self.tokens_of[share], self.width, MOST)) for share in shares) // step) * step
        shape, most = (count, self.width), min(MOST, len(rows))
        tokens, positions, branch = np.full(shape, self.pad_id, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        pair, ends, weight = np.full(shape, -1, np.int32), np.zeros((count, most, 2), np.int32), np.zeros((count, most), np.float32)
        for r, members in enumerate(first_fit(self.tokens_of[rows], self.width, MOST)):
            at = 0
            for n, row in enumerate(rows[members]):
                prompt, replies = self._prompts[row], self._replies[row]
                for b, part in enumerate((prompt, *replies)):
                    here, start = np.s_[r, at : at + len(part)], len(prompt) if b else 0
                    tokens[here], pair[here], branch[here] = part, n, b
                    positions[here] = start + np.arange(len(part))
                    at += len(part)
                    if b:
                        ends[r, n, b - 1] = at - 1
                weight[r, n] = self.weights[row]
        return PackedPairs(tokens, positions, pair, branch, ends, weight)

    def _ordered(self, seed: int, epoch: int) -> np.ndarray:
        rng = np.random.Generator(np.random.Philox(key=[seed, epoch]))
        order = rng.permutation(self.size)[: self.steps_per_epoch * self.batch_size]
        window = self.window * self.batch_size
        batches = []
        for part in np.split(order, range(window, len(order), window)):
            alike = part[np.argsort(self.tokens_of[part], kind="stable")].reshape(self.batch_size, -1)
            batches.append(rng.permuted(alike, axis=1).T)
        return rng.permuted(np.concatenate(batches), axis=1)  # or one host would have the short pairs


def first_fit(lengths: Sequence[int], capacity: int, most: int) -> list[list[int]]:
    """The numbers of the items in each bin: longest first, each into the first bin with room, at most `most` in one.

    Where `most` is never reached, at most 11/9 of the fewest possible bins and one more (first-fit decreasing, Johnson 1973). No length
    may be above capacity.
    """
    bins, room = [], []
    for i in np.argsort(-np.asarray(lengths), kind="stable"):
        found = next((k for k, left in enumerate(room) if lengths[i] <= left and len(bins[k]) < most), None)
        if found is None:
            found = len(bins)
            bins.append([])
            room.append(capacity)
        bins[found].append(int(i))
        room[found] -= lengths[i]
    return bins
