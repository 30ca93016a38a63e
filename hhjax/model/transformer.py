"""The decoder: one block whose settings cover the paper's ladder, GPT-NeoX, Llama and Qwen. The only file that imports flax.

Flax declares the parameters of a block with their logical axes; everything else is plain functions of arrays.
Blocks are stacked along a leading `layers` axis and scanned in training, unrolled when a cache is passed.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P

from hhjax.model.attention import KEPT, attend, attend_in_parts, fused_attention
from hhjax.sharding import RULES, gathered_spec, is_axes
from hhjax.types import Array, Model


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder. The defaults are the house style of the ladder in sizes.py.

    vocab: rows of the embedding, at least the tokenizer's vocabulary (0: to be filled in by `model_config`).
    kv_heads < heads is grouped-query attention. rotary_fraction: share of each head that is rotated.
    activation: "gelu" (exact), "gelu_tanh" or "silu".
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    vocab: int = 0
    norm: str = "layer"  # "layer" or "rms"
    norm_bias: bool = True
    norm_eps: float = 1e-5
    rotary_fraction: float = 1.0
    rotary_base: float = 10_000.0
    parallel_residual: bool = False
    gated_mlp: bool = False
    activation: str = "gelu_tanh"
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = True

    def __post_init__(self):
        for name, allowed in (("norm", ("layer", "rms")), ("activation", tuple(ACTIVATIONS))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} {getattr(self, name)!r}; choose one of {', '.join(allowed)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")


@dataclass(frozen=True)
class RunConfig:
    """How a model is executed. Only dtype changes a result by more than rounding, and is part of a stage's identity.

    remat: what the backward pass finds of the forward one: "none" (all that it uses), "dots" (matrix products and fused attention; the rest is
    cheap to compute anew and dear to keep), "full" (block inputs only), or "auto" ("none" on CPU, "dots" elsewhere).
    unroll: layers per scan step; 0 is all of up to 8 on CPU, where it saves a third and the last layer is computed only where it is read, and one
    elsewhere.
    dtype: "float32", "bfloat16", or "auto" (bfloat16 on GPU and TPU); parameters are f32 always.
    barrier: "auto" (CPU only), "on" or "off": what XLA's CPU compiler needs to be told, see `product`, `rotate_and_back`, `once`,
    `attend_in_parts` and `unrolled`; "off" where a CPU shall differentiate forward (jax.jvp).
    attention: "auto" (by the kernel of `fused_attention` where there is one) or "plain".
    """

    remat: str = field(default="auto", metadata={"identity": False})
    unroll: int = field(default=0, metadata={"identity": False})
    dtype: str = "auto"
    barrier: str = field(default="auto", metadata={"identity": False})
    attention: str = field(default="auto", metadata={"identity": False})


class Where(NamedTuple):
    """What attention must know of positions, computed once for all layers (B may be 1: the same for every row).

    sin, cos: [B, T, 1, rotated / 2] f32. bias: [B, T, S] f32, 0 or -1e30; None where a token
    sees all that stand before it and attention is fused. read: [B, T] int32, which tokens of the row these T are; None: all, in order.
    """

    sin: Array
    cos: Array
    bias: Array | None
    read: Array | None = None


class Cache(NamedTuple):
    """Keys and values of every layer: tuples of [B, kv_heads, S, head_dim]. Which slot holds which token is the caller's to know."""

    keys: tuple[Array, ...]
    values: tuple[Array, ...]


ACTIVATIONS = {"gelu": partial(nn.gelu, approximate=False), "gelu_tanh": nn.gelu, "silu": nn.silu}
FEW_ROWS = 64  # of all devices together, up to which `few_or_many` goes the other way: still 1.2 times as fast, at 96 equal
REMAT = {
    "none": None,
    "dots": lambda primitive, *given, **settings: (
        primitive.name.startswith("dot_product_attention_fwd") or settings.get("name") == KEPT  # what fused attention leaves
        or jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *given, **settings)),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def remat_on(run: RunConfig, platform: str) -> str:
    """What "auto" is there."""
    return run.remat if run.remat != "auto" else "none" if platform == "cpu" else "dots"


def reads_apart(layers: int, run: RunConfig, platform: str) -> bool:
    """Whether the last layer of a forward without a cache is computed only where it is read: on CPU, where layers are unrolled. To cut the last
    layer's weights from a loop's would copy them all, and fused kernels know rows of queries in the order of keys alone."""
    return platform == "cpu" and unroll_on(layers, run, platform) == layers


