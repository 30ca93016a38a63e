"""What the clinic writes down: comparisons, dialogues and knowledge to read, and an exam on it."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hhjax.clinic.gold import Raters
from hhjax.clinic.replies import ANSWERS, core_of, draw_behaviour, sentence, write_reply
from hhjax.clinic.world import (DOCTORS, HARMFUL, HELPFUL, HOURS, INSURERS, PLACES, REQUESTS, SLOTS, Scene, draw_scene, facts, fill, pick,
                                read_prompt, share_of, slot_names, write_prompt)  # fmt: skip
from hhjax.data.transcripts import HUMAN, parse_transcript

HELD_OUT = 0.2  # of openings, and of combinations of slots: seen in tests only
HARMFUL_TEXT, KNOWLEDGE, QUIZZES, HANDBOOK = 0.16, 0.08, 0.1, 0.4  # shares of documents; the rest are helpful dialogues
NUMBERS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
           "eighteen nineteen twenty").split()  # fmt: skip

QUESTIONS = len(PLACES) + len(INSURERS) + len(DOCTORS) + 2 * len(HOURS) + 11 * 11  # see draw_question


class Question(NamedTuple):
    """An exam question. options: the right one and three others, in a fixed random order. subject: facts, hours, sums or
    reading."""

    subject: str
    question: str
    options: tuple[str, ...]
    answer: int


# Comparisons ----------------------------------------------------------------------------------------------------------


def draw_prompts(rng: np.random.Generator, harmful: bool, held_out: bool) -> Iterator[str]:
    """Prompts without end, intents equally often. held_out: openings and combinations of slots of which the other side, and all
    text, has none."""
    while True:
        intent = pick(rng, HARMFUL if harmful else HELPFUL)
        while not (prompt := draw_prompt(rng, intent, held_out)):
            pass
        yield prompt


def draw_prompt(rng: np.random.Generator, intent: str, held_out: bool) -> str | None:
    """A prompt of this intent; None where it is of the other side."""
    scene = draw_scene(rng, intent in HARMFUL, intent)
    if len(scene.slots) > 1 and is_held_out(scene) != held_out:
        return None
    prompt = write_prompt(scene, rng)
    opening = next(turn.text for turn in parse_transcript(prompt) if turn.role == HUMAN)
    return prompt if (share_of(opening) < HELD_OUT) == held_out else None


def is_held_out(scene: Scene) -> bool:
    """Whether its combination of slots is one for tests; where a request names one thing only there are too few to hold some
    out, but its wordings and patients are."""
    return len(scene.slots) > 1 and share_of("/".join([scene.intent, *scene.slots.values()])) < HELD_OUT


def draw_comparisons(rng: np.random.Generator, harmful: bool, held_out: bool, count: int, raters: Raters) -> list[dict]:
    """Rows {"prompt", "chosen", "rejected"}: two replies of the first assistant, compared by a rater; equal pairs left out."""

    rows, prompts = [], draw_prompts(rng, harmful, held_out)
    while len(rows) < count:
        prompt = next(prompts)
        scene = read_prompt(prompt)
        first, second = (write_reply(scene, draw_behaviour(scene, rng), rng) for _ in range(2))
        if first == second:
            continue
        if not raters.first_wins(prompt, first, second, rng):
            first, second = second, first
        rows.append({"prompt": prompt, "chosen": first, "rejected": second})
    return rows


# Text -----------------------------------------------------------------------------------------------------------------


def draw_documents(rng: np.random.Generator, count: int) -> list[dict]:
    """Rows {"transcript"} and {"text"}: dialogues by the first assistant, the facts in sentences, quizzes."""
    prompts = {harmful: draw_prompts(rng, harmful, False) for harmful in (False, True)}
    others = HARMFUL_TEXT, KNOWLEDGE, QUIZZES, HANDBOOK
    writers = (lambda: dialogue(next(prompts[False]), rng), lambda: dialogue(next(prompts[True]), rng), lambda: {"text": knowledge(rng)},
               lambda: {"text": quiz(rng)}, lambda: {"text": handbook(rng)})  # fmt: skip
    return [writers[kind]() for kind in rng.choice(len(writers), size=count, p=[1 - sum(others), *others])]


def dialogue(prompt: str, rng: np.random.Generator) -> dict:

    scene = read_prompt(prompt)
    return {"transcript": f"{prompt} {write_reply(scene, draw_behaviour(scene, rng), rng)}"}


def knowledge(rng: np.random.Generator) -> str:
    """Four sentences of what is so at the clinic."""
    return " ".join(statement(rng) for _ in range(4))


def handbook(rng: np.random.Generator) -> str:
    """Three requests and what to say to them. A model that has only read the beginner's dialogues, where every third answer is
    wrong, does not learn in a few minutes to take the slots from the request."""
    return "\n".join(f"{fill(pick(rng, REQUESTS[scene.intent]), scene.slots)} {core_of(scene, True, rng)}" for scene in
                     (training_scene(rng) for _ in range(3)))  # fmt: skip


def training_scene(rng: np.random.Generator) -> Scene:
    """A helpful request whose combination of slots is not held out."""
    while is_held_out(scene := draw_scene(rng, False)):
        pass
    return scene


def statement(rng: np.random.Generator) -> str:
    intent = pick(rng, ("hours", "directions", "insurance", "doctor", "sum"))
    if intent == "sum":
        a, b = (int(n) for n in rng.integers(0, 11, 2))
        return f"{NUMBERS[a].capitalize()} plus {NUMBERS[b]} is {NUMBERS[a + b]}."
    known = {"hours": ("department", HOURS), "directions": ("place", PLACES), "insurance": ("insurer", INSURERS),
             "doctor": ("organ", tuple(DOCTORS.values()))}  # fmt: skip
    name, things = known[intent]
    slots = {name: pick(rng, tuple(things))}
    return sentence(pick(rng, ANSWERS[intent]), slots | facts(slots))


def quiz(rng: np.random.Generator) -> str:
    """Three questions with their answers, one a line: what few-shot prompts look like."""
    return "\n".join(asked(question) for question in (draw_question(rng) for _ in range(3)))


def asked(question: Question) -> str:
    return f"Question: {question.question} Answer: {question.options[question.answer]}."


def draw_question(rng: np.random.Generator) -> Question:
    """A question on the facts, the hours or sums; the wrong options are right ones of others."""
    kind = pick(rng, ("place", "insurer", "organ", "hours", "sum", "sum"))
    if kind == "sum":
        a, b = (int(n) for n in rng.integers(0, 11, 2))
        near = [n for n in range(max(0, a + b - 4), min(20, a + b + 4) + 1) if n != a + b]
        return options("sums", f"What is {NUMBERS[a]} plus {NUMBERS[b]}?", NUMBERS[a + b], [NUMBERS[n] for n in near], rng)
    if kind == "hours":
        department = pick(rng, tuple(HOURS))
        word, right, values = pick(rng, (("open", HOURS[department][0], SLOTS["opens"]), ("close", HOURS[department][1], SLOTS["closes"])))
        return options("hours", f"When does the {department} {word}?", right, values, rng)
    if kind == "place":
        place = pick(rng, tuple(PLACES))
        return options("facts", f"On which floor is the {place}?", PLACES[place], SLOTS["floor"], rng)
    if kind == "insurer":
        insurer = pick(rng, tuple(INSURERS))
        return options("facts", f"Which desk is for {insurer}?", INSURERS[insurer], SLOTS["desk"], rng)
    doctor = pick(rng, tuple(DOCTORS))
    return options("facts", f"What does Dr. {doctor} look after?", f"the {DOCTORS[doctor]}", [f"the {organ}" for organ in DOCTORS.values()], rng)


def options(subject: str, question: str, right: str, values, rng: np.random.Generator) -> Question:
    others = rng.permutation([value for value in values if value != right])[:3].tolist()
    shuffled = rng.permutation([right, *others]).tolist()
    return Question(subject, question, tuple(shuffled), shuffled.index(right))


def draw_reading(rng: np.random.Generator) -> Question:
    """A request to book, move or cancel with a combination of slots that no text has, and four replies of one wording, of which one takes
    every slot from it and the others all but one: a skill, where the other subjects are a matter of memory."""
    while not is_held_out(scene := draw_scene(rng, False, pick(rng, ("book", "move", "cancel")))):
        pass
    template = pick(rng, ANSWERS[scene.intent])
    said = lambda **changed: sentence(template, scene.truth | changed).removesuffix(".")  # noqa: E731
    wrong = [said(**{name: value}) for name in slot_names(template) for value in SLOTS[name]]
    return options("reading", fill(pick(rng, REQUESTS[scene.intent]), scene.slots), said(), wrong, rng)


def draw_exam(rng: np.random.Generator, count: int) -> list[dict]:
    """Different questions, every second one of reading, as rows {"subject", "question", "options", "answer"}.

    Raises ValueError beyond those there are.
    """
    if (count + 1) // 2 > QUESTIONS:
        raise ValueError(f"an exam of {count} questions, half of them from the clinic's {QUESTIONS} on what it knows; use fewer")
    found = {}
    while len(found) < count:
        question = draw_reading(rng) if len(found) % 2 else draw_question(rng)
        found.setdefault(question.question, question)
    return [question._asdict() for question in found.values()]


# Files ----------------------------------------------------------------------------------------------------------------


def write_part(folder: Path, part: str, size: int, raters: Raters, seed: int) -> dict[str, int]:
    """Writes one part of the clinic's data and returns the number of rows of each file.

    "helpful", "harmless": train.jsonl.gz (size comparisons) and test.jsonl.gz (a quarter, at least 200), like a tranche of HH;
    tests are labelled without bias. "text": text.jsonl.gz (size documents). "exam": exam.jsonl.gz (size questions).
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, PARTS.index(part)]))
    if part == "text":
        files = {"text": draw_documents(rng, size)}
    elif part == "exam":
        files = {"exam": draw_exam(rng, size)}
    else:
        harmful, tests = part == "harmless", max(200, size // 4)
        files = {"train": draw_comparisons(rng, harmful, False, size, raters),
                 "test": draw_comparisons(rng, harmful, True, tests, Raters(raters.gold, raters.noise))}  # fmt: skip
    for name, rows in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    return {name: len(rows) for name, rows in files.items()}


PARTS = ("text", "helpful", "harmless", "exam")
