"""Rows of token ids, and batches that are a pure function of (seed, step, host)."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from hhjax.data.comparisons import Comparison
from hhjax.data.records import DataError
from hhjax.data.sources import Document
from hhjax.data.tokenizer import Tokenizer
from hhjax.data.transcripts import ASSISTANT, OPEN_REPLY, Turn, parse_transcript
from hhjax.types import Pairs, Tokens

WINDOW = 16  # batches whose rows are sorted by length together: enough to pad little, too few to order an epoch
_CHUNK = 8192  # texts a call of the tokenizer


class Host(NamedTuple):
    """One of the processes that share every batch."""

    index: int = 0
    count: int = 1


def encode_prompt(tok: Tokenizer, prompt: str) -> np.ndarray:
    """The ids of a transcript that ends in "\\n\\nAssistant:", int32.

    Each turn is its header, then " text", encoded apart so that a reply has the same ids as a
    past turn and as a sample; every past Assistant turn ends in <eot>.
    """
    return _Encoder(tok).prompt(prompt)


def encode_reply(tok: Tokenizer, reply: str, stop: bool = True) -> np.ndarray:
    """The ids of what follows a prompt, int32, ending in <eot> if `stop`. Inner turns are encoded like a prompt's."""
    ids = _Encoder(tok).reply(reply)
    return ids if stop else ids[:-1]


def encode_document(tok: Tokenizer, document: Document) -> np.ndarray:
    """The ids of a document, its turns like a prompt's, int32, ending in <eot>."""
    return _Encoder(tok).document(document)


class Source(ABC):
    """Rows of ids in memory, and the order in which batches take them.

    An epoch is a permutation of the rows by (seed, epoch), cut into whole batches: each row at
    most once. Rows are sorted by length inside windows of 16 batches, and the batches shuffled.
    """

    size: int  # rows
    batch_size: int  # of all hosts together
    lengths: np.ndarray  # [size], what a row is sorted and padded by
    tokens_of: np.ndarray  # [size], the tokens of a row that are no padding
    window: int = WINDOW
    _last: tuple = (None, None)

    @abstractmethod
    def take(self, rows: np.ndarray, width_of: np.ndarray | None = None):
        """The batch of these row numbers, as wide as `width_of` (all hosts' rows; default `rows`) needs."""

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches an epoch. Raises DataError if there is not even one."""
        if self.size < self.batch_size:
            raise DataError(f"{self.size} rows do not fill a batch of {self.batch_size}: lower the batch or add data")
        return self.size // self.batch_size

    def batch(self, seed: int, step: int, host: Host = Host()):
        """This host's share of batch `step` (from 0, over all epochs); the hosts' shares in order are the batch."""
        rows = self.rows_of(seed, step)
        return self.take(_share(rows, host), width_of=rows)

    def rows_of(self, seed: int, step: int) -> np.ndarray:
        """The row numbers of all hosts' batch `step`."""
        if step < 0 or seed < 0:
            raise DataError(f"seed {seed}, step {step}: both count from 0")
        epoch, place = divmod(step, self.steps_per_epoch)
        return self._epoch(seed, epoch)[place]

    def _epoch(self, seed: int, epoch: int) -> np.ndarray:
        """Row numbers [steps_per_epoch, batch_size] of an epoch; the last one asked for is kept."""
        if self._last[0] != (seed, epoch):
            self._last = (seed, epoch), self._ordered(seed, epoch)
        return self._last[1]

    def _ordered(self, seed: int, epoch: int) -> np.ndarray:
        # The rows that fill no batch are cut off while the order is random: no length is favoured.
        rng = np.random.Generator(np.random.Philox(key=[seed, epoch]))
        order = rng.permutation(self.size)[: self.steps_per_epoch * self.batch_size]
        if self.window == 1:  # in the order drawn: sorted rows would give one host the short ones
            return order.reshape(-1, self.batch_size)
        window = self.window * self.batch_size
        by_length = [part[np.argsort(self.lengths[part], kind="stable")]
                     for part in np.split(order, range(window, len(order), window))]
        return rng.permutation(np.concatenate(by_length).reshape(-1, self.batch_size))


