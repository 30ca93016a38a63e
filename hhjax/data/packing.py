"""Comparisons, and replies to prompts, laid end to end in rows, each prompt once."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from hhjax.data.comparisons import Comparison
from hhjax.data.stream import Host, PairSource
from hhjax.data.tokenizer import Tokenizer
from hhjax.types import PackedPairs, PackedReplies, Tokens, Vocabulary

MOST = 16  # pairs a row
ENDS = 16  # what the number of a row's ends of replies is a multiple of
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
        count = -(-max(len(first_fit(pair_sizes(self.tokens_of[share]), (self.width, MOST))) for share in shares) // step) * step
        shape, most = (count, self.width), min(MOST, len(rows))
        ends, weight = np.zeros((count, most, 2), np.int32), np.zeros((count, most), np.float32)
        bins = first_fit(pair_sizes(self.tokens_of[rows]), (self.width, MOST))
        laid, places = lay([[(self._prompts[i], self._replies[i]) for i in rows[members]] for members in bins], *shape, self.pad_id)
        for (r, n, _, spans), row in zip(places, rows[np.concatenate(bins)]):
            ends[r, n] = [stop - 1 for _, stop in spans]
            weight[r, n] = self.weights[row]
        return PackedPairs(*laid, ends, weight)

    def _ordered(self, seed: int, epoch: int) -> np.ndarray:
        rng = np.random.Generator(np.random.Philox(key=[seed, epoch]))
        order = rng.permutation(self.size)[: self.steps_per_epoch * self.batch_size]
        window = self.window * self.batch_size
        batches = []
        for part in np.split(order, range(window, len(order), window)):
            alike = part[np.argsort(self.tokens_of[part], kind="stable")].reshape(self.batch_size, -1)
            batches.append(rng.permuted(alike, axis=1).T)
        return rng.permuted(np.concatenate(batches), axis=1)  # or one host would have the short pairs


def lay(rows, count: int, width: int, pad_id: int):
    """Prompts and their replies laid end to end: (tokens, positions, pair, branch), [count, width] int32 each as in PackedPairs; and for
    every prompt in order its row, its number there, where it ends, and the (start, stop) of each reply.

    rows: of each row its (prompt, replies), arrays of ids.
    """
    shape = (count, width)
    tokens, positions, branch = np.full(shape, pad_id, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    pair, places = np.full(shape, -1, np.int32), []
    for r, items in enumerate(rows):
        at = 0
        for n, (prompt, replies) in enumerate(items):
            spans = []
            for b, part in enumerate((prompt, *replies)):
                here, start = np.s_[r, at : at + len(part)], len(prompt) if b else 0
                tokens[here], pair[here], branch[here] = part, n, b
                positions[here] = start + np.arange(len(part))
                spans.append((at, at + len(part)))
                at += len(part)
            places.append((r, n, spans[0][1], spans[1:]))
    return (tokens, positions, pair, branch), places


class ReplyPacker(NamedTuple):
    """How replies of one to `new` tokens to prompts of at most `prompt_len` are packed: rows of two full ones.

    ways: the shards of a mesh's batch axis, whose replies stay together. copies: how many replies in a run share a prompt.
    host: which shards this process brings. halve: whether models gain where no more than half of a row's places is read, see
    `transformer.reads_apart`.
    """

    prompt_len: int
    new: int
    vocab: Vocabulary
    ways: int = 1
    copies: int = 1
    host: Host = Host()
    halve: bool = False

    @property
    def width(self) -> int:
        return -(-2 * (self.prompt_len + self.new + 2) // 8) * 8

    def pack(self, rows: Tokens, stopped: np.ndarray, batches: np.ndarray | None = None) -> PackedReplies:
        """This host's share, of numpy arrays. rows, stopped: of all samples, [B, T] and [B].

        batches: [K, b] numbers of the samples of each batch, runs of b / ways to a shard; the arrays then begin with an axis of K.
        None: one batch of all, without that axis. All have equally many rows, a number that goes by sixteenths, of which with
        `halve` half of the places are read, or all where half would take more rows. So few programs are compiled.
        """
        every = np.arange(len(rows.length))[None] if batches is None else batches
        if every.shape[1] % (self.ways * self.copies):
            raise ValueError(f"{every.shape[1]} replies in runs of {self.copies} do not divide into {self.ways} shards; use a multiple of both")
        shards = every.reshape(len(every), self.ways, -1)
        items = [[[item for run in runs(shard, self.copies) for item in self._items(rows, stopped, run)] for shard in batch] for batch in shards]
        length = rows.length - rows.prompt_len
        size = lambda run, prompt, replies: (len(prompt) + sum(map(len, replies)), int(length[run].sum()))  # noqa: E731
        sizes = [[[size(*item) for item in of] for of in batch] for batch in items]
        step = -(-shards.shape[2] // 32)  # a sixteenth of the most rows that there can be, two replies in each

        def filled(read: int):
            """Bins in which no row is read in more places, and how many rows they are."""
            bins = [[first_fit(of, (self.width, read)) for of in batch] for batch in sizes]
            return bins, -(-max(len(of) for batch in bins for of in batch) // step) * step

        (bins, count), read, half = filled(self.width), None, self.width // 2
        if self.halve and all(n <= half for batch in sizes for of in batch for _, n in of) and (tried := filled(half))[1] <= count:
            (bins, count), read = tried, half
        of_shards = [(of, found) for batch, into in zip(items, bins) for of, found in zip(batch, into)]
        ends = max(sum(len(of[i][0]) for i in members) for of, found in of_shards for members in found)
        ends = -(-ends // ENDS) * ENDS
        mine = np.split(np.arange(self.ways), self.host.count)[self.host.index]
        join = lambda parts: jax.tree.map(lambda *x: np.concatenate(x), *parts)  # noqa: E731
        laid = [join([self._shard(rows, shards[k, w], items[k][w], bins[k][w], count, read, ends) for w in mine]) for k in range(len(every))]
        return laid[0] if batches is None else jax.tree.map(lambda *x: np.stack(x), *laid)

    def _items(self, rows: Tokens, stopped, run):
        """(numbers, prompt, closed replies) of samples that share a prompt, as many together as a row holds."""
        closing = [[self.vocab.eoc] if stopped[i] else [self.vocab.eot, self.vocab.eoc] for i in run]
        prompt = rows.tokens[run[0], : rows.prompt_len[run[0]]]
        replies = [np.append(rows.tokens[i, len(prompt) : rows.length[i]], end).astype(np.int32) for i, end in zip(run, closing)]
        start, used = 0, len(prompt)
        for at, reply in enumerate(replies):
            if used + len(reply) > self.width:
                yield run[start:at], prompt, replies[start:at]
                start, used = at, len(prompt)
            used += len(reply)
        yield run[start:], prompt, replies[start:]

    def _shard(self, rows: Tokens, shard, items, bins, count: int, reads: int | None, most_ends: int) -> PackedReplies:
        """reads, most_ends: how many places before a reply's tokens, and how many ends, a row has room for."""
        length = (rows.length - rows.prompt_len)[shard].astype(np.int32)
        size, ids, ends = len(shard), np.arange(self.new), np.zeros((count, most_ends), np.int32)
        read = None if reads is None else np.zeros((count, reads), np.int32)
        reply, before, end = np.full((size, self.new), self.vocab.pad, np.int32), np.zeros((size, self.new), np.int32), np.zeros(size, np.int32)
        place = {sample: k for k, sample in enumerate(shard)}
        laid, places = lay([[items[i][1:] for i in members] for members in bins], count, self.width, self.vocab.pad)
        used = np.zeros((count, 2), int)  # of reads and of ends, so far in each row
        for (r, _, prompt_end, spans), i in zip(places, np.concatenate(bins)):
            for (start, stop), sample in zip(spans, items[i][0]):
                k, (at, n) = place[sample], used[r]
                token = np.minimum(ids, length[k] - 1)
                sees = np.where(token == 0, prompt_end, start + token) - 1
                reply[k, : length[k]] = rows.tokens[sample, rows.prompt_len[sample] : rows.length[sample]]
                if read is None:
                    before[k] = r * self.width + sees
                else:
                    read[r, at : at + length[k]], before[k] = sees[: length[k]], r * reads + at + token
                ends[r, n], end[k] = stop - 1, r * most_ends + n
                used[r] += length[k], 1
        return PackedReplies(*laid, read, ends, reply, length, before, end)


