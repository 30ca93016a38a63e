"""Language modelling: next-token cross-entropy."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from hhjax.objectives.masked import masked_mean, masked_sum
from hhjax.types import LossFn, Model, Tokens


@dataclass(frozen=True)
class LMLoss:
    """chunk: positions whose logits exist at one time (0: all), which bounds memory at large vocabularies."""

    chunk: int = 128


def lm_loss(logits, targets, mask):
    """Mean cross-entropy in nats per token, and its metrics.

    log sum exp(logits) - logits[target], in f32. logits: [..., V]; targets, mask: [...].
    """
    nll, correct = token_nll(logits, targets)
    weight = jnp.sum(mask).astype(jnp.float32)
    return masked_mean(nll, mask), {"token_accuracy": masked_mean(correct, mask), "weight": weight}


def token_nll(logits, targets):
    """-log softmax(logits)[target] in nats, and whether the target is the likeliest token.

    logits [..., V], targets [...] -> f32 [...], bool [...]. The guess is read off the maximum that the softmax
    needs anyway: an argmax over the vocabulary takes a tenth of a CPU step.
    """
    logits = logits.astype(jnp.float32)
    target = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    top = jax.lax.stop_gradient(jnp.max(logits, -1))
    return top + jnp.log(jnp.sum(jnp.exp(logits - top[..., None]), -1)) - target, target >= top


def next_tokens(batch: Tokens):
    """Targets and mask of next-token prediction: position t predicts t + 1 where t + 1 is in the row's loss part.

    Returns targets [B, T] (0 where there is none) and mask [B, T] bool.
    """
    targets = jnp.pad(batch.tokens[:, 1:], ((0, 0), (0, 1)))
    t = jnp.arange(batch.tokens.shape[1])[None] + 1
    return targets, (t >= batch.prompt_len[:, None]) & (t < batch.length[:, None])


def chunked_nll(model: Model, params, hidden, targets, mask, chunk: int):
    """Sum over positions of the masked nll and of correct guesses, per row, a chunk of positions at a time.

    hidden: [B, T, D]; targets, mask: [B, T], a mask of numbers weighs the positions above 0. Returns (nll [B], correct [B]) f32.
    Logits of several chunks are recomputed in the backward pass, so at most [B, chunk, V] of them exist.
    """
    b, t = targets.shape
    chunk = min(chunk or t, t)

    def of(hidden, targets, mask):
        found = token_nll(model.logits(params, hidden), targets)
        return tuple(masked_sum(mask * x, mask > 0, -1) for x in found)

    if chunk == t:
        return of(hidden, targets, mask)
    pad = -t % chunk
    split = lambda x: jnp.moveaxis(  # noqa: E731
        jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2)).reshape(b, -1, chunk, *x.shape[2:]), 1, 0
    )

    @jax.checkpoint
    def one(sums, part):
        return tuple(s + x for s, x in zip(sums, of(*part))), None

    zero = jnp.zeros(b, jnp.float32)
    (nll, correct), _ = jax.lax.scan(one, (zero, zero), (split(hidden), split(targets), split(mask)))
    return nll, correct


def lm_objective(model: Model, cfg: LMLoss = LMLoss()) -> LossFn:
    """Next-token cross-entropy over `Tokens`, in nats per token; log V at random initialisation."""

    def loss(params, batch: Tokens, key):
        del key
        targets, mask = next_tokens(batch)
        hidden, _ = model.apply(params, batch.tokens)
        nll, correct = chunked_nll(model, params, hidden, targets, mask, cfg.chunk)
        count = jnp.sum(mask).astype(jnp.float32)
        per_token = jnp.maximum(count, 1)
        return jnp.sum(nll) / per_token, {"token_accuracy": jnp.sum(correct) / per_token, "weight": count}

    return loss
