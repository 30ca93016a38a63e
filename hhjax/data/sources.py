"""Where data lies: the data folder, the HH tranches by name (or from the hub), text for language models, and public exams."""

import gzip
import hashlib
import json
import logging
import os
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hhjax.data.records import DataError, DataReport, Malformed, is_record_file, open_bytes, read_records
from hhjax.data.transcripts import ASSISTANT, HUMAN, Turn, parse_transcript
from hhjax.process import cache_dir

COMPARISONS = ("helpful-base", "helpful-rejection-sampled", "helpful-online", "harmless-base")
RED_TEAM = "red-team-attempts"
TRANCHES = (*COMPARISONS, RED_TEAM)
HH_REPO = "Anthropic/hh-rlhf"
EVALUATION_SETS = ("hhh-alignment", "truthfulqa", "humaneval", "bbq", "mmlu", "hellaswag", "lambada", "arc",
                   "winogender", "realtoxicityprompts")  # never a source of training rows
EXAMS = {"arc-easy": "arc/arc_easy.jsonl.gz", "arc-challenge": "arc/arc_challenge.jsonl.gz", "hellaswag": "hellaswag/hellaswag.json.gz",
         "lambada": "lambada/lambada_openai.jsonl.gz", "mmlu": "mmlu/mmlu.zip"}  # read by exams.py
DOCUMENT_CHARS = 4000
VALIDATION_SHARE = 50  # one document in 50 is held out

_LEFT_OUT = ("austen-emma.raw.txt.gz",)  # the same book as austen-emma.txt.gz

log = logging.getLogger("hhjax.data")


@dataclass(frozen=True)
class TextData:
    """Text for language-model training: names of sources, or paths of .txt, .jsonl, .json, .parquet, .zip files."""

    sources: tuple[str, ...] = ("dialogue-sgd", "text-gutenberg", "text-us-speeches", "text-wikitext2")
    limit: int | None = None  # characters of training text; the first of a fixed permutation, so smaller sets nest


@dataclass(frozen=True)
class ExamData:
    """Public exams, by name (EXAMS): never a source of training rows.

    limit: questions of each, the first in the order of their hashes, so that smaller sets nest. most_chars: those whose text with
    its longest option is longer are left out, since a model trained on rows of 256 tokens cannot read a long one with examples.
    """

    sources: tuple[str, ...] = ("arc-easy", "hellaswag", "lambada", "mmlu")
    limit: int = 500
    most_chars: int = 300

    def __post_init__(self):
        unknown = [name for name in self.sources if name not in EXAMS]
        if unknown or not self.sources or len(set(self.sources)) < len(self.sources):
            raise DataError(f"exams {self.sources}: name some of {', '.join(EXAMS)}, each once")
        if self.limit < 1 or self.most_chars < 1:
            raise DataError(f"limit {self.limit} and most_chars {self.most_chars}: use at least 1 of each")


class Document(NamedTuple):
    """One text to model. turns: its dialogue turns, or None for prose, whose text is then the document."""

    text: str
    turns: tuple[Turn, ...] | None = None


class SourceFiles(NamedTuple):
    """The files of a comparison source; `line` says which. test is empty where the fold rule has to split `train`."""

    name: str
    train: tuple[Path, ...]
    test: tuple[Path, ...]
    line: str


class Attempt(NamedTuple):
    """A red-team dialogue, its success as its author rated it (0 to 4), and the PM's lowest score of a reply."""

    turns: tuple[Turn, ...]
    rating: float | None
    min_harmlessness: float | None


