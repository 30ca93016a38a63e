"""`hhjax bench`: what this machine can do, the denominator of every share a run prints."""

import json
import os
import platform
from datetime import datetime, timezone
from statistics import median

import jax

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


def report(row: dict) -> str:
    """The readings as a small table and one JSON line."""
    names = [n.removesuffix("_best") for n in row if n.endswith("_best")]
    lines = [f"{'ceiling':<24}{'best':>10}{'median':>10}"]
    lines += [f"{n:<24}{row[n + '_best']:>10}{row[n + '_median']:>10}" for n in names]
    lines += ["noisy: a neighbour is busy; compare ratios only"] if row["noisy"] else []
    return "\n".join([*lines, json.dumps(row)])
