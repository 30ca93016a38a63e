"""Softmax attention: as it is written down, in parts for CPU, by the kernels of GPUs and TPUs. Every array keeps heads apart, grouped under the key head that they read."""

import re
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash, splash_attention_mask as splash_mask

from hhjax.sharding import batch_ways, spec

KEPT = "attention"  # the name of what splash attention leaves for its gradient
SPLASH_ROWS = 128  # of which its blocks are made
HIDDEN = -(2.0**41)  # the lowest bias that jax itself gives cuDNN's kernel in bf16, which errs in differences of larger ones


def attend(q, k, v, bias):
    """Softmax attention. The softmax is f32 and is normalised after the product with v, which is smaller.

    q: [B, T, H, d]; k, v: [B, K, S, d] with H a multiple of K; bias: [B or 1, T, S] f32. Returns [B, T, H, d].
    """
    q = grouped(q, k.shape[1]) * q.shape[-1] ** -0.5
    weights = unnormalised(jnp.einsum("bkgtd,bksd->bkgts", q, k, preferred_element_type=jnp.float32), bias)
    y = jnp.einsum("bkgts,bksd->bkgtd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    y = y / jnp.sum(weights, -1)[..., None]
    return ungrouped(y.astype(v.dtype))


@jax.custom_vjp
def attend_in_parts(q, k, v, bias):
    """`attend` where no token sees a later one of its row, whose gradient stops at the bias. Queries are all of a row (T = S), or some of it,
    which then are not in parts. A query that may see nothing is given the mean of the values up to the end of its part, and not of all.

    Queries go in a few parts, each against the keys up to its own end: with four parts three eighths of the products are never made. The gradient's
    products transpose the narrow operand, never the weights, as in transformer.product.
    """
    return _parts_forward(q, k, v, bias)[0]


def parts(queries: int, keys: int) -> list[tuple[slice, int]]:
    """Where a row of queries is cut, and the end of the keys that each part may see: not below 64 tokens, in parts of at least 128 above 256, in
    four at most; some queries of a row may stand anywhere and are one part."""
    count = min(max(queries // 128, 2), 4) if queries == keys >= 64 else 1
    size = -(-queries // count)
    cuts = [slice(start, min(start + size, queries)) for start in range(0, queries, size)]
    return [(cut, cut.stop if queries == keys else keys) for cut in cuts]


def _parts_forward(q, k, v, bias):
    q = grouped(q, k.shape[1]) * q.shape[-1] ** -0.5
    made, kept = [], []
    for part, end in parts(q.shape[3], k.shape[2]):
        mine = q[:, :, :, part]
        # The heads of a group are rows of one product: XLA's CPU products know one batch, one row and one column axis.
        rows = mine.reshape(*k.shape[:2], -1, k.shape[-1])
        scores = jnp.einsum("bkqd,bksd->bkqs", rows, k[:, :, :end], preferred_element_type=jnp.float32)
        weights = unnormalised(scores.reshape(*mine.shape[:4], end), bias[:, part, :end]).reshape(scores.shape)
        total = jnp.sum(weights, -1, keepdims=True)
        weights = weights.astype(v.dtype)
        y = jnp.einsum("bkqs,bksd->bkqd", weights, v[:, :, :end], preferred_element_type=jnp.float32) / total
        made.append(y.reshape(mine.shape).astype(v.dtype))
        kept.append((rows, weights, total, y))
    return ungrouped(jnp.concatenate(made, 3)), (kept, k, v)


def _parts_backward(saved, g):
    kept, k, v = saved
    g, dk, dv, dq = grouped(g, k.shape[1]), 0.0, 0.0, []
    for (part, end), (rows, weights, total, y) in zip(parts(g.shape[3], k.shape[2]), kept):
        mine = g[:, :, :, part]
        dy = mine.reshape(rows.shape) / total
        scores = jnp.einsum("bkqd,bksd->bkqs", dy.astype(v.dtype), v[:, :, :end], preferred_element_type=jnp.float32)
        scores = (weights * (scores - jnp.sum(dy * y, -1, keepdims=True))).astype(k.dtype)
        dq.append(jnp.einsum("bkqs,bksd->bkqd", scores, k[:, :, :end], preferred_element_type=jnp.float32).reshape(mine.shape))
        later = ((0, 0), (0, 0), (0, 0), (0, k.shape[2] - end))
        dk += jnp.pad(jnp.einsum("bkqd,bkqs->bkds", rows, scores, preferred_element_type=jnp.float32), later)
        dv += jnp.pad(jnp.einsum("bkqd,bkqs->bkds", dy.astype(v.dtype), weights, preferred_element_type=jnp.float32), later)
    dq = ungrouped(jnp.concatenate(dq, 3)) * k.shape[-1] ** -0.5
    return dq.astype(k.dtype), jnp.swapaxes(dk, 2, 3).astype(k.dtype), jnp.swapaxes(dv, 2, 3).astype(v.dtype), None


attend_in_parts.defvjp(_parts_forward, _parts_backward)


def fused_attention(device, dtype, head_dim: int, mesh=None):
    """The kernel of `attend` for this device where no token sees a later one of its row (S = T), called (q, k, v, bias); None where there is none.
    bias: [B or 1, T, T] f32, 0 or as low as one likes; None where order alone decides. No array of [H, T, T] f32 is made.

    By cuDNN on NVIDIA's Ampere and later, in bf16, with heads of at most 128 in eighths; on TPUs jax's splash attention.
    """
    if device.platform == "tpu":
        return partial(attend_splash, mesh=mesh)
    capability = str(getattr(device, "compute_capability", ""))  # "9.0"; AMD says "gfx942"
    version = [int(n) for n in capability.split(".")] if re.fullmatch(r"\d+\.\d+", capability) else [0]
    return attend_cudnn if version >= [8, 0] and dtype == jnp.bfloat16 and head_dim <= 128 and head_dim % 8 == 0 else None


def attend_cudnn(q, k, v, bias, implementation: str = "cudnn"):
    """By cuDNN, whose gradient of the bias is computed and dropped: jax 0.10 calls no kernel without. With a bias it wants even lengths.
    implementation: "xla" is jax's own reference for it, which runs anywhere."""
    length, rows = q.shape[1], lambda x: jnp.swapaxes(x, 1, 2)  # noqa: E731
    if bias is not None:
        q, k, v, bias = lengthened(q, k, v, bias, length % 2)
        bias = jnp.maximum(bias, HIDDEN).astype(q.dtype)[:, None]
    return jax.nn.dot_product_attention(q, rows(k), rows(v), bias, is_causal=True, implementation=implementation)[:, :length]


def attend_splash(q, k, v, bias, mesh=None, interpret: bool = False):
    """By jax's splash attention, on every device its own rows and heads. A token sees itself whatever the bias says: where a whole block sees
    nothing the kernel divides by zero. interpret: on any device, slowly."""
    length = q.shape[1]
    q, k, v, bias = lengthened(q * q.shape[-1] ** -0.5, k, v, bias, -length % SPLASH_ROWS)
    size = q.shape[1]
    block = max(n for n in range(SPLASH_ROWS, 641, SPLASH_ROWS) if size % n == 0)
    blocks = splash.BlockSizes(block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
                               block_kv_dkv_compute=block, use_fused_bwd_kernel=True)  # fmt: skip

    def kernel(mask):
        made = splash.make_splash_mha(mask, head_shards=1, q_seq_shards=1, block_sizes=blocks, residual_checkpoint_name=KEPT, interpret=interpret)
        made.fwd_mask_info = made.fwd_mask_info._replace(is_dynamic_mask=None)  # which is read for a name alone, and cannot be while tracing
        return made

    def local(q, k, v, *seen):
        if not seen:
            return jax.vmap(kernel(splash_mask.MultiHeadMask(q.shape[1] * [splash_mask.CausalMask((size, size))])))(q, k, v)
        return jax.vmap(lambda q, k, v, seen: kernel(seen[None])(q, k, v))(q, k, v, *seen)  # one mask for all heads

    arrays = jnp.swapaxes(q, 1, 2), k, v
    if bias is not None:
        arrays += (jnp.broadcast_to((bias > HIDDEN) | jnp.eye(size, dtype=bool), (len(q), size, size)),)
    if mesh is not None and mesh.size > 1:
        over = "batch" if len(q) % batch_ways(mesh) == 0 else None  # a chat's one row is every device's
        split, rows = spec((over, "heads")), spec((over,))
        local = jax.shard_map(local, mesh=mesh, in_specs=(split, split, split, rows)[: len(arrays)], out_specs=split, check_vma=False)
    return jnp.swapaxes(local(*arrays), 1, 2)[:, :length]


def lengthened(q, k, v, bias, more: int):
    """Queries, keys and bias of rows that are longer at their end, where a token sees itself alone."""
    if not more:
        return q, k, v, bias
    if bias is not None:
        added = jnp.diag(jnp.arange(q.shape[1] + more) >= q.shape[1])
        bias = jnp.where(added, 0.0, jnp.pad(bias, ((0, 0), (0, more), (0, more)), constant_values=HIDDEN))
    wider = lambda x, axis: jnp.pad(x, [(0, more if i == axis else 0) for i in range(4)])  # noqa: E731
    return wider(q, 1), wider(k, 2), wider(v, 2), bias


def grouped(x, groups: int):
    """[B, T, H, d] -> [B, groups, H / groups, T, d]."""
    b, t, _, d = x.shape
    return jnp.moveaxis(x.reshape(b, t, groups, -1, d), 1, 3)


def ungrouped(x):
    """[B, K, G, T, d] -> [B, T, K * G, d]."""
    b, _, _, t, d = x.shape
    return jnp.moveaxis(x, 3, 1).reshape(b, t, -1, d)


def unnormalised(scores, bias):
    """exp of scores [B, K, G, T, S] with their bias [B or 1, T, S], above each row's highest, which is a constant to the gradient."""
    scores = scores + bias[:, None, None]
    return jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, -1, keepdims=True)))
