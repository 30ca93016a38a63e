"""Exams and detection from tiny trained models, and the clinic as a stage."""

import gzip
import json

import numpy as np
import pytest

from hhjax.clinic.corpus import write_part
from hhjax.clinic.gold import Raters, gold
from hhjax.data.comparisons import ComparisonData
from hhjax.data.records import DataError
from hhjax.data.sources import EXAMS, ExamData
from hhjax.fields import ConfigError
from hhjax.io.metrics import read_rows
from hhjax.loops import clinic
from hhjax.loops.probes import context as asked
from hhjax.loops.probes import distinct, ending, noised, run_detect, run_exam, run_questions
from hhjax.stages import Clinic, Detect, Exam, Questions

QUESTIONS = [{"subject": s, "question": f"{s} {i}?", "options": ["mat", "dog"], "answer": i % 2} for s in ("a", "b") for i in range(4)]


@pytest.fixture
def exam_folder(tmp_path):
    with gzip.open(tmp_path / "exam.jsonl.gz", "wt") as f:
        f.writelines(json.dumps(q) + "\n" for q in QUESTIONS)
    return tmp_path


def test_an_exam_counts_what_is_right(pipeline, context, exam_folder, tmp_path):
    stage = Exam("exam", of=str(pipeline["lm"]), data=f"{exam_folder}/", shots=(0, 2), batch_size=16)
    run_exam(stage, context(stage, tmp_path / "run"))
    rows = json.loads((tmp_path / "run" / "evals" / "exam.json").read_text())["rows"]
    assert [(r["subject"], r["shots"], r["questions"]) for r in rows] == [("a", 0, 4), ("b", 0, 4), ("a", 2, 4), ("b", 2, 4)]
    for row in rows:
        assert row["accuracy"] == np.mean(row["right"]) and 0 < row["nats"] < 20
        assert row["nats"] == pytest.approx(np.mean(row["each_nats"]), abs=1e-4)
    assert "accuracy" in (tmp_path / "run" / "evals" / "table.txt").read_text()


def test_shots_are_other_questions_of_the_subject():
    assert asked(QUESTIONS, 1, 0) == "Question: a 1? Answer:"
    assert asked(QUESTIONS, 1, 2) == "Question: a 2? Answer: mat.\nQuestion: a 3? Answer: dog.\nQuestion: a 1? Answer:"
    assert asked(QUESTIONS, 3, 1).startswith("Question: a 0? ")  # round the end
    with pytest.raises(DataError, match="4 shots, but 'a' has 3 other"):
        asked(QUESTIONS, 0, 4)


def test_options_that_go_on_from_a_text_are_not_asked_for():
    rows = [{"subject": "a", "question": f"The cat {i}", "options": ["sat", "ran"], "answer": i % 2, "continues": True} for i in range(3)]
    assert asked(rows, 0, 0) == "The cat 0" and [ending(rows[0], at) for at in (0, 1)] == [" sat", " ran"]
    assert asked(rows, 0, 2) == "The cat 1 ran\nThe cat 2 sat\nThe cat 0"


def test_public_exams_become_a_stage_that_an_exam_reads(pipeline, context, tmp_path):
    rows = [{"query": f"Question: a {i}?", "choices": ["mat", "dog", "cat", "hat"], "gold": i % 4} for i in range(6)]
    path = tmp_path / "data" / EXAMS["arc-easy"]
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    questions = Questions("questions", data=ExamData(("arc-easy",), limit=4))
    run_questions(questions, context(questions, tmp_path / "questions", data=tmp_path / "data"))
    [event] = [e for e in read_rows(tmp_path / "questions" / "events.jsonl") if e["event"] == "data"]
    assert event["arc-easy"] == 4
    stage = Exam("exam", of=str(pipeline["lm"]), data=f"{tmp_path}/questions", shots=(0,), batch_size=16)
    run_exam(stage, context(stage, tmp_path / "run"))
    [row] = json.loads((tmp_path / "run" / "evals" / "exam.json").read_text())["rows"]
    assert (row["subject"], row["questions"], len(row["each_nats"])) == ("arc-easy", 4, 4)


