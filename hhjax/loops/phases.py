"""The compiled parts of a PPO iteration: sampling, scoring, the update; who plays in them, what they read, and what they cost."""

import contextlib
import math
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from hhjax import roofline
from hhjax.data.packing import ReplyPacker
from hhjax.data.stream import Host
from hhjax.loops.sampling import fetch, frozen, make_sample
from hhjax.loops.supervised import compute_dtype
from hhjax.model.transformer import make_model, reads_apart, unstacked, unstacked_axes
from hhjax.sharding import batch_host, batch_sharding, batch_ways, batches_sharding, param_shardings, put_batch, put_batches, replicated
from hhjax.stages import PPO, loss_of
from hhjax.train.rollout import Judges, make_actor, make_exact_kl, make_score
from hhjax.train.state import PartsOptimizer, TrainState, make_parts_optimizer, state_shardings
from hhjax.train.step import make_ppo_update, make_train_step
from hhjax.types import Model, PackedReplies, Tokens, Vocabulary


class Reading(NamedTuple):
    """What models read: so many rows of so many tokens; of each, the tokens whose last hidden states policy and value are asked, and the ends that
    preference models are."""

    rows: int
    width: int
    read: int
    ends: int


class Phases(NamedTuple):
    """The compiled parts of an iteration, and of a look at held-out prompts.

    spread(policy params) -> them on the rollout mesh; sample(params, prompts, row_ids, key) -> (Samples, decode steps) there;
    gather(samples) -> them on the training mesh; fetch(samples) -> their rows and whether they stopped, as numpy, on every process.
    lay(samples, rows, stopped) -> what models read of them, on the training mesh. score(...) and exact_kl(...): see train/rollout.py.
    split(rows, stopped, rng) -> order and rows of the minibatches, see `make_ppo_update`; update(state, rollout, order, rows) -> (state,
    metrics), the state donated.
    """

    spread: Callable
    sample: Callable
    gather: Callable
    fetch: Callable
    lay: Callable
    score: Callable
    split: Callable
    update: Callable
    exact_kl: Callable


@dataclass
class Seconds:
    """Wall seconds of the phases of an iteration, each of which is waited for; `read`, the host's, lies within `train`."""

    generate: float = 0.0
    score: float = 0.0
    train: float = 0.0
    read: float = 0.0

    @contextlib.contextmanager
    def phase(self, name: str):
        began = time.perf_counter()
        yield
        setattr(self, name, time.perf_counter() - began)


def advance(phases: Phases, state: TrainState, frozen: dict, prompts, key, rng, offsets: dict, beta: float, seconds: Seconds,
            poll: Callable[[], None] = lambda: None, read: Callable = lambda rows, report: None):  # fmt: skip
    """One iteration on the devices: (new state, fetched rows, shapes, decode steps, metrics, what was read), each phase waited for and timed.

    shapes: a `Reading` of what was scored, and of what all updates learnt from. poll() is called between the phases. rng: shuffles
    the minibatches. read(rows, report): the host's own look at the replies and their scores, while the devices learn from them.
    """
    with seconds.phase("generate"):
        samples, steps = phases.sample(phases.spread(state.params["policy"]), *prompts, key)
        samples = phases.gather(samples)
        rows, stopped = phases.fetch(samples)
    poll()
    with seconds.phase("score"):
        laid = phases.lay(samples, rows, stopped)
        scored = phases.score(state.params, frozen, samples, laid, offsets, beta)
        order, own = phases.split(rows, stopped, rng)  # while the devices score
        rollout, report = jax.block_until_ready(scored)
    poll()
    with seconds.phase("train"):
        learning = phases.update(state, rollout, order, own)
        with seconds.phase("read"):
            said = read(rows, report)
        state, metrics = jax.block_until_ready(learning)
    new = rows.tokens.shape[1] - prompts[0].tokens.shape[1]
    first, passes = reading(laid, new), 1 if order is None else order.size // len(rows.length)
    learnt = first._replace(rows=passes * first.rows) if own is None else reading(own, new)
    return state, rows, (first, learnt), steps, metrics, said


