"""The loop of PPO: prompts -> samples -> scores -> update, over and over. All that an iteration draws is a pure function
of (seed, iteration), so a killed run begins its unfinished iteration anew and goes on bit for bit."""

import contextlib
import json
import math
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

import jax
import numpy as np

from hhjax import roofline
from hhjax.data.packing import ReplyPacker
from hhjax.data.stream import Host, PromptSource
from hhjax.data.tokenizer import Tokenizer
from hhjax.evals.replies import repeated_ngram_share
from hhjax.experiment import PPO, Preempted, StageContext
from hhjax.io import checkpoint
from hhjax.io.files import write_atomically
from hhjax.io.metrics import write_event
from hhjax.loops.progress import START, Progress
from hhjax.loops.sampling import (EVALUATION, Loaded, check_sampling, even_rows, fetch, frozen, load_all, load_prompts, make_sample,
                                  put_prompts, reply_texts, row_batches, write_samples)  # fmt: skip
from hhjax.loops.supervised import compute_dtype, is_due, rearm_watchdog, restore_newest, watchdog
from hhjax.model.generate import slots_of
from hhjax.model.transformer import config_to_json, make_model
from hhjax.objectives.kl import adapt_beta
from hhjax.sharding import (batch_host, batch_sharding, batch_ways, batches_sharding, check_batch, make_mesh, param_shardings, put_batch,
                            put_batches, replicated)  # fmt: skip
from hhjax.train.rollout import Judges, make_actor, make_exact_kl, make_score
from hhjax.train.state import (PartsOptimizer, TrainState, init_state, join_policy, make_parts_optimizer, split_policy,
                               state_shardings)  # fmt: skip
from hhjax.train.step import make_ppo_update, make_train_step
from hhjax.types import PackedReplies, Vocabulary

SAMPLING = 2**32 - 2  # the child of the run's key that replies are drawn with
MINIBATCHES = 2**32 - 4  # the stream of numpy's random numbers that minibatches are drawn with


class Setup(NamedTuple):
    """What does not change in a run. models: by role; frozen: parameters of the reference, the reward and the tests."""

    stage: PPO
    ctx: StageContext
    mesh: object
    rollout_mesh: object
    models: dict
    frozen: dict
    tok: Tokenizer
    prompts: PromptSource
    held_out: PromptSource


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
    """Wall seconds of the phases of an iteration; each is waited for."""

    generate: float = 0.0
    score: float = 0.0
    train: float = 0.0

    @contextlib.contextmanager
    def phase(self, name: str):
        began = time.perf_counter()
        yield
        setattr(self, name, time.perf_counter() - began)