def test_an_exam_without_questions_says_so(pipeline, context, tmp_path):
    stage = Exam("exam", of=str(pipeline["lm"]), data=f"{tmp_path}/", batch_size=16)
    with pytest.raises(DataError, match=r"exam\.jsonl\.gz does not exist"):
        run_exam(stage, context(stage, tmp_path / "run"))


def test_detection_tells_two_kinds_of_prompts_apart(pipeline, context, tmp_path):
    folders = {}
    for part in ("helpful", "harmless"):
        folders[part] = tmp_path / part
        folders[part].mkdir()
        write_part(folders[part], part, 80, Raters(), 0)
    sides = {"inside": ComparisonData((str(folders["helpful"]),)), "outside": ComparisonData((str(folders["harmless"]),))}
    stage = Detect("detect", of=str(pipeline["lm"]), fit=60, exposure=(1, 20), prompt_len=160, batch_size=32, **sides)
    run_detect(stage, context(stage, tmp_path / "run"))
    found = json.loads((tmp_path / "run" / "evals" / "detect.json").read_text())
    assert set(found["auroc"]) == {"relative_mahalanobis", "mahalanobis", "probe_1", "probe_20"} and len(found["auroc"]["probe_1"]) == 5
    assert np.mean(found["auroc"]["probe_20"]) > max(0.7, np.mean(found["auroc"]["probe_1"]))
    with pytest.raises(ConfigError, match="layer=3, but the model has 2"):
        deep = Detect("detect", of=str(pipeline["lm"]), layer=3, **sides)
        run_detect(deep, context(deep, tmp_path / "deep"))


def test_openings_are_first_turns_alone_and_once(context, tmp_path):
    start = "\n\nHuman: Hello there\n\nAssistant:"
    dialogues = [start, start + " Hi\n\nHuman: More\n\nAssistant:", "\n\nHuman: Other\n\nAssistant:"]
    rows = [{"prompt": prompt, "chosen": "a", "rejected": "b"} for prompt in dialogues]
    for split, several in (("train", rows), ("test", [{"prompt": "\n\nHuman: T\n\nAssistant:", "chosen": "a", "rejected": "b"}])):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in several))
    data = ComparisonData((f"{tmp_path}/",))
    ctx = context(Detect("d", of=f"{tmp_path}/", inside=data, outside=data), tmp_path / "run")
    assert sorted(distinct(data, "train", False, ctx)) == sorted(dialogues)
    assert sorted(distinct(data, "train", True, ctx)) == [start, "\n\nHuman: Other\n\nAssistant:"]


def test_noise_swaps_words_and_keeps_turns():
    prompt, rng = "\n\nHuman: a b c d e f g h\n\nHuman: i j k l\n\nAssistant:", np.random.default_rng(0)
    assert noised(prompt, ["x"], 0.0, rng) == prompt
    changed = noised(prompt, ["x"], 0.5, rng)
    assert changed.count("\n\nHuman:") == 2 and changed.endswith("Assistant:") and 2 <= changed.split().count("x") <= 10


def test_the_clinic_as_a_stage(context, tmp_path):
    stage = Clinic("helpful", part="helpful", size=50, raters=Raters(noise=0))
    clinic.run(stage, context(stage, tmp_path / "run", seed=3))
    with gzip.open(tmp_path / "run" / "train.jsonl.gz", "rt") as f:
        rows = [json.loads(line) for line in f]
    assert len(rows) == 50
    assert all(gold(r["prompt"], r["chosen"]) >= gold(r["prompt"], r["rejected"]) for r in rows)
    [event] = [e for e in read_rows(tmp_path / "run" / "events.jsonl") if e["event"] == "data"]
    assert (event["train"], event["test"]) == (50, 200)
    with pytest.raises(ConfigError, match="choose one of text, helpful, harmless, exam"):
        Clinic("x", part="gossip")