def unroll_on(layers: int, run: RunConfig, platform: str) -> int:
    """Layers per scan step there."""
    return min(layers, run.unroll or (8 if platform == "cpu" else 1))


@lru_cache(maxsize=32)
def make_model(cfg: ModelConfig, mesh=None, run: RunConfig = RunConfig()) -> Model:
    """The record of pure functions of types.Model, one and the same where it is called alike: a layer that jax has traced for the
    policy serves the reference, the PM and the value network too. With a mesh, activations are pinned to (data, fsdp) at block
    boundaries and each layer's weights are gathered over fsdp before use; without the pins the partitioner
    spreads the parameters' sharding into the activations (0.29 of the one-device rate on eight devices)."""
    for name, allowed in (("remat", ("auto", *REMAT)), ("attention", ("auto", "plain"))):
        if getattr(run, name) not in allowed:
            raise ValueError(f"{name} {getattr(run, name)!r}; choose one of {', '.join(allowed)}")
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    platform = device.platform
    dtype = jnp.dtype(run.dtype if run.dtype != "auto" else "float32" if platform == "cpu" else "bfloat16")
    barrier = run.barrier == "on" or (run.barrier == "auto" and platform == "cpu")
    fused = fused_attention(device, dtype, cfg.head_dim, mesh) if run.attention == "auto" else None
    unroll, last_apart = unroll_on(cfg.layers, run, platform), reads_apart(cfg.layers, run, platform)
    policy = REMAT[remat_on(run, platform)]
    block, decoding = Block(cfg, dtype, barrier, fused), Block(cfg, dtype, barrier, fused, turned=dtype == jnp.float32)
    axes, declared = decoder_axes(cfg), block_params(cfg)
    layer_axes, shapes = ({name: get(box) for name, box in declared.items()} for get in (lambda b: b.names, lambda b: b.value.shape))

    def constrain(x, spec):
        return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    def pin(x):
        return constrain(x, P(RULES["batch"]))

    def gather(weights, names):
        """Weights in the compute dtype (cast first: half the bytes travel), whole along fsdp."""
        cast = jax.tree.map(lambda w: w.astype(dtype) if w.ndim > 1 else w, weights)
        return jax.tree.map(lambda n, w: constrain(w, gathered_spec(n)), names, cast, is_leaf=is_axes)

    def init(key):
        return init_decoder(cfg, Block(cfg, dtype, barrier), key)

    @jax.jit  # traced once for all layers and programs that give it equal shapes; XLA inlines the calls
    def layer(x, weights, where, kv=None, slot=None, asked=None):
        x, kv = (block if slot is None else decoding).apply({"params": gather(weights, layer_axes)}, pin(x), where, kv, slot, asked)
        return pin(x), kv

    def apply(params, tokens, positions=None, mask=None, cache=None, slot=None, read=None):
        """tokens [B, T] -> (final normed hidden [B, T, D], cache).

        positions: [B, T], 0.. by default. They may begin again inside a row, with a mask [B, T, T].
        mask: [B, S] keys that exist, beyond causality; right padding needs none. Or [B, T, S] keys that each token may see,
        causality included: nothing that lies later in the row. S is T, or the cache's slots where `slot` is given.
        slot: int32, one for all rows, where in the cache the first of the tokens goes. Then `mask` says which slots each of them may see, its
        own among them. None: the cache is empty, and they are all that is seen.
        read: [B, R] int32, of which tokens the hidden states are asked, [B, R, D]. Of the others the last layer makes keys and values alone,
        with a cache and wherever `reads_apart` says so.
        Raises ValueError for a mask of another S, or of none; for a slot of no cache, and for `unrolled` params without a cache.
        """
        if cache is None and (slot is not None or isinstance(params["blocks"], tuple)):
            raise ValueError("a slot or parameters that are unrolled, and no cache; give one of init_cache, or stacked parameters and no slot")
        own = slot is None  # the keys to be seen are those of `tokens`: a cache's other slots are empty
        # One row of positions and one mask where every row has the same: [1, T], [1, T, S] instead of [B, ...].
        positions = jnp.arange(tokens.shape[1])[None] if positions is None else positions
        keys = tokens.shape[1] if own else cache.keys[0].shape[2]
        if (mask.shape[-1] if mask is not None else tokens.shape[1]) != keys or not (own or (mask is not None and mask.ndim == 3)):
            raise ValueError(f"a mask of shape {getattr(mask, 'shape', None)} where {keys} keys may be seen; give one of [B, T, {keys}]"
                             + (f" or [B, {keys}]" if own else ""))  # fmt: skip
        apart = read is not None and read.shape[1] < tokens.shape[1] and (cache is not None or last_apart)

        def known():
            """What all tokens must know, and what those that are read."""
            ordered = fused is not None and own and mask is None
            every = about(positions, None if ordered else visible(positions, mask))
            if not apart:
                return every, None
            at = read_at(jnp.broadcast_to(positions, tokens.shape), read)
            return every, about(at, visible(at, mask if mask is None or mask.ndim == 2 else read_at(mask, read)), read)

        def about(at, seen, read=None):
            return Where(*rotation(cfg, at), None if seen is None else jnp.where(seen, 0.0, -1e30), read)

        def visible(at, mask):
            """Which keys tokens at these positions may see, [B or 1, T, S]."""
            if mask is not None and mask.ndim == 3:
                return mask
            causal = positions[:, None, :] <= at[:, :, None]
            return causal if mask is None else causal & mask[:, None, :]

        alone = mesh is None or mesh.size == 1  # a branch's values would be whole on every device
        where, asked = once(known, params["final_norm_scale"][0]) if barrier and alone else known()
        x = pin(gather(params["embed"], axes["embed"])[tokens].astype(dtype))

        if cache is None:
            body = lambda x, weights, asked=None: (layer(x, weights, where, asked=asked)[0], None)  # noqa: E731
            if policy is not None:
                # Where no loop parts forward from backward, XLA would find both the same and keep what was to be computed anew.
                body = jax.checkpoint(body, policy=policy, prevent_cse=unroll == cfg.layers)
            blocks = params["blocks"]
            if apart:
                blocks, last = (jax.tree.map(lambda w: w[part], blocks) for part in (np.s_[:-1], -1))
            x, _ = jax.lax.scan(body, x, blocks, unroll=unroll)
            x = body(x, last, asked)[0] if apart else x
        else:  # unrolled: a scan would copy the whole cache at every layer
            new = []
            for i, weights in enumerate(layers_of(params["blocks"])):
                x, kv = layer(x, weights, where, (cache.keys[i], cache.values[i]), slot, asked if i == cfg.layers - 1 else None)
                new.append(kv)
            cache = Cache(*map(tuple, zip(*new)))
        x = x if read is None or apart else read_at(x, read)
        return normalize(cfg, x, params["final_norm_scale"], params.get("final_norm_bias")), cache

    def layers_of(blocks):
        """The weights of each layer, of stacked ones or of `unrolled` ones."""
        if not isinstance(blocks, tuple):
            return unstack(blocks)
        if not barrier:
            return blocks
        return [{name: w.T.reshape(shapes[name]) if w.ndim > 1 else w for name, w in weights.items()} for weights in blocks]

    def unrolled(params):
        """A tree per layer in the compute dtype: a loop over tokens would slice stacked weights anew for each. On CPU matrices are turned as
        well, so that products sum over the last axis: those of a few rows are twice as fast."""
        blocks = params["blocks"] if isinstance(params["blocks"], tuple) else unstack(params["blocks"])
        if barrier:
            turned = lambda name, w: w.reshape(-1, cfg.width).T if name == "o" else w.reshape(len(w), -1).T  # noqa: E731
            blocks = tuple({name: turned(name, w) if w.ndim > 1 else w for name, w in weights.items()} for weights in blocks)
            return params | {"blocks": jax.lax.optimization_barrier(blocks)}
        return jax.tree.map(lambda w: w.astype(dtype) if w.ndim > 1 else w, params | {"blocks": blocks})

    def logits(params, hidden):
        """[..., D] -> [..., V] f32."""
        name = "embed" if cfg.tied_embeddings else "unembed"
        table, hidden = gather(params[name], axes[name]), hidden.astype(dtype)
        if barrier and dtype == jnp.float32:
            return product(hidden, table.T if cfg.tied_embeddings else table)
        return jnp.einsum("...d,vd->...v" if cfg.tied_embeddings else "...d,dv->...v", hidden, table, preferred_element_type=jnp.float32)

    def score(params, hidden):
        """[..., D] -> [...] f32: the scalar head of preference and value models."""
        return jnp.einsum("...d,d->...", hidden.astype(jnp.float32), params["score"])

    def init_cache(batch, length):
        zeros = lambda: tuple(  # noqa: E731
            jnp.zeros((batch, cfg.kv_heads, length, cfg.head_dim), dtype) for _ in range(cfg.layers)
        )
        return Cache(zeros(), zeros())

    return Model(cfg, init, apply, logits, score, lambda: axes, init_cache, unrolled)