class PairSource(Source):
    """Comparisons as rows [prompt, reply, <eot>, <eoc>], encoded once; batches are Pairs.

    A row over `seq_len` loses tokens from the left of its prompt, as many on both sides
    (`truncated` counts such pairs). A pair whose longer reply does not fit whole, behind at least the
    open Assistant header, is left out (`too_long` counts them). `rows` are the comparisons kept, in order.
    """

    def __init__(self, rows: Iterable[Comparison], tok: Tokenizer, seq_len: int, batch_size: int,
                 widths: Sequence[int] | None = None):
        """widths: the lengths a batch may be padded to, up to `seq_len`; default 64, 96, 128, 192, 256, ...
        and `seq_len`. Each is a compilation; by doubling alone fewer tokens are real (on HH at 512: 0.63, not 0.70)."""
        rows = list(rows)
        encoder = _Encoder(tok)
        encoder.learn(part for row in rows for part in _pair_parts(row))
        header, end = len(encoder[OPEN_REPLY]), np.array([tok.eoc_id], np.int32)
        self.batch_size, self.seq_len, self.pad_id = batch_size, seq_len, tok.pad_id
        self.widths = _widths(widths, seq_len)
        self.truncated = self.too_long = 0
        kept, self._prompts, self._replies = [], [], []
        for row in rows:
            prompt = encoder.prompt(row.prompt)
            replies = [np.concatenate([encoder.reply(reply), end]) for reply in (row.chosen, row.rejected)]
            room = seq_len - max(map(len, replies))
            if room < header:
                self.too_long += 1
                continue
            if len(prompt) > room:
                self.truncated += 1
                prompt = prompt[-room:].copy()
            kept.append(row)
            self._prompts.append(prompt)
            self._replies.append(replies)
        if not kept:
            raise DataError(f"none of {len(rows)} pairs fits in {seq_len} tokens: give pairs, or a larger seq_len")
        self.rows, self.size = tuple(kept), len(kept)
        self.weights = np.array([row.weight for row in kept], np.float32)
        prompts = np.array([len(prompt) for prompt in self._prompts], np.int32)
        replies = np.array([[len(reply) for reply in both] for both in self._replies], np.int32)
        self.lengths, self.tokens_of = prompts + replies.max(1), 2 * prompts + replies.sum(1)

    def take(self, rows: np.ndarray, width_of: np.ndarray | None = None) -> Pairs:
        """Pairs of [len(rows), width] numpy arrays, width the next of `widths`."""
        longest = self.lengths[rows if width_of is None else width_of].max()
        width = self.widths[np.searchsorted(self.widths, longest)]
        chosen, rejected = (self._tokens(rows, side, width) for side in (0, 1))
        return Pairs(chosen, rejected, self.weights[rows])

    def _tokens(self, rows: np.ndarray, side: int, width: int) -> Tokens:
        tokens = np.full((len(rows), width), self.pad_id, np.int32)
        prompt_len, length = np.zeros(len(rows), np.int32), np.zeros(len(rows), np.int32)
        for at, row in enumerate(rows):
            prompt, reply = self._prompts[row], self._replies[row][side]
            prompt_len[at], length[at] = len(prompt), len(prompt) + len(reply)
            tokens[at, : prompt_len[at]] = prompt
            tokens[at, prompt_len[at] : length[at]] = reply
        return Tokens(tokens, prompt_len, length)


class PromptSource(Source):
    """Distinct prompts to sample replies to, each ending in the open Assistant header; batches are Tokens [B, width].

    A prompt over `width` loses tokens from its left (`truncated` counts them). All batches have one width and no row is
    sorted by length: a batch of short prompts alone would make one rollout unlike the next. `prompts` are the texts.
    """

    window = 1

    def __init__(self, prompts: Iterable[str], tok: Tokenizer, width: int, batch_size: int):
        self.prompts, encoder = tuple(dict.fromkeys(prompts)), _Encoder(tok)
        encoder.learn(part for prompt in self.prompts for part in _all_parts(parse_transcript(prompt)))
        whole = [encoder.prompt(prompt) for prompt in self.prompts]
        if not whole:
            raise DataError("no prompts to sample replies to: name comparisons that have some")
        if width < len(encoder[OPEN_REPLY]):
            raise DataError(f"prompts of {width} tokens hold not even {OPEN_REPLY!r}: use a larger width")
        self._rows, self.truncated = [row[-width:] for row in whole], sum(len(row) > width for row in whole)
        self.size, self.batch_size, self.width, self.pad_id = len(whole), batch_size, width, tok.pad_id
        self.lengths = self.tokens_of = np.array([len(row) for row in self._rows], np.int32)

    def take(self, rows: np.ndarray, width_of: np.ndarray | None = None) -> Tokens:
        """Tokens of [len(rows), width] numpy arrays; the whole row is prompt."""
        tokens = np.full((len(rows), self.width), self.pad_id, np.int32)
        for at, row in enumerate(rows):
            tokens[at, : len(self._rows[row])] = self._rows[row]
        return Tokens(tokens, self.lengths[rows], self.lengths[rows])


