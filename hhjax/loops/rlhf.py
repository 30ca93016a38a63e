"""The loop of PPO: prompts -> samples -> scores -> update, over and over. All that an iteration draws is a pure function
of (seed, iteration), so a killed run begins its unfinished iteration anew and goes on bit for bit."""

import contextlib
import json
import time
from typing import NamedTuple, NoReturn

import jax
import numpy as np

from hhjax import roofline
from hhjax.data.stream import Host, PromptSource
from hhjax.data.tokenizer import Tokenizer
from hhjax.evals.replies import repeated_ngram_share
from hhjax.io import checkpoint
from hhjax.io.files import write_atomically
from hhjax.io.metrics import write_event
from hhjax.loops.phases import (Phases, Seconds, advance, iteration_flops, judge_params, make_phases, memory_gib, ppo_optimizer,
                                ppo_shardings, roles)  # fmt: skip
from hhjax.loops.progress import START, Progress
from hhjax.loops.sampling import (EVALUATION, Loaded, check_sampling, even_rows, frozen, load_all, load_prompts, put_prompts, reply_texts,
                                  row_batches, write_samples)  # fmt: skip
from hhjax.loops.supervised import compute_dtype, is_due, rearm_watchdog, restore_newest, watchdog
from hhjax.model.generate import slots_of
from hhjax.model.transformer import config_to_json
from hhjax.objectives.kl import adapt_beta
from hhjax.sharding import batch_host, batch_ways, check_batch, make_mesh, put_batch
from hhjax.stages import PPO, Preempted, StageContext
from hhjax.train.state import TrainState, init_state, join_policy, split_policy

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
            if not timed:  # it compiled: rates of its phases would say how long that took
                progress.exclude(time.perf_counter() - began)
                row = {name: x for name, x in row.items() if not name.endswith("_per_s")}
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
    stage, seconds, began = setup.stage, Seconds(), time.perf_counter()
    index, count = batch_host(setup.rollout_mesh)
    batch = setup.prompts.batch(setup.ctx.seed, done - 1, Host(index, count))
    row_ids = np.split(np.arange(stage.batch_size, dtype=np.int32), count)[index]
    prompts = put_batch((batch, row_ids), setup.rollout_mesh)
    key = jax.random.fold_in(sampling_key(setup), done)
    rng = np.random.default_rng([setup.ctx.seed, MINIBATCHES, done])

    def read(rows, report) -> dict:
        asked = [setup.prompts.prompts[i] for i in setup.prompts.rows_of(setup.ctx.seed, done - 1)]
        return report_row(jax.device_get(report), rows) | means(watched(stage, asked, rows, setup.tok))

    state, rows, shapes, steps, metrics, row = advance(phases, state, setup.frozen, prompts, key, rng, offsets, beta, seconds,
                                                       setup.ctx.stop_if_told, read)  # fmt: skip
    row |= {n: float(x) for n, x in jax.device_get(metrics).items() if n != "weight"}
    tokens, new = int(rows.length.sum()), int((rows.length - rows.prompt_len).sum())
    slots = slots_of(stage.sampling, stage.batch_size, batch_ways(setup.rollout_mesh))
    row["slot_occupancy"] = (new - stage.batch_size) / (slots * max(int(steps), 1))  # the first token of a reply costs no decode step
    rates = {f"{name}_s": s for name, s in vars(seconds).items()}
    rates |= {"generate_tokens_per_s": new / seconds.generate, "score_tokens_per_s": tokens / seconds.score,
              "train_tokens_per_s": stage.epochs * tokens / seconds.train,
              "samples_per_s": stage.batch_size / (time.perf_counter() - began), "memory_gib": memory_gib()}  # fmt: skip
    flops = iteration_flops(stage, setup.models, jax.default_backend(), *shapes)
    return state, row | {"beta": beta} | rates, (tokens, shapes[0].rows * shapes[0].width, flops), shapes


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


# The start -------------------------------------------------------------------------------------------------------------


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


def mean_scores(setup: Setup, phases: Phases, state: TrainState) -> dict:
    """The mean score that each PM gives the initial policy's replies to the held-out prompts: what later scores are above.

    With gamma 1 a constant in reward and values cancels out of the advantages, so that a value network which starts from a PM may go
    on predicting scores as they are: "value" is that constant, see `make_score`. Of the reward PM it is the mean of its scores; of any
    other model the mean of its own predictions, which is 0 for a head that was never trained.
    """
    stage, none = setup.stage, {"reward": 0.0, "value": 0.0, "tests": dict.fromkeys(setup.stage.tests, 0.0)}
    parts = [report for *_, report in held_out_replies(setup, phases, state, none)]
    means = {name: float(np.concatenate([p[name] for p in parts]).mean()) for name in parts[0]}
    from_reward = not stage.value_head and stage.value in (None, stage.reward)
    tests = {ref: means[f"test/{ref}"] for ref in stage.tests}
    return {"reward": means["score"], "value": means["score" if from_reward else "value_mean"], "tests": tests}


def describe_folder(ctx: StageContext, policy: Loaded, prompts: PromptSource, held_out: PromptSource) -> None:
    """model.json and the tokenizer, which make the folder a model; and the prompts' counts."""
    write_atomically(ctx.dir / "model.json", json.dumps(config_to_json(policy.model.config), indent=1) + "\n")
    policy.tokenizer.save(ctx.dir)
    counts = {"rows": prompts.size, "held_out": held_out.size, "truncated": prompts.truncated}
    write_event(ctx.dir, "data", **counts)
    print(f"{prompts.size} prompts ({prompts.truncated} truncated), {held_out.size} held out")


def sampling_key(setup: Setup):
    return jax.random.fold_in(jax.random.key(setup.ctx.seed), SAMPLING)
