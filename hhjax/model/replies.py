"""Replies that exist: where they lie in their rows, what a model sees before each token, and the log-probabilities of the tokens.

Sampling and training share `policy_logits`, so that the first PPO ratio is 1.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from hhjax.types import Array, Model, PackedPairs, PackedReplies, Params, Tokens, Vocabulary

NEVER = -1e30  # a logit whose probability is 0 in f32; finite, so that 0 * logp stays 0


def policy_logits(model: Model, params: Params, hidden, vocab: Vocabulary, temperature: float = 1.0):
    """[..., D] -> [..., V] f32: logits / temperature, with <pad>, <eoc> and rows past the tokenizer's never sampled."""
    logits = model.logits(params, hidden) / (temperature or 1.0)
    ids = jnp.arange(logits.shape[-1])
    return jnp.where((ids != vocab.pad) & (ids != vocab.eoc) & (ids < vocab.size), logits, NEVER)


def joined(prompts: Tokens, reply, vocab: Vocabulary) -> Tokens:
    """Prompts [B, P] and replies [B, R] (padded) as rows [B, P + R] without a gap between the two."""
    b, p = prompts.tokens.shape
    r = reply.shape[1]
    at = jnp.arange(p + r)[None] - prompts.length[:, None]  # the place in the reply, negative in the prompt
    prompt = jnp.pad(prompts.tokens, ((0, 0), (0, r)), constant_values=vocab.pad)
    replied = jnp.take_along_axis(reply, jnp.clip(at, 0, r - 1), axis=1)
    tokens = jnp.where(at < 0, prompt, jnp.where(at < r, replied, vocab.pad))
    return Tokens(tokens, prompts.length, prompts.length + jnp.sum(reply != vocab.pad, -1))


def hidden_states(model: Model, params: Params, rows: Tokens | PackedReplies | PackedPairs, read=None):
    """The last hidden states of rows of any layout, [rows, T, D]; or of the tokens at `read` [rows, R] alone, [rows, R, D]."""
    if isinstance(rows, Tokens):
        return model.apply(params, rows.tokens, read=read)[0]
    return model.apply(params, rows.tokens, rows.positions, packed_mask(rows), read=read)[0]


def packed_mask(rows: PackedPairs | PackedReplies):
    """Which tokens each token may see, [N, T, T] bool: those before it of its own prompt, but for other replies to it."""
    t = jnp.arange(rows.tokens.shape[1])
    same = rows.pair[:, :, None] == rows.pair[:, None, :]
    shared = (rows.branch[:, None, :] == 0) | (rows.branch[:, :, None] == rows.branch[:, None, :])
    return same & shared & (t[None, :] <= t[:, None])


def reply_tokens(rows: Tokens | PackedReplies, width: int):
    """Each reply from its start on: tokens [B, width] (pad past its end) and mask [B, width] bool."""
    if isinstance(rows, PackedReplies):
        return rows.reply, jnp.arange(width)[None] < rows.reply_len[:, None]
    at = rows.prompt_len[:, None] + jnp.arange(width)[None]
    mask = at < rows.length[:, None]
    tokens = jnp.take_along_axis(rows.tokens, jnp.minimum(at, rows.tokens.shape[1] - 1), axis=1)
    return tokens, mask


def before_reply_tokens(model: Model, params: Params, rows: Tokens | PackedReplies, width: int, ways: int = 1):
    """The last hidden states that predict each reply token, [B, width, D]. ways: shards of packed rows."""
    if isinstance(rows, PackedReplies):
        return picked(hidden_states(model, params, rows, rows.read), rows.before, ways)
    at = rows.prompt_len[:, None] - 1 + jnp.arange(width)[None]
    return hidden_states(model, params, rows, jnp.minimum(at, rows.tokens.shape[1] - 1))


def picked(hidden, places, ways: int):
    """Hidden states [N, M, D] by numbers [B, ...] that count through the rows of each of `ways` shards: [B, ..., D]."""
    flat, index = hidden.reshape(ways, -1, hidden.shape[-1]), places.reshape(ways, -1, 1)
    return jnp.take_along_axis(flat, index, axis=1).reshape(*places.shape, -1)


def reply_logps(model: Model, params: Params, hidden, tokens, vocab: Vocabulary, temperature: float = 1.0,
                chunk: int = 128) -> tuple[Array, Array]:
    """logp of each token and the entropy of its distribution, in nats, [B, R] each; the caller masks.

    hidden: [B, R, D] from `before_reply_tokens`. At most `chunk` positions' logits exist at one time.
    """

    def one(part):
        hidden, tokens = part
        logp = jax.nn.log_softmax(policy_logits(model, params, hidden, vocab, temperature))
        return jnp.take_along_axis(logp, tokens[..., None], -1)[..., 0], -jnp.sum(jnp.exp(logp) * logp, -1)

    return by_chunks(one, (hidden, tokens), chunk)


def by_chunks(one: Callable, arrays, chunk: int = 128):
    """one(arrays) for a tree of [B, R, ...] arrays, to one of [B, R], `chunk` positions at a time; backward recomputes each."""
    b, r = jax.tree.leaves(arrays)[0].shape[:2]
    if r <= chunk:
        return one(arrays)
    cut = lambda x: jnp.moveaxis(  # noqa: E731
        jnp.pad(x, ((0, 0), (0, -r % chunk)) + ((0, 0),) * (x.ndim - 2)).reshape(b, -1, chunk, *x.shape[2:]), 1, 0)
    found = jax.lax.map(jax.checkpoint(one), jax.tree.map(cut, arrays))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(b, -1)[:, :r], found)
