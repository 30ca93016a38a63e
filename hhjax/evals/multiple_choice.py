"""Multiple choice by the probability that a language model gives to each option."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hhjax.data.tokenizer import Tokenizer
from hhjax.model.replies import before_reply_tokens, reply_logps, reply_tokens
from hhjax.sharding import batch_host, put_batch, replicated
from hhjax.types import Model, Tokens


class Answered(NamedTuple):
    """How one question was answered. chosen: the option of the highest probability; right: whether it is the answer; nats: minus
    the log of the answer's share of the options' probability, log(options) for a model that knows nothing."""

    chosen: int
    right: bool
    nats: float


def ask(model: Model, params, tok: Tokenizer, contexts: Sequence[str], options: Sequence[Sequence[str]], answers: Sequence[int],
        batch_size: int, mesh, poll: Callable[[], None] = lambda: None) -> list[Answered]:
    """Each question as context + option for every option; the option's tokens are scored, summed.

    Contexts start a document. Tokens of an option are those past the longest start that context and context + option share, as a
    tokenizer may join the two. poll() is called before every batch, on every process.
    """
    rows = [(context, context + option) for context, several in zip(contexts, options) for option in several]
    scores = iter(option_logps(model, params, tok, rows, batch_size, mesh, poll))
    found = []
    for several, answer in zip(options, answers):
        logps = np.array([next(scores) for _ in several])
        share = logps - np.logaddexp.reduce(logps)
        chosen = int(np.argmax(logps))
        found.append(Answered(chosen, chosen == answer, float(-share[answer])))
    return found


def option_logps(model: Model, params, tok: Tokenizer, rows: Sequence[tuple[str, str]], batch_size: int, mesh,
                 poll: Callable[[], None] = lambda: None) -> np.ndarray:
    """The log-probability of the end of each (start, whole) text past its start, in nats, [len(rows)]."""
    wholes, starts = (tok.encode_batch([row[i] for row in rows]) for i in (1, 0))
    shared = [next((i for i, (a, b) in enumerate(zip(s, w)) if a != b), min(len(s), len(w))) for s, w in zip(starts, wholes)]
    ids = [[tok.eot_id, *whole] for whole in wholes]  # in training every document follows the end of another
    width = -(-max(map(len, ids)) // 16) * 16
    reach = max(len(row) - 1 - at for row, at in zip(ids, shared))

    def score(params, batch: Tokens):
        tokens, mask = reply_tokens(batch, reach)
        hidden = before_reply_tokens(model, params, batch, reach)
        logp, _ = reply_logps(model, params, hidden, tokens, tok.vocabulary)
        return jnp.sum(jnp.where(mask, logp, 0.0), -1)

    score = jax.jit(score, out_shardings=replicated(mesh))
    index, count = batch_host(mesh)
    found = np.zeros(len(rows))
    for first in range(0, len(rows), batch_size):
        poll()
        at = np.minimum(np.arange(first, first + batch_size), len(rows) - 1)
        mine = np.split(at, count)[index]
        tokens = np.full((len(mine), width), tok.pad_id, np.int32)
        for place, row in enumerate(mine):
            tokens[place, : len(ids[row])] = ids[row]
        prompt_len, length = (np.array([f(row) for row in mine], np.int32) for f in (lambda r: shared[r] + 1, lambda r: len(ids[r])))
        found[at] = jax.device_get(score(params, put_batch(Tokens(tokens, prompt_len, length), mesh)))
    return found
