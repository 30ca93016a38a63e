"""Sampling: replies to ragged prompts with a static key/value cache, whose rows go from replies that have ended to those that wait."""

from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hhjax.model.replies import NEVER, joined, policy_logits
from hhjax.types import Array, Key, Model, Params, Samples, Tokens, Vocabulary

_BLOCKS = 128  # into which `draw_token` cuts the vocabulary: a tensor axis that splits the one splits the other


@dataclass(frozen=True)
class Sampling:
    """How replies are drawn. temperature 0 is greedy. top_k 0 and top_p 1 are off, as in the paper (footnote 12).

    slots: rows decoded at one time; when an eighth of them have ended, waiting rows take their places. 0: all rows at once, to the end of
    the longest reply. Replies do not depend on it, but for near-ties that rounding decides.
    """

    max_new_tokens: int = 128  # Bai et al. 2022, section 4.1; 32 in the robustness runs
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    slots: int = field(default=0, metadata={"identity": False})

    def __post_init__(self):
        if self.max_new_tokens < 1 or self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1 or self.slots < 0:
            raise ValueError(f"{self}: max_new_tokens >= 1, temperature >= 0, top_k >= 0, 0 < top_p <= 1, slots >= 0")


class Slots(NamedTuple):
    """The rows under way, one a slot; every array's first axis is the slots, those of a shard together.

    row: which of its shard's rows a slot holds; id: what that row's noise is drawn by. prompt_len, t: int32, t counts the reply's tokens so
    far. last: the newest of them. live: whether the reply goes on. tokens, logp, entropy: [slots, R], the reply so far.
    """

    row: Array
    id: Array
    prompt_len: Array
    t: Array
    last: Array
    live: Array
    tokens: Array
    logp: Array
    entropy: Array


class Carry(NamedTuple):
    """What decoding carries from token to token. taken: [ways] int32, the rows of each shard's queue that have had a slot; steps: int32."""

    slots: Slots
    cache: tuple
    taken: Array
    steps: Array


