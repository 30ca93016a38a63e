"""A dialogue in the terminal with any model that has learnt turns."""

import sys
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp

from hhjax.data.stream import PromptSource
from hhjax.data.transcripts import ASSISTANT, HUMAN, OPEN_REPLY, Turn, render
from hhjax.loops.sampling import reply_texts
from hhjax.loops.supervised import load_model
from hhjax.model.generate import Sampling, generate
from hhjax.sharding import make_mesh
from hhjax.stages import split_step

WIDTHS = (64, 128, 256, 512, 1024)  # prompts are padded to one of these, each compiled once; longer ones lose their start


def talk(ref: str, cfg: Sampling, seed: int = 0, lines: Iterable[str] | None = None) -> list[Turn]:
    """Reads Human turns from `lines` (default: the terminal) and prints replies, until an empty line. Returns the dialogue."""
    folder, step = split_step(ref)
    model, params, tok = load_model(Path(folder), step, make_mesh())
    sample = jax.jit(lambda p, prompts, key: generate(model, p, prompts, jnp.zeros(1, jnp.int32), key, tok.vocabulary, cfg))
    turns: list[Turn] = []
    for number, line in enumerate(typed() if lines is None else lines):
        if not line.strip():
            break
        turns.append(Turn(HUMAN, line.strip()))
        prompt = render(turns) + OPEN_REPLY
        length = PromptSource([prompt], tok, WIDTHS[-1], 1).lengths[0]
        source = PromptSource([prompt], tok, next(w for w in WIDTHS if w >= length), 1)
        samples, _ = sample(params, source.batch(0, 0), jax.random.fold_in(jax.random.key(seed), number))
        [reply] = reply_texts(jax.device_get(samples.rows), tok)
        print(f"Assistant:{reply}", flush=True)
        turns.append(Turn(ASSISTANT, reply.strip()))
    return turns


def typed() -> Iterable[str]:
    """Lines from the terminal, with a prompt where there is someone to see it."""
    while True:
        if sys.stdin.isatty():
            print("Human: ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line