class Block(nn.Module):
    """One decoder block: attention and MLP, in sequence or in parallel on the same input. turned: for decoding on CPU in f32, whose weights lie as
    `Model.unrolled` has them."""

    cfg: ModelConfig
    dtype: jnp.dtype
    barrier: bool
    fused: Callable | None = None
    turned: bool = False

    @nn.compact
    def __call__(self, x, where, kv=None, slot=None, asked=None):
        """x [B, T, D] -> x after the block, of all tokens or of those that `asked` reads, [B, R, D]; and keys and values of all."""
        cfg = self.cfg
        a, kv = self.attention(self.norm("attn_norm", x), where, kv, slot, asked)
        x = x if asked is None else read_at(x, asked.read)
        if cfg.parallel_residual:
            return x + a + self.mlp(self.norm("mlp_norm", x)), kv
        x = x + a
        return x + self.mlp(self.norm("mlp_norm", x)), kv

    def weight(self, name, shape, axes, fan_in, scale=1.0):
        init = nn.initializers.normal(scale * fan_in**-0.5)
        return self.param(name, nn.with_partitioning(init, axes), shape, jnp.float32).astype(self.dtype)

    def vector(self, name, shape, axes, value=0.0):
        init = nn.initializers.constant(value)
        return self.param(name, nn.with_partitioning(init, axes), shape, jnp.float32)

    def dense(self, x, w, over: int = 1):
        """The last `over` axes of x summed with the first of w."""
        if not self.barrier:
            return jnp.tensordot(x, w, over)
        kept, made = x.shape[: x.ndim - over], w.shape[over:]
        multiply = few_or_many if self.turned else product
        return multiply(x.reshape(*kept, -1), w.reshape(-1, math.prod(made))).reshape(*kept, *made)

    def norm(self, name, x):
        cfg = self.cfg
        scale = self.vector(f"{name}_scale", (cfg.width,), (None,), 1.0)
        bias = self.vector(f"{name}_bias", (cfg.width,), (None,)) if cfg.norm == "layer" and cfg.norm_bias else None
        return normalize(cfg, x, scale, bias)

    def head_norm(self, name, x):
        scale = self.vector(f"{name}_scale", (self.cfg.head_dim,), (None,), 1.0)
        return rms_norm(x, scale, self.cfg.norm_eps)

    def project(self, name, x, heads, axis):
        """[B, T, D] -> [B, T, heads, head_dim]."""
        cfg = self.cfg
        w = self.weight(name, (cfg.width, heads, cfg.head_dim), ("embed", axis, "head_dim"), cfg.width)
        y = self.dense(x, w)
        if cfg.qkv_bias:
            y = y + self.vector(f"{name}_bias", (heads, cfg.head_dim), (axis, "head_dim")).astype(self.dtype)
        return y

    def attention(self, x, where, kv, slot, asked):
        cfg = self.cfg
        q = self.project("q", x if asked is None else read_at(x, asked.read), cfg.heads, "heads")
        k = self.project("k", x, cfg.kv_heads, "kv_heads")
        v = self.project("v", x, cfg.kv_heads, "kv_heads")
        if cfg.qk_norm:
            q, k = self.head_norm("q_norm", q), self.head_norm("k_norm", k)
        turn, asking = rotate_and_back if self.barrier else rotate, asked or where
        q, k = turn(q, asking.sin, asking.cos), turn(k, where.sin, where.cos)
        k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)  # [B, K, T, d], the cache's layout
        if kv is not None:
            kv = write(kv[0], k, slot), write(kv[1], v, slot)
        if slot is None:  # the keys to be seen are those of x
            by_order = self.fused if asked is None else None
            y = (by_order or (attend_in_parts if self.barrier else attend))(q, k, v, asking.bias)
        else:
            y = attend(q, *kv, asking.bias)
        out = self.weight("o", (cfg.heads, cfg.head_dim, cfg.width), ("heads", "head_dim", "embed"),
                          cfg.heads * cfg.head_dim, (2 * cfg.layers) ** -0.5)  # fmt: skip
        y = self.dense(y, out, over=2)
        if cfg.out_bias:
            y = y + self.vector("o_bias", (cfg.width,), (None,)).astype(self.dtype)
        return y, kv

    def mlp(self, x):
        cfg = self.cfg
        h = self.dense(x, self.weight("up", (cfg.width, cfg.mlp_width), ("embed", "mlp"), cfg.width))
        if cfg.mlp_bias:
            h = h + self.vector("up_bias", (cfg.mlp_width,), ("mlp",)).astype(self.dtype)
        activation = ACTIVATIONS[cfg.activation]
        if cfg.gated_mlp:
            h = h * activation(self.dense(x, self.weight("gate", (cfg.width, cfg.mlp_width), ("embed", "mlp"), cfg.width)))
        else:
            h = activation(h)
        down = self.weight("down", (cfg.mlp_width, cfg.width), ("mlp", "embed"), cfg.mlp_width, (2 * cfg.layers) ** -0.5)
        y = self.dense(h, down)
        if cfg.mlp_bias:
            y = y + self.vector("down_bias", (cfg.width,), (None,)).astype(self.dtype)
        return y