def pair_sizes(tokens: np.ndarray) -> np.ndarray:
    """What `first_fit` is told of pairs: the tokens of each, and that it is one."""
    return np.stack([tokens, np.ones_like(tokens)], 1)


def runs(numbers: np.ndarray, size: int) -> list[np.ndarray]:
    """Runs of `size`; the last may be shorter."""
    return np.split(numbers, range(size, len(numbers), size))


def first_fit(sizes: Sequence[Sequence[int]], capacity: Sequence[int]) -> list[list[int]]:
    """The numbers of the items in each bin. sizes: of each item, of one kind or several, [n, kinds]; capacity: what a bin holds of each kind.

    Those with the most of the first kind come first, each into the first bin with room. Where that kind alone fills bins, at most 11/9 of the
    fewest possible and one more (first-fit decreasing, Johnson 1973). No size may be above its capacity.
    """
    sizes = np.asarray(sizes).reshape(-1, len(capacity))
    bins, room = [], np.tile(capacity, (len(sizes), 1))
    for i in np.argsort(-sizes[:, 0], kind="stable"):
        found = int(np.argmax(np.all(room[: len(bins) + 1] >= sizes[i], axis=1)))  # the last of these is a new one
        if found == len(bins):
            bins.append([])
        bins[found].append(int(i))
        room[found] -= sizes[i]
    return bins
