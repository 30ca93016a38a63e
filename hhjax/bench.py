"""`hhjax bench`: what this machine can do, the denominator of every share a run prints, and how fast the steps are on it."""

import contextlib
import itertools
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from statistics import median
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from hhjax.chips import device_peak
from hhjax.data.comparisons import Comparison
from hhjax.data.packing import PackedSource
from hhjax.data.stream import PairSource
from hhjax.loops.phases import Seconds, advance, make_phases, memory_gib, phase_flops, ppo_optimizer, ppo_shardings
from hhjax.loops.supervised import compute_dtype
from hhjax.model.generate import Sampling, generate, slots_of
from hhjax.model.sizes import matmul_params, model_config
from hhjax.model.transformer import ModelConfig, RunConfig, make_model
from hhjax.objectives.lm import lm_objective
from hhjax.objectives.preference import end_scores, preference_objective
from hhjax.roofline import attention_ceiling, copy_ceiling, forward_flops, lm_step_flops, logits_flops, matmul_ceiling, pm_step_flops, read_on
from hhjax.sharding import batch_ways, make_mesh, put_batch
from hhjax.stages import PPO
from hhjax.train.state import OptimConfig, init_state, make_optimizer
from hhjax.train.step import make_train_step
from hhjax.types import PackedPairs, Tokens, Vocabulary

# Deciles of lengths in tokens of GPT-NeoX's tokenizer: the prompts and replies of the 962 test comparisons of helpful-base and
# harmless-base, where the two are hardly correlated (0.15).
HH_PROMPT = (12, 18, 22, 40, 68, 96, 130, 162, 207, 293, 807)
HH_REPLY = (4, 11, 17, 22, 28, 35, 45, 57, 74, 110, 314)