def init_decoder(cfg: ModelConfig, block: Block, key):
    """Fresh f32 parameters: kernels N(0, 1/fan_in), residual outputs shrunk by sqrt(2 layers), embeddings N(0, 0.02^2).

    The score head starts at zero, so a fresh preference model's loss is exactly log 2 and an LM's parameters
    are a preference model's as they stand. Raises ValueError when the vocabulary is not set.
    """
    if cfg.vocab < 1:
        raise ValueError("the model's vocab is 0; make its config with model_config(name, vocab_size)")
    embed_key, block_key, out_key = jax.random.split(key, 3)
    init_block = lambda k: nn.unbox(block.init(k, *example_input(cfg)))["params"]  # noqa: E731
    params = {
        "embed": 0.02 * jax.random.normal(embed_key, (cfg.vocab, cfg.width)),
        "blocks": jax.vmap(init_block)(jax.random.split(block_key, cfg.layers)),
        "final_norm_scale": jnp.ones(cfg.width),
        "score": jnp.zeros(cfg.width),
    }
    if cfg.norm == "layer" and cfg.norm_bias:
        params["final_norm_bias"] = jnp.zeros(cfg.width)
    if not cfg.tied_embeddings:
        params["unembed"] = 0.02 * jax.random.normal(out_key, (cfg.width, cfg.vocab))
    return params


