#!/usr/bin/env python3
"""Is this slice fit for a run? Devices, mesh, storage, one collective, one tiny training step; each said and timed.

    python tpu/preflight.py --devices 128 --mesh 1,32,4 --out /runs
    tpu/gke.sh run --topology v5p:4x4x4 --image IMAGE --bucket BUCKET -- python tpu/preflight.py --devices 64 --mesh 1,16,4 --out /runs

Run it on every host, as a training run: it joins the same cluster. Ends with 0 where all is well and 2 where something is not, so that
tpu/supervise.sh does not start it again. Without --devices any number is taken; on a laptop: JAX_PLATFORMS=cpu python tpu/preflight.py.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from hhjax.cluster import first_process, join_cluster
from hhjax.io.bucket import bucket_of, working_copy
from hhjax.io.files import is_remote, write_atomically
from hhjax.model.sizes import model_config
from hhjax.model.transformer import ModelConfig, RunConfig, make_model
from hhjax.objectives.preference import PreferenceLoss, preference_objective
from hhjax.sharding import AXES, MeshConfig, batch_host, batch_ways, make_mesh, param_shardings, put_batch, replicated
from hhjax.train.state import OptimConfig, init_state, make_optimizer, state_shardings
from hhjax.train.step import make_train_step, shard_step
from hhjax.types import Pairs, Tokens

WIDTH = 32  # tokens of a row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, help="how many jax should see, over all hosts")
    parser.add_argument("--mesh", default="-1,1,1", help="data,fsdp,tensor; -1 takes what the others leave")
    parser.add_argument("--out", help="where run directories will be, a folder or gs://BUCKET/PREFIX: a file is written there and read back")
    parser.add_argument("--heartbeat-timeout-s", type=int, default=30)
    parser.add_argument("--dry-run", action="store_true", help="say what would be checked")
    options = parser.parse_args()
    sizes = MeshConfig(*(int(n) for n in options.mesh.split(",")))
    if options.dry_run:
        print(f"would check: {options.devices or 'any number of'} devices, mesh {options.mesh} ({' x '.join(AXES)}), "
              f"{f'writing to {options.out}' if options.out else 'no storage'}, one collective, one training step")  # fmt: skip
        return 0
    join_cluster(options.heartbeat_timeout_s)
    mesh = None

    def devices():
        found = jax.device_count()
        require(found == (options.devices or found), f"jax sees {found} devices, {options.devices} were expected: a host is missing, or "
                f"the job has another slice than the plan")  # fmt: skip
        return f"{found} x {jax.devices()[0].device_kind} on {jax.process_count()} hosts"

    def make():
        nonlocal mesh
        mesh = make_mesh(sizes)
        return " x ".join(f"{name} {mesh.shape[name]}" for name in AXES)

    checks = {"devices": devices, "mesh": make, "storage": lambda: storage(options.out), "collective": lambda: collective(mesh),
              "training step": lambda: training_step(mesh)}  # fmt: skip
    return 0 if all(passes(name, check) for name, check in checks.items()) else 2


def passes(name: str, check: Callable[[], str]) -> bool:
    """Runs one check and says how it went."""
    began = time.perf_counter()
    try:
        said, ok = check(), True
    except Exception as error:  # whatever it is, it is what this script is to find
        said, ok = f"{type(error).__name__}: {error}", False
    if first_process() or not ok:
        print(f"{'ok    ' if ok else 'FAILED'} {name:<14}{time.perf_counter() - began:7.1f} s  {said}", flush=True)
    return ok


def require(ok: bool, why: str) -> None:
    if not ok:
        raise ValueError(why)


def storage(out: str | None) -> str:
    """Every host writes a file of its own, by the rename that checkpoints rest on, or an object, and reads it back."""
    if out is None:
        return "not asked for (--out)"
    name, text = f".preflight.{jax.process_index()}", f"{os.getpid()} {time.time()}"
    if is_remote(out):
        with working_copy(out) as here:
            bucket = bucket_of(here)
            bucket.files.pipe_file(bucket.at(here / name), text.encode())
            found = bucket.files.cat_file(bucket.at(here / name)).decode()
            bucket.files.rm_file(bucket.at(here / name))
    else:
        Path(out).mkdir(parents=True, exist_ok=True)
        path = Path(out) / name
        write_atomically(path, text)
        found = path.read_text()
        path.unlink()
    require(found == text, f"{out}/{name} does not hold what was written")
    return out


def collective(mesh) -> str:
    """A sum over all devices of numbers that lie one on each."""
    n = mesh.size
    x = jax.make_array_from_callback((n,), jax.NamedSharding(mesh, jax.P(AXES)), lambda at: np.arange(n, dtype=np.float32)[at])
    total = float(jax.jit(jnp.sum, out_shardings=replicated(mesh))(x))
    require(total == n * (n - 1) / 2, f"the sum over {n} devices is {total}, not {n * (n - 1) / 2}")
    return f"sum over {n} devices"


def training_step(mesh) -> str:
    """Two updates of a small preference model on the mesh: the first loss is log 2, the second lower."""
    config = small_model(mesh.shape["fsdp"], mesh.shape["tensor"])
    model = make_model(config, mesh, RunConfig())
    optimizer = make_optimizer(OptimConfig(lr=1e-2), 2)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    shardings = state_shardings(optimizer, shapes, param_shardings(model.axes(), shapes, mesh), mesh)
    state = jax.jit(lambda key: init_state(model.init(key), optimizer, key), out_shardings=shardings)(jax.random.key(0))
    step = shard_step(make_train_step(preference_objective(model, PreferenceLoss()), optimizer), shardings, mesh)
    losses = []
    for _ in range(2):
        state, metrics = step(state, put_batch(pairs(mesh), mesh))
        losses.append(float(metrics["loss"]))
    require(abs(losses[0] - np.log(2)) < 1e-3 and losses[1] < losses[0], f"losses {losses}; the first should be log 2 = 0.6931")
    return f"losses {losses[0]:.4f}, {losses[1]:.4f}"


def small_model(fsdp: int, tensor: int) -> ModelConfig:
    """Two layers that divide over any mesh."""
    width, heads = math.lcm(64, fsdp), math.lcm(2, tensor)
    return replace(model_config("0.1M", 1), width=width, heads=heads, kv_heads=heads, mlp_width=math.lcm(4 * width, tensor),
                   vocab=math.lcm(384, fsdp, tensor))  # fmt: skip


def pairs(mesh) -> Pairs:
    """This host's share of a pair for every way that the mesh splits a batch; the chosen reply differs from the rejected one."""
    rows = batch_ways(mesh) // batch_host(mesh)[1]
    prompt_len, length = np.full(rows, WIDTH // 2, np.int32), np.full(rows, WIDTH, np.int32)
    chosen, rejected = (Tokens(np.full((rows, WIDTH), token, np.int32), prompt_len, length) for token in (5, 6))
    return Pairs(chosen, rejected, np.ones(rows, np.float32))


if __name__ == "__main__":
    sys.exit(main())