def make_phases(stage: PPO, models: dict, vocab: Vocabulary, mesh, rollout_mesh, shardings: TrainState) -> Phases:
    """The parts compiled for these models (by role, see `roles`), meshes, and shardings of the state."""
    width, heat = stage.sampling.max_new_tokens, stage.sampling.temperature
    policy = models["policy"]
    ways = batch_ways(mesh)
    actor = make_actor(policy, models.get("value"), vocab, width, heat, ways)
    judges = Judges(models["kl_to"], models["reward"], {ref: models[f"tests.{ref}"] for ref in stage.tests})
    recompute = stage.rollout.recompute
    dtype = compute_dtype(stage.run, mesh)
    recompute = dtype != "float32" if recompute is None else recompute
    score = make_score(actor, judges, vocab, width, stage.rollout, recompute, heat, ways)
    optimizer = ppo_optimizer(stage)
    step = make_train_step(loss_of(stage, actor), optimizer, stage.micro_batches, tuple(optimizer.parts))
    whole, rows = replicated(mesh), batch_sharding(mesh)
    spread, gather, sampler = (lambda x: x), (lambda x: x), policy
    if stage.rollout_mesh:
        sampler = make_model(policy.config, rollout_mesh, stage.run)
        places = decoding_shardings(sampler, rollout_mesh)
        cast = jax.jit(lambda params: unstacked(frozen(params, dtype)))  # what travels, and what decoding reads at every token
        spread = lambda params: jax.device_put(cast(params), places)  # noqa: E731
        gather = lambda samples: jax.device_put(samples, rows)  # noqa: E731

    def packer():  # not made here: a mesh that is only planned for has no hosts
        halve = any(reads_apart(model.config.layers, stage.run, mesh.devices.flat[0].platform) for model in models.values())
        return reply_packer(stage, vocab, ways)._replace(host=Host(*batch_host(mesh)), halve=halve)

    def lay(samples, fetched, stopped):
        return put_batch(packer().pack(fetched, stopped), mesh) if is_packed(stage, ways) else samples.rows

    def split(fetched, stopped, rng):
        order, packed = minibatches(stage, packer(), fetched, stopped, rng)
        return order, put_batches(packed, mesh)

    return Phases(
        spread=spread,
        sample=make_sample(sampler, vocab, stage.sampling, rollout_mesh),
        gather=gather,
        fetch=lambda samples: fetch((samples.rows, samples.stopped), mesh),
        lay=lay,
        score=jax.jit(score, in_shardings=(shardings.params, None, rows, rows, None, None), out_shardings=(rows, whole)),
        split=split,
        update=jax.jit(make_ppo_update(step), in_shardings=(shardings, rows, whole, batches_sharding(mesh)), out_shardings=(shardings, whole),
                       donate_argnums=0),
        exact_kl=jax.jit(make_exact_kl(policy, models["kl_to"], vocab, width, heat), out_shardings=whole),
    )  # fmt: skip


# Who plays -------------------------------------------------------------------------------------------------------------


def roles(stage: PPO) -> dict[str, str]:
    """Role -> reference. A model in two roles is loaded for each, as it is trained in one and frozen in the other."""
    value = {} if stage.value_head else {"value": stage.value or stage.reward}
    tests = {f"tests.{ref}": ref for ref in stage.tests}
    return {"policy": stage.policy, "kl_to": stage.kl_to or stage.policy, "reward": stage.reward} | value | tests


def judge_params(stage: PPO, params: dict) -> dict:
    """What `make_score` calls frozen, from parameters (or shapes, or shardings) by role."""
    return {"reference": params["kl_to"], "reward": params["reward"], "tests": {ref: params[f"tests.{ref}"] for ref in stage.tests}}


def ppo_optimizer(stage: PPO) -> PartsOptimizer:
    """Policy and value network each with its own, over all updates of the run."""
    configs = {"policy": stage.optim} | ({} if stage.value_head else {"value": stage.value_optim})
    return make_parts_optimizer(configs, stage.steps * stage.epochs * stage.minibatches)


def ppo_shardings(optimizer: PartsOptimizer, models: dict, mesh) -> TrainState:
    """Where the state of these models' parameters lies."""
    shapes = {name: jax.eval_shape(models[name].init, jax.random.key(0)) for name in optimizer.parts}
    places = {name: param_shardings(models[name].axes(), shapes[name], mesh) for name in optimizer.parts}
    return state_shardings(optimizer, shapes, places, mesh)


