"""Public exams as questions of one layout: ARC, HellaSwag, MMLU, and LAMBADA with four words to choose from."""

import csv
import hashlib
import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from hhjax.data.records import DataError, open_bytes, read_records
from hhjax.data.sources import ExamData, find_exam


class ExamQuestion(NamedTuple):
    """A row of exam.jsonl.gz. subject: the exam. options: without a full stop at the end. continues: the options go on from the
    question's text (HellaSwag, LAMBADA) and do not answer it."""

    subject: str
    question: str
    options: tuple[str, ...]
    answer: int
    continues: bool = False


def load_exams(data: ExamData, data_dir: str | Path | None = None) -> list[ExamQuestion]:
    """The questions of every exam of `data`, each text once, without those that offer one option twice.

    Raises DataError where a file is missing, malformed, or has none.
    """
    found = []
    for name in data.sources:
        path = find_exam(name, data_dir)
        try:
            every = {q.question: q for q in _READERS[name](path)}
        except (KeyError, TypeError, ValueError, IndexError, EOFError, OSError, zipfile.BadZipFile) as error:
            raise DataError(f"{path} is not laid out as {name} is ({type(error).__name__}): get the file anew") from error
        asked = [q._replace(subject=name) for q in every.values()
                 if len(set(q.options)) == len(q.options) and len(q.question) + max(map(len, q.options)) <= data.most_chars]  # fmt: skip
        if not asked:
            raise DataError(f"{path} has no question of at most {data.most_chars} characters: raise most_chars")
        found += sorted(asked, key=lambda q: _hash(q.question))[: data.limit]
    return found


def _arc(path: Path) -> Iterator[ExamQuestion]:
    for _, row in read_records(path):
        yield _question(row["query"].removeprefix("Question: "), row["choices"], row["gold"])


def _hellaswag(path: Path) -> Iterator[ExamQuestion]:
    """Both parts of the file, which share a few questions. What [header], [title] and the like mark stays, without the marks."""
    with open_bytes(path) as file:
        parts = json.load(file)
    for row in (*parts["test"], *parts["dev"]):
        letters = sorted(row["choices"])
        yield _question(_unmarked(row["question"]), [_unmarked(row["choices"][at]) for at in letters], letters.index(row["answer"]), True)


def _unmarked(text: str) -> str:
    for mark in ("[header]", "[title]", "[step]", "[substeps]"):
        text = text.replace(mark, " ")
    return " ".join(text.split())


def _lambada(path: Path) -> Iterator[ExamQuestion]:
    """The last word among four: LAMBADA asks for the word itself, which no small model finds. The other three are the last words of
    other passages, those that follow in the file and differ; which place the right one has is the passage's hash."""
    rows = [(row["context"].strip(), row["continuation"].strip()) for _, row in read_records(path)]
    for at, (context, word) in enumerate(rows):
        following = dict.fromkeys(rows[(at + n) % len(rows)][1] for n in range(1, 9))  # words of a book come twice, seldom more
        others = [other for other in following if other != word][:3]
        place = _hash(context) % 4
        yield _question(context, [*others[:place], word, *others[place:]], place, True)


def _mmlu(path: Path) -> Iterator[ExamQuestion]:
    """The test questions of all 57 subjects."""
    with zipfile.ZipFile(path) as file:
        for name in sorted(file.namelist()):
            if name.startswith("data/test/") and name.endswith(".csv"):
                for question, *options, letter in csv.reader(io.StringIO(file.read(name).decode(), newline="")):
                    yield _question(question, options, "ABCD".index(letter))


def _question(question: str, options, answer: int, continues: bool = False) -> ExamQuestion:
    """Raises IndexError where the answer is none of the options."""
    bare = tuple(option.strip().removesuffix(".") for option in options)
    if not 0 <= answer < len(bare):
        raise IndexError(answer)
    return ExamQuestion("", question.strip(), bare, answer, continues)


def _hash(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)


_READERS = {"arc-easy": _arc, "arc-challenge": _arc, "hellaswag": _hellaswag, "lambada": _lambada, "mmlu": _mmlu}
