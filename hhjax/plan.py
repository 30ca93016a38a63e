"""--dry-run: what a run would do, without allocating it: shapes, parameters, shardings, tokens, FLOPs, memory."""

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from hhjax import roofline
from hhjax.data.tokenizer import load_tokenizer
from hhjax.experiment import DEFAULT_SIZE, PM, PPO, Placed, Run, Tokenizer, Training, place, split_step
from hhjax.io.models import open_model
from hhjax.loops.rlhf import iteration_flops, ppo_optimizer, ppo_shardings, roles
from hhjax.model.sizes import matmul_params, model_config
from hhjax.model.transformer import ModelConfig, make_model
from hhjax.sharding import batch_ways, check_batch, make_mesh, param_shardings
from hhjax.train.state import init_state, make_optimizer, state_shardings
from hhjax.train.step import make_train_step, shard_step
from hhjax.types import Pairs, Tokens


def describe(run: Run, out: Path, data_dir: Path | None = None) -> str:
    """Every stage of a run as text. Nothing is read but data hashes and finished parents' configs; no array is made.

    Raises ConfigError and ValueError as the run itself would: a mesh that does not fit, a batch that does not divide.
    """
    placed = {p.stage.name: p for p in place(run, out, data_dir)}
    lines = [f"run {run.name}"]
    for p in placed.values():
        done = "done" if (p.dir / "DONE").is_file() else "to do"
        lines.append(f"\n{p.stage.name} ({p.stage.kind}, {done})  {p.dir}")
        if isinstance(p.stage, Training):
            lines += [f"  {line}" for line in describe_training(p.stage, architecture(p, placed))]
        if isinstance(p.stage, PPO):
            lines += [f"  {line}" for line in describe_ppo(p.stage, {r: architecture_of(ref, p, placed) for r, ref in roles(p.stage).items()})]
    return "\n".join(lines)


