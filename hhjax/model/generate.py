"""Sampling: replies to ragged prompts with a static key/value cache, and the log-probabilities of any reply.

Sampling and training share `policy_logits`, so that the first PPO ratio is 1.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from hhjax.types import Array, Key, Model, Params, Samples, Tokens, Vocabulary

_NEVER = -1e30  # a logit whose probability is 0 in f32; finite, so that 0 * logp stays 0


@dataclass(frozen=True)
class Sampling:
    """How replies are drawn. temperature 0 is greedy. top_k 0 and top_p 1 are off, as in the paper (footnote 12)."""

    max_new_tokens: int = 128  # Bai et al. 2022, section 4.1; 32 in the robustness runs
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if self.max_new_tokens < 1 or self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"{self}: max_new_tokens >= 1, temperature >= 0, top_k >= 0 and 0 < top_p <= 1")


def policy_logits(model: Model, params: Params, hidden, vocab: Vocabulary, temperature: float = 1.0):
    """[..., D] -> [..., V] f32: logits / temperature, with <pad>, <eoc> and rows past the tokenizer's never sampled."""
    logits = model.logits(params, hidden) / (temperature or 1.0)
    ids = jnp.arange(logits.shape[-1])
    return jnp.where((ids != vocab.pad) & (ids != vocab.eoc) & (ids < vocab.size), logits, _NEVER)


def generate(model: Model, params: Params, prompts: Tokens, row_ids, key: Key, vocab: Vocabulary, cfg: Sampling) -> Samples:
    """A reply of at most cfg.max_new_tokens to every prompt, ending after <eot>; done when all rows are.

    prompts: Tokens [B, P], right-padded, `length` counting the prompt. row_ids: [B] int32: token t of row i is drawn with
    fold_in(fold_in(key, row_ids[i]), t), so a row's reply does not depend on the rows beside it.
    """
    (b, p), r = prompts.tokens.shape, cfg.max_new_tokens
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, row_ids)

    def draw(hidden, t):
        """The token drawn from each row's last hidden state [B, D], its logp and the entropy."""
        logits = policy_logits(model, params, hidden, vocab, cfg.temperature)
        logp = jax.nn.log_softmax(logits)
        if cfg.temperature:
            step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, t)
            token = jax.vmap(jax.random.categorical)(step_keys, filtered(logits, cfg))
        else:
            token = jnp.argmax(logits, -1)
        chosen = jnp.take_along_axis(logp, token[:, None], -1)[:, 0]
        return token.astype(jnp.int32), chosen, -jnp.sum(jnp.exp(logp) * logp, -1)

    def put(buffers, news, done, t):
        """Column t of tokens, logp and entropy; done rows keep pad and 0."""
        return tuple(buf.at[:, t].set(jnp.where(done, buf[:, t], new)) for buf, new in zip(buffers, news))

    def more(carry):
        t, _, done, _, _ = carry
        return (t < r) & ~jnp.all(done)

    def step(carry):
        t, last, done, buffers, cache = carry
        at = prompts.length + t - 1
        hidden, cache = model.apply(params, last[:, None], at[:, None], None, cache)
        news = draw(hidden[:, 0], t)
        return t + 1, news[0], done | (news[0] == vocab.eot), put(buffers, news, done, t), cache

    hidden, cache = model.apply(params, prompts.tokens, None, None, model.init_cache(b, p + r))
    last_hidden = jnp.take_along_axis(hidden, (prompts.length - 1)[:, None, None], axis=1)[:, 0]
    first = draw(last_hidden, 0)
    empty = (jnp.full((b, r), vocab.pad), jnp.zeros((b, r)), jnp.zeros((b, r)))
    done = jnp.zeros(b, bool)
    carry = (1, first[0], first[0] == vocab.eot, put(empty, first, done, 0), cache)
    _, _, stopped, (reply, logp, entropy), _ = jax.lax.while_loop(more, step, carry)
    return Samples(joined(prompts, reply, vocab), logp, entropy, stopped)


def filtered(logits, cfg: Sampling):
    """Logits with all but the top_k likeliest, and all beyond the smallest set of probability top_p, ruled out."""
    if cfg.top_k and cfg.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, cfg.top_k)[0][..., -1:]
        logits = jnp.where(logits >= least, logits, _NEVER)
    if cfg.top_p < 1:
        ordered = -jnp.sort(-logits, -1)
        p = jax.nn.softmax(ordered)
        kept = jnp.sum(jnp.cumsum(p, -1) - p < cfg.top_p, -1, keepdims=True)  # at least the likeliest
        logits = jnp.where(logits >= jnp.take_along_axis(ordered, kept - 1, -1), logits, _NEVER)
    return logits


def joined(prompts: Tokens, reply, vocab: Vocabulary) -> Tokens:
    """Prompts [B, P] and replies [B, R] (padded) as rows [B, P + R] without a gap between the two."""
    b, p = prompts.tokens.shape
    r = reply.shape[1]
    at = jnp.arange(p + r)[None] - prompts.length[:, None]  # the place in the reply, negative in the prompt
    prompt = jnp.pad(prompts.tokens, ((0, 0), (0, r)), constant_values=vocab.pad)
    replied = jnp.take_along_axis(reply, jnp.clip(at, 0, r - 1), axis=1)
    tokens = jnp.where(at < 0, prompt, jnp.where(at < r, replied, vocab.pad))
    return Tokens(tokens, prompts.length, prompts.length + jnp.sum(reply != vocab.pad, -1))


# Replies that exist already -------------------------------------------------------------------------------------------


def reply_tokens(rows: Tokens, width: int):
    """The reply of each row from its start on: tokens [B, width] (pad past its end) and mask [B, width] bool."""
    at = rows.prompt_len[:, None] + jnp.arange(width)[None]
    mask = at < rows.length[:, None]
    tokens = jnp.take_along_axis(rows.tokens, jnp.minimum(at, rows.tokens.shape[1] - 1), axis=1)
    return tokens, mask


def before_reply_tokens(hidden, rows: Tokens, width: int):
    """The hidden states that predict each reply token: [B, T, D] -> [B, width, D]."""
    at = rows.prompt_len[:, None] - 1 + jnp.arange(width)[None]
    return jnp.take_along_axis(hidden, jnp.minimum(at, hidden.shape[1] - 1)[..., None], axis=1)


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
