"""What a step must compute, and what this machine can: FLOPs by the cost model, ceilings by measurement."""

import time
from functools import lru_cache
from statistics import median

import jax
import jax.numpy as jnp

from hhjax.model.sizes import matmul_params
from hhjax.model.transformer import ModelConfig, RunConfig, reads_apart


def forward_flops(cfg: ModelConfig, rows: int, width: int, read: int | None = None) -> float:
    """FLOPs of the blocks on rows x width tokens: 2N a token for matrix products and, averaged over a causal
    row, 2 x layers x (heads x head_dim) x width for attention. Logits apart; padding counts, since it is computed.

    read: tokens of a row whose last hidden states are asked; of the others the last layer makes keys and values alone. None: all. Their
    attention is an average token's too, though most stand late in their row.
    """
    attention = 2 * cfg.heads * cfg.head_dim * width
    per_token = 2 * matmul_params(cfg) + cfg.layers * attention
    unread = 0 if read is None else max(width - read, 0)
    beside_keys = 2 * (matmul_params(cfg) / cfg.layers - 2 * cfg.width * cfg.kv_heads * cfg.head_dim) + attention
    return float(rows * (width * per_token - unread * beside_keys))


def read_on(cfg: ModelConfig, run: RunConfig, platform: str, read: int) -> int | None:
    """`read` for `forward_flops`, where such a model computes its last layer so without a cache; else None."""
    return read if reads_apart(cfg.layers, run, platform) else None


def logits_flops(cfg: ModelConfig, tokens: int) -> float:
    """FLOPs of the output matrix over `tokens` positions."""
    return 2.0 * tokens * cfg.width * cfg.vocab


def lm_step_flops(cfg: ModelConfig, rows: int, width: int) -> float:
    """Model FLOPs of a language-model update: three forwards. Rematerialisation is not counted (MFU, not HFU)."""
    return 3 * (forward_flops(cfg, rows, width) + logits_flops(cfg, rows * width))


def pm_step_flops(cfg: ModelConfig, rows: int, width: int, logits_rows: int = 0, read: int | None = None) -> float:
    """Model FLOPs of a preference update. rows: all of them, of chosen and of rejected replies, or packed ones; logits_rows: those that a
    language-model term pays for, which reads all tokens; read: see `forward_flops`."""
    return 3 * (forward_flops(cfg, rows, width, None if logits_rows else read) + logits_flops(cfg, logits_rows * width))


def matmul_ceiling(dtype: str = "float32", size: int = 2048, repeats: int = 5) -> float:
    """FLOP/s of a size^3 matrix product on one device: the best of `repeats` timings, after a warm-up.

    Random operands (zeros run faster on some chips).
    """
    a, b = (jax.random.normal(jax.random.key(i), (size, size)).astype(dtype) for i in range(2))
    seconds = _time(jax.jit(jnp.matmul), (a, b), repeats)
    return 2.0 * size**3 / min(seconds)


def copy_ceiling(megabytes: int = 256, repeats: int = 5) -> float:
    """Bytes/s of a donated in-place update, counting bytes read and written, on one device."""
    x = jnp.ones(megabytes * 2**18, jnp.float32)
    bump = jax.jit(lambda x: x + 1.0, donate_argnums=0)
    x = bump(x).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        x = bump(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2.0 * x.nbytes / median(seconds)


def attention_ceiling(repeats: int = 5) -> float:
    """FLOP/s of batched q.k products as attention makes them: 64 heads of 256 x 64."""
    q, k = (jax.random.normal(jax.random.key(i), (64, 256, 64)) for i in range(2))
    seconds = _time(jax.jit(lambda q, k: jnp.einsum("btd,bsd->bts", q, k)), (q, k), repeats, inner=8)
    return 2.0 * 64 * 256 * 256 * 64 / min(seconds)


@lru_cache
def ceiling(dtype: str = "float32") -> float:
    """`matmul_ceiling` times the number of devices (simulated CPU devices share one machine and count once)."""
    devices = 1 if jax.default_backend() == "cpu" else jax.device_count()
    return devices * matmul_ceiling(dtype, 2048 if jax.default_backend() == "cpu" else 8192)


def _time(fn, args, repeats: int, inner: int = 1) -> list[float]:
    """Seconds of one call, `repeats` times, each the mean of `inner` calls in a row; compiled beforehand."""
    fn(*args).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(inner):
            out = fn(*args)
        out.block_until_ready()
        seconds.append((time.perf_counter() - start) / inner)
    return seconds
