"""`hhjax bench scale` and `hhjax bench compile`: what a mesh costs at one global batch, and what programs take to trace and compile."""

import dataclasses
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from hhjax.bench import Bench, about, tracing
from hhjax.hlo import Program
from hhjax.model.generate import Sampling, generate
from hhjax.model.transformer import make_model
from hhjax.objectives.preference import preference_objective
from hhjax.sharding import MeshConfig, make_mesh, param_shardings, put_batch
from hhjax.train.state import OptimConfig, init_state, make_optimizer, state_shardings
from hhjax.train.step import make_train_step, shard_step
from hhjax.types import Pairs, Tokens, Vocabulary


@dataclass(frozen=True)
class ScaleBench(Bench):
    """Updates of a preference model on meshes of `devices`, beside one device, all with one global batch. On a CPU the devices are
    simulated: what is seen is the cost of partitioning, not of an interconnect."""

    devices: int = 8


@dataclass(frozen=True)
class CompileBench(Bench):
    """Programs of models of so many layers: an update of a preference model (layers scanned) and sampling (layers unrolled). Each is compiled
    twice; size, layers, unroll, repeats, warmup and profile are not asked, and setting one is an error."""

    depths: tuple[int, ...] = (4, 16, 40)
    width: int = 64
    heads: int = 1
    mlp_width: int = 256
    batch: int = 4
    prompt: int = 16
    response: int = 16


