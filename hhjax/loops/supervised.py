"""The loop of the stages that learn from rows: language models and preference models; and tokenizer training.

A batch is a pure function of (seed, step), so a run goes on from a checkpoint as if it had never stopped.
"""

import contextlib
import faulthandler
import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np

from hhjax import roofline
from hhjax.data.packing import PackedSource
from hhjax.data.stream import Host, LMSource, PairSource
from hhjax.data.tokenizer import load_tokenizer, train_tokenizer
from hhjax.fields import ConfigError
from hhjax.io import checkpoint
from hhjax.io.files import write_atomically
from hhjax.io.metrics import write_event
from hhjax.io.models import open_model
from hhjax.loops import inputs
from hhjax.loops.progress import START, Progress
from hhjax.loops.waiting import on_all, on_first
from hhjax.model.sizes import model_config
from hhjax.model.transformer import ModelConfig, RunConfig, config_to_json, make_model
from hhjax.sharding import batch_host, batch_ways, check_batch, make_mesh, param_shardings, put_batch
from hhjax.stages import DEFAULT_SIZE, PM, Preempted, StageContext, Tokenizer, Training, loss_of
from hhjax.train.state import TrainState, init_state, make_optimizer, state_shardings
from hhjax.train.step import make_train_step, shard_step
from hhjax.types import Batch, LossFn, Model, PackedPairs, Pairs, Tokens

SAMPLE_ROWS = 8