def describe_training(stage: Training, cfg: ModelConfig) -> Iterator[str]:
    """Model, state and step of a training stage at its widest batch."""
    mesh = make_mesh(stage.mesh)
    check_batch(stage.batch_size // stage.micro_batches, mesh)
    model = make_model(cfg, mesh, stage.run)
    optimizer = make_optimizer(stage.optim, stage.steps or 1)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    shardings = state_shardings(optimizer, shapes, param_shardings(model.axes(), shapes, mesh), mesh)
    state = jax.eval_shape(lambda k: init_state(model.init(k), optimizer, k), jax.random.key(0))
    total = sum(x.size for x in jax.tree.leaves(shapes))
    yield f"mesh      {dict(mesh.shape)} over {mesh.size} devices ({mesh.devices.flat[0].device_kind})"
    yield f"model     {cfg.layers} layers, width {cfg.width}, {cfg.heads} heads, vocabulary {cfg.vocab}"
    yield f"weights   {total:,} parameters, {matmul_params(cfg):,} of them in the blocks' matrix products"
    for (path, leaf), sharding in zip(jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(shardings.params)):
        name = "/".join(str(k.key) for k in path)
        yield f"  {name:<24}{str(leaf.shape):<24}{str(leaf.dtype):<10}{sharding.spec}"
    rows = stage.batch_size * (2 if isinstance(stage, PM) else 1)
    lm_coef = getattr(stage.loss, "lm_coef", 0.0)
    flops = (
        roofline.pm_step_flops(cfg, rows, stage.seq_len, lm_coef)
        if isinstance(stage, PM)
        else roofline.lm_step_flops(cfg, rows, stage.seq_len)
    )
    what = f"{stage.batch_size} pairs" if isinstance(stage, PM) else f"{rows} rows"
    yield f"batch     {what} of at most {stage.seq_len} tokens: {rows * stage.seq_len:,} positions, {batch_ways(mesh)} ways"
    length = f"{stage.steps:,} updates" if stage.steps else f"{stage.epochs:g} epochs"
    yield f"length    {length}; {flops:.3g} FLOPs an update" + (f", {flops * stage.steps:.3g} in all" if stage.steps else "")
    yield f"state     {bytes_per_device(state, shardings) / 2**20:,.1f} MiB a device (f32 weights and two moments)"
    batch = jax.ShapeDtypeStruct((stage.batch_size, stage.seq_len), jnp.int32)
    count = jax.ShapeDtypeStruct((stage.batch_size,), jnp.int32)
    tokens = Tokens(batch, count, count)
    example = Pairs(tokens, tokens, jax.ShapeDtypeStruct(count.shape, jnp.float32)) if isinstance(stage, PM) else tokens
    step = make_train_step(stage.objective(model, stage.loss), optimizer, stage.micro_batches)
    memory = shard_step(step, shardings, mesh).lower(state, example).compile().memory_analysis()
    yield f"compiled  {memory.temp_size_in_bytes / 2**20:,.1f} MiB of temporaries a device, besides the state"


def describe_ppo(stage: PPO, configs: dict[str, ModelConfig]) -> Iterator[str]:
    """Models by role, state, and the work of an iteration at full length."""
    mesh = make_mesh(stage.mesh)
    check_batch(stage.batch_size // (stage.minibatches * stage.micro_batches), mesh)
    models = {role: make_model(cfg, mesh, stage.run) for role, cfg in configs.items()}
    shapes = {role: jax.eval_shape(model.init, jax.random.key(0)) for role, model in models.items()}
    optimizer = ppo_optimizer(stage)
    shardings = ppo_shardings(optimizer, models, mesh)
    trained = {role: shapes[role] for role in optimizer.parts}
    state = jax.eval_shape(lambda k: init_state(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), trained), optimizer, k), jax.random.key(0))
    yield f"mesh      {dict(mesh.shape)} over {mesh.size} devices ({mesh.devices.flat[0].device_kind})"
    for role, cfg in configs.items():
        kind = "trained" if role in trained else "frozen"
        total = sum(x.size for x in jax.tree.leaves(shapes[role]))
        yield f"  {role:<24}{cfg.layers} layers, width {cfg.width}, {total:,} parameters, {kind}"
    width, new = stage.prompt_len + stage.sampling.max_new_tokens, stage.sampling.max_new_tokens
    yield f"batch     {stage.batch_size} prompts of {stage.prompt_len} tokens and {new} new ones: {stage.batch_size * width:,} positions"
    updates, flops = stage.epochs * stage.minibatches, iteration_flops(stage, models)
    yield f"length    {stage.steps:,} iterations of {updates} updates; {flops:.3g} FLOPs an iteration, {flops * stage.steps:.3g} in all"
    cache = 2 * models["policy"].config.layers * stage.batch_size * configs["policy"].kv_heads * width * configs["policy"].head_dim * 4
    yield f"state     {bytes_per_device(state, shardings) / 2**20:,.1f} MiB a device (f32 weights and two moments of what is trained)"
    yield f"cache     {cache / 2**20 / batch_ways(mesh):,.1f} MiB a device while sampling (f32)"


def bytes_per_device(tree, shardings) -> int:
    """Bytes that one device holds of a tree of shapes under matching shardings."""
    sizes = jax.tree.map(lambda x, s: int(np.prod(s.shard_shape(x.shape))) * _item_bytes(x.dtype), tree, shardings)
    return sum(jax.tree.leaves(sizes))


def _item_bytes(dtype) -> int:
    """Bytes of an element; a typed PRNG key is two words."""
    return 8 if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) else np.dtype(dtype).itemsize


def architecture(placed: Placed, run: dict[str, Placed]) -> ModelConfig:
    """The model a training stage would build, from its parents in this run or on disk."""
    stage = placed.stage
    if not stage.init:
        return model_config(stage.model or DEFAULT_SIZE, vocabulary(stage.tokenizer, placed, run))
    return architecture_of(stage.init, placed, run, stage.tokenizer)


def architecture_of(ref: str, placed: Placed, run: dict[str, Placed], tokenizer: str | None = None) -> ModelConfig:
    """The model behind a reference of a stage: of an earlier stage, or on disk."""
    name, step = split_step(ref)
    if name in run:
        stage = run[name].stage
        return architecture_of(stage.policy, run[name], run) if isinstance(stage, PPO) else architecture(run[name], run)
    return open_model(placed.parents[ref], step, vocabulary(tokenizer or ref, placed, run)).config


def vocabulary(ref: str, placed: Placed, run: dict[str, Placed]) -> int:
    """The rows that a tokenizer needs: as its stage says, or as the folder holds it."""
    stage = run[ref].stage if ref in run else None
    return stage.vocab if isinstance(stage, Tokenizer) else load_tokenizer(placed.parents[ref]).vocab_size
