"""--dry-run: what a run would do, without allocating it: shapes, parameters, shardings, tokens, FLOPs, memory."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp

from hhjax import roofline
from hhjax.data.tokenizer import load_tokenizer
from hhjax.experiment import Run
from hhjax.io.bucket import address_of, is_done
from hhjax.io.models import open_model
from hhjax.loops.phases import iteration_flops, ppo_optimizer, ppo_shardings, roles
from hhjax.loops.sampling import check_sampling
from hhjax.loops.supervised import compute_dtype
from hhjax.lowering import Step, batch_shape, batch_shapes, bytes_per_device, lower_update, ppo_phase
from hhjax.model.sizes import matmul_params, model_config
from hhjax.model.transformer import ModelConfig, make_model
from hhjax.placing import place
from hhjax.sharding import batch_ways, check_batch, make_mesh, param_shardings
from hhjax.stages import DEFAULT_SIZE, PM, PPO, Stage, Tokenizer, Training, loss_of, split_step
from hhjax.train.state import init_state, make_optimizer, state_shardings


def describe(run: Run, out: Path, data_dir: Path | None = None, only: str | None = None) -> str:
    """Every stage of a run as text, or the one of this name. Nothing is read but data hashes and finished parents' configs; no array is made.

    Raises ConfigError and ValueError as the run itself would: a mesh that does not fit, a batch that does not divide. And whatever a loss
    raises: each is traced.
    """
    if only is not None:
        run.experiment.stage(only)
    placed = place(run, out, data_dir)
    folders = {ref: folder for p in placed for ref, folder in p.parents.items()}
    find = architectures({p.stage.name: p.stage for p in placed}, folders.__getitem__)
    lines = [f"run {run.name}"]
    for p in (p for p in placed if only in (None, p.stage.name)):
        done = "done" if is_done(p.dir) else "to do"
        lines.append(f"\n{p.stage.name} ({p.stage.kind}, {done})  {address_of(p.dir)}")
        if isinstance(p.stage, Training):
            lines += [f"  {line}" for line in describe_training(p.stage, find(p.stage.name))]
        if isinstance(p.stage, PPO):
            lines += [f"  {line}" for line in describe_ppo(p.stage, {r: find(ref) for r, ref in roles(p.stage).items()})]
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
    (rows, width), flops = update_work(stage, cfg, batch_ways(mesh), mesh.devices.flat[0].platform)
    what = f"{rows} rows of {'at most ' if rows == stage.batch_size else ''}{width} tokens"
    if isinstance(stage, PM):
        what = f"{stage.batch_size} pairs in {rows} rows of {width} tokens{', if they are as long as those of HH' if stage.packed else ''}"
    yield f"batch     {what}: {rows * width:,} positions, {batch_ways(mesh)} ways"
    length = f"{stage.steps:,} updates" if stage.steps else f"{stage.epochs:g} epochs"
    yield f"length    {length}; {flops:.3g} FLOPs an update" + (f", {flops * stage.steps:.3g} in all" if stage.steps else "")
    yield f"state     {bytes_per_device(state, shardings) / 2**20:,.1f} MiB a device (f32 weights and two moments)"
    if isinstance(stage, PM) and stage.packed:  # held-out comparisons have rows of their own, which a changed loss must know too
        held_out = batch_shapes(replace(stage, packed=False), batch_ways(mesh))
        jax.eval_shape(loss_of(stage, model), shapes, held_out, jax.eval_shape(lambda: jax.random.key(0)))
    memory = lower_update(stage, model, optimizer, shardings, mesh).compile().memory_analysis()
    yield f"compiled  {memory.temp_size_in_bytes / 2**20:,.1f} MiB of temporaries a device, besides the state"


def update_work(stage: Training, cfg: ModelConfig, ways: int, platform: str) -> tuple[tuple[int, int], float]:
    """(rows, width) of an update's batch, the widest that there is, and its model FLOPs. ways: how many shards the batch has."""
    rows, width = batch_shape(stage, ways)
    if not isinstance(stage, PM):
        return (rows, width), roofline.lm_step_flops(cfg, rows, width)
    logits = (rows if stage.packed else stage.batch_size) if getattr(stage.loss, "lm_coef", 0.0) else 0
    ends = 2 * batch_shapes(stage, ways).weight.shape[1] if stage.packed else 1
    return (rows, width), roofline.pm_step_flops(cfg, rows, width, logits, roofline.read_on(cfg, stage.run, platform, ends))


def describe_ppo(stage: PPO, configs: dict[str, ModelConfig]) -> Iterator[str]:
    """Models by role, state, and the work of an iteration at full length."""
    mesh = make_mesh(stage.mesh)
    check_batch(stage.batch_size // (stage.minibatches * stage.micro_batches), mesh)
    check_sampling(stage, make_mesh(stage.rollout_mesh or stage.mesh))
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
    updates, flops = stage.epochs * stage.minibatches, iteration_flops(stage, models, mesh.devices.flat[0].platform)
    yield f"length    {stage.steps:,} iterations of {updates} updates; {flops:.3g} FLOPs an iteration, {flops * stage.steps:.3g} in all"
    cache = 2 * models["policy"].config.layers * stage.batch_size * configs["policy"].kv_heads * width * configs["policy"].head_dim * 4
    yield f"state     {bytes_per_device(state, shardings) / 2**20:,.1f} MiB a device (f32 weights and two moments of what is trained)"
    yield f"cache     {cache / 2**20 / batch_ways(mesh):,.1f} MiB a device while sampling (f32)"
    yield f"update    logs {', '.join(sorted(update_metrics(stage, configs, mesh).keys() - {'weight'}))}"


def update_metrics(stage: PPO, configs: dict[str, ModelConfig], mesh):
    """The metrics of a PPO stage's update, as shapes: all phases are traced, so that a loss that does not run says so here."""
    decode = make_mesh(stage.rollout_mesh) if stage.rollout_mesh else mesh
    update, inputs = ppo_phase(Step("", stage, configs, "update"), mesh, decode, compute_dtype(stage.run, mesh))
    return jax.eval_shape(update, *inputs)[1]


def architectures(stages: Mapping[str, Stage], folder: Callable) -> Callable[[str], ModelConfig]:
    """find(reference) -> the architecture of the model behind it. stages: of the run, by name. folder: reference -> where a
    reference that is no stage lies; raises what that and reading it raise."""

    def find(ref: str, tokenizer: str | None = None) -> ModelConfig:
        name, step = split_step(ref)
        if name not in stages:
            return open_model(folder(ref), step, vocabulary(tokenizer or ref)).config
        stage = stages[name]
        if isinstance(stage, PPO):
            return find(stage.policy)
        if stage.init:
            return find(stage.init, stage.tokenizer)
        return model_config(stage.model or DEFAULT_SIZE, vocabulary(stage.tokenizer))

    def vocabulary(ref: str) -> int:
        """The rows that a tokenizer needs: as its stage says, or as the folder holds it."""
        stage = stages.get(split_step(ref)[0])
        return stage.vocab if isinstance(stage, Tokenizer) else load_tokenizer(folder(ref)).vocab_size

    return find