def decoder_axes(cfg: ModelConfig):
    """Logical axis names of every parameter, as a tree of tuples."""
    axes = {
        "embed": ("vocab", "embed"),
        "blocks": {name: ("layers", *box.names) for name, box in block_params(cfg).items()},
        "final_norm_scale": (None,),
        "score": (None,),
    }
    if cfg.norm == "layer" and cfg.norm_bias:
        axes["final_norm_bias"] = (None,)
    if not cfg.tied_embeddings:
        axes["unembed"] = ("embed", "vocab")
    return axes


@lru_cache(maxsize=32)
def block_params(cfg: ModelConfig) -> dict:
    """What flax declares of one block, by name: boxes with axis `names` and a `value` that has a shape."""
    block = Block(cfg, jnp.dtype("float32"), False)
    # The example is made while tracing: made eagerly it would be a dozen little programs to compile.
    return jax.eval_shape(lambda key: block.init(key, *example_input(cfg)), jax.random.key(0))["params"]


def example_input(cfg: ModelConfig):
    """Arguments of a block for one token, enough to make its parameters."""
    positions = jnp.zeros((1, 1), jnp.int32)
    return jnp.zeros((1, 1, cfg.width)), Where(*rotation(cfg, positions), jnp.zeros((1, 1, 1)))


def normalize(cfg: ModelConfig, x, scale, bias=None):
    """Layer or RMS norm over the last axis, in f32; the result in x's dtype."""
    if cfg.norm == "rms":
        return rms_norm(x, scale, cfg.norm_eps)
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, -1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + cfg.norm_eps) * scale
    return (y if bias is None else y + bias).astype(x.dtype)


def rms_norm(x, scale, eps):
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + eps)
    return (y * scale).astype(x.dtype)


