"""Rows of jsonl, json and parquet files one by one, the malformed among them with their reason, and the report."""

import codecs
import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

MAX_LINE = 1 << 20  # bytes; no comparison is that long, so a longer line is a damaged file
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")

_DAMAGED_GZIP = (EOFError, zlib.error, gzip.BadGzipFile)


class DataError(ValueError):
    """Data that is missing, malformed or contradictory; the message names it and the remedy."""


class Malformed(ValueError):
    """One row that cannot be used. `reason` is a fixed phrase to count by, `detail` says where."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason


class Skipped(NamedTuple):
    """A row left out. line counts from 1; in a .json list or a parquet file it is the number of the row."""

    file: str
    line: int
    reason: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}"


@dataclass
class DataReport:
    """What was read and what was left out; printing it shows no row's contents."""

    read: int = 0
    kept: int = 0
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def reasons(self) -> Counter:
        """How many rows were skipped for each reason."""
        return Counter(row.reason for row in self.skipped)

    def skip(self, file: Path, line: int, error: Malformed) -> None:
        self.skipped.append(Skipped(str(file), line, error.reason, str(error)))

    def require_clean(self) -> None:
        """Raise DataError if any row was skipped: what `strict` asks for."""
        if self.skipped:
            raise DataError(f"malformed rows under strict: repair them, or leave strict out to skip them\n{self}")

    def __add__(self, other: "DataReport") -> "DataReport":
        return DataReport(self.read + other.read, self.kept + other.kept,
                          self.skipped + other.skipped, self.notes + other.notes)

    def __str__(self) -> str:
        return self.text(10)

    def text(self, shown: int) -> str:
        """The notes, the counts, and the first `shown` rows that were skipped."""
        lines = [*self.notes, f"{self.read:,} rows read, {self.kept:,} kept, {len(self.skipped):,} skipped"]
        lines += [f"  {count:>7,}  {reason}" for reason, count in self.reasons.most_common()]
        lines += [f"  {row}" for row in self.skipped[:shown]]
        if len(self.skipped) > shown:
            lines.append(f"  ... and {len(self.skipped) - shown:,} more")
        return "\n".join(lines)


def is_record_file(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)


def read_records(path: Path) -> Iterator[tuple[int, object]]:
    """Yield (line, row) in file order; a row that cannot be decoded is yielded as its `Malformed`.

    Reads .jsonl, .json (a list, or lines), .gz of either, and .parquet, by suffix.
    Lines end at b"\\n" only: strings in HH hold U+2028 and U+0085.
    """
    name = path.name.lower()
    if not path.is_file():
        raise DataError(f"no file {path}: check the path")
    if name.endswith(".parquet"):
        return _parquet_rows(path)
    if name.endswith((".json", ".json.gz")):
        return _json_rows(path)
    if name.endswith((".jsonl", ".jsonl.gz")):
        return _lines(path)
    raise DataError(f"{path} has no known format: name it {', '.join(SUFFIXES)}")


def open_bytes(path: Path) -> BinaryIO:
    return gzip.open(path) if path.name.lower().endswith(".gz") else open(path, "rb")


def _lines(path: Path) -> Iterator[tuple[int, object]]:
    with open_bytes(path) as file:
        number = 0
        while True:
            number += 1
            try:
                line = file.readline(MAX_LINE + 1)
                if len(line) > MAX_LINE:
                    size = len(line) + _skip_line(file, line)
                    yield number, Malformed("line over 1 MB", f"{size:,} bytes")
                    continue
            except _DAMAGED_GZIP as error:
                yield number, Malformed("damaged gzip", f"{type(error).__name__}; the rest of the file is lost")
                return
            if not line:
                return
            if line.strip():
                yield number, _decode(line)


def _skip_line(file: BinaryIO, line: bytes) -> int:
    """Read on to the end of the line; returns the bytes skipped."""
    skipped = 0
    while line and not line.endswith(b"\n"):
        line = file.readline(MAX_LINE)
        skipped += len(line)
    return skipped


def _decode(line: bytes) -> object:
    """The JSON value of `line`, or the Malformed that says why there is none."""
    try:
        return json.loads(line.removeprefix(codecs.BOM_UTF8).decode("utf-8").rstrip())  # so that what ends too soon ends in its own line
    except UnicodeDecodeError as error:
        return Malformed("invalid UTF-8", f"byte {error.start + 1}")
    except json.JSONDecodeError as error:
        return Malformed("invalid JSON", f"{error.msg}, column {error.colno}")
    except (ValueError, RecursionError) as error:
        return Malformed("invalid JSON", type(error).__name__)


def _json_rows(path: Path) -> Iterator[tuple[int, object]]:
    """A JSON list as its items; anything else is read as JSON lines, which often carry this suffix too."""
    try:
        with open_bytes(path) as file:
            text = file.read()
    except _DAMAGED_GZIP as error:
        yield 1, Malformed("damaged gzip", type(error).__name__)
        return
    if not text.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        yield from _lines(path)
        return
    rows = _decode(text)
    if isinstance(rows, Malformed):
        yield 1, rows
    else:
        yield from enumerate(rows, start=1)


def _parquet_rows(path: Path) -> Iterator[tuple[int, object]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        yield number + 1, Malformed("damaged parquet", f"{type(error).__name__}; the rest of the file is lost")