class LMSource(Source):
    """Documents, each ending in <eot>, joined and cut into rows of exactly `seq_len` ids; batches are Tokens.

    prompt_len is 0 and length `seq_len`: every token but a row's first is a target. The remainder of the last row
    is left out. `n_tokens` counts the ids in rows.
    """

    def __init__(self, documents: Iterable[Document], tok: Tokenizer, seq_len: int, batch_size: int):
        documents, encoder = list(documents), _Encoder(tok)
        encoder.learn(part for doc in documents
                      for part in ([doc.text] if doc.turns is None else _all_parts(doc.turns)))
        stream = np.concatenate([np.zeros(0, np.int32), *map(encoder.document, documents)])
        self.size, self.batch_size, self.seq_len = len(stream) // seq_len, batch_size, seq_len
        if not self.size:
            raise DataError(f"documents of {len(stream)} tokens in all do not fill a row of {seq_len}: add text")
        self.n_tokens = self.size * seq_len
        self._rows = stream[: self.n_tokens].reshape(self.size, seq_len)
        self.lengths = self.tokens_of = np.full(self.size, seq_len, np.int32)

    def take(self, rows: np.ndarray, width_of: np.ndarray | None = None) -> Tokens:
        """Tokens of [len(rows), seq_len] numpy arrays."""
        return Tokens(self._rows[rows], np.zeros(len(rows), np.int32), self.lengths[rows])


class _Encoder:
    """Ids of turns; each distinct header and " text" is encoded once, and in large calls."""

    def __init__(self, tok: Tokenizer):
        self.tok, self.ids = tok, {}
        self.eot = np.array([tok.eot_id], np.int32)

    def learn(self, texts: Iterable[str]) -> None:
        """Encode ahead."""
        new = sorted(set(texts) - self.ids.keys())
        for start in range(0, len(new), _CHUNK):
            chunk = new[start : start + _CHUNK]
            self.ids.update(zip(chunk, (np.array(ids, np.int32) for ids in self.tok.encode_batch(chunk))))

    def prompt(self, text: str) -> np.ndarray:
        *past, last = parse_transcript(text)
        if last != Turn(ASSISTANT, ""):
            raise DataError(f"a prompt must end in {OPEN_REPLY!r}: add it")
        return np.concatenate([*self._turns(past), self[OPEN_REPLY]])

    def reply(self, text: str) -> np.ndarray:
        """Without the header, which is the prompt's."""
        return np.concatenate(self._turns(_reply_turns(text))[1:])

    def document(self, document: Document) -> np.ndarray:
        if document.turns is None:
            return np.concatenate([self[document.text], self.eot])
        ends = bool(document.turns) and document.turns[-1].role == ASSISTANT
        return np.concatenate(self._turns(document.turns) + ([] if ends else [self.eot]))

    def _turns(self, turns: Iterable[Turn]) -> list[np.ndarray]:
        return [ids for turn in turns
                for ids in (*map(self.__getitem__, _parts(turn)), *([self.eot] if turn.role == ASSISTANT else ()))]

    def __getitem__(self, text: str) -> np.ndarray:
        if text not in self.ids:
            self.learn([text])
        return self.ids[text]


def _parts(turn: Turn) -> tuple[str, ...]:
    """The texts of a turn that are encoded apart: its header, and " text" if there is any."""
    return (f"\n\n{turn.role}:", " " + turn.text) if turn.text else (f"\n\n{turn.role}:",)


def _all_parts(turns: Iterable[Turn]) -> Iterator[str]:
    return (part for turn in turns for part in _parts(turn))


def _pair_parts(row: Comparison) -> Iterator[str]:
    turns = (parse_transcript(row.prompt), _reply_turns(row.chosen), _reply_turns(row.rejected))
    return (part for some in turns for part in _all_parts(some))


def _reply_turns(reply: str) -> tuple[Turn, ...]:
    return parse_transcript(f"{OPEN_REPLY} {reply}")


def _share(rows: np.ndarray, host: Host) -> np.ndarray:
    """The rows of one host: the batch cut into equal runs."""
    if len(rows) % host.count or not 0 <= host.index < host.count:
        raise DataError(f"a batch of {len(rows)} cannot be shared by host {host.index} of {host.count}: use a multiple")
    share = len(rows) // host.count
    return rows[host.index * share : (host.index + 1) * share]


def _widths(widths: Sequence[int] | None, seq_len: int) -> np.ndarray:
    """The widths below `seq_len`, and `seq_len`; by default 64 and 96, doubled and doubled."""
    default = (width << k for k in range(seq_len.bit_length()) for width in (64, 96))
    return np.array(sorted({width for width in widths or default if width < seq_len} | {seq_len}))