def run(stage: PPO, ctx: StageContext) -> None:
    """Trains a policy to its last iteration, from its newest good checkpoint or from the start.

    Raises DataError on prompts that fill no batch, Diverged on a loss that is not finite, and Preempted once it
    was told to stop (between two phases of an iteration, or two batches of held-out prompts) and has saved.
    """
    mesh = make_mesh(stage.mesh)
    rollout_mesh = make_mesh(stage.rollout_mesh) if stage.rollout_mesh else mesh
    check_batch(stage.batch_size // (stage.minibatches * stage.micro_batches), mesh)
    check_sampling(stage, rollout_mesh)
    found = load_all(roles(stage), ctx, mesh, stage.run)
    tok = found["policy"].tokenizer
    prompts, held_out = (load_prompts(stage.data, split, ctx, tok, stage.prompt_len, stage.batch_size) for split in ("train", "test"))
    if jax.process_index() == 0:
        describe_folder(ctx, found["policy"], prompts, held_out)
    state, shardings, position = starting_state(stage, ctx, found, mesh)
    models = {name: loaded.model for name, loaded in found.items()}
    dtype = compute_dtype(stage.run, mesh)
    params = judge_params(stage, {name: frozen(found[name].params, dtype) for name in found if name not in ("policy", "value")})
    del found
    setup = Setup(stage, ctx, mesh, rollout_mesh, models, params, tok, prompts, held_out)
    phases = make_phases(stage, models, tok.vocabulary, mesh, rollout_mesh, shardings)
    if "offsets" not in position:
        rearm_watchdog(stage.watchdog_s)
        position = position | {"offsets": mean_scores(setup, phases, state), "beta": stage.kl.beta}
        if jax.process_index() == 0:
            write_event(ctx.dir, "offsets", **position["offsets"])
    train(setup, phases, state, position)


def train(setup: Setup, phases: Phases, state: TrainState, position: dict) -> None:
    """Iterations from position["step"] to the last, with their rows, looks and checkpoints."""
    stage, ctx = setup.stage, setup.ctx
    progress = Progress(ctx, stage.name, position, stage.steps, roofline.ceiling(compute_dtype(stage.run)))
    saver = checkpoint.CheckpointWriter(ctx.dir, stage.keep, on_saved=progress.saved)
    beta, saved, compiled = position["beta"], position["step"], set()

    def save(done: int, owed: bool = False) -> None:
        with progress.excluded():
            progress.metrics.sync()
            here = {"step": done, "tokens": progress.tokens, "beta": beta, "offsets": position["offsets"], "owes_evaluation": owed}
            saver.save(done, split_policy(state), here)

    def stop(done: int) -> NoReturn:
        saver.wait()
        progress.event("preempt", step=done)
        raise Preempted(f"{stage.name} was told to stop: {f'saved at iteration {done}' if done else 'nothing to save yet'} of {stage.steps}")

    with contextlib.closing(progress), contextlib.closing(saver), watchdog():
        rearm_watchdog(stage.watchdog_s)
        if position["step"] == 0 or position["owes_evaluation"]:
            with progress.excluded():
                progress.evaluation(position["step"], look(setup, phases, state, position["offsets"], position["step"]))
        for done in range(position["step"] + 1, stage.steps + 1):
            rearm_watchdog(stage.watchdog_s)
            began = time.perf_counter()
            try:
                state, row, work, shapes = iterate(setup, phases, state, position["offsets"], beta, done)
            except Preempted:  # before its update: the state is that of the iteration before
                if saved < done - 1:
                    progress.require_finite(done - 1, row)
                    save(done - 1)
                stop(done - 1)
            beta = adapt_beta(beta, stage.kl, row["kl_k1"], stage.batch_size)
            timed = shapes in compiled
            if not timed:  # it compiled
                progress.exclude(time.perf_counter() - began)
                compiled.add(shapes)
            progress.count(*work, timed=timed)
            last, stopping = done == stage.steps, ctx.should_stop()
            evaluating = last or is_due(done, stage.eval_every)
            if last or is_due(done, stage.log_every):
                progress.hold(done, row)
                progress.flush()
            if evaluating or stopping or is_due(done, stage.save_every):
                progress.require_finite(done, row)
            owed = evaluating and (
                stopping or not progress.evaluated(done, lambda: look(setup, phases, state, position["offsets"], done))
            )
            stopping = owed or (stopping and not last)
            if last or stopping or is_due(done, stage.save_every):
                save(done, owed)
                saved = done
            if stopping:
                stop(done)


def iterate(setup: Setup, phases: Phases, state: TrainState, offsets: dict, beta: float, done: int):
    """Iteration `done` (from 1): the new state, its row of metrics, its work (real tokens, positions that were scored for them, model
    FLOPs), and the shapes that it was compiled for."""
    stage, mesh, seconds, began = setup.stage, setup.mesh, Seconds(), time.perf_counter()
    index, count = batch_host(setup.rollout_mesh)
    batch = setup.prompts.batch(setup.ctx.seed, done - 1, Host(index, count))
    row_ids = np.split(np.arange(stage.batch_size, dtype=np.int32), count)[index]
    prompts = put_batch((batch, row_ids), setup.rollout_mesh)
    key = jax.random.fold_in(sampling_key(setup), done)
    rng = np.random.default_rng([setup.ctx.seed, MINIBATCHES, done])
    state, rows, shapes, steps, report, metrics = advance(phases, state, setup.frozen, prompts, key, rng, offsets, beta, seconds,
                                                          setup.ctx.stop_if_told)  # fmt: skip
    seen = watched(stage, [setup.prompts.prompts[i] for i in setup.prompts.rows_of(setup.ctx.seed, done - 1)], rows, setup.tok)
    row = report_row(jax.device_get(report), rows) | means(seen) | {n: float(x) for n, x in jax.device_get(metrics).items() if n != "weight"}
    tokens, new = int(rows.length.sum()), int((rows.length - rows.prompt_len).sum())
    slots = slots_of(stage.sampling, stage.batch_size, batch_ways(setup.rollout_mesh))
    row["slot_occupancy"] = (new - stage.batch_size) / (slots * max(int(steps), 1))  # the first token of a reply costs no decode step
    rates = {f"{name}_s": s for name, s in vars(seconds).items()}
    rates |= {"generate_tokens_per_s": new / seconds.generate, "score_tokens_per_s": tokens / seconds.score,
              "train_tokens_per_s": stage.epochs * tokens / seconds.train,
              "samples_per_s": stage.batch_size / (time.perf_counter() - began), "memory_gib": memory_gib()}  # fmt: skip
    return state, row | {"beta": beta} | rates, (tokens, math.prod(shapes[0]), iteration_flops(stage, setup.models, *shapes)), shapes


def advance(phases: Phases, state: TrainState, frozen: dict, prompts, key, rng, offsets: dict, beta: float, seconds: Seconds,
            poll: Callable[[], None] = lambda: None):  # fmt: skip
    """One iteration on the devices: (new state, fetched rows, shapes, decode steps, report, metrics), each phase waited for and timed.

    shapes: rows and width of what was scored, and of what all updates learnt from. poll() is called between the phases. rng: shuffles
    the minibatches.
    """
    with seconds.phase("generate"):
        samples, steps = phases.sample(phases.spread(state.params["policy"]), *prompts, key)
        samples = phases.gather(samples)
        rows, stopped = phases.fetch(samples)
    poll()
    with seconds.phase("score"):
        laid = phases.lay(samples, rows, stopped)
        rollout, report = jax.block_until_ready(phases.score(state.params, frozen, samples, laid, offsets, beta))
    poll()
    with seconds.phase("train"):
        order, own = phases.split(rows, stopped, rng)
        state, metrics = jax.block_until_ready(phases.update(state, rollout, order, own))
    count, width = laid.tokens.shape
    passes = 1 if order is None else order.size // len(rows.length)
    learnt = (count * passes, width) if own is None else (math.prod(own.tokens.shape[:2]), own.tokens.shape[2])
    return state, rows, ((count, width), learnt), steps, report, metrics


def report_row(report: dict, rows) -> dict:
    """The metrics of a rollout: means, quantiles of the scores, KL in nats per response, repetition."""
    row = {}
    for name, x in report.items():
        x = np.asarray(x, np.float64)
        if name.startswith(("score", "test/")):
            row |= {name: x.mean()} | {f"{name}_p{q}": np.quantile(x, q / 100) for q in (10, 50, 90)}
        elif name in ("k1", "k3"):
            row[f"kl_{name}"] = x.mean()
        else:
            row[{"stopped": "stop_rate"}.get(name, name)] = x.mean()
    row["sqrt_kl"] = max(row["kl_k1"], 0.0) ** 0.5
    replies = [ids[p:n].tolist() for ids, p, n in zip(rows.tokens, rows.prompt_len, rows.length)]
    row["repeated_3grams"] = float(np.mean([repeated_ngram_share(reply) for reply in replies]))
    return {name: float(x) for name, x in row.items()}


def look(setup: Setup, phases: Phases, state: TrainState, offsets: dict, done: int) -> dict:
    """Replies to the held-out prompts, always with the same noise: their metrics. Writes samples/<iteration>.jsonl."""
    stage, tok = setup.stage, setup.tok
    parts, tokens = [], []
    for samples, rows, report in held_out_replies(setup, phases, state, offsets):
        exact = phases.exact_kl(state.params["policy"], setup.frozen["reference"], samples.rows)
        real = len(report["score"])
        parts.append(report | {"kl_exact": np.asarray(exact)[:real]})
        tokens.append(jax.tree.map(lambda x: x[:real], rows))
    whole = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
    rows = jax.tree.map(lambda *xs: np.concatenate(xs), *tokens)
    prompts, texts = [setup.held_out.prompts[at] for at in held_out_rows(setup)], reply_texts(rows, tok)
    seen = watched(stage, prompts, rows, tok)
    if jax.process_index() == 0:
        columns = {n: whole[n] for n in ("score", "k1", "length", "stopped", *(f"test/{ref}" for ref in stage.tests))} | seen
        write_samples(setup.ctx.dir, f"{done:06}", [
            {"row": i, **{n: round(float(x[i]), 4) for n, x in columns.items() if np.isfinite(x[i])}, "prompt": prompt, "reply": text}
            for i, (prompt, text) in enumerate(zip(prompts, texts))])  # fmt: skip
    return report_row(whole, rows) | means(seen)


def held_out_rows(setup: Setup) -> np.ndarray:
    """The held-out prompts that are looked at."""
    return even_rows(setup.held_out.size, setup.stage.eval_prompts)


def held_out_replies(setup: Setup, phases: Phases, state: TrainState, offsets: dict):
    """Yields, a batch at a time, Samples of the policy's replies to the held-out prompts, the last batch filled up, their rows as
    numpy, and what the report says of each real one: numpy [rows]."""
    chosen, policy = held_out_rows(setup), phases.spread(state.params["policy"])
    key = jax.random.fold_in(sampling_key(setup), EVALUATION)
    for places, real in row_batches(len(chosen), setup.stage.batch_size):
        setup.ctx.stop_if_told()
        prompts = put_prompts(setup.held_out, chosen[places], places, setup.rollout_mesh)
        samples = phases.gather(phases.sample(policy, *prompts, key)[0])
        rows, stopped = phases.fetch(samples)
        _, report = phases.score(state.params, setup.frozen, samples, phases.lay(samples, rows, stopped), offsets, 0.0)
        yield samples, rows, {n: np.asarray(x)[:real] for n, x in jax.device_get(report).items() if np.ndim(x)}


def watched(stage: PPO, prompts: list[str], rows, tok: Tokenizer) -> dict[str, np.ndarray]:
    """watch/NAME -> what the stage's `watch` says of every reply, [B]; nan where it does not apply."""
    said = stage.watch(prompts, reply_texts(rows, tok)) if stage.watch else {}
    return {f"watch/{name}": np.asarray(x, float) for name, x in said.items()}


def means(columns: dict[str, np.ndarray]) -> dict[str, float]:
    """The mean of each column over the replies that it applies to; columns that apply to none are left out."""
    return {name: float(np.nanmean(x)) for name, x in columns.items() if np.isfinite(x).any()}


# The start ------------------------------------------------------------------------------------------------------------


def roles(stage: PPO) -> dict[str, str]:
    """Role -> reference. A model in two roles is loaded for each, as it is trained in one and frozen in the other."""
    value = {} if stage.value_head else {"value": stage.value or stage.reward}
    tests = {f"tests.{ref}": ref for ref in stage.tests}
    return {"policy": stage.policy, "kl_to": stage.kl_to or stage.policy, "reward": stage.reward} | value | tests


def judge_params(stage: PPO, params: dict) -> dict:
    """What `make_score` calls frozen, from parameters (or shapes, or shardings) by role."""
    return {"reference": params["kl_to"], "reward": params["reward"], "tests": {ref: params[f"tests.{ref}"] for ref in stage.tests}}


def starting_state(stage: PPO, ctx: StageContext, found: dict[str, Loaded], mesh):
    """The newest good state with its shardings and position, or the parents' parameters and fresh optimisers."""
    optimizer = ppo_optimizer(stage)
    params = {name: found[name].params for name in optimizer.parts}
    shardings = ppo_shardings(optimizer, {name: found[name].model for name in optimizer.parts}, mesh)
    # The key is drawn inside: an eager one would be five little programs to compile.
    fresh = lambda p, seed: init_state(p, optimizer, jax.random.split(jax.random.key(seed))[1])  # noqa: E731
    like = jax.eval_shape(lambda p: split_policy(fresh(p, 0)), params)
    if restored := restore_newest(ctx, stage.name, like, split_policy(shardings)):
        return join_policy(restored[0]), shardings, START | restored[1]
    return jax.jit(fresh, out_shardings=shardings)(params, ctx.seed), shardings, START


def ppo_optimizer(stage: PPO) -> PartsOptimizer:
    """Policy and value network each with its own, over all updates of the run."""
    configs = {"policy": stage.optim} | ({} if stage.value_head else {"value": stage.value_optim})
    return make_parts_optimizer(configs, stage.steps * stage.epochs * stage.minibatches)


def ppo_shardings(optimizer: PartsOptimizer, models: dict, mesh) -> TrainState:
    """Where the state of these models' parameters lies."""
    shapes = {name: jax.eval_shape(models[name].init, jax.random.key(0)) for name in optimizer.parts}
    places = {name: param_shardings(models[name].axes(), shapes[name], mesh) for name in optimizer.parts}
    return state_shardings(optimizer, shapes, places, mesh)


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
    step = make_train_step(stage.objective(actor, stage.loss), optimizer, stage.micro_batches, tuple(optimizer.parts))
    whole, rows = replicated(mesh), batch_sharding(mesh)
    spread, gather, sampler = (lambda x: x), (lambda x: x), policy
    if stage.rollout_mesh:
        sampler = make_model(policy.config, rollout_mesh, stage.run)
        shapes = jax.eval_shape(sampler.init, jax.random.key(0))
        places = param_shardings(sampler.axes(), shapes, rollout_mesh)
        cast = jax.jit(lambda params: frozen(params, dtype))  # what travels, and what decoding reads at every token
        spread = lambda params: jax.device_put(cast(params), places)  # noqa: E731
        gather = lambda samples: jax.device_put(samples, rows)  # noqa: E731
    def packer():  # not made here: a mesh that is only planned for has no hosts
        return reply_packer(stage, vocab, ways)._replace(host=Host(*batch_host(mesh)))

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


def mean_scores(setup: Setup, phases: Phases, state: TrainState) -> dict:
    """The mean score that each PM gives the initial policy's replies to the held-out prompts: what later scores are above.

    With gamma 1 a constant in reward and values cancels out of the advantages, so that a value network which starts from the
    reward PM may go on predicting scores as they are: "value" is that constant, see `make_score`.
    """
    stage, none = setup.stage, {"reward": 0.0, "value": 0.0, "tests": dict.fromkeys(setup.stage.tests, 0.0)}
    parts = [report for *_, report in held_out_replies(setup, phases, state, none)]
    means = {name: float(np.concatenate([p[name] for p in parts]).mean()) for name in parts[0]}
    from_reward = not stage.value_head and stage.value in (None, stage.reward)
    tests = {ref: means[f"test/{ref}"] for ref in stage.tests}
    return {"reward": means["score"], "value": means["score"] if from_reward else 0.0, "tests": tests}


def describe_folder(ctx: StageContext, policy: Loaded, prompts: PromptSource, held_out: PromptSource) -> None:
    """model.json and the tokenizer, which make the folder a model; and the prompts' counts."""
    write_atomically(ctx.dir / "model.json", json.dumps(config_to_json(policy.model.config), indent=1) + "\n")
    policy.tokenizer.save(ctx.dir)
    counts = {"rows": prompts.size, "held_out": held_out.size, "truncated": prompts.truncated}
    write_event(ctx.dir, "data", **counts)
    print(f"{prompts.size} prompts ({prompts.truncated} truncated), {held_out.size} held out")


# Work -----------------------------------------------------------------------------------------------------------------


def sampling_key(setup: Setup):
    return jax.random.fold_in(jax.random.key(setup.ctx.seed), SAMPLING)


def iteration_flops(stage: PPO, models: dict, scored: tuple[int, int] | None = None, learnt: tuple[int, int] | None = None) -> float:
    """Model FLOPs of an iteration, see `phase_flops`."""
    return sum(phase_flops(stage, {name: model.config for name, model in models.items()}, scored, learnt).values())


def phase_flops(stage: PPO, configs: dict, scored: tuple[int, int] | None = None, learnt: tuple[int, int] | None = None) -> dict[str, float]:
    """Model FLOPs of an iteration's phases: "sample", the policy, at full length; "score", one forward of every judge and the value
    network; "update", three of policy and value an epoch. configs: ModelConfig by role. scored, learnt: rows and width that are read
    there, the latter in all epochs; by default a full row a reply."""
    new = stage.sampling.max_new_tokens
    full = stage.batch_size, stage.prompt_len + new
    forward = {name: roofline.forward_flops(cfg, *(scored or full)) for name, cfg in configs.items()}
    sampled = roofline.forward_flops(configs["policy"], *full)
    logits = {name: roofline.logits_flops(configs[name], stage.batch_size * new) for name in ("policy", "kl_to")}
    updated = learnt or (stage.epochs * full[0], full[1])
    trained = stage.epochs * logits["policy"] + sum(roofline.forward_flops(configs[name], *updated) for name in ("policy", "value") if name in configs)
    judged = sum(flops for name, flops in forward.items() if name != "policy") + logits["kl_to"]
    return {"sample": sampled + logits["policy"], "score": judged, "update": 3 * trained}


def memory_gib() -> float:
    """The most memory used so far: of the first device where it tells, else of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 2**30
