"""What travels between the rooms of the house: batches, the model record, the loss signature."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

Array = jax.Array
Key = jax.Array
Params = Any  # a pytree of arrays
Batch = Any  # a pytree of arrays with a leading batch axis
Metrics = dict[str, Array]  # scalars; "weight" says how many items the loss is a mean of

LossFn = Callable[[Params, Batch, Key], tuple[Array, Metrics]]


class Tokens(NamedTuple):
    """Right-padded rows of token ids.

    tokens: [B, T] int32. prompt_len, length: [B] int32 with prompt_len <= length <= T;
    positions count from 0, `tokens[b, prompt_len[b]:length[b]]` is the part that
    a loss may look at, and everything from `length` on is `<pad>`.
    """

    tokens: Array
    prompt_len: Array
    length: Array


class Pairs(NamedTuple):
    """Comparisons: two rows that share their prompt, and the loss weight of the pair.

    chosen, rejected: Tokens of equal [B, T], each row ending in `<eoc>`.
    weight: [B] f32, Bai et al. 2022 section 5.1.2's lambda for harmless pairs, else 1.
    """

    chosen: Tokens
    rejected: Tokens
    weight: Array


class PackedPairs(NamedTuple):
    """Comparisons laid end to end in rows, each as prompt, chosen reply, rejected reply, so that a prompt is computed once.

    tokens, positions: [R, T] int32; positions begin anew at every prompt, and a rejected reply's go on from its prompt.
    pair: [R, T] int32, which of its row's pairs a token is of, from 0; -1 is padding. branch: [R, T] int32, 0 the prompt,
    1 the chosen, 2 the rejected reply. ends: [R, N, 2] int32, where the two `<eoc>` of each pair are.
    weight: [R, N] f32 as in Pairs, and 0 where a row has fewer than N pairs.
    """

    tokens: Array
    positions: Array
    pair: Array
    branch: Array
    ends: Array
    weight: Array


class PackedReplies(NamedTuple):
    """Replies laid end to end in rows behind their prompts, which are there once; each reply is closed by <eot> <eoc>, as a PM reads it.

    tokens, positions, pair, branch: [N, T] int32 as in PackedPairs: `pair` is which of its row's prompts a token belongs to, `branch`
    which of that prompt's replies, 0 the prompt itself.
    read: [N, M] int32, the places in each row whose hidden states predict a reply's tokens, 0 past the last; None: all T in order. ends: [N, K]
    int32, the places of the <eoc>, alike.
    reply: [B, R] int32, each reply as it was sampled, <pad> past its end; reply_len: [B] int32. before: [B, R] int32, which of the places that
    are read predicts each of its tokens; end: [B] int32, which of the ends is its own. Both count through the rows of the reply's own
    shard, the first N / shards of them, or the next.
    """

    tokens: Array
    positions: Array
    pair: Array
    branch: Array
    read: Array | None
    ends: Array
    reply: Array
    reply_len: Array
    before: Array
    end: Array


class Model(NamedTuple):
    """A decoder as a record of pure functions; nobody outside `model/` sees flax.

    init(key) -> params
    apply(params, tokens [B, T], positions [B, T] | None, mask [B, S] | [B, T, S] | None, cache | None, slot | None, read [B, R] | None)
        -> (hidden [B, T, D], or [B, R, D] of the tokens that are read, cache | None); without a slot the cache is taken as empty
    logits(params, hidden [..., D]) -> [..., V] f32
    score(params, hidden [..., D]) -> [...] f32, the scalar head
    axes() -> a pytree like params of logical axis names, for `sharding.py`
    init_cache(batch, length) -> an empty key/value cache
    unrolled(params, stacked or a tree per layer) -> params as `apply` reads them fastest again and again with a cache, and only with one
    """

    config: Any
    init: Callable
    apply: Callable
    logits: Callable
    score: Callable
    axes: Callable
    init_cache: Callable
    unrolled: Callable


class Vocabulary(NamedTuple):
    """The special ids of a tokenizer and its number of rows; a model may have more, which are never sampled."""

    pad: int
    eot: int
    eoc: int
    size: int


class Samples(NamedTuple):
    """Replies to a batch of prompts.

    rows: Tokens [B, P + R], each prompt followed by its reply, <eot> included where it was sampled.
    logp, entropy: [B, R] f32 nats of the policy's distribution at the sampling temperature, before top-k and top-p, for reply token t; 0
        past the reply.
    stopped: [B] bool, whether the reply ended in <eot> within R tokens.
    """

    rows: Tokens
    logp: Array
    entropy: Array
    stopped: Array


class Rollout(NamedTuple):
    """What a PPO update sees of its samples, frozen before the first step. All but rows: [B, R], by reply token.

    rows: what models read, a row a reply or several packed in one.
    logp, ref_logp: nats, of the policy that sampled and of the reference. values: of the state before each token.
    advantages: whitened; returns: what the value network is to learn. mask: which tokens are real.
    """

    rows: Tokens | PackedReplies
    mask: Array
    logp: Array
    ref_logp: Array
    values: Array
    advantages: Array
    returns: Array


Actor = Callable[[Params, Tokens | PackedReplies], tuple[Array, Array, Array]]  # -> logp, values, entropy of the reply tokens, [B, R]
