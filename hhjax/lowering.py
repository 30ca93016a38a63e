"""A run's step functions and the shapes that go into them, lowered for devices that are here or not, and what a device holds while each runs.

`lower` is called in the process that compiles (hhjax/aot.py); the rest needs no compiler.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hhjax.aot import topology_devices
from hhjax.chips import Topology
from hhjax.data.packing import MOST, STEP
from hhjax.loops.phases import decoding_shardings, is_packed, judge_params, make_phases, minibatches, ppo_optimizer, ppo_shardings, reply_packer
from hhjax.loops.sampling import frozen
from hhjax.loops.supervised import compute_dtype
from hhjax.model.transformer import ModelConfig, make_model, unstacked
from hhjax.sharding import batch_sharding, batch_ways, batches_sharding, check_batch, make_mesh, param_shardings
from hhjax.stages import PM, PPO, Training, loss_of
from hhjax.train.state import decayed, init_state, make_optimizer, state_shardings
from hhjax.train.step import make_train_step, shard_step
from hhjax.types import PackedPairs, Pairs, Tokens, Vocabulary

# Pairs of helpful-base and harmless-base (3,694, in 8,192 pieces), which stand for a PM's own, since no data is read here. At a seq_len
# of 256, 512 and 1,024 PackedSource gives them rows of 512, 768 and 1,280 tokens, a pair 193, 228 and 234 tokens (the long ones have lost
# the start of their prompts), and fills 0.93 of as many rows as a batch of 32 needs, before that number is made to divide by the mesh.
HH_PAIR, HH_SHORT, HH_REPLY, HH_FILLED = 234, 0.75, 256, 0.93


class Step(NamedTuple):
    """One step function of a stage, to be compiled. configs: ModelConfig by role ("model" for an LM or PM)."""

    run: str
    stage: Training | PPO
    configs: dict[str, ModelConfig]
    phase: str


def lower(step: Step, topology: Topology):
    """(the step function lowered for the topology's devices, what is known of it without compiling). facts: as `lower_on`, and extent,
    axis -> dimension of the topology -> places."""
    lowered, facts, used = lower_on(step, topology_devices(topology))
    return lowered, facts | {"extent": extent(used)}


def lower_on(step: Step, devices):
    """(the step function lowered for these devices, facts, the mesh that it uses). facts: mesh, its sizes; held, bytes a device by
    what they hold; beside, those of them that are no arguments."""
    mesh = make_mesh(step.stage.mesh, devices)
    decode = make_mesh(step.stage.rollout_mesh, devices) if getattr(step.stage, "rollout_mesh", None) else mesh
    check_step(step, mesh)
    dtype = compute_dtype(step.stage.run, mesh)
    held, beside = holdings(step, mesh, decode, dtype)
    used = decode if step.phase == "sample" else mesh
    facts = {"mesh": dict(used.shape), "held": held, "beside": beside}
    if isinstance(step.stage, Training):
        model = make_model(step.configs["model"], mesh, step.stage.run)
        optimizer = make_optimizer(step.stage.optim, step.stage.steps or 1)
        shardings = state_shardings(optimizer, *shapes_and_places(model.config, mesh), mesh)
        return lower_update(step.stage, model, optimizer, shardings, mesh), facts, used
    phase, inputs = ppo_phase(step, mesh, decode, dtype)
    return phase.lower(*inputs), facts, used


def ppo_phase(step: Step, mesh, decode, dtype: str):
    """(the function of a phase of PPO as `loops/phases.py` jits it, shapes of what it is called with)."""
    stage = step.stage
    models = {role: make_model(cfg, mesh, stage.run) for role, cfg in step.configs.items()}
    optimizer = ppo_optimizer(stage)
    shardings = ppo_shardings(optimizer, models, mesh)
    vocab = Vocabulary(0, 1, 2, models["policy"].config.vocab)
    phases = make_phases(stage, models, vocab, mesh, decode, shardings)
    shapes = {role: parameters_of(cfg)[0] for role, cfg in step.configs.items()}
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(lambda p, k: init_state(p, optimizer, k), {part: shapes[part] for part in optimizer.parts}, key)
    small = {role: jax.eval_shape(lambda p: frozen(p, dtype), x) for role, x in shapes.items()}
    if stage.rollout_mesh:
        policy = placed(jax.eval_shape(unstacked, small["policy"]), decoding_shardings(make_model(step.configs["policy"], decode), decode))
    else:
        policy = placed(shapes["policy"], shardings.params["policy"])
    inputs = (policy, token_shapes(stage.batch_size, stage.prompt_len), jax.ShapeDtypeStruct((stage.batch_size,), jnp.int32), key)
    if step.phase == "sample":
        return phases.sample, inputs
    judges = judge_params(stage, {role: placed(small[role], shapes_and_places(cfg, mesh)[1]) for role, cfg in step.configs.items()})
    offsets = {"reward": 0.0, "value": 0.0, "tests": dict.fromkeys(stage.tests, 0.0)}
    samples = split_rows(jax.eval_shape(phases.sample, *inputs)[0], mesh)
    packer, full, none = full_replies(stage, vocab, batch_ways(mesh))
    laid = split_rows(packer.pack(full, none), mesh) if is_packed(stage, batch_ways(mesh)) else samples.rows
    scored = (state.params, judges, samples, laid, offsets, 0.0)
    if step.phase == "score":
        return phases.score, scored
    order, packed = minibatches(stage, packer, full, none, np.random.default_rng(0))
    rollout = split_rows(jax.eval_shape(phases.score, *scored)[0], mesh)
    return phases.update, (state, rollout, order, split_rows(packed, mesh, batches_sharding(mesh)))


def full_replies(stage: PPO, vocab: Vocabulary, ways: int):
    """What packs the replies of a stage, and a batch of them that is as long as there can be: what is planned for."""
    each = lambda n: np.full(stage.batch_size, n, np.int32)  # noqa: E731
    width = stage.prompt_len + stage.sampling.max_new_tokens
    return reply_packer(stage, vocab, ways), Tokens(np.full((stage.batch_size, width), vocab.eoc + 1), each(stage.prompt_len), each(width)), each(0)


def lower_update(stage: Training, model, optimizer, shardings, mesh):
    """The stage's update at its widest batch, as `loops/supervised.py` jits it, traced and lowered for the mesh's devices."""
    state = jax.eval_shape(lambda k: init_state(model.init(k), optimizer, k), jax.random.key(0))
    step = make_train_step(loss_of(stage, model), optimizer, stage.micro_batches)
    return shard_step(step, shardings, mesh).lower(state, batch_shapes(stage, batch_ways(mesh)))


def batch_shapes(stage: Training, ways: int) -> Tokens | Pairs | PackedPairs:
    """The batch of an update, without its numbers."""
    rows, width = batch_shape(stage, ways)
    if not isinstance(stage, PM):
        return token_shapes(rows, width)
    if not stage.packed:
        tokens = token_shapes(stage.batch_size, width)
        return Pairs(tokens, tokens, jax.ShapeDtypeStruct((stage.batch_size,), jnp.float32))
    tokens, pairs = jax.ShapeDtypeStruct((rows, width), jnp.int32), (rows, min(MOST, stage.batch_size))
    ends, weight = jax.ShapeDtypeStruct((*pairs, 2), jnp.int32), jax.ShapeDtypeStruct(pairs, jnp.float32)
    return PackedPairs(tokens, tokens, tokens, tokens, ends, weight)


def token_shapes(rows: int, width: int) -> Tokens:
    count = jax.ShapeDtypeStruct((rows,), jnp.int32)
    return Tokens(jax.ShapeDtypeStruct((rows, width), jnp.int32), count, count)


def batch_shape(stage: Training, ways: int) -> tuple[int, int]:
    """(rows, width) of all that an update reads: of a PM both rows of every pair, or what `PackedSource` would make of pairs like HH's."""
    if not isinstance(stage, PM):
        return stage.batch_size, stage.seq_len
    if not stage.packed:
        return 2 * stage.batch_size, stage.seq_len
    width = -(-min(2 * stage.seq_len, stage.seq_len + HH_REPLY) // STEP) * STEP
    tokens, multiple = stage.batch_size * min(HH_PAIR, HH_SHORT * stage.seq_len), ways * stage.micro_batches
    return math.ceil(tokens / (HH_FILLED * width) / multiple) * multiple, width


def placed(shapes, shardings):
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def split_rows(shapes, mesh, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or batch_sharding(mesh)), shapes)


def check_step(step: Step, mesh) -> None:
    """Raises ValueError on a batch that does not divide, as the loops do."""
    stage = step.stage
    check_batch(stage.batch_size // (getattr(stage, "minibatches", 1) * stage.micro_batches), mesh)


# What a device holds ---------------------------------------------------------------------------------------------------


def holdings(step: Step, mesh, decode, dtype: str) -> tuple[dict[str, int], int]:
    """(bytes that a device holds while the step runs, by what they are; how many of them are not the step's arguments).

    "cache": keys and values of sampling, a part of the temporaries. A PPO stage holds its frozen models and optimisers all along.
    """
    if isinstance(step.stage, Training):
        optimizer = make_optimizer(step.stage.optim, step.stage.steps or 1)
        return split_state(optimizer, *shapes_and_places(step.configs["model"], mesh), mesh), 0
    stage, optimizer = step.stage, ppo_optimizer(step.stage)
    found = {role: shapes_and_places(cfg, mesh) for role, cfg in step.configs.items()}
    held = split_state(optimizer, *({part: found[part][i] for part in optimizer.parts} for i in (0, 1)), mesh)
    held["frozen models"] = sum(weight_bytes(*found[role], dtype) for role in found if role not in ("policy", "value"))
    if step.phase == "update":
        return held, held["frozen models"]
    if step.phase == "score":
        return held, held["optimiser"]
    cfg, rows = step.configs["policy"], stage.batch_size // batch_ways(decode)
    heads = cfg.kv_heads // decode.shape["tensor"]
    width = stage.prompt_len + stage.sampling.max_new_tokens
    beside = sum(held.values())
    if stage.rollout_mesh:
        held["decode weights"] = weight_bytes(*shapes_and_places(cfg, decode), dtype)
    else:  # it samples with the very parameters that it trains
        beside -= bytes_per_device(*found["policy"])
    return held | {"cache": 2 * cfg.layers * rows * heads * width * cfg.head_dim * jnp.dtype(dtype).itemsize}, beside


def split_state(optimizer, shapes, places, mesh) -> dict[str, int]:
    """Bytes a device of a TrainState: parameters, and the optimiser with the step and the key."""
    state = jax.eval_shape(lambda p, k: init_state(p, optimizer, k), shapes, jax.eval_shape(lambda: jax.random.key(0)))
    parameters = bytes_per_device(shapes, places)
    return {"parameters": parameters, "optimiser": bytes_per_device(state, state_shardings(optimizer, shapes, places, mesh)) - parameters}


def weight_bytes(shapes, places, dtype: str) -> int:
    """Bytes a device of a model that is not trained: matrices in the compute dtype."""
    small = jax.tree.map(lambda x, matrix: jax.ShapeDtypeStruct(x.shape, dtype if matrix else x.dtype), shapes, decayed(shapes))
    return bytes_per_device(small, places)


def shapes_and_places(cfg: ModelConfig, mesh):
    """(shapes, shardings) of a model's parameters."""
    shapes, axes = parameters_of(cfg)
    return shapes, param_shardings(axes, shapes, mesh)


@lru_cache
def parameters_of(cfg: ModelConfig):
    """(shapes, logical axes): tracing a model takes longer than all else that a search does without compiling."""
    model = make_model(cfg)
    return jax.eval_shape(model.init, jax.random.key(0)), model.axes()


def extent(mesh) -> dict[str, dict[int, int]]:
    """Mesh axis -> dimension of the torus (of GPUs: machine, place in it) -> how many places along it the devices of one group take."""
    found = {}
    for i, axis in enumerate(mesh.axis_names):
        line = mesh.devices[tuple(slice(None) if j == i else 0 for j in range(mesh.devices.ndim))]
        places = list(zip(*(tuple(d.coords) for d in line.flat)))
        found[axis] = {dim: len(set(at)) for dim, at in enumerate(places) if len(set(at)) > 1}
    return found


def bytes_per_device(tree, shardings) -> int:
    """Bytes that one device holds of a tree of shapes under matching shardings."""
    sizes = jax.tree.map(lambda x, s: int(np.prod(s.shard_shape(x.shape))) * _item_bytes(x.dtype), tree, shardings)
    return sum(jax.tree.leaves(sizes))


def _item_bytes(dtype) -> int:
    """Bytes of an element; a typed PRNG key is two words."""
    return 8 if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) else np.dtype(dtype).itemsize