def find_data_dir(data_dir: str | Path | None = None) -> tuple[Path | None, str]:
    """The data folder and a line that says which: `data_dir`, else $HHJAX_DATA, else ./data, else None (the hub).

    Raises DataError if one that was asked for does not exist.
    """
    for asked, origin in ((data_dir, "--data-dir"), (os.environ.get("HHJAX_DATA"), "HHJAX_DATA")):
        if asked:
            if not Path(asked).is_dir():
                raise DataError(f"{origin} is {str(asked)!r}, which is no folder: name one, or leave it out")
            return Path(asked), f"data from {asked} ({origin})"
    if Path("data").is_dir():
        return Path("data"), "data from ./data"
    return None, f"no data folder: tranches of HH come from {hub_repo()} on the hub"


def data_notes(sources: Sequence[str], data_dir: str | Path | None = None) -> list[str]:
    """What a run says of where these sources come from, which is nothing where there is no data folder and none of them is of the hub."""
    folder, line = find_data_dir(data_dir)
    return [line] if folder or any(name in TRANCHES for name in sources) else []


def hub_repo() -> str:
    """The repository of the HH tranches; $HHJAX_HH_REPO may name another, or a local folder of the same layout."""
    return os.environ.get("HHJAX_HH_REPO", HH_REPO)


def find_source(name: str, data_dir: str | Path | None = None) -> SourceFiles:
    """The files of a comparison source, by tranche name or path (as given, or inside the data folder).

    A tranche is read from its official files where the training one is there, else from
    `hh-rlhf-split` (official test rows, split again by fold), else from the hub. Official
    test rows never meet the split's training rows. A folder holds train and test files; a lone
    file is split by fold. Raises DataError if there is nothing, or no comparisons in it.
    """
    folder, _ = find_data_dir(data_dir)
    if name == RED_TEAM:
        raise DataError(f"{RED_TEAM} holds rated transcripts, not comparisons: use it as text (its Human turns), "
                        f"and one of {', '.join(COMPARISONS)} here")
    return _tranche(name, folder) if name in COMPARISONS else _at_path(name, _find_path(name, folder))


def find_exam(name: str, data_dir: str | Path | None = None) -> Path:
    """The file of an exam. Raises DataError where it is not in the data folder: exams are not downloaded."""
    folder, _ = find_data_dir(data_dir)
    if folder is None or not (folder / EXAMS[name]).is_file():
        where = f"{folder} has no {EXAMS[name]}" if folder else f"there is no data folder to hold {EXAMS[name]}"
        raise DataError(f"exam {name}: {where}; put it there, or name a folder that has it in HHJAX_DATA or --data-dir")
    return folder / EXAMS[name]


def data_files(data, data_dir: str | Path | None = None) -> list[Path]:
    """The files that `data` (a ComparisonData, TextData or ExamData) is read from; their sha256 enters a stage's identity."""
    if isinstance(data, ExamData):
        return [find_exam(name, data_dir) for name in data.sources]
    if isinstance(data, TextData):
        return [file for name in data.sources for file in _text_files(name, data_dir)]
    found = (find_source(name, data_dir) for name in data.sources)
    return [file for source in found for file in (*source.train, *source.test)]


def load_documents(data: TextData, data_dir: str | Path | None = None, split: str = "train") -> list[Document]:
    """The documents of `data`, in source order; "test" is the one in 50 that its own hash holds out.

    Books are cut into documents of about 4,000 characters; tokenised prose is lightly
    detokenised. Of an HH tranche only the Human turns of the training file (fold 0's, where it is
    split by fold) are taken: its replies are never a target.
    """
    if split not in ("train", "test"):
        raise DataError(f"split {split!r}: use 'train' or 'test'")
    for note in data_notes(data.sources, data_dir):
        log.info("%s", note)
    files = ((name, file) for name in data.sources for file in _text_files(name, data_dir))
    documents = [document for name, file in files for document in _read_text(name, file)]
    side = [doc for doc in documents if (_hash(doc.text) % VALIDATION_SHARE == 0) == (split == "test")]
    if not side:
        raise DataError(f"{', '.join(data.sources) or 'no source'}: no document in the {split} part; add a source")
    return _first_characters(side, data.limit) if split == "train" and data.limit else side