def ceiling(repeats: int = 5) -> dict:
    """Matrix-product, attention and copy rates of one device: `repeats` readings of each, best and median.

    Returns a flat dict that goes out as one JSON line; noisy is true where a median lies more than 10 % below its best.
    """
    size = 2048 if jax.default_backend() == "cpu" else 8192
    readings = {
        "matmul_f32_gflops": [matmul_ceiling("float32", size) / 1e9 for _ in range(repeats)],
        "matmul_bf16_gflops": [matmul_ceiling("bfloat16", size) / 1e9 for _ in range(repeats)],
        "attention_f32_gflops": [attention_ceiling() / 1e9 for _ in range(repeats)],
        "copy_gbytes": [copy_ceiling() / 1e9 for _ in range(repeats)],
    }
    rows = {f"{name}_best": round(max(r), 1) for name, r in readings.items()}
    rows |= {f"{name}_median": round(median(r), 1) for name, r in readings.items()}
    return rows | {
        "noisy": any(median(r) < 0.9 * max(r) for r in readings.values()),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


@dataclass(frozen=True)
class Bench:
    """What is timed: a rung of sizes.py by name, or without one a decoder in the Qwen3 layout. dtype, remat, unroll, attention as
    RunConfig's; repeats are timed after warmup, one after the other.

    Rates are of the median, those of preference models, whose batches differ, of the mean; an update's shares are of the mean. noisy: where the
    median takes over a tenth longer than the best. Raises ValueError for what cannot be timed."""

    size: str = ""
    layers: int = 4
    width: int = 256
    heads: int = 4
    mlp_width: int = 1024
    vocab: int = 512
    dtype: str = "auto"
    remat: Literal["auto", "none", "dots", "full"] = "auto"
    unroll: int = 0
    attention: Literal["auto", "plain"] = "auto"
    batch: int = 16
    prompt: int = 64
    response: int = 64
    repeats: int = 10
    warmup: int = 3
    profile: str = ""  # a folder for a trace of the timed part

    def __post_init__(self):
        least = {"batch": 1, "prompt": 1, "response": 1, "repeats": 1, "warmup": 0}
        for name, value in ((name, getattr(self, name)) for name in least):
            if value < least[name]:
                raise ValueError(f"{name} {value}; give at least {least[name]}")
        if not self.size and self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of heads {self.heads}")

    def shape(self) -> ModelConfig:
        if self.size:
            return model_config(self.size, self.vocab)
        return ModelConfig(self.layers, self.width, self.heads, self.heads, self.width // self.heads, self.mlp_width, self.vocab, norm="rms",
                           gated_mlp=True, activation="silu", qk_norm=True, tied_embeddings=False)  # fmt: skip

    def run(self) -> RunConfig:
        return RunConfig(dtype=self.dtype, remat=self.remat, unroll=self.unroll, attention=self.attention)

    def model(self):
        return make_model(self.shape(), None, self.run())

    def ceiling(self) -> float:
        """FLOP/s of matrix products in the dtype that is timed."""
        return matmul_ceiling(compute_dtype(self.run()), 2048 if jax.default_backend() == "cpu" else 8192)


@dataclass(frozen=True)
class PMBench(Bench):
    """Updates of a preference model. lengths: "fixed", every prompt and reply full, or "hh", drawn from HH's, at most seq_len a
    reply with its prompt. packed: as PM.packed. steps go through different batches."""

    lengths: Literal["fixed", "hh"] = "fixed"
    seq_len: int = 512
    packed: bool = True


@dataclass(frozen=True)
class PPOBench(Bench):
    """Whole PPO iterations by the loop's own compiled parts: sampling, scores by a PM and a reference, an update of policy and separate
    value network. lengths: of prompts, "fixed" or "hh" as in PMBench; replies are full. packed: as PPO.packed, which gains nothing where
    all rows are full. slots: as Sampling.slots."""

    epochs: int = 1
    lengths: Literal["fixed", "hh"] = "fixed"
    packed: bool = False
    slots: int = 0


@dataclass(frozen=True)
class GenerateBench(Bench):
    """Sampling of `response` tokens at most. mean_length: replies stop with a probability of one in so many at each token (0: never).
    slots: as Sampling.slots. copies: how many of the batch's rows share a prompt."""

    mean_length: float = 0.0
    slots: int = 0
    copies: int = 1

    def __post_init__(self):
        super().__post_init__()
        if self.response < 2:
            raise ValueError(f"response {self.response}; a decode step is timed by the second token on: give at least 2")
        if self.copies < 1 or self.batch % self.copies:
            raise ValueError(f"copies {self.copies} do not divide a batch of {self.batch}")
        self.slots_used()

    def slots_used(self) -> int:
        """Rows that are decoded at one time, which are no more than there are. Raises ValueError where they do not divide the batch."""
        return slots_of(Sampling(self.response, slots=self.slots), self.batch, 1)


class Numbers:
    """A tokenizer whose words are ids, so that a comparison has the lengths that are asked for."""

    pad_id, eot_id, eoc_id = 0, 1, 2

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [[int(word) if word.isdigit() else 3 for word in text.split()] for text in texts]


def draw_comparisons(cfg: PMBench, count: int) -> list[Comparison]:
    """Comparisons of random words. Lengths count headers, <eot> and <eoc>."""
    rng = np.random.default_rng(0)
    draw = lambda deciles: int(np.interp(rng.uniform(0, 10), range(11), deciles))  # noqa: E731
    words = lambda n: " ".join(map(str, rng.integers(4, cfg.vocab, max(1, n - 2))))  # noqa: E731
    fixed = cfg.lengths == "fixed"
    found = []
    for _ in range(count):
        prompt, *replies = (cfg.prompt, cfg.response, cfg.response) if fixed else (draw(HH_PROMPT), draw(HH_REPLY), draw(HH_REPLY))
        found.append(Comparison(f"\n\nHuman: {words(prompt)}\n\nAssistant:", *(words(reply) for reply in replies)))
    return found


def lm(cfg: Bench) -> dict:
    """Updates of a language model on `batch` rows of prompt + response tokens."""
    model, width = cfg.model(), cfg.prompt + cfg.response
    full = np.full(cfg.batch, width, np.int32)
    rng = np.random.default_rng(0)
    batches = (Tokens(rng.integers(3, cfg.vocab, (cfg.batch, width), np.int32), 0 * full, full) for _ in iter(int, 1))
    row = time_step(cfg, model, lm_objective(model), batches, lambda batch: lm_step_flops(model.config, cfg.batch, width))
    return row | {"tokens_per_s": round(cfg.batch * width / row["median_s"], 1)} | about(cfg)


def pm(cfg: PMBench) -> dict:
    """Updates of a preference model: pairs/s, and the share of the computed positions that hold a real token."""
    model, steps = cfg.model(), cfg.warmup + cfg.repeats
    seq_len = cfg.prompt + cfg.response if cfg.lengths == "fixed" else cfg.seq_len
    layout = PackedSource if cfg.packed else PairSource
    source = layout(draw_comparisons(cfg, cfg.batch * (steps + 8)), Numbers(), seq_len, cfg.batch)
    batches = [source.batch(0, step) for step in range(steps)]
    rows = lambda batch: batch.tokens.shape if cfg.packed else (2 * cfg.batch, batch.chosen.tokens.shape[1])  # noqa: E731
    read = read_on(model.config, cfg.run(), jax.default_backend(), 2 * batches[0].weight.shape[1] if cfg.packed else 1)
    real = lambda b: (b.pair >= 0).sum() if isinstance(b, PackedPairs) else b.chosen.length.sum() + b.rejected.length.sum()  # noqa: E731
    row = time_step(cfg, model, preference_objective(model), iter(batches), lambda batch: pm_step_flops(model.config, *rows(batch), read=read))
    useful = sum(map(real, batches)) / sum(np.prod(rows(batch)) for batch in batches)
    return row | {"pairs_per_s": round(cfg.batch / row["mean_s"], 2), "best_pairs_per_s": round(cfg.batch / row["best_s"], 2),
                  "useful_share": round(float(useful), 3)} | about(cfg)  # fmt: skip


def time_step(cfg: Bench, model, loss, batches: Iterator, flops: Callable) -> dict:
    """Seconds of an update on each of the batches after the warm-up, and the share of this machine's matrix products, read before and
    after. Where a shape is new it is compiled beforehand: compile_s is the sum of that."""
    optimizer = make_optimizer(OptimConfig(lr=1e-6), cfg.warmup + cfg.repeats)
    step = jax.jit(make_train_step(loss, optimizer), donate_argnums=0)
    state = jax.jit(lambda key: init_state(model.init(key), optimizer, key))(jax.random.key(0))
    batches = list(itertools.islice(batches, cfg.warmup + cfg.repeats))
    programs, ceilings = {}, [cfg.ceiling()]
    shape_of = lambda batch: jax.tree.leaves(batch)[0].shape  # noqa: E731
    began = time.perf_counter()
    for batch in batches:
        if shape_of(batch) not in programs:
            programs[shape_of(batch)] = step.lower(state, batch).compile()
    compile_s = time.perf_counter() - began

    def train(i: int):
        nonlocal state
        state, metrics = programs[shape_of(batches[i])](state, batches[i])
        return state, metrics

    timed = time_calls(train, cfg)
    work = [flops(batch) for batch in batches[cfg.warmup :]]
    ceilings.append(cfg.ceiling())
    peak = device_peak(jax.devices()[0].device_kind)
    vendor = {"share_of_vendor": round(sum(work) / sum(timed) / peak, 3)} if peak else {}
    return vendor | spread(timed) | {"mean_s": round(sum(timed) / len(timed), 6),
            "share_of_ceiling": round(sum(work) / sum(timed) / max(ceilings), 3), "ceiling_gflops": round(max(ceilings) / 1e9, 1),
            "shapes": len(programs), "compile_s": round(compile_s, 2)}  # fmt: skip


def sampling(cfg: GenerateBench) -> dict:
    """Sampling after full prompts: new tokens/s; the share of the roofline of a decode step, the greater of its bytes (weights and cache)
    over the copy rate and its FLOPs over the matrix rate; and slot_occupancy, the share of the rows decoded that gave a token."""
    model, shape, slots = cfg.model(), cfg.shape(), cfg.slots_used()
    vocab = Vocabulary(pad=0, eot=2 if cfg.mean_length else shape.vocab, eoc=1, size=shape.vocab)  # without a mean, a stop that is never drawn
    count = cfg.batch // cfg.copies
    full = np.full(count, cfg.prompt, np.int32)
    prompts = Tokens(np.random.default_rng(0).integers(3, cfg.vocab, (count, cfg.prompt), np.int32), full, full)
    params = jax.jit(model.init)(jax.random.key(0))
    rows = np.arange(cfg.batch, dtype=np.int32)
    stopping = model._replace(logits=lambda *args: with_stop(model.logits(*args), vocab.eot, cfg.mean_length)) if cfg.mean_length else model

    def measure(tokens: int):
        draw = jax.jit(lambda params, key: counted(*generate(stopping, params, prompts, rows, key, vocab, Sampling(tokens, slots=cfg.slots))))
        began = time.perf_counter()
        compiled = draw.lower(params, jax.random.key(0)).compile()
        compile_s = time.perf_counter() - began
        drawn = []

        def call(i):
            drawn.append(compiled(params, jax.random.key(i)))
            return drawn[-1]

        timed = time_calls(call, cfg)
        return timed, *np.array(jax.device_get(drawn[cfg.warmup :]), float).T, compile_s

    whole, new, steps, compile_s = measure(cfg.response)
    prefill, *_ = measure(1)
    step = (sum(whole) - cfg.repeats * median(prefill)) / sum(steps)
    floor = decode_floor(cfg, slots, 1, copy_ceiling(), cfg.ceiling())
    rate = new / np.array(whole)
    return spread(whole) | {"prefill_s": round(median(prefill), 6),
            "tokens_per_s": round(median(rate), 1), "best_tokens_per_s": round(max(rate), 1), "mean_reply": round(sum(new) / len(new) / cfg.batch, 1),
            "slot_occupancy": round((sum(new) - len(new) * cfg.batch) / (slots * sum(steps)), 3),
            "decode_step_ms": round(1e3 * step, 3), "share_of_roofline": round(floor / step, 3), "compile_s": round(compile_s, 2)} | about(cfg)  # fmt: skip


def decode_floor(cfg: Bench, slots: int, devices: int, byte_rate: float, flop_rate: float) -> float:
    """The least seconds of a decode step of so many rows over devices that each read all weights: their bytes (weights, and of the cache at half of
    the reply a share) or their FLOPs. Rates are a device's."""
    shape, size = cfg.shape(), jnp.dtype(compute_dtype(cfg.run())).itemsize
    cached = 2 * shape.layers * shape.kv_heads * shape.head_dim * slots * (cfg.prompt + cfg.response / 2)
    moved = size * (matmul_params(shape) + shape.vocab * shape.width + cached / devices)
    flops = slots * (forward_flops(shape, 1, 1) + logits_flops(shape, 1)) + 2 * cached * shape.heads / shape.kv_heads
    return max(moved / byte_rate, flops / devices / flop_rate)


def counted(samples, steps) -> tuple:
    """Tokens drawn, and decode steps."""
    return (samples.rows.length - samples.rows.prompt_len).sum(), steps


def with_stop(logits, stop: int, mean_length: float):
    """Logits under which the stop has a probability of one in mean_length, whatever the others are."""
    others = jax.nn.logsumexp(jnp.where(jnp.arange(logits.shape[-1]) == stop, -jnp.inf, logits), -1, keepdims=True)
    return jnp.where(jnp.arange(logits.shape[-1]) == stop, others - math.log(max(mean_length - 1, 1e-6)), logits)


def score(cfg: Bench) -> dict:
    """Scores by a preference model of `batch` full rows of prompt + response tokens."""
    model, width = cfg.model(), cfg.prompt + cfg.response
    full = np.full(cfg.batch, width, np.int32)
    rows = Tokens(np.random.default_rng(0).integers(3, cfg.vocab, (cfg.batch, width), np.int32), full - cfg.response, full)
    params = jax.jit(model.init)(jax.random.key(0))
    began = time.perf_counter()
    compiled = jax.jit(lambda params, rows: end_scores(model, params, rows)).lower(params, rows).compile()
    compile_s = time.perf_counter() - began
    timed = time_calls(lambda i: compiled(params, rows), cfg)
    work = forward_flops(model.config, cfg.batch, width, read_on(model.config, cfg.run(), jax.default_backend(), 1))
    return spread(timed) | {"rows_per_s": round(cfg.batch / median(timed), 1),
            "share_of_ceiling": round(work / median(timed) / cfg.ceiling(), 3), "compile_s": round(compile_s, 2)} | about(cfg)  # fmt: skip


def time_calls(call: Callable, cfg: Bench) -> list[float]:
    """Seconds of call(i), each waited for, after the warm-up, and a trace of them."""

    def seconds(i: int) -> float:
        began = time.perf_counter()
        jax.block_until_ready(call(i))
        return time.perf_counter() - began

    for i in range(cfg.warmup):
        seconds(i)
    with tracing(cfg.profile):
        return [seconds(i) for i in range(cfg.warmup, cfg.warmup + cfg.repeats)]


def spread(timed: list[float]) -> dict:
    """Median and best of these seconds, and whether the two are too far apart for more than comparisons."""
    return {"median_s": round(median(timed), 6), "best_s": round(min(timed), 6), "noisy": median(timed) > 1.1 * min(timed)}


def tracing(folder: str):
    """A trace of what happens inside, for TensorBoard or Perfetto; nothing where no folder is named. Without Python's own calls, which
    fill a trace before the device's operations are in it."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    return jax.profiler.trace(folder, profiler_options=options) if folder else contextlib.nullcontext()


def about(cfg: Bench) -> dict:
    """What was timed, and where. memory_gib: the most that a device held, or this process."""
    shape = {name: getattr(cfg.shape(), name) for name in ("layers", "width", "heads", "mlp_width", "vocab")}
    machine = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "load": round(os.getloadavg()[0], 2)}
    return vars(cfg) | shape | {"memory_gib": memory_gib()} | machine


def ppo(cfg: PPOBench) -> dict:
    """Median and best seconds of an iteration after the warm-up, its phases, samples/s, and the first one's seconds with compilation.

    Prompts are full, no reply can stop, and rates of learning are tiny: every iteration does the same work. times_floor: the whole over
    the least that it takes, matrix products at this machine's rate and decode steps at that or its copy rate.
    """
    began, mesh, shape, run = time.perf_counter(), make_mesh(), cfg.shape(), cfg.run()
    slow = OptimConfig(lr=1e-6)
    stage = PPO("bench", policy="./policy", reward="./pm", prompt_len=cfg.prompt, batch_size=cfg.batch, epochs=cfg.epochs, run=run,
                packed=cfg.packed, sampling=Sampling(cfg.response, slots=cfg.slots), optim=slow, value_optim=slow)  # fmt: skip
    models = dict.fromkeys(("policy", "kl_to", "reward", "value"), make_model(shape, mesh, run))
    vocab = Vocabulary(pad=0, eot=shape.vocab, eoc=1, size=shape.vocab)  # a stop that is never drawn
    optimizer = ppo_optimizer(stage)
    shardings = ppo_shardings(optimizer, models, mesh)
    init = jax.jit(models["policy"].init, out_shardings=shardings.params["policy"])
    policy, value, reference, reward = (init(jax.random.key(i)) for i in (0, 1, 0, 2))
    start = jax.jit(lambda p: init_state(p, optimizer, jax.random.key(0)), out_shardings=shardings)  # as the loop does
    state = start({"policy": policy, "value": value})
    frozen = {"reference": reference, "reward": reward, "tests": {}}
    phases = make_phases(stage, models, vocab, mesh, mesh, shardings)
    offsets = {"reward": 0.0, "value": 0.0, "tests": {}}
    rng, readings = np.random.default_rng(0), []
    with contextlib.ExitStack() as traced:
        for i in range(cfg.warmup + cfg.repeats):
            if i == cfg.warmup:
                traced.enter_context(tracing(cfg.profile))
            length = prompt_lengths(cfg, rng)
            ids = rng.integers(2, cfg.vocab, (cfg.batch, cfg.prompt), np.int32)
            rows = Tokens(np.where(np.arange(cfg.prompt) < length[:, None], ids, 0), length, length)
            prompts = put_batch((rows, np.arange(cfg.batch, dtype=np.int32)), mesh)
            seconds, at = Seconds(), time.perf_counter()
            state, replied, (scored, learnt), *_ = advance(phases, state, frozen, prompts, jax.random.key(i), rng, offsets, 0.05, seconds)
            readings.append({"iteration": time.perf_counter() - at} | vars(seconds))
            if i == 0:
                first = time.perf_counter() - began
    assert (replied.length - replied.prompt_len == cfg.response).all()
    timed = readings[cfg.warmup :]
    whole = [r["iteration"] for r in timed]
    phases_s = {f"{name}_s": round(median(r[name] for r in timed), 4) for name in ("generate", "score", "train")}
    devices = 1 if jax.default_backend() == "cpu" else mesh.size  # simulated ones share one machine
    work, rate = phase_flops(stage, dict.fromkeys(models, shape), jax.default_backend(), scored, learnt), cfg.ceiling()
    slots = slots_of(stage.sampling, cfg.batch, batch_ways(mesh))
    steps = (cfg.response - 1) * cfg.batch / slots  # no reply stops
    prefill = forward_flops(shape, cfg.batch, cfg.prompt, 1) + logits_flops(shape, cfg.batch)
    floor = (work["score"] + work["update"] + prefill) / rate / devices + steps * decode_floor(cfg, slots, devices, copy_ceiling(), rate)
    return spread(whole) | {
        **phases_s,
        "samples_per_s": round(cfg.batch / median(whole), 2), "best_samples_per_s": round(cfg.batch / min(whole), 2),
        "train_share_of_ceiling": round(work["update"] / phases_s["train_s"] / rate / devices, 3), "times_floor": round(median(whole) / floor, 2), "first_step_s": round(first, 2),
        "useful_share": round(float(replied.length.sum() / scored.rows / scored.width), 3),
    } | about(cfg)  # fmt: skip


def prompt_lengths(cfg: PPOBench, rng) -> np.ndarray:
    """[batch] int32."""
    drawn = np.interp(rng.uniform(0, 10, cfg.batch), range(11), HH_PROMPT).astype(np.int32)
    return np.minimum(drawn, cfg.prompt) if cfg.lengths == "hh" else np.full(cfg.batch, cfg.prompt, np.int32)


def table(rows: list[dict], hidden: set[str]) -> str:
    """What was measured, as aligned columns; a single row as lines of a name and a value. hidden: names of settings."""
    names = [name for name in rows[0] if name not in hidden]
    lines = [names, *([str(row[name]) for name in names] for row in rows)]
    if len(rows) == 1:
        lines = [list(pair) for pair in zip(*lines)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def report(row: dict) -> str:
    """The readings as a small table and one JSON line."""
    names = [n.removesuffix("_best") for n in row if n.endswith("_best")]
    lines = [f"{'ceiling':<24}{'best':>10}{'median':>10}"]
    lines += [f"{n:<24}{row[n + '_best']:>10}{row[n + '_median']:>10}" for n in names]
    lines += ["noisy: a neighbour is busy; compare ratios only"] if row["noisy"] else []
    return "\n".join([*lines, json.dumps(row)])