def decoding_shardings(model: Model, mesh):
    """Where `unstacked` parameters lie."""
    shapes = jax.eval_shape(lambda key: unstacked(model.init(key)), jax.random.key(0))
    return param_shardings(unstacked_axes(model.axes(), model.config.layers), shapes, mesh)


# What the models read --------------------------------------------------------------------------------------------------


def reply_packer(stage: PPO, vocab: Vocabulary, ways: int) -> ReplyPacker:
    """What packs the stage's replies."""
    return ReplyPacker(stage.prompt_len, stage.sampling.max_new_tokens, vocab, ways)


def is_packed(stage: PPO, ways: int) -> bool:
    """Whether models read packed rows. Fewer than 16 replies a device fill rows of two full ones hardly better than padding does."""
    each = stage.batch_size // (stage.minibatches * stage.micro_batches * ways)
    return each >= 16 if stage.packed is None else stage.packed


def minibatches(stage: PPO, packer: ReplyPacker, rows, stopped, rng) -> tuple[np.ndarray | None, PackedReplies | None]:
    """The samples of each minibatch of each epoch, [K, b], in an order of `rng`, and what the models read of them, as numpy, packed anew
    for each. No order where one update takes all; no rows where they are those of the rollout."""
    packed = is_packed(stage, packer.ways)
    count, parts = stage.epochs * stage.minibatches, stage.micro_batches if packed else 1
    if count * parts == 1:
        return None, None
    every = np.arange(stage.batch_size)
    order = np.concatenate([rng.permutation(every) if count > 1 else every for _ in range(stage.epochs)]).reshape(count, -1)
    if not packed:
        return order, None
    # `accumulate` gives every array's item i to part i % parts: each part is packed apart, and the rows of all dealt out like that.
    by_part = order.reshape(count, -1, parts).swapaxes(1, 2).reshape(count * parts, -1)
    deal = lambda x: x.reshape(count, parts, *x.shape[1:]).swapaxes(1, 2).reshape(count, -1, *x.shape[2:])  # noqa: E731
    return order if count > 1 else None, jax.tree.map(deal, packer.pack(rows, stopped, by_part))


# Work ------------------------------------------------------------------------------------------------------------------


def reading(rows: Tokens | PackedReplies, new: int) -> Reading:
    """Of a batch, or of several along a first axis. new: the most tokens of a reply."""
    count, width = math.prod(rows.tokens.shape[:-1]), rows.tokens.shape[-1]
    if not isinstance(rows, PackedReplies):
        return Reading(count, width, new, 1)
    return Reading(count, width, width if rows.read is None else rows.read.shape[-1], rows.ends.shape[-1])


def iteration_flops(stage: PPO, models: dict, platform: str, scored: Reading | None = None, learnt: Reading | None = None) -> float:
    """Model FLOPs of an iteration, see `phase_flops`."""
    return sum(phase_flops(stage, {name: model.config for name, model in models.items()}, platform, scored, learnt).values())


def phase_flops(stage: PPO, configs: dict, platform: str, scored: Reading | None = None, learnt: Reading | None = None) -> dict[str, float]:
    """Model FLOPs of an iteration's phases on such devices: "sample", the policy, at full length; "score", one forward of every judge and the
    value network; "update", three of policy and value an epoch. configs: ModelConfig by role. scored, learnt: what is read there, the
    latter in all epochs; by default a full row a reply."""
    new = stage.sampling.max_new_tokens
    full = Reading(stage.batch_size, stage.prompt_len + new, new, 1)

    def forward(role: str, rows: Reading) -> float:
        cfg, read = configs[role], rows.read if role in ("policy", "kl_to", "value") else rows.ends
        return roofline.forward_flops(cfg, rows.rows, rows.width, roofline.read_on(cfg, stage.run, platform, read))

    sampled = roofline.forward_flops(configs["policy"], full.rows, full.width, new)
    logits = {name: roofline.logits_flops(configs[name], stage.batch_size * new) for name in ("policy", "kl_to")}
    updated = learnt or full._replace(rows=stage.epochs * full.rows)
    trained = stage.epochs * logits["policy"] + sum(forward(role, updated) for role in ("policy", "value") if role in configs)
    judged = sum(forward(role, scored or full) for role in configs if role != "policy") + logits["kl_to"]
    return {"sample": sampled + logits["policy"], "score": judged, "update": 3 * trained}


def memory_gib() -> float:
    """The most memory used so far: of the first device where it tells, else of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 2**30
