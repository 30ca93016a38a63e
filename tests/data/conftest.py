"""A small tokenizer, trained once, and rows to encode."""

import random

import pytest

from hhjax.data.comparisons import Comparison
from hhjax.data.tokenizer import train_tokenizer

WORDS = ("the river runs past an old mill where children watch boats and count birds before supper while "
         "somebody asks how bread is made or why rain falls on hills in spring").split()


def sentence(rng: random.Random, low: int = 3, high: int = 12) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high))).capitalize() + "."


def comparison(number: int, rng: random.Random) -> Comparison:
    prompt = "".join(f"\n\nHuman: {sentence(rng)}\n\nAssistant: {sentence(rng)}" for _ in range(rng.randint(0, 3)))
    prompt += f"\n\nHuman: Question {number}?\n\nAssistant:"
    return Comparison(prompt, sentence(rng, 1, 30), sentence(rng, 1, 30))


@pytest.fixture(scope="session")
def tok():
    rng = random.Random(0)
    return train_tokenizer([sentence(rng) for _ in range(500)], 340)


@pytest.fixture(scope="session")
def pairs():
    rng = random.Random(1)
    return [comparison(number, rng) for number in range(203)]