def red_team_attempts(data_dir: str | Path | None = None) -> list[Attempt]:
    """The rated dialogues of red-team-attempts (Ganguli et al. 2022), malformed rows left out."""
    rows = [row for file in _text_files(RED_TEAM, data_dir) for _, row in read_records(file) if isinstance(row, dict)]
    return [Attempt(turns, row.get("rating"), row.get("min_harmlessness_score_transcript"))
            for row in rows if (turns := _turns_of(row))]


def detokenise(text: str) -> str:
    """Prose with spaces round its punctuation (NLTK's Gutenberg, WikiText) as it was, as far as regexes can tell."""
    for pattern, replacement in _DETOKENISE:
        text = pattern.sub(replacement, text)
    return text


def cut(text: str, size: int = DOCUMENT_CHARS) -> Iterator[str]:
    """Pieces of at most `size` characters, cut at a paragraph, else a line, else a sentence, else a word."""
    text = text.strip()
    while len(text) > size:
        window = text[: size + 1]
        ends = (window.rfind(mark, size // 2) + len(mark.rstrip()) for mark in ("\n\n", "\n", ". ", " "))
        end = next((end for end in ends if end >= size // 2), size)
        yield text[:end].rstrip()
        text = text[end:].lstrip()
    if text:
        yield text


# The HH tranches.


def _tranche(name: str, folder: Path | None) -> SourceFiles:
    if folder:
        official, split = folder / "hh-rlhf" / name, folder / "hh-rlhf-split" / name
        train, test = _part(official, "train"), _part(official, "test")
        if train and test:
            return SourceFiles(name, train, test, f"official train and test files in {official}")
        train, test = _part(split, "train"), _part(split, "test")
        if train and test:
            return SourceFiles(name, train + test, (), f"official test rows in {split}, split by fold")
    kept = download(name)
    line = f"official files of {hub_repo()}, kept in {kept}"
    return SourceFiles(name, _part(kept, "train"), _part(kept, "test"), line)


def _part(folder: Path, part: str) -> tuple[Path, ...]:
    """The train or test file of a folder, as a tuple of one or none."""
    files = sorted(path for path in folder.glob(f"{part}.*") if is_record_file(path))
    if len(files) > 1:
        raise DataError(f"{folder} holds {', '.join(path.name for path in files)}: keep one of them")
    return tuple(files)


def download(tranche: str, repo: str | None = None, cache: str | Path | None = None) -> Path:
    """The folder of a tranche from the hub, kept as {split}.jsonl.gz under `cache` ($HHJAX_CACHE, ~/.cache/hhjax).

    Raises DataError with the remedy if the repository cannot be read.
    """
    repo = repo or hub_repo()
    cache = Path(cache or cache_dir())
    folder = cache / re.sub(r"[^\w.-]+", "--", repo) / tranche
    if folder.is_dir():
        return folder
    import datasets

    log.info("downloading %s of %s to %s", tranche, repo, folder)
    try:
        parts = datasets.load_dataset(repo, data_dir=tranche, cache_dir=str(cache / "datasets"))
    except Exception as error:  # the hub's client has no common base class for its errors
        raise DataError(
            f"{tranche} is in no data folder and could not be read from {repo} ({type(error).__name__}): set HHJAX_DATA"
            f" or --data-dir to a folder that holds hh-rlhf/{tranche}/train.jsonl.gz and test.jsonl.gz, or go online"
        ) from error
    partial = folder.with_name(f"{tranche}.{os.getpid()}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    for part, rows in parts.items():
        _write_rows(partial / f"{part}.jsonl.gz", rows)
    try:
        partial.rename(folder)
    except OSError:  # another process was first, with the same rows
        if not folder.is_dir():
            raise
    return folder


def _write_rows(path: Path, rows) -> None:
    """Equal rows give equal bytes (no time stamp), so that a stage's identity does not depend on the day."""
    with open(path, "wb") as raw, gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


# Paths.


def _find_path(name: str, folder: Path | None) -> Path:
    """`name` as a path, else inside the data folder; evaluation sets are refused."""
    candidates = [Path(name)] + ([folder / name] if folder else [])
    path = next((path for path in candidates if path.exists()), None)
    if path is None:
        where = f" or in {folder}" if folder else "; set HHJAX_DATA or --data-dir to the data folder"
        if "/" in name or Path(name).suffix:
            raise DataError(f"no file {name!r} here{where}")
        known = ", ".join((*TRANCHES, *_READERS))
        raise DataError(f"no data {name!r} here{where}; names known: {known}; or give a path")
    if evaluation := set(path.parts) & set(EVALUATION_SETS):
        raise DataError(f"{name} is part of {evaluation.pop()}, which is for evaluation only: leave it out of training")
    return path


def _at_path(name: str, path: Path) -> SourceFiles:
    if path.is_file():
        return SourceFiles(name, (path,), (), f"{path}, split by fold")
    train, test = _part(path, "train"), _part(path, "test")
    if train and test:
        return SourceFiles(name, train, test, f"train and test files in {path}")
    files = _part(path, "comparisons") or tuple(sorted(filter(is_record_file, path.iterdir())))
    if not files:
        raise DataError(f"{path} holds no comparison file: put train.jsonl and test.jsonl there, or name a file")
    return SourceFiles(name, files, (), f"{', '.join(file.name for file in files)} in {path}, split by fold")


# Text.


def _text_files(name: str, data_dir: str | Path | None) -> tuple[Path, ...]:
    folder, _ = find_data_dir(data_dir)
    if name == RED_TEAM:
        local = folder / "hh-rlhf" / name if folder else None
        return tuple(sorted(filter(is_record_file, (local if local and local.is_dir() else download(name)).iterdir())))
    if name in COMPARISONS:
        source = _tranche(name, folder)
        return source.train[:1]
    path = _find_path(name, folder)
    if path.is_file():
        return (path,)
    files = sorted(file for file in path.iterdir() if _is_text(file) and file.name not in _LEFT_OUT)
    if not files:
        raise DataError(f"{path} holds no text file: .txt, .jsonl, .json, .parquet (or .gz), .zip")
    return tuple(files)


def _is_text(path: Path) -> bool:
    return path.name.endswith((".txt", ".txt.gz", ".zip")) or is_record_file(path)


def _read_text(name: str, path: Path) -> Iterator[Document]:
    """The documents of one file of the source `name`."""
    if name in TRANCHES:
        yield from _human_turns(path)
    elif path.suffix == ".zip":
        yield from _zip_documents(path)
    elif is_record_file(path):
        yield from _row_documents(path)
    elif path.name.endswith((".txt", ".txt.gz")):
        with open_bytes(path) as file:
            text = _READERS.get(name, str)(_decode(file.read()))
        yield from map(Document, cut(text))
    else:
        raise DataError(f"{path} has no known format: name it .txt, .jsonl, .json, .parquet (or .gz) or .zip")


def _row_documents(path: Path) -> Iterator[Document]:
    """Rows with "text", or with a dialogue in "turns" or "messages"; the log says how many are neither."""
    report = DataReport()
    for line, row in read_records(path):
        report.read += 1
        if isinstance(row, dict) and isinstance(row.get("text"), str):
            yield from map(Document, cut(_encodable(row["text"])))
        elif isinstance(row, dict) and (turns := _turns_of(row)):
            yield _dialogue(turns)
        else:
            report.skip(path, line, row if isinstance(row, Malformed) else Malformed("neither a text nor a dialogue"))
    report.kept = report.read - len(report.skipped)
    if report.skipped:
        log.warning("%s", report)


def _encodable(text: str) -> str:
    """The text with "?" for half surrogate pairs, which JSON can spell and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()


_ROLES = {"user": HUMAN, "human": HUMAN, "system": ASSISTANT, "assistant": ASSISTANT}  # SGD calls its assistant SYSTEM


def _turns_of(row: dict) -> tuple[Turn, ...]:
    """The turns of SGD's {"speaker", "utterance"}, of chat messages, or of an HH "transcript"; () if it has none."""
    try:
        if "transcript" in row:
            return parse_transcript(_encodable(row["transcript"]))
        said = [(turn["speaker"], turn["utterance"]) for turn in row["turns"]] if "turns" in row else [
            (turn["role"], turn["content"]) for turn in row["messages"] if turn["role"] != "system"]
        return tuple(Turn(_ROLES[role.lower()], _encodable(text.strip())) for role, text in said)
    except (KeyError, TypeError, AttributeError, ValueError):
        return ()


def _human_turns(path: Path) -> Iterator[Document]:
    """What people wrote in an HH tranche, a document a dialogue; the replies are left out."""
    for _, row in read_records(path):
        if not isinstance(row, dict):
            continue
        turns = _turns_of({"transcript": row.get("transcript", row.get("chosen"))})
        if human := tuple(turn for turn in turns if turn.role == HUMAN):
            yield _dialogue(human)


def _dialogue(turns: tuple[Turn, ...]) -> Document:
    return Document("\n\n".join(f"{turn.role}: {turn.text}" for turn in turns), turns)


def _zip_documents(path: Path) -> Iterator[Document]:
    with zipfile.ZipFile(path) as file:
        for name in sorted(file.namelist()):
            if name.endswith(".txt"):
                yield from map(Document, cut(_decode(file.read(name))))


def _decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return raw.decode("latin-1").replace("\r\n", "\n")


def _gutenberg(text: str) -> str:
    """Sentences, one a line, as running text; a line that ends in no punctuation is a heading and stays alone."""
    return detokenise(re.sub(r"(?<=[.!?,;:'\"`\-])[ \t]*\n(?=\S)", " ", text))


def _wikitext(text: str) -> str:
    """Articles without the sentences that hold <unk>, and without the = marks of headings."""
    lines = (re.sub(r"^(= )+(.*?)( =)+$", r"\2", line.strip()) for line in text.split("\n"))
    known = (" ".join(part for part in re.split(r"(?<= [.!?]) ", line) if "<unk>" not in part) for line in lines)
    return detokenise("\n".join(line for line in known if line))


_READERS = {"dialogue-sgd": str, "text-gutenberg": _gutenberg, "text-us-speeches": str, "text-wikitext2": _wikitext,
            "text-tinyshakespeare": str}

_DETOKENISE = tuple((re.compile(pattern), replacement) for pattern, replacement in (
    (r" @([-,.])@ ", r"\1"),
    (r"`` ?| ?''", '"'),
    (r'(?<![^\s(])" ([^"\n]+?) "(?=[\s,.;:!?)]|$)', r'"\1"'),
    (r" ([,.;:!?%)\]}]+)", r"\1"),
    (r"([(\[{$£]) ", r"\1"),
    (r"(?<=\w)' (?=(?:m|ve|ll|re|d)\b)", "'"),
    (r" ('(?:s|d|m|ll|re|ve|t)\b|n't\b)", r"\1"),
    (r"` ", "'"),
    (r" '(?=[ ,.;:!?]|$)", "'"),
    (r" ?-- ?", "--"),
    (r" - ", "-"),
))


def _hash(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)


def _first_characters(documents: list[Document], limit: int) -> list[Document]:
    """Documents of a fixed permutation until `limit` characters are reached, at least one."""
    order = np.random.Generator(np.random.Philox(0)).permutation(len(documents))
    ends = np.cumsum([len(documents[i].text) for i in order])
    return [documents[i] for i in order[: max(1, int(np.searchsorted(ends, limit, side="right")))]]
