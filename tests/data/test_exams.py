"""Public exams in their own formats, as questions of one layout."""

import csv
import gzip
import io
import json
import zipfile

import pytest

from hhjax.data.exams import load_exams
from hhjax.data.records import DataError
from hhjax.data.sources import EXAMS, ExamData, data_files, find_source

ARC = [{"query": f"Question: What melts at {n}?", "choices": ["Ice.", "tin", "a rock", "wax"], "gold": n % 4} for n in range(6)]
WORDS = ["ship", "ship", "bread", "lamp", "river", "ship", "coat"]
MMLU = {"anatomy": [("Which, if any?", "one", "two", "both", "none", "C"), ("Twice?", "2", "2.", "3", "4", "A")],
        "law": [('Is "it" so?', "yes", "no", "often", "never", "B")]}  # fmt: skip


def hellaswag(question: str, answer: str, number: int) -> dict:
    choices = {letter: f"[step] {letter} ends {number}." for letter in "DACB"}
    return {"question": question, "choices": choices, "answer": answer, "id": number, "domain": "zeroshot"}


@pytest.fixture
def folder(tmp_path):
    def write(name, text: str):
        path = tmp_path / EXAMS[name]
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress(text.encode()))

    write("arc-easy", "".join(json.dumps(row) + "\n" for row in ARC))
    write("lambada", "".join(json.dumps({"context": f"Passage {n} of the", "continuation": word}) + "\n" for n, word in enumerate(WORDS)))
    rows = {"test": [hellaswag("[header] How to row [title] Sit", "C", 1)], "dev": [hellaswag("[header] How to row [title] Sit", "C", 1),
                                                                                    hellaswag("She " + 80 * "very ", "A", 2)]}  # fmt: skip
    write("hellaswag", json.dumps({"dataset": "hellaswag"} | rows))
    (tmp_path / "mmlu").mkdir()
    with zipfile.ZipFile(tmp_path / EXAMS["mmlu"], "w") as file:
        for part, subjects in (("test", MMLU), ("dev", {"law": [("Not asked?", "a", "b", "c", "d", "D")]})):
            for subject, several in subjects.items():
                csv.writer(text := io.StringIO()).writerows(several)
                file.writestr(f"data/{part}/{subject}_{part}.csv", text.getvalue())
    return tmp_path


def exam(folder, name, **changes):
    return {q.question: q for q in load_exams(ExamData((name,), **changes), folder)}


def test_each_format_becomes_questions_with_their_answers(folder):
    arc = exam(folder, "arc-easy")
    assert len(arc) == 6 and arc["What melts at 5?"] == ("arc-easy", "What melts at 5?", ("Ice", "tin", "a rock", "wax"), 1, False)
    mmlu = exam(folder, "mmlu")  # neither the dev questions nor the one with an option twice
    assert {q: several.options[several.answer] for q, several in mmlu.items()} == {"Which, if any?": "both", 'Is "it" so?': "no"}
    [row] = exam(folder, "hellaswag").values()  # once, though it is in both parts; the other is too long
    assert row == ("hellaswag", "How to row Sit", tuple(f"{letter} ends 1" for letter in "ABCD"), 2, True)
    assert len(exam(folder, "hellaswag", most_chars=500)) == 2


def test_the_last_word_stands_among_three_others(folder):
    lambada = exam(folder, "lambada")
    places = set()
    for n, word in enumerate(WORDS):
        question = lambada[f"Passage {n} of the"]
        assert question.options[question.answer] == word and len(set(question.options)) == 4 and question.continues
        places.add(question.answer)
    assert len(places) > 1 and {*lambada["Passage 0 of the"].options} == {"ship", "bread", "lamp", "river"}


def test_smaller_limits_nest_and_name_the_files(folder):
    few, more = (list(exam(folder, "arc-easy", limit=limit)) for limit in (2, 4))
    assert few == more[:2] and list(exam(folder, "arc-easy")) != [row["query"].removeprefix("Question: ") for row in ARC]
    assert data_files(ExamData(("mmlu", "arc-easy")), folder) == [folder / EXAMS["mmlu"], folder / EXAMS["arc-easy"]]


def test_what_is_wrong_is_told(folder, monkeypatch, tmp_path_factory):
    with pytest.raises(DataError, match="has no question of at most 5 characters"):
        exam(folder, "arc-easy", most_chars=5)
    (folder / EXAMS["arc-easy"]).write_bytes(gzip.compress(b'{"query": "Question: x?", "choices": ["a"], "gold": 1}\n'))
    with pytest.raises(DataError, match="not laid out as arc-easy is"):
        exam(folder, "arc-easy")
    (folder / EXAMS["mmlu"]).unlink()
    with pytest.raises(DataError, match="has no mmlu/mmlu.zip; put it there"):
        exam(folder, "mmlu")
    monkeypatch.delenv("HHJAX_DATA", raising=False)
    monkeypatch.chdir(tmp_path_factory.mktemp("empty"))
    with pytest.raises(DataError, match="there is no data folder"):
        load_exams(ExamData(("mmlu",)))
    with pytest.raises(DataError, match="name some of arc-easy"):
        ExamData(("trivia",))


def test_exams_are_no_source_of_training_rows(folder):
    for path in (path for path in EXAMS.values() if (folder / path).is_file()):
        with pytest.raises(DataError, match="for evaluation only"):
            find_source(path, folder)
