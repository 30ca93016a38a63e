"""Human comparisons: rows of any common layout as (prompt, chosen, rejected), their mixtures and their split."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hhjax.data.records import DataError, DataReport, Malformed, is_record_file, read_records
from hhjax.data.sources import data_notes, find_source
from hhjax.data.transcripts import (ASSISTANT, HUMAN, OPEN_REPLY, Turn, canonical, has_marker, parse_transcript, render,
                                    split_pair)

FOLDS = 5
MAX_CHARS = 1 << 20

log = logging.getLogger("hhjax.data")


class Comparison(NamedTuple):
    """Two replies to one prompt, the first preferred by a person.

    prompt: transcript text that ends in "\\n\\nAssistant:". chosen, rejected: what follows,
    stripped; in a few rows several turns. weight: the pair's weight in the loss.
    """

    prompt: str
    chosen: str
    rejected: str
    source: str = ""
    weight: float = 1.0


@dataclass(frozen=True)
class ComparisonData:
    """Which comparisons a stage reads; all choices but `fold` and `overlap` shape the training side only."""

    sources: tuple[str, ...] = ("helpful-base", "harmless-base")  # tranches, files, or folders with train and test
    shares: tuple[float, ...] = ()  # of each source in the mixture, to scale; empty: every row
    limit: int | None = None  # rows in all, the first of a fixed permutation, so that smaller sets nest
    loss_weights: tuple[float, ...] = ()  # of each source's pairs: the paper's lambda for harmless ones, section 5.1.2
    fold: int = 0  # which fifth is the test side where no official split exists
    half: str | None = None  # "A" or "B": half of the training openings, for a train and a test PM (section 4.2)
    overlap: str = "error"  # an opening prompt on both sides: "error", or "drop" its training rows
    strict: bool = False  # a malformed row is an error

    def __post_init__(self):
        for name in ("shares", "loss_weights"):
            values = getattr(self, name)
            if values and (len(values) != len(self.sources) or min(values) < 0 or not any(values)):
                raise DataError(f"{name} {values}: give one number >= 0 for each of {self.sources}, not all 0")
        for name, allowed in (("fold", range(FOLDS)), ("half", (None, "A", "B")), ("overlap", ("error", "drop"))):
            if getattr(self, name) not in allowed:
                raise DataError(f"{name} {getattr(self, name)!r}: use one of {', '.join(map(repr, allowed))}")
        if self.limit is not None and self.limit < 1:
            raise DataError(f"limit {self.limit}: use at least 1 row, or None for all")
        if not self.sources or len(set(self.sources)) < len(self.sources):
            raise DataError(f"sources {self.sources}: name at least one, and each once")


def opening(prompt: str) -> str:
    """The first Human turn, stripped: what tells dialogues apart when train and test are compared."""
    return next(turn.text for turn in parse_transcript(prompt) if turn.role == HUMAN)


def opening_hash(prompt: str) -> int:
    """32 bits of sha256 of the opening; test where `% 5` equals the fold. Rests on the text alone, so on no order."""
    return int(hashlib.sha256(opening(prompt).encode()).hexdigest()[:8], 16)


def read_comparisons(path: str | Path, strict: bool = False, source: str | None = None,
                     weight: float = 1.0) -> tuple[list[Comparison], DataReport]:
    """The comparisons of one file, and the report on rows that were skipped.

    Raises DataError if the file is missing or unknown, and with `strict` if a row is malformed.
    """
    rows, report, path = [], DataReport(), Path(path)
    for line, record in read_records(path):
        report.read += 1
        try:
            rows.append(to_comparison(record, source or path.name, weight))
        except Malformed as error:
            report.skip(path, line, error)
    report.kept = len(rows)
    if strict:
        report.require_clean()
    return rows, report


def check_data(path: str | Path, strict: bool = False) -> DataReport:
    """The report on a comparison file, or on every one in a folder: what `hhjax check-data` prints."""
    path = Path(path)
    files = sorted(filter(is_record_file, path.rglob("*"))) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path} holds no comparison file: .jsonl, .json, .parquet (or .gz)")
    report = sum((read_comparisons(file)[1] for file in files), DataReport())
    report.notes.append(f"{path}: {len(files)} file{'s' * (len(files) > 1)}")
    if strict:
        report.require_clean()
    return report


def load_comparisons(data: ComparisonData, split: str = "train",
                     data_dir: str | Path | None = None) -> tuple[list[Comparison], DataReport]:
    """One side of `data` and the report on all files read; test rows come in file order, whatever the mixture.

    Raises DataError if an opening prompt stands on both sides (unless overlap="drop"), or
    if the mixture asks for more rows than there are.
    """
    if split not in ("train", "test"):
        raise DataError(f"split {split!r}: use 'train' or 'test'")
    train, test, report = _read_sides(data, data_dir)
    train = _without_overlap(train, test, data.overlap, report)
    if split == "test":
        rows = [row for group in test for row in group]
    else:
        rows = mix([_in_half(group, data.half) for group in train], data.shares, data.limit)
    if not rows:
        raise DataError(f"{', '.join(data.sources)}: no {split} rows; {report}")
    report.notes.append(f"{split}: {len(rows):,} comparisons")
    log.info("%s", report)
    return rows, report


def mix(groups: Sequence[Sequence[Comparison]], shares: Sequence[float] = (),
        limit: int | None = None) -> list[Comparison]:
    """Rows of all groups in the proportion of `shares` (empty: of their sizes), each group in a fixed random order.

    Row k of a group stands at (k + 1/2) / share and rows are taken in that order, so
    every smaller limit is a prefix of a larger one, in proportion up to one row a group. Ends
    where the first group runs out. Raises DataError if that is before `limit`.
    """
    shares = shares or [len(group) for group in groups]
    live = [(_permuted(group, number), share) for number, (group, share) in enumerate(zip(groups, shares)) if share > 0]
    place = [((k + 0.5) / share, number, k) for number, (group, share) in enumerate(live) for k in range(len(group))]
    end = min(((len(group) + 0.5) / share for group, share in live), default=0)
    order = sorted(at for at in place if at[0] < end)
    if limit is not None and limit > len(order):
        raise DataError(f"limit {limit} rows, but shares {tuple(shares)} of {[len(group) for group in groups]} rows "
                        f"leave {len(order)}: lower the limit or change the shares")
    return [live[number][0][k] for _, number, k in order[:limit]]


def to_comparison(row: object, source: str = "", weight: float = 1.0) -> Comparison:
    """A row of any known layout as a Comparison.

    {"chosen", "rejected"}: transcripts, or chat-message lists. {"prompt", "chosen", "rejected"}:
    the prompt a transcript, a plain text (one Human turn) or a message list; the replies plain
    texts, transcripts or message lists, which may repeat the prompt (their own copy is then used).
    System messages go before the first Human text, with a blank line. Raises Malformed.
    """
    if isinstance(row, Malformed):
        raise row
    if not isinstance(row, dict):
        raise Malformed("not an object", type(row).__name__)
    chosen, rejected = (_text(row, key) for key in ("chosen", "rejected"))
    if _is_dialogue(chosen) and _is_dialogue(rejected):
        prompt, chosen, rejected = _or_malformed(split_pair, chosen, rejected)
    elif _is_dialogue(chosen) or _is_dialogue(rejected):
        raise Malformed("one reply repeats the prompt and the other does not")
    else:
        prompt = _open_prompt(_text(row, "prompt"))
        chosen, rejected = _reply(chosen), _reply(rejected)
    return _checked(Comparison(prompt, chosen, rejected, source, weight))


def _checked(pair: Comparison) -> Comparison:
    for name, reply in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if not reply:
            raise Malformed("empty reply", name)
        if has_marker(reply) and parse_transcript(OPEN_REPLY + " " + reply)[-1].role != ASSISTANT:
            raise Malformed("the last turn is not the Assistant's", name)
    if pair.chosen == pair.rejected:
        raise Malformed("identical replies")
    if len(pair.prompt) + len(pair.chosen) + len(pair.rejected) > MAX_CHARS:
        raise Malformed("row over 1 MB")
    if not any(turn.role == HUMAN for turn in _or_malformed(parse_transcript, pair.prompt)):
        raise Malformed("no Human turn")
    return pair


def _text(row: dict, key: str) -> str:
    """A field as text: as it is, or rendered from a message list."""
    if key not in row:
        raise Malformed("missing key", key)
    value = row[key]
    if value is None:
        raise Malformed("null", key)
    if isinstance(value, list):
        return render(_turns(value, key))
    if not isinstance(value, str):
        raise Malformed("wrong type", f"{key} is {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON may spell "\\ud800", which is no character
        raise Malformed("invalid UTF-8", f"{key} holds half a surrogate pair") from None
    return value


_ROLES = {"user": HUMAN, "human": HUMAN, "assistant": ASSISTANT}


def _turns(messages: list, key: str) -> tuple[Turn, ...]:
    turns, system = [], []
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise Malformed("wrong type", f"{key} holds a message without role and content")
        role, text = message["role"].lower(), _text(message, "content").strip()
        if has_marker("\n\n" + text):
            raise Malformed("a message holds a turn marker", key)
        if role == "system":
            system.append(text)
        elif role not in _ROLES:
            raise Malformed("unknown role", key)
        else:
            before = system if _ROLES[role] == HUMAN else []
            turns.append(Turn(_ROLES[role], "\n\n".join([*before, text])))
            system = [] if before else system
    if not turns or system:
        raise Malformed("no turn", key)
    return tuple(turns)


def _is_dialogue(text: str) -> bool:
    """Whether a reply repeats its prompt: then it starts with a Human turn."""
    return canonical(text).startswith("\n\nHuman:")


def _open_prompt(text: str) -> str:
    """The prompt as a transcript that ends in "\\n\\nAssistant:"; plain text is one Human turn."""
    text = canonical(text)
    if not has_marker(text):
        text = "\n\nHuman: " + text.strip()
    *_, last = _or_malformed(parse_transcript, text)
    if last == Turn(ASSISTANT, ""):
        return text.rstrip()
    if last.role == ASSISTANT:
        raise Malformed("the prompt ends in an Assistant turn")
    if not last.text:
        raise Malformed("empty prompt")
    return text.rstrip() + OPEN_REPLY


def _reply(text: str) -> str:
    """A reply without its own "Assistant:" marker."""
    return canonical(text).removeprefix(OPEN_REPLY).strip()


def _or_malformed(function, *arguments):
    try:
        return function(*arguments)
    except ValueError as error:
        raise Malformed(str(error)) from None


def _read_sides(data: ComparisonData, data_dir) -> tuple[list, list, DataReport]:
    """(train rows of each source, test rows of each source, report).

    A source without test rows of its own is split by the hash of its openings, except those that another source trains on: fresh replies
    to the training prompts of a tranche are for training beside it.
    """
    train, test, lone, report = [], [], [], DataReport(notes=data_notes(data.sources, data_dir))
    for number, name in enumerate(data.sources):
        source = find_source(name, data_dir)
        weight = data.loss_weights[number] if data.loss_weights else 1.0
        if source.test and data.fold:
            raise DataError(f"fold {data.fold}, but {name} has test rows of its own ({source.line}): use fold 0")
        rows, read = _read_files(source.train, data.strict, name, weight)
        held_out, read_test = _read_files(source.test, data.strict, name, weight)
        report += read + read_test
        report.notes.append(f"{name}: {source.line}" + ("" if source.test else f" {data.fold} of {FOLDS}"))
        train.append(rows)
        test.append(held_out)
        lone.append(not source.test)
    trained = {opening(row.prompt) for alone, group in zip(lone, train) if not alone for row in group}
    for number, rows in enumerate(train):
        if lone[number]:
            in_test = [opening(row.prompt) not in trained and opening_hash(row.prompt) % FOLDS == data.fold for row in rows]
            train[number], test[number] = ([row for row, out in zip(rows, in_test) if out == side] for side in (False, True))
    return train, test, report


def _read_files(files: Sequence[Path], strict: bool, source: str, weight: float) -> tuple[list[Comparison], DataReport]:
    rows, report = [], DataReport()
    for file in files:
        more, read = read_comparisons(file, strict, source, weight)
        rows += more
        report += read
    return rows, report


def _without_overlap(train: list, test: list, overlap: str, report: DataReport) -> list:
    """The training groups without rows whose opening also stands in a test group: dropped and noted, or an error."""
    held_out = {opening(row.prompt) for group in test for row in group}
    clean = [[row for row in group if opening(row.prompt) not in held_out] for group in train]
    dropped = sum(map(len, train)) - sum(map(len, clean))
    if dropped and overlap == "error":
        raise DataError(f"{dropped:,} training rows have an opening prompt that is also in test: a test accuracy would "
                        f"flatter; set overlap to 'drop' to leave them out of training")
    if dropped:
        report.notes.append(f"{dropped:,} training rows dropped: their opening prompt is also in test")
    return clean


def _in_half(rows: list[Comparison], half: str | None) -> list[Comparison]:
    """Half of the openings, by the parity of their hash, which is independent of its remainder by 5."""
    return rows if half is None else [row for row in rows if opening_hash(row.prompt) % 2 == "AB".index(half)]


def _permuted(rows: Sequence, seed: int) -> list:
    return [rows[i] for i in np.random.Generator(np.random.Philox(seed)).permutation(len(rows))]