def once(compute, number):
    """compute(), as values of their own: in a branch that XLA cannot foresee, for its CPU compiler puts sine and cosine into every
    fusion that reads them, so that each head of each layer computes them anew. number: a scalar that the program is given; where it is NaN all
    is zero, so one without which nothing is right anyway."""
    return jax.lax.cond(number > -jnp.inf, compute, lambda: jax.tree.map(jnp.zeros_like, jax.eval_shape(compute)))


def rotation(cfg: ModelConfig, positions):
    """Angles of rotary embedding (Su et al. 2021) for positions [B, T]: sin and cos, [B, T, 1, rotated / 2] f32."""
    dims = int(cfg.head_dim * cfg.rotary_fraction) // 2 * 2
    frequency = cfg.rotary_base ** (-jnp.arange(0, dims, 2, dtype=jnp.float32) / dims)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    return jnp.sin(angle), jnp.cos(angle)


def rotate(x, sin, cos):
    """The first 2 x sin.shape[-1] channels of each head turned, halves layout. x: [B, T, H, d]."""
    half = sin.shape[-1]
    a, b, kept = (x[..., i].astype(jnp.float32) for i in (np.s_[:half], np.s_[half : 2 * half], np.s_[2 * half :]))
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, kept], -1).astype(x.dtype)


@jax.custom_vjp
def rotate_and_back(x, sin, cos):
    """`rotate`, whose gradient is turned back instead of added up from padded halves. Angles are constants."""
    return rotate(x, sin, cos)


rotate_and_back.defvjp(lambda x, *angles: (rotate(x, *angles), angles), lambda angles, g: (rotate(g, -angles[0], angles[1]), None, None))


def read_at(x, read):
    """x [B, T, ...] at each row's own places [B, R]: [B, R, ...]."""
    return jnp.take_along_axis(x, read.reshape(*read.shape, *(1,) * (x.ndim - 2)), 1)


def write(buffer, update, slot):
    """buffer [B, K, S, d] with update [B, K, T, d] written from `slot` (0 where None) on, the same in every row: a slot of each row's own
    would be a scatter, which TPUs do row by row."""
    return jax.lax.dynamic_update_slice(buffer, update.astype(buffer.dtype), (0, 0, 0 if slot is None else slot, 0))


def unstack(blocks):
    """The weights of each layer, from the stacked ones."""
    layers = len(jax.tree.leaves(blocks)[0])
    return tuple(jax.tree.map(lambda w: w[i], blocks) for i in range(layers))


def unstacked(params):
    """Parameters with a tree per layer, which `Model.unrolled` takes as well as stacked ones, and then, off a CPU, without another copy."""
    return params | {"blocks": unstack(params["blocks"])}


def unstacked_axes(axes, layers: int):
    """The logical axes of `unstacked` parameters."""
    return axes | {"blocks": layers * ({name: names[1:] for name, names in axes["blocks"].items()},)}


@jax.custom_vjp
def product(x, w):
    """x @ w, [..., D] @ [D, F], whose weight gradient transposes the narrower operand. On CPU, XLA otherwise transposes the
    wide one and evaluates the activation's derivative inside that strided copy, element by element: a third of a step."""
    return x @ w


def _product_backward(kept, g):
    x, w = kept
    rows, g_rows = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    if x.shape[-1] <= g.shape[-1]:
        dw = jax.lax.optimization_barrier(rows.T) @ g_rows
    else:
        dw = jax.lax.optimization_barrier(jax.lax.optimization_barrier(g_rows.T) @ rows).T
    return g @ w.T, dw


product.defvjp(lambda x, w: (x @ w, (x, w)), _product_backward)


def few_or_many(x, w):
    """`product` with a w that lies in memory as w.T, for x of few rows the other way round, as w.T @ x.T: XLA's CPU library copies its right side
    into an order of its own at every call, and turns products round unless a barrier keeps it from doing so."""
    if math.prod(x.shape[:-1]) > FEW_ROWS:
        return product(x, w)
    made = jax.lax.dot_general(w, x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), (((0,), (1,)), ((), ())))
    return jax.lax.optimization_barrier(made).T.reshape(*x.shape[:-1], w.shape[1])


def first_layers(params, layers: int):
    """The parameters of a model that ends after so many of its layers, for a config with that number."""
    return params | {"blocks": jax.tree.map(lambda x: x[:layers], params["blocks"])}


def config_to_json(cfg: ModelConfig) -> dict:
    return asdict(cfg)


def config_from_json(fields: dict) -> ModelConfig:
    """ModelConfig from `model.json`; TypeError on a field it does not know."""
    return ModelConfig(**fields)