def run(stage: Training, ctx: StageContext) -> None:
    """Trains an LM or a PM to its last step, from its newest good checkpoint or from the start.

    Raises DataError on data that fills no batch, Diverged on a loss that is not finite, and
    Preempted once it was told to stop and has saved.
    """
    mesh = make_mesh(stage.mesh)
    host = Host(*batch_host(mesh))
    check_batch(stage.batch_size // stage.micro_batches, mesh)
    config, tokenizer, load_parent = starting_point(stage, ctx)
    model = make_model(config, mesh, stage.run)
    source, held_out = on_all(ctx, lambda: load_sources(stage, ctx, tokenizer, batch_ways(mesh)))
    total = total_steps(stage, source)
    optimizer = make_optimizer(stage.optim, total)
    loss = loss_of(stage, model)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    shardings = state_shardings(optimizer, shapes, param_shardings(model.axes(), shapes, mesh), mesh)
    if jax.process_index() == 0:
        describe_folder(ctx.dir, config, tokenizer, source, ctx.seed)

    state, position = resume(stage, ctx, model, optimizer, shardings, load_parent)
    train_step = shard_step(make_train_step(loss, optimizer, stage.micro_batches), shardings, mesh)
    evaluate = make_evaluate(loss, held_out, stage, mesh, ctx.stop_if_told)
    flops_per_s = roofline.ceiling(compute_dtype(stage.run))
    progress = Progress(ctx, stage.name, position, total, flops_per_s)
    saver = checkpoint.CheckpointWriter(ctx.dir, stage.keep, on_saved=progress.saved)
    with contextlib.closing(progress), contextlib.closing(saver), watchdog():
        update = make_update(stage, config, train_step, mesh, progress)
        rearm_watchdog(stage.watchdog_s)
        if position["owes_evaluation"]:
            with progress.excluded():
                progress.evaluation(position["step"], evaluate(state.params))
        for done, (batch, tokens) in enumerate(prefetch(source, ctx.seed, position["step"], total, host), position["step"] + 1):
            rearm_watchdog(stage.watchdog_s)
            state, metrics = update(state, batch, tokens)
            progress.flush()  # the row before: the device has this step's work meanwhile
            last, stopping = done == total, ctx.should_stop()
            if last or is_due(done, stage.log_every):
                progress.hold(done, metrics)
            evaluating = last or is_due(done, stage.eval_every)
            if evaluating or stopping or is_due(done, stage.save_every):
                progress.flush()
                progress.require_finite(done, metrics)
            owed = evaluating and (stopping or not progress.evaluated(done, lambda: evaluate(state.params)))
            stopping = owed or (stopping and not last)
            if last or stopping or is_due(done, stage.save_every):
                with progress.excluded():
                    progress.metrics.sync()
                    saver.save(done, state, {"step": done, "tokens": progress.tokens, "owes_evaluation": owed})
            if stopping:
                saver.wait()
                progress.event("preempt", step=done)
                raise Preempted(f"{stage.name} was told to stop: saved at step {done} of {total}")


def run_tokenizer(stage: Tokenizer, ctx: StageContext) -> None:
    """Trains the tokenizer on process 0."""

    def work():
        texts = [document.text for document in inputs.documents(stage.data, "train", ctx.data_dir, ctx.parents)]
        train_tokenizer(texts, stage.vocab, ctx.dir, algorithm=stage.algorithm)

    on_first(ctx, work)


def load_model(folder: Path, step: int | None, mesh, run: RunConfig = RunConfig()):
    """A trained stage, or a Hugging Face folder, as (Model, params on the mesh, tokenizer); step None is its last."""
    tokenizer = load_tokenizer(folder)
    saved = open_model(folder, step, tokenizer.vocab_size)
    model = make_model(saved.config, mesh, run)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return model, saved.load(shapes, param_shardings(model.axes(), shapes, mesh)), tokenizer


def make_update(stage: Training, config: ModelConfig, train_step, mesh, progress: Progress):
    """(state, numpy batch, real tokens) -> (state, metrics), with the work counted; not timed where a new shape is compiled."""
    compiled, host = set(), Host(*batch_host(mesh))

    def update(state, batch, tokens):
        timed = batch_shape(batch) in compiled
        progress.count(tokens, *batch_work(stage, config, batch, host.count), timed=timed)
        if timed:
            return train_step(state, put_batch(batch, mesh))
        compiled.add(batch_shape(batch))
        jax.block_until_ready(state)  # the steps still under way are no part of the compilation
        with progress.excluded():
            return jax.block_until_ready(train_step(state, put_batch(batch, mesh)))

    return update


# The start ------------------------------------------------------------------------------------------------------------


def starting_point(stage: Training, ctx: StageContext):
    """The architecture and tokenizer of a stage, its parent's or those that it names, and how to load the parent's
    parameters: (shapes, shardings) -> params, or None where there is no parent."""
    tokenizer_dir, _ = ctx.parent(stage.tokenizer or stage.init)
    tokenizer = load_tokenizer(tokenizer_dir)
    if not stage.init:
        return model_config(stage.model or DEFAULT_SIZE, tokenizer.vocab_size), tokenizer, None
    config, load = open_model(*ctx.parent(stage.init), tokenizer.vocab_size)
    if config.vocab < tokenizer.vocab_size:
        raise ConfigError(
            f"{stage.name}: tokenizer {stage.tokenizer!r} has {tokenizer.vocab_size} tokens and "
            f"init={stage.init!r} knows {config.vocab}; leave tokenizer out to use its own"
        )
    return config, tokenizer, load


def resume(stage: Training, ctx: StageContext, model: Model, optimizer, shardings: TrainState, load_parent):
    """The newest good state and its position, or a fresh one that starts from the parent's parameters."""
    init_key, run_key = jax.random.split(jax.random.key(ctx.seed))
    like = jax.eval_shape(lambda k: init_state(model.init(k), optimizer, k), init_key)

    if found := restore_newest(ctx, stage.name, like, shardings):
        return found[0], START | found[1]
    if load_parent:
        params = load_parent(like.params, shardings.params)
    else:
        params = jax.jit(model.init, out_shardings=shardings.params)(init_key)
    start = jax.jit(lambda p, k: init_state(p, optimizer, k), out_shardings=shardings, donate_argnums=0)
    return start(params, run_key), START


def restore_newest(ctx: StageContext, name: str, like, shardings):
    """The newest good state and its position, or None where no checkpoint was begun; both are told in events.jsonl.

    Raises ConfigError where there are checkpoints and none can be read: starting anew would bury them.
    """

    def damaged(step, reason):
        print(f"{name}: checkpoint passed over: {reason}", file=sys.stderr)
        if jax.process_index() == 0:
            write_event(ctx.dir, "damaged", step=step, reason=reason)

    if found := checkpoint.restore(ctx.dir, like, shardings, on_damaged=damaged):
        if jax.process_index() == 0:
            write_event(ctx.dir, "restore", **found[1])
        return found
    if steps := checkpoint.good_steps(checkpoint.checkpoints_dir(ctx.dir)):
        raise ConfigError(f"{ctx.dir} has checkpoints {steps}, and none can be read; the reasons are in events.jsonl: "
                          f"mend them, or move the folder away to start anew")  # fmt: skip
    return None


def describe_folder(folder: Path, config: ModelConfig, tokenizer, source, seed: int) -> None:
    """model.json, the tokenizer, and the first batch as text: what `hhjax show --samples` prints."""
    write_atomically(folder / "model.json", json.dumps(config_to_json(config), indent=1) + "\n")
    tokenizer.save(folder)
    (folder / "samples").mkdir(exist_ok=True)
    rows = list(sample_rows(source.batch(seed, 0, Host()), tokenizer))
    (folder / "samples" / "train.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))


def sample_rows(batch: Batch, tokenizer) -> Iterator[dict]:
    """The first rows of a batch as text, with their lengths in tokens."""
    for i in range(min(SAMPLE_ROWS, batch_shape(batch)[0])):
        for name, prompt, rest in parts_of(batch, i):
            text = {"prompt": tokenizer.decode(prompt), "text": tokenizer.decode(rest)}
            yield {"row": i, "part": name, "prompt_len": len(prompt), "length": len(prompt) + len(rest), **text}


def parts_of(batch: Batch, i: int) -> Iterator[tuple[str, list[int], list[int]]]:
    """(name, ids of the prompt, ids of what follows) of everything that row i holds."""
    if isinstance(batch, PackedPairs):
        for n in range(batch.pair[i].max() + 1):
            prompt, *replies = (batch.tokens[i][(batch.pair[i] == n) & (batch.branch[i] == b)].tolist() for b in range(3))
            yield from ((name, prompt, reply) for name, reply in zip(("chosen", "rejected"), replies))
        return
    for name, rows in (("chosen", batch.chosen), ("rejected", batch.rejected)) if isinstance(batch, Pairs) else (("tokens", batch),):
        ids, prompt, length = rows.tokens[i].tolist(), rows.prompt_len[i], rows.length[i]
        yield name, ids[:prompt], ids[prompt:length]


# Data -----------------------------------------------------------------------------------------------------------------


def load_sources(stage: Training, ctx: StageContext, tokenizer, ways: int = 1):
    """The training rows and the held-out ones. The counts go to events.jsonl and the console. ways: how many shards
    a batch's rows are cut into."""
    if isinstance(stage, PM):
        (train, report), (test, _) = (inputs.comparisons(stage.data, split, ctx.data_dir, ctx.parents) for split in ("train", "test"))
        held_out = PairSource(test, tokenizer, stage.seq_len, stage.batch_size)
        layout = partial(PackedSource, multiple=ways * stage.micro_batches) if stage.packed else PairSource
        source = layout(train, tokenizer, stage.seq_len, stage.batch_size)
        details = {"report": str(report), "truncated": source.truncated, "too_long": source.too_long}
    else:
        train, test = (inputs.documents(stage.data, split, ctx.data_dir, ctx.parents) for split in ("train", "test"))
        source, held_out = (LMSource(docs, tokenizer, stage.seq_len, stage.batch_size) for docs in (train, test))
        details = {"documents": len(train)}
    if jax.process_index() == 0:
        write_event(ctx.dir, "data", rows=source.size, held_out=held_out.size, **details)
        if "report" in details:
            print(f"{replace(report, notes=[])}\n{source.truncated} pairs truncated, {source.too_long} left out: a reply is too long for seq_len")
        looked = f", of which {stage.eval_rows} are looked at" if stage.eval_rows < held_out.size else ""
        print(f"{stage.name}: {source.size} rows, {held_out.size} held out{looked}, {source.steps_per_epoch} steps an epoch")
    return source, held_out


def total_steps(stage: Training, source) -> int:
    """Updates in all. Raises DataError where the data fills no batch."""
    return stage.steps if stage.steps is not None else max(1, round(stage.epochs * source.steps_per_epoch))


def prefetch(source, seed: int, start: int, stop: int, host: Host) -> Iterator[tuple[Batch, int]]:
    """This host's batches of steps start..stop-1, each made while the one before is in use, and the real tokens of all hosts'."""

    def make(step):
        return source.batch(seed, step, host), int(source.tokens_of[source.rows_of(seed, step)].sum())

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(make, start) if start < stop else None
        for step in range(start, stop):
            made = coming.result()
            coming = pool.submit(make, step + 1) if step + 1 < stop else None
            yield made


def batch_shape(batch: Batch) -> tuple[int, int]:
    """(rows, width in tokens); of Pairs the rows of one side."""
    return (batch.chosen if isinstance(batch, Pairs) else batch).tokens.shape


def batch_work(stage: Training, config: ModelConfig, batch: Batch, hosts: int = 1) -> tuple[int, float]:
    """Positions of a global batch and the model FLOPs of an update on it; every host has as many rows as this one."""
    rows, width = batch_shape(batch)
    rows *= hosts
    if isinstance(batch, Tokens):
        return rows * width, roofline.lm_step_flops(config, rows, width)
    logits_rows = rows if getattr(stage.loss, "lm_coef", 0.0) else 0
    rows, ends = (2 * rows, 1) if isinstance(batch, Pairs) else (rows, 2 * batch.weight.shape[1])
    read = roofline.read_on(config, stage.run, jax.default_backend(), ends)
    return rows * width, roofline.pm_step_flops(config, rows, width, logits_rows, read)


# Evaluation, watchdog -------------------------------------------------------------------------------------------------


def make_evaluate(loss: LossFn, held_out, stage: Training, mesh, poll: Callable[[], None]):
    """params -> the loss's metrics over at most `eval_rows` held-out rows, each counted once and with weight one. poll() is
    called before every batch."""
    scored = jax.jit(lambda params, batch: loss(params, batch, jax.random.key(0)))
    host = Host(*batch_host(mesh))

    def evaluate(params) -> dict:
        sums, total = {}, 0.0
        for batch in held_out_batches(held_out, stage.eval_rows, stage.batch_size, host):
            poll()
            value, metrics = jax.device_get(scored(params, put_batch(batch, mesh)))
            weight = float(metrics.pop("weight"))
            total += weight
            for name, x in (metrics | {"loss": value}).items():
                sums[name] = sums.get(name, 0.0) + weight * float(x)
        return {name: s / max(total, 1e-9) for name, s in sums.items()}

    return evaluate


def held_out_batches(source, most: int, batch_size: int, host: Host) -> Iterator[Batch]:
    """This host's batches of at most `most` rows spread evenly over `source`, filled up with rows of no weight."""
    rows = np.linspace(0, source.size - 1, min(most, source.size)).astype(int)
    for start in range(0, len(rows), batch_size):
        places = np.arange(start, start + batch_size)
        mine = np.split(places, host.count)[host.index]
        take = lambda at: rows[np.minimum(at, len(rows) - 1)]  # noqa: E731
        yield only_real(source.take(take(mine), width_of=take(places)), mine < len(rows))


def only_real(batch: Batch, is_real: np.ndarray) -> Batch:
    """The batch with the rows that are not real out of every mean, and all others of weight one. is_real: [B] bool."""
    if isinstance(batch, Pairs):
        return batch._replace(weight=is_real.astype(np.float32))
    return batch._replace(length=np.where(is_real, batch.length, batch.prompt_len))


def compute_dtype(run: RunConfig, mesh=None) -> str:
    """The dtype of matrix products that `run` means on a mesh's devices, or on this machine's."""
    platform = mesh.devices.flat[0].platform if mesh is not None else jax.default_backend()
    return run.dtype if run.dtype != "auto" else "float32" if platform == "cpu" else "bfloat16"


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def rearm_watchdog(seconds: float) -> None:
    """Ends the process, with every thread's traceback, unless called again within `seconds`."""
    if seconds:
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)


@contextlib.contextmanager
def watchdog():
    """Disarms the watchdog at the end, however it comes."""
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