def generate(model: Model, params: Params, prompts: Tokens, row_ids, key: Key, vocab: Vocabulary, cfg: Sampling,
             ways: int = 1) -> tuple[Samples, Array]:  # fmt: skip
    """A reply of at most cfg.max_new_tokens to the prompt of every row, ending after <eot>; and the decode steps that were needed.

    prompts: Tokens [N, P], right-padded, `length` counting the prompt. row_ids: [B] int32; B is a multiple of N, and runs of B / N rows
    share a prompt, which is read once for all that begin together. Token t of a row is drawn with fold_in(fold_in(key, row id), t), so
    that its reply does not depend on the rows beside it.
    ways: how many shards the mesh splits rows into. Each has slots and a queue of its own, so that no cache crosses devices.
    Raises ValueError where rows, slots and shards do not divide.
    """
    (n, p), b, r = prompts.tokens.shape, len(row_ids), cfg.max_new_tokens
    copies, rows, slots = b // n, b // ways, slots_of(cfg, b, ways) // ways  # the last two of a shard
    group = refill_group(b, n, slots, ways)
    params = model.unrolled(params)

    def draw(hidden, slots: Slots):
        """Each live slot with the next token of its reply, drawn from its last hidden state [slots, D]."""
        logits = policy_logits(model, params, hidden, vocab, cfg.temperature)
        logp = jax.nn.log_softmax(logits)
        if cfg.temperature:
            keys = jax.vmap(lambda row, t: jax.random.fold_in(jax.random.fold_in(key, row), t))(slots.id, slots.t)
            token = draw_token(keys, filtered(logits, cfg))
        else:
            token = jnp.argmax(logits, -1).astype(jnp.int32)
        here = (jnp.arange(r) == slots.t[:, None]) & slots.live[:, None]
        add = lambda old, new: jnp.where(here, new[:, None], old)  # noqa: E731
        t = slots.t + slots.live
        return slots._replace(
            t=t, last=token, live=slots.live & (token != vocab.eot) & (t < r), tokens=add(slots.tokens, token),
            logp=add(slots.logp, jnp.take_along_axis(logp, token[:, None], -1)[:, 0]),
            entropy=add(slots.entropy, -jnp.sum(jnp.exp(logp) * logp, -1)))  # fmt: skip

    def begin(row) -> tuple[Slots, tuple]:
        """Slots and caches of these rows of every shard, [ways, G] in order: their prompts read, their first tokens drawn."""
        shared = min(copies, row.shape[1])
        mine = jax.tree.map(lambda x: take(x, row[:, ::shared] // copies), prompts)
        hidden, cache = model.apply(params, mine.tokens, cache=model.init_cache(len(mine.length), p + r), read=mine.length[:, None] - 1)
        last = hidden[:, 0]
        if shared > 1:
            last, mine, cache = jax.tree.map(lambda x: jnp.repeat(x, shared, axis=0), (last, mine, cache))
        none = jnp.zeros(row.size, jnp.int32)
        blank = jnp.zeros((row.size, r))
        slots = Slots(row.reshape(-1), take(row_ids, row), mine.length, none, none, none == 0, jnp.full((row.size, r), vocab.pad), blank, blank)
        return draw(last, slots), cache

    def step(carry: Carry) -> Carry:
        """Behind the prompts the cache is a ring of r columns: a step writes the newest token of every row to the same, wherever it stands in its
        row, and a row sees as many columns, backwards, as it has tokens."""
        slots, column = carry.slots, carry.steps % r
        age, place = (column - jnp.arange(-p, r)) % r, jnp.arange(p + r)
        visible = jnp.where(place < p, place < slots.prompt_len[:, None], age < slots.t[:, None])
        at = slots.prompt_len + slots.t - 1
        hidden, cache = model.apply(params, slots.last[:, None], at[:, None], visible[:, None], carry.cache, p + column)
        return carry._replace(slots=draw(hidden[:, 0], slots), cache=cache, steps=carry.steps + 1)

    def takers(carry: Carry):
        """Which shards have a group of rows waiting and as many slots that have ended, [ways] bool."""
        ended = jnp.sum(~carry.slots.live.reshape(ways, -1), 1)
        return (carry.taken < rows) & (ended >= group)

    def ready(carry: Carry):
        """Whether half of the shards that have rows waiting can take some: all shards read prompts when one does."""
        return 2 * jnp.sum(takers(carry)) >= jnp.maximum(jnp.sum(carry.taken < rows), 1)

    def decode(carry: Carry) -> Carry:
        """To the end of all replies, or until waiting rows begin. The count only tells compilers how long that may take."""
        going = lambda c: (c[0] < r - 1) & jnp.any(c[1].slots.live) & ~ready(c[1])  # noqa: E731
        return jax.lax.while_loop(going, lambda c: (c[0] + 1, step(c[1])), (0, carry))[1]

    def refill(carried):
        """Replies so far are written down, and waiting rows begin in slots that have ended."""
        replies, carry = carried
        replies, able = written(replies, carry.slots), takers(carry)
        ended = jnp.argsort(carry.slots.live.reshape(ways, -1), axis=1)[:, :group]
        into = jnp.where(able[:, None], ended, slots)  # a number that no slot has: nothing is written
        fresh = begin(carry.taken[:, None] + jnp.arange(group))
        now = jax.tree.map(lambda old, new: put(old, into, new), (carry.slots, carry.cache), fresh)
        return replies, decode(Carry(*now, carry.taken + able * group, carry.steps))

    def written(replies, slots: Slots):
        return jax.tree.map(lambda x, new: put(x, slots.row.reshape(ways, -1), new), replies, slots[-3:])

    carry = decode(Carry(*begin(jnp.tile(jnp.arange(slots), (ways, 1))), jnp.full(ways, slots), jnp.int32(0)))
    replies = carry.slots[-3:]
    if slots < rows:
        replies = jax.tree.map(lambda x: jnp.zeros((b, r), x.dtype), replies)
        replies, carry = jax.lax.while_loop(lambda c: jnp.any(c[1].taken < rows), refill, (replies, carry))
        replies = written(replies, carry.slots)
    asked = jax.tree.map(lambda x: jnp.repeat(x, copies, axis=0), prompts) if copies > 1 else prompts
    tokens, logp, entropy = replies
    return Samples(joined(asked, tokens, vocab), logp, entropy, jnp.any(tokens == vocab.eot, -1)), carry.steps


def slots_of(cfg: Sampling, batch: int, ways: int) -> int:
    """How many rows of a batch are decoded at one time, over all shards. Raises ValueError where they do not divide."""
    slots = min(cfg.slots or batch, batch)
    if batch % slots or slots % ways:
        raise ValueError(f"sampling.slots={cfg.slots}: {slots} slots over {ways} shards do not divide a batch of {batch}; choose a divisor of "
                         f"the batch that is a multiple of the shards")  # fmt: skip
    return slots


def refill_group(b: int, n: int, slots: int, ways: int) -> int:
    """How many of a shard's slots must have ended before as many waiting rows begin: about an eighth, since reading one prompt
    costs nearly as much as reading several. Raises ValueError where b rows of n prompts do not divide."""
    copies = b // n
    even = lambda size: slots % size == 0 and (copies % size == 0 or size % copies == 0)  # noqa: E731
    if b % n or n % ways or not even(slots):
        raise ValueError(f"{b} rows of {n} prompts do not divide into {ways} shards of {slots} slots; let shards divide the prompts, and "
                         f"slots be a multiple or a part of the rows of one")  # fmt: skip
    return next(size for size in range(max(slots // 8, 1), 0, -1) if even(size))


def take(x, index):
    """x [ways * M, ...] of each shard by the numbers in index [ways, G]: [ways * G, ...]."""
    found = jax.vmap(lambda x, i: x[i])(x.reshape(len(index), -1, *x.shape[1:]), index)
    return found.reshape(-1, *x.shape[1:])


def put(x, index, new):
    """x [ways * M, ...] with new [ways * G, ...] at index [ways, G] of each shard; numbers of M and above are left out."""
    split = lambda x: x.reshape(len(index), -1, *x.shape[1:])  # noqa: E731
    return jax.vmap(lambda x, i, new: x.at[i].set(new, mode="drop"))(split(x), index, split(new)).reshape(x.shape)


def draw_token(keys, logits):
    """A token of softmax(logits) for every key: [S] keys, [S, V] f32 -> [S] int32. One of probability 0 is never drawn.

    By the inverse of the cumulative distribution, of blocks of the vocabulary and then inside one: Gumbel noise on every logit took 12 ms
    for 32 rows of 8,192 tokens on a CPU, this 0.5. Probabilities are told apart to f32's rounding of the whole, 1e-7.
    """
    p = jnp.exp(logits - jnp.max(logits, -1, keepdims=True))
    p = jnp.pad(p, ((0, 0), (0, -p.shape[1] % _BLOCKS))).reshape(len(p), _BLOCKS, -1)
    block, share = invert(jnp.sum(p, -1), jax.vmap(jax.random.uniform)(keys))
    # A sum over all blocks but one: taking the one by its number would gather the vocabulary where it is split.
    own = jnp.sum(jnp.where(jnp.arange(_BLOCKS)[:, None] == block[:, None, None], p, 0.0), 1)
    return block * p.shape[2] + invert(own, share)[0]


def invert(sizes, share):
    """Where `share` [S] of the whole lies among parts of these sizes [S, N], f32: the number of the part, which has a size, and the share of
    it that lies below, in [0, 1). Compilers add up long rows in pieces, so that sums may fall by a rounding where a part has no size."""
    upto = jnp.where(sizes > 0, jnp.cumsum(sizes, -1), 0.0)
    below = share * jnp.max(upto, -1)
    part = jnp.argmax(upto > below[:, None], -1).astype(jnp.int32)
    end, size = (jnp.take_along_axis(x, part[:, None], 1)[:, 0] for x in (upto, sizes))
    return part, jnp.clip((below - (end - size)) / size, 0.0, 1 - 2.0**-23)


def filtered(logits, cfg: Sampling):
    """Logits with all but the top_k likeliest, and all beyond the smallest set of probability top_p, ruled out."""
    if cfg.top_k and cfg.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, cfg.top_k)[0][..., -1:]
        logits = jnp.where(logits >= least, logits, NEVER)
    if cfg.top_p < 1:
        ordered = -jnp.sort(-logits, -1)
        p = jax.nn.softmax(ordered)
        kept = jnp.sum(jnp.cumsum(p, -1) - p < cfg.top_p, -1, keepdims=True)  # at least the likeliest
        logits = jnp.where(logits >= jnp.take_along_axis(ordered, kept - 1, -1), logits, NEVER)
    return logits
