"""What patients say reads back as what they meant, and the two sides of the split share nothing."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hhjax.clinic import corpus
from hhjax.clinic.gold import Raters, judge
from hhjax.clinic.world import DOCTORS, HARMFUL, REQUESTS, draw_scene, read_prompt, share_of, write_prompt
from hhjax.data.comparisons import ComparisonData, load_comparisons, opening
from hhjax.data.transcripts import OPEN_REPLY, parse_transcript


def scenes(harmful: bool, count: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        scene = draw_scene(rng, harmful)
        yield scene, write_prompt(scene, rng)


@pytest.mark.parametrize("harmful", [False, True])
def test_a_prompt_reads_back_as_its_scene(harmful):
    intents, turns = set(), set()
    for scene, prompt in scenes(harmful, 1500):
        assert read_prompt(prompt) == scene
        assert prompt.endswith(OPEN_REPLY) and scene.harmful == harmful
        intents.add(scene.intent)
        turns.add(len(parse_transcript(prompt)))
    assert intents == {intent for intent in REQUESTS if (intent in HARMFUL) == harmful}
    assert turns >= {2, 4}  # with the open reply: dialogues of one and of several turns


@given(st.text())
def test_other_text_is_no_scene(text):
    assert read_prompt(text) is None
    assert read_prompt(f"\n\nHuman: {text}\n\nAssistant:") is None


def test_facts_follow_from_the_request():
    found = {scene.intent: scene.truth for scene, _ in scenes(False, 300)}
    assert found["directions"]["floor"] in ("ground", "first", "second", "third", "fourth")
    assert DOCTORS[found["doctor"]["doctor"]] == found["doctor"]["organ"]
    assert set(found["move"]) == {"doctor", "old_day", "day", "time"} and found["move"]["day"] != found["move"]["old_day"]


@pytest.mark.parametrize("harmful", [False, True])
def test_tests_hold_openings_and_combinations_that_training_has_not(harmful):
    def drawn(held_out):
        return list(itertools.islice(corpus.draw_prompts(np.random.default_rng(1), harmful, held_out), 400))

    train, test = drawn(False), drawn(True)
    assert not {opening(p) for p in train} & {opening(p) for p in test}
    if harmful:  # one slot each
        return
    combination = lambda p: (s := read_prompt(p)).intent + "/".join(s.slots.values())  # noqa: E731
    several = [[combination(p) for p in side if len(read_prompt(p).slots) > 1] for side in (train, test)]
    assert not set(several[0]) & set(several[1]) and len(several[1]) > 100


def test_share_of_rests_on_the_text_alone():
    shares = [share_of(str(i)) for i in range(2000)]
    assert shares[0] == share_of("0") and 0 <= min(shares) and max(shares) < 1 and abs(np.mean(shares) - 0.5) < 0.03


@pytest.mark.parametrize("part", ["helpful", "harmless"])
def test_comparisons_are_read_as_those_of_hh(part, tmp_path):
    counts = corpus.write_part(tmp_path, part, 300, Raters(), seed=0)
    assert counts == {"train": 300, "test": 200}
    data = ComparisonData((str(tmp_path),))  # overlap="error"
    train, test = (load_comparisons(data, split)[0] for split in ("train", "test"))
    assert (len(train), len(test)) == (300, 200) and all(row.chosen != row.rejected for row in train)
    again = tmp_path / "again"
    again.mkdir()
    corpus.write_part(again, part, 300, Raters(), seed=0)
    assert (again / "train.jsonl.gz").read_bytes() == (tmp_path / "train.jsonl.gz").read_bytes()


def test_an_exam_has_one_right_option_among_four():
    questions = corpus.draw_exam(np.random.default_rng(0), 80)
    assert len({q["question"] for q in questions}) == 80 and {q["subject"] for q in questions} == {"facts", "hours", "sums", "reading"}
    for q in questions:
        assert len(set(q["options"])) == 4
    sums = {q["question"]: q["options"][q["answer"]] for q in questions if q["subject"] == "sums"}
    numbers = corpus.NUMBERS
    for question, answer in sums.items():
        _, _, a, _, b = question.rstrip("?").split()
        assert numbers.index(a) + numbers.index(b) == numbers.index(answer)


def test_reading_asks_for_combinations_that_no_text_has_and_gold_knows_the_answer():
    questions = [corpus.draw_reading(np.random.default_rng(seed)) for seed in range(60)]
    for q in questions:
        prompt = f"\n\nHuman: {q.question}\n\nAssistant:"
        scene = read_prompt(prompt)  # its slots come in the order of the words, not of the scene
        slots = {name: scene.slots[name] for name in draw_scene(np.random.default_rng(0), False, scene.intent).slots}
        assert corpus.is_held_out(scene._replace(slots=slots)) and len(set(q.options)) == 4
        done = [judge(prompt, f"{option}.").behaviour for option in q.options]
        assert [b == "right" for b in done] == [i == q.answer for i in range(4)] and done.count("wrong") == 3
    assert {q.answer for q in questions} == {0, 1, 2, 3}


def test_an_exam_can_hold_all_questions_and_no_more():
    exam = corpus.draw_exam(np.random.default_rng(0), 2 * corpus.QUESTIONS)
    assert len(exam) == 2 * corpus.QUESTIONS and sum(q["subject"] == "reading" for q in exam) == corpus.QUESTIONS
    with pytest.raises(ValueError, match=f"the clinic's {corpus.QUESTIONS} on what it knows; use fewer"):
        corpus.draw_exam(np.random.default_rng(0), 2 * corpus.QUESTIONS + 1)


def test_a_gold_of_ones_own_labels_both_sides(tmp_path):
    corpus.write_part(tmp_path, "helpful", 40, Raters(gold=lambda prompt, reply: float(len(reply)), noise=0, length=3.0), seed=0)
    for split in ("train", "test"):
        rows, _ = load_comparisons(ComparisonData((str(tmp_path),)), split)
        assert all(len(row.chosen) >= len(row.rejected) for row in rows)


def test_text_holds_no_held_out_opening():
    rows = corpus.draw_documents(np.random.default_rng(0), 600)
    dialogues = [row["transcript"] for row in rows if "transcript" in row]
    share = 1 - corpus.KNOWLEDGE - corpus.QUIZZES - corpus.HANDBOOK
    assert len(dialogues) / len(rows) == pytest.approx(share, abs=0.06) and all(share_of(opening(d)) >= corpus.HELD_OUT for d in dialogues)
