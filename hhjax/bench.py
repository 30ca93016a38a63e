"""`hhjax bench`: what this machine can do, the denominator of every share a run prints, and how fast PPO is on it."""

import json
import os
import platform
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from statistics import median

import jax
import numpy as np

from hhjax.roofline import attention_ceiling, copy_ceiling, matmul_ceiling


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
class PPOBench:
    """Whole PPO iterations of random models in the Qwen3 layout, by the loop's own compiled parts: sampling, scores by a PM and a
    reference, an update of policy and separate value network."""

    layers: int = 4
    width: int = 256
    heads: int = 4
    mlp_width: int = 1024
    vocab: int = 512
    batch: int = 16
    prompt: int = 64
    response: int = 64
    epochs: int = 1
    repeats: int = 10
    warmup: int = 3


def ppo(cfg: PPOBench) -> dict:
    """Median and best seconds of an iteration after the warm-up, its phases, samples/s, and the first one's seconds with compilation.

    Prompts are full, no reply can stop, and rates of learning are tiny: every iteration does the same work.
    """
    from hhjax.experiment import PPO
    from hhjax.loops import rlhf
    from hhjax.model.generate import Sampling
    from hhjax.model.transformer import ModelConfig, make_model
    from hhjax.sharding import make_mesh, put_batch
    from hhjax.train.state import OptimConfig, init_state
    from hhjax.types import Tokens, Vocabulary

    began, mesh = time.perf_counter(), make_mesh()
    shape = ModelConfig(cfg.layers, cfg.width, cfg.heads, cfg.heads, cfg.width // cfg.heads, cfg.mlp_width, cfg.vocab, norm="rms",
                        gated_mlp=True, activation="silu", qk_norm=True, tied_embeddings=False)  # fmt: skip
    slow = OptimConfig(lr=1e-6)
    stage = PPO("bench", policy="./policy", reward="./pm", prompt_len=cfg.prompt, batch_size=cfg.batch, epochs=cfg.epochs,
                sampling=Sampling(cfg.response), optim=slow, value_optim=slow)  # fmt: skip
    models = dict.fromkeys(("policy", "kl_to", "reward", "value"), make_model(shape, mesh))
    vocab = Vocabulary(pad=0, eot=cfg.vocab, eoc=1, size=cfg.vocab)  # a stop that is never drawn
    optimizer = rlhf.ppo_optimizer(stage)
    shardings = rlhf.ppo_shardings(optimizer, models, mesh)
    init = jax.jit(models["policy"].init, out_shardings=shardings.params["policy"])
    policy, value, reference, reward = (init(jax.random.key(i)) for i in (0, 1, 0, 2))
    start = jax.jit(lambda p: init_state(p, optimizer, jax.random.key(0)), out_shardings=shardings)  # as the loop does
    state = start({"policy": policy, "value": value})
    frozen = {"reference": reference, "reward": reward, "tests": {}}
    phases = rlhf.make_phases(stage, models, vocab, mesh, mesh, shardings)
    offsets = {"reward": 0.0, "value": 0.0, "tests": {}}
    rng, readings = np.random.default_rng(0), []
    for i in range(cfg.warmup + cfg.repeats):
        full = np.full(cfg.batch, cfg.prompt, np.int32)
        rows = Tokens(rng.integers(2, cfg.vocab, (cfg.batch, cfg.prompt), np.int32), full, full)
        prompts = put_batch((rows, np.arange(cfg.batch, dtype=np.int32)), mesh)
        seconds, start = rlhf.Seconds(), time.perf_counter()
        state, samples, *_ = rlhf.advance(phases, state, frozen, prompts, jax.random.key(i), offsets, 0.05, seconds)
        readings.append({"iteration": time.perf_counter() - start} | vars(seconds))
        if i == 0:
            first = time.perf_counter() - began
    assert int(samples.rows.length.min()) == cfg.prompt + cfg.response
    timed = readings[cfg.warmup :]
    whole = [r["iteration"] for r in timed]
    phases_s = {f"{name}_s": round(median(r[name] for r in timed), 4) for name in ("generate", "score", "train")}
    train = 3 * cfg.epochs * sum(iteration_forwards(shape, cfg))
    return {
        "median_s": round(median(whole), 4), "best_s": round(min(whole), 4), **phases_s,
        "samples_per_s": round(cfg.batch / median(whole), 2), "best_samples_per_s": round(cfg.batch / min(whole), 2),
        "train_share_of_ceiling": round(train / phases_s["train_s"] / matmul_ceiling(), 3), "first_step_s": round(first, 2),
        **vars(cfg), "device": jax.devices()[0].device_kind, "jax": jax.__version__, "load": round(os.getloadavg()[0], 2),
    }  # fmt: skip


def iteration_forwards(shape, cfg: PPOBench) -> tuple[float, float]:
    """Model FLOPs of a forward of the policy, with logits of the reply, and of the value network."""
    from hhjax.roofline import forward_flops, logits_flops

    blocks = forward_flops(shape, cfg.batch, cfg.prompt + cfg.response)
    return blocks + logits_flops(shape, cfg.batch * cfg.response), blocks


def report(row: dict) -> str:
    """The readings as a small table and one JSON line."""
    names = [n.removesuffix("_best") for n in row if n.endswith("_best")]
    lines = [f"{'ceiling':<24}{'best':>10}{'median':>10}"]
    lines += [f"{n:<24}{row[n + '_best']:>10}{row[n + '_median']:>10}" for n in names]
    lines += ["noisy: a neighbour is busy; compare ratios only"] if row["noisy"] else []
    return "\n".join([*lines, json.dumps(row)])