def meshes(devices: int) -> dict[str, MeshConfig]:
    """The layouts that are compared, by name."""
    found = {f"data {devices}": MeshConfig(devices), f"fsdp {devices}": MeshConfig(1, devices)}
    if devices % 4 == 0:
        found |= {f"fsdp {devices // 2} x tensor 2": MeshConfig(1, devices // 2, 2)}
    if devices % 8 == 0:
        found |= {f"data 2 x fsdp {devices // 4} x tensor 2": MeshConfig(2, devices // 4, 2)}
    return found


def scale(cfg: ScaleBench) -> Iterator[dict]:
    """A row for one device and for each mesh: seconds of an update, the rate over one device's (medians of turns), collectives of an update.

    Raises ValueError where there are fewer devices.
    """
    if jax.device_count() < cfg.devices:
        raise ValueError(f"devices {cfg.devices}, and there are {jax.device_count()}; ask for no more")
    devices = jax.devices()[: cfg.devices]
    layouts = {"one device": make_mesh(MeshConfig(1), devices[:1])} | {n: make_mesh(m, devices) for n, m in meshes(cfg.devices).items()}
    made = {name: compiled_update(cfg, mesh) for name, mesh in layouts.items()}
    timed = {name: [] for name in made}

    def turn() -> None:
        for name, (step, state, batch, text) in made.items():
            began = time.perf_counter()
            made[name] = step, jax.block_until_ready(step(state, batch))[0], batch, text
            timed[name].append(time.perf_counter() - began)

    for _ in range(cfg.warmup):
        turn()
    with tracing(cfg.profile):
        for _ in range(cfg.repeats):
            turn()
    timed = {name: seconds[cfg.warmup :] for name, seconds in timed.items()}
    for name, mesh in layouts.items():
        ratio = median(one / s for one, s in zip(timed["one device"], timed[name]))
        yield {"mesh": name, "median_s": round(median(timed[name]), 6), "of_one_device": round(ratio, 3),
               "collectives": collectives(made[name][3], mesh)} | about(cfg)  # fmt: skip


def compiled_update(cfg: Bench, mesh):
    """(compiled step, state, batch, text of the program) of a preference model on a mesh."""
    model = make_model(cfg.shape(), mesh, cfg.run())
    optimizer = make_optimizer(OptimConfig(lr=1e-6), 100)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    shardings = state_shardings(optimizer, shapes, param_shardings(model.axes(), shapes, mesh), mesh)
    start = jax.jit(lambda key: init_state(model.init(key), optimizer, key), out_shardings=shardings)
    state, batch = start(jax.random.key(0)), put_batch(full_pairs(cfg), mesh)
    step = shard_step(make_train_step(preference_objective(model), optimizer), shardings, mesh).lower(state, batch).compile()
    return step, state, batch, step.as_text()


def full_pairs(cfg: Bench) -> Pairs:
    """A batch whose rows are full."""
    rng, full = np.random.default_rng(0), np.full(cfg.batch, cfg.prompt + cfg.response, np.int32)
    side = lambda: Tokens(rng.integers(3, cfg.vocab, (cfg.batch, full[0]), np.int32), full - cfg.response, full)  # noqa: E731
    return Pairs(side(), side(), np.ones(cfg.batch, np.float32))


def collectives(text: str, mesh) -> str:
    """How many of each kind an update runs, loops counted as often as they run."""
    counts: dict[str, int] = {}
    for found in Program(text).collectives(dict(mesh.shape)):
        counts[found.kind] = counts.get(found.kind, 0) + found.times
    return ", ".join(f"{times} {kind}" for kind, times in sorted(counts.items())) or "none"


def compile_times(cfg: CompileBench) -> Iterator[dict]:
    """A row for each program and depth: seconds to trace and lower it, to compile it with an empty cache, and with a full one.

    Raises ValueError for a setting that is not asked.
    """
    for name in ("size", "layers", "unroll", "repeats", "warmup", "profile"):
        if getattr(cfg, name) != getattr(CompileBench, name):
            raise ValueError(f"{name} {getattr(cfg, name)} is not asked where programs are compiled; leave it out; depths says how many layers")
    kept = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    try:
        for depth in cfg.depths:
            for name, lower in (("pm update", lower_update), ("sampling", lower_sampling)):
                with tempfile.TemporaryDirectory() as folder:
                    use_cache(folder, 0.0)
                    cold, warm = timed_compile(cfg, depth, lower), timed_compile(cfg, depth, lower)
                yield {"program": name, "layers": depth, "trace_s": cold[0], "cold_s": cold[1], "warm_s": warm[1]} | about(cfg) | {"layers": depth}
    finally:
        use_cache(*kept)


def use_cache(folder: str | None, least_s: float) -> None:
    """From now on jax keeps programs that took at least so long to compile in this folder."""
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least_s)
    compilation_cache.reset_cache()


def timed_compile(cfg: CompileBench, depth: int, lower) -> tuple[float, float]:
    """Seconds of tracing and lowering, and of compiling, with nothing in memory."""
    jax.clear_caches()
    began = time.perf_counter()
    lowered = lower(dataclasses.replace(cfg, layers=depth))
    traced = time.perf_counter()
    lowered.compile()
    return round(traced - began, 3), round(time.perf_counter() - traced, 3)


def lower_update(cfg: Bench):
    model = make_model(cfg.shape(), None, dataclasses.replace(cfg.run(), unroll=1))
    optimizer = make_optimizer(OptimConfig(lr=1e-6), 100)
    state = jax.eval_shape(lambda key: init_state(model.init(key), optimizer, key), jax.random.key(0))
    return jax.jit(make_train_step(preference_objective(model), optimizer), donate_argnums=0).lower(state, full_pairs(cfg))


def lower_sampling(cfg: Bench):
    model = make_model(cfg.shape(), None, cfg.run())
    full, vocab = np.full(cfg.batch, cfg.prompt, np.int32), Vocabulary(0, 1, 2, cfg.vocab)
    prompts = Tokens(np.full((cfg.batch, cfg.prompt), 3, np.int32), full, full)
    rows = np.arange(cfg.batch, dtype=np.int32)
    draw = jax.jit(lambda params, key: generate(model, params, prompts, rows, key, vocab, Sampling(cfg.response)))
    return draw.lower(jax.eval_shape(model.init, jax.random.key(0)), jax.random.key(0))
