"""The decoder: parameter counts, causality, padding, the cache, remat, the product with its own backward, precision."""

import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hhjax.model import transformer
from hhjax.model.attention import attend, attend_cudnn, attend_in_parts, attend_splash, fused_attention, parts
from hhjax.model.sizes import SIZES, matmul_params, model_config
from hhjax.model.transformer import (
    ModelConfig,
    RunConfig,
    config_from_json,
    config_to_json,
    make_model,
    rotate,
    rotation,
    unstacked,
    unstacked_axes,
)
from hhjax.sharding import MeshConfig, is_axes, make_mesh

TINY = model_config("0.1M", 100)
GROUPED = ModelConfig(
    layers=2, width=32, heads=4, kv_heads=2, head_dim=16, mlp_width=48, vocab=64, norm="rms", gated_mlp=True,
    activation="silu", qk_norm=True, tied_embeddings=False, rotary_fraction=0.5,
)  # fmt: skip
PARALLEL = replace(TINY, parallel_residual=True, qkv_bias=True, out_bias=True, mlp_bias=True, activation="gelu")
CONFIGS = pytest.mark.parametrize("cfg", [TINY, GROUPED, PARALLEL], ids=["gpt", "llama", "neox"])


def tokens_for(cfg, shape=(3, 12), seed=0):
    return jax.random.randint(jax.random.key(seed), shape, 0, cfg.vocab)


@pytest.mark.parametrize("name", ["13M", "42M", "197M", "810M", "2.7B", "13B", "52B"])
def test_ladder_is_as_wide_as_the_paper_says(name):
    cfg = SIZES[name]
    assert cfg.width == 128 * cfg.layers
    assert matmul_params(cfg) == 12 * cfg.layers * cfg.width**2
    size = float(name[:-1]) * {"M": 1e6, "B": 1e9}[name[-1]]
    assert matmul_params(cfg) == pytest.approx(size, rel=0.06)


@pytest.mark.parametrize("name", SIZES)
def test_counted_blocks_are_the_blocks_that_are_made(name):
    cfg = model_config(name, 1000)
    shapes = jax.eval_shape(make_model(cfg).init, jax.random.key(0))
    kernels = [x.size for k, x in shapes["blocks"].items() if not k.endswith(("scale", "bias"))]
    assert sum(kernels) == matmul_params(cfg)
    assert shapes["embed"].shape == (1024, cfg.width)


def test_an_unknown_size_and_an_unset_vocabulary_are_errors():
    with pytest.raises(ValueError, match="'7B'; choose one of 0.1M"):
        model_config("7B", 100)
    with pytest.raises(ValueError, match="vocab is 0"):
        make_model(SIZES["0.1M"]).init(jax.random.key(0))


def test_equal_models_are_one_and_their_layers_are_traced_once():
    model = make_model(GROUPED)
    assert model is make_model(replace(GROUPED)) and model is not make_model(TINY)
    decode = lambda params, tokens: model.apply(params, tokens, None, None, model.init_cache(3, 16))  # noqa: E731
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    traced = [jax.make_jaxpr(f)(shapes, tokens_for(GROUPED)) for f in (decode, lambda *args: decode(*args))]
    layers = [eqn.params["jaxpr"] for jaxpr in traced for eqn in jaxpr.eqns if eqn.params.get("name") == "layer"]
    assert len(layers) == 2 * GROUPED.layers and all(layer is layers[0] for layer in layers)


@CONFIGS
def test_later_tokens_change_nothing_before_them(cfg):
    model = make_model(cfg)
    params, tokens = model.init(jax.random.key(1)), tokens_for(cfg)
    hidden, _ = model.apply(params, tokens)
    changed, _ = model.apply(params, tokens.at[:, 7:].set(0))
    np.testing.assert_array_equal(hidden[:, :7], changed[:, :7])
    assert jnp.abs(hidden[:, 7:] - changed[:, 7:]).max() > 1e-3


@CONFIGS
def test_cached_decoding_of_ragged_rows_equals_the_full_forward(cfg):
    model = make_model(cfg)
    params, tokens = model.init(jax.random.key(1)), tokens_for(cfg)
    full, _ = model.apply(params, tokens)
    start = jnp.array([3, 5, 2])
    prompt = jnp.where(jnp.arange(5) < start[:, None], tokens[:, :5], 0)  # right-padded prompts
    _, cache = model.apply(params, prompt, cache=model.init_cache(3, 12))
    params = model.unrolled(params)
    assert isinstance(params["blocks"], tuple)
    for step in range(7):  # behind the prompts a column of the cache for every step
        at, column = start + step, jnp.arange(12)
        token = jnp.take_along_axis(tokens, at[:, None], 1)
        seen = (column < start[:, None]) | ((5 <= column) & (column <= 5 + step))
        hidden, cache = model.apply(params, token, at[:, None], seen[:, None], cache, slot=5 + step)
        expected = jnp.take_along_axis(full, at[:, None, None], 1)
        np.testing.assert_allclose(hidden, expected, atol=1e-5, rtol=0)
    for mask in (jnp.ones((3, 1, 1), bool), jnp.ones((3, 12), bool), None):  # the first would be taken for the token's own key
        with pytest.raises(ValueError, match="where 12 keys may be seen"):
            model.apply(params, token, at[:, None], mask, cache, slot=11)
    for slot, given in ((11, model.init(jax.random.key(1))), (None, params)):
        with pytest.raises(ValueError, match="and no cache"):
            model.apply(given, token, at[:, None], jnp.ones((3, 1, 1), bool), slot=slot)


@CONFIGS
def test_a_masked_key_is_as_if_it_were_not_there(cfg):
    model = make_model(cfg)
    params, tokens = model.init(jax.random.key(1)), tokens_for(cfg)
    left_padded = jnp.pad(tokens, ((0, 0), (4, 0)))
    positions = jnp.broadcast_to(jnp.maximum(jnp.arange(16) - 4, 0), (3, 16))
    mask = jnp.broadcast_to(jnp.arange(16) >= 4, (3, 16))
    hidden, _ = model.apply(params, left_padded, positions=positions, mask=mask)
    expected, _ = model.apply(params, tokens)
    np.testing.assert_allclose(hidden[:, 4:], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("cfg, run", [
    (TINY, RunConfig()), (GROUPED, RunConfig()), (PARALLEL, RunConfig()), (GROUPED, RunConfig(barrier="off")), (GROUPED, RunConfig(unroll=1)),
    (GROUPED, RunConfig(remat="full")), (replace(GROUPED, layers=1), RunConfig()),
], ids=["gpt", "llama", "neox", "no barrier", "loop", "remat", "one layer"])  # fmt: skip
def test_what_is_read_alone_is_what_stands_there(cfg, run):
    """Values and gradients, whatever says which keys are seen; places in any order, and twice."""
    model = make_model(cfg, run=run)
    params, tokens = model.init(jax.random.key(1)), tokens_for(cfg)
    read = jnp.array([[11, 3], [5, 5], [0, 7]])
    t = jnp.arange(12)
    two = jnp.broadcast_to(jnp.where(t < 6, t, t - 6), (3, 12))  # two dialogues a row
    own = jnp.broadcast_to((t[:, None] // 6 == t // 6) & (t <= t[:, None]), (3, 12, 12))
    ways = ((None, None), (None, t < jnp.array([[12], [8], [9]])), (two, own))

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def alone(params):
        found = [model.apply(params, tokens, *way, read=read)[0] for way in ways]
        return sum(jnp.sum(jnp.sin(x)) for x in found), found

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def among_all(params):
        found = [jnp.take_along_axis(model.apply(params, tokens, *way)[0], read[..., None], 1) for way in ways]
        return sum(jnp.sum(jnp.sin(x)) for x in found), found

    (_, values), gradient = alone(params)
    (_, expected), true = among_all(params)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), values, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * max(1, float(jnp.abs(b).max()))), gradient, true)


@pytest.mark.parametrize("cfg, layers", [(TINY, 1), (GROUPED, 2)], ids=["gpt", "llama"])
def test_a_prompt_may_be_read_at_its_end_alone(cfg, layers):
    """The cache that it leaves is the same; so may tokens that come later."""
    cfg = replace(cfg, layers=layers)
    model, tokens = make_model(cfg), tokens_for(cfg)
    params = model.init(jax.random.key(1))
    (whole, cache), (last, own) = (model.apply(params, tokens, cache=model.init_cache(3, 14), read=read) for read in (None, jnp.array([[4], [11], [0]])))
    np.testing.assert_allclose(last[:, 0], whole[jnp.arange(3), jnp.array([4, 11, 0])], atol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), own, cache)
    more, at, read = tokens[:, :2], jnp.broadcast_to(jnp.arange(12, 14), (3, 2)), jnp.array([[1], [0], [1]])
    seen = jnp.broadcast_to(jnp.arange(14) <= at[:, :, None], (3, 2, 14))
    both, one = (model.apply(model.unrolled(params), more, at, seen, cache, 12, read)[0] for read in (None, read))
    np.testing.assert_allclose(one, jnp.take_along_axis(both, read[..., None], 1), atol=1e-5)


def gradient(cfg, run, positions=None, mask=None):
    model, tokens = make_model(cfg, run=run), tokens_for(cfg)
    params = model.init(jax.random.key(1))
    loss = lambda p: jnp.mean(jnp.square(model.logits(p, model.apply(p, tokens, positions, mask)[0])))  # noqa: E731
    return jax.make_jaxpr(jax.grad(loss))(params), jax.grad(loss)(params)


@pytest.mark.parametrize("run", [RunConfig(remat="full", unroll=1), RunConfig(remat="dots", unroll=1), RunConfig(unroll=2)], ids=str)
def test_remat_and_unrolling_change_the_program_but_not_the_gradient(run):
    program, grads = gradient(TINY, RunConfig(unroll=1))
    other_program, other_grads = gradient(TINY, run)
    assert str(program) != str(other_program)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4), grads, other_grads)


@CONFIGS
def test_the_cpu_s_products_and_angles_give_the_same_gradients_another_way(cfg):
    """With two rows packed into one: positions that begin again, and a mask of its own for every token."""
    segment = jnp.broadcast_to(jnp.arange(12) >= 5, (3, 12))
    positions = jnp.arange(12) - 5 * segment
    mask = (segment[:, :, None] == segment[:, None]) & jnp.tri(12, dtype=bool)
    program, grads = gradient(cfg, RunConfig(barrier="off"), positions, mask)
    other_program, other_grads = gradient(cfg, RunConfig(barrier="on"), positions, mask)
    assert "optimization_barrier" in str(other_program) and "optimization_barrier" not in str(program)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4), grads, other_grads)


@pytest.mark.parametrize("rows", [(1,), (3, 1), (transformer.FEW_ROWS,), (transformer.FEW_ROWS + 1,)], ids=str)
def test_a_product_of_few_rows_goes_the_other_way_and_is_the_same(rows):
    x, turned, g = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(*rows, 16), (24, 16), (*rows, 24)]))
    ours, theirs = (jax.vjp(f, x, turned) for f in (lambda x, w: transformer.few_or_many(x, w.T), lambda x, w: x @ w.T))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), (ours[0], ours[1](g)), (theirs[0], theirs[1](g)))
    # The weights are the left side, for whose sake it is done, and stay there.
    text = jax.jit(lambda x, turned: transformer.few_or_many(x, turned.T)).lower(x, turned).compile().as_text()
    assert ("f32[24,{}]".format(x.size // 16) in text) == (x.size // 16 <= transformer.FEW_ROWS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_decode_step_s_products_go_the_other_way_in_f32(dtype):
    cfg, model = TINY, make_model(TINY, run=RunConfig(barrier="on", dtype=dtype))

    def products(rows, decoding):
        def run(params, tokens, cache):
            seen = jnp.ones((rows, 1, 4), bool)
            params = model.unrolled(params)
            hidden, _ = model.apply(params, tokens, tokens, seen, cache, 3) if decoding else model.apply(params, tokens, cache=cache)
            return model.logits(params, hidden)

        shapes = jax.eval_shape(lambda: (model.init(jax.random.key(0)), jnp.zeros((rows, 1), jnp.int32), model.init_cache(rows, 4)))
        return re.findall(rf"f32\[(\d+),{rows}\] = optimization_barrier", str(jax.make_jaxpr(run)(*shapes)))

    dense = [cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim, cfg.width, cfg.mlp_width, cfg.width]
    dense += cfg.gated_mlp * [cfg.mlp_width]
    # jax writes a layer that it traced once down once.
    assert sorted(map(int, products(5, True))) == (sorted(dense) if dtype == "float32" else [])
    assert products(transformer.FEW_ROWS + 1, True) == products(5, False) == []


def test_bfloat16_compute_keeps_f32_parameters_and_logits():
    model = make_model(TINY, run=RunConfig(dtype="bfloat16"))
    params, tokens = model.init(jax.random.key(1)), tokens_for(TINY)
    hidden, _ = model.apply(params, tokens)
    assert hidden.dtype == jnp.bfloat16 and model.logits(params, hidden).dtype == jnp.float32
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
    exact = make_model(TINY)
    np.testing.assert_allclose(hidden.astype(jnp.float32), exact.apply(params, tokens)[0], atol=0.1)
    assert model.score(params, hidden).dtype == jnp.float32


def test_attention_is_stable_at_large_scores_and_equals_a_plain_loop():
    q, k, v = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(1, 5, 4, 8), (1, 2, 5, 8), (1, 2, 5, 8)]))
    bias = jnp.where(jnp.tril(jnp.ones((1, 5, 5), bool)), 0.0, -1e30)
    out = np.asarray(attend(q, k, v, bias))
    for head in range(4):
        for t in range(5):
            s = np.asarray(k[0, head // 2, : t + 1] @ q[0, t, head]) / np.sqrt(8)
            w = np.exp(s - s.max())
            np.testing.assert_allclose(out[0, t, head], (w / w.sum()) @ np.asarray(v[0, head // 2, : t + 1]), atol=1e-5)
    assert jnp.all(jnp.isfinite(attend(q * 1e4, k, v, bias)))


@pytest.mark.parametrize("dtype, off", [("float32", 1e-5), ("bfloat16", 0.05)])
@pytest.mark.parametrize("rows", [1, 2])
def test_attention_in_parts_knows_one_mask_for_all_rows_and_bfloat16(dtype, off, rows):
    q, k, v, g = (jax.random.normal(jax.random.key(i), s, dtype) for i, s in enumerate([(2, 130, 6, 8), (2, 2, 130, 8), (2, 2, 130, 8), (2, 130, 6, 8)]))
    bias = jnp.where(jnp.tril(jnp.ones((rows, 130, 130), bool)), 0.0, -1e30)
    (y, back), (expected, plain) = (jax.vjp(lambda *x, f=f: f(*x, bias), q, k, v) for f in (attend_in_parts, attend))
    for mine, theirs in zip((y, *back(g)), (expected, *plain(g))):
        assert mine.dtype == theirs.dtype == dtype
        mine, theirs = (np.asarray(x, np.float32) for x in (mine, theirs))
        assert np.max(np.abs(mine - theirs)) < off * np.max(np.abs(theirs))


KERNELS = {"cudnn": partial(attend_cudnn, implementation="xla"), "splash": partial(attend_splash, interpret=True)}  # as any device can run them


def packed_rows(length: int):
    """[2, length, length] bool: two dialogues a row, of which the second row's second one is a prompt and two replies that do not see each other."""
    at = jnp.arange(length)
    segment = jnp.stack([at >= length // 2, at >= length // 3])
    own = (segment[:, :, None] == segment[:, None]) & (at[None] <= at[:, None])
    first, second = (at >= length // 2) & (at < 3 * length // 4), at >= 3 * length // 4
    return own.at[1].set(own[1] & ~(second[:, None] & first))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [34, 35, 256, 300])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_fused_attention_is_attention_and_so_is_its_gradient(kernel, length, masked):
    """Of grouped heads, by order alone and with a mask of its own for each row, and of lengths that kernels do not take as they are."""
    q, k, v, g = (jax.random.normal(jax.random.key(i), (2, *s)) for i, s in enumerate([(length, 6, 16), (2, length, 16), (2, length, 16), (length, 6, 16)]))
    bias = jnp.where(packed_rows(length) if masked else jnp.tri(length, dtype=bool)[None], 0.0, -1e30)
    fused = jax.jit(lambda *x: KERNELS[kernel](*x, bias if masked else None))
    (y, back), (expected, plain) = jax.vjp(fused, q, k, v), jax.vjp(lambda *x: attend(*x, bias), q, k, v)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), back(g), plain(g))


@pytest.mark.parametrize("mesh", [MeshConfig(2, 2, 2), MeshConfig(8)])
def test_splash_attention_on_a_mesh_is_that_of_one_device(mesh):
    """Rows and heads are split; a lone row is every device's."""
    q, k, v = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(8, 128, 4, 16), (8, 2, 128, 16), (8, 2, 128, 16)]))
    bias = jnp.where(jnp.tile(packed_rows(128), (4, 1, 1)), 0.0, -1e30)
    for rows, seen in ((8, bias), (8, None), (1, bias[1:2])):
        x = q[:rows], k[:rows], v[:rows], seen
        split = jax.jit(lambda *x: attend_splash(*x, mesh=make_mesh(mesh), interpret=True))(*x)
        plain = lambda q, k, v, seen=seen: attend(q, k, v, jnp.where(jnp.tri(128, dtype=bool), 0.0, -1e30)[None] if seen is None else seen)  # noqa: E731
        np.testing.assert_allclose(split, plain(*x[:3]), atol=1e-5)
        loss = lambda f: jax.jit(jax.grad(lambda *x: jnp.sum(jnp.sin(f(*x))), (0, 1, 2)))(*x[:3])  # noqa: E731
        there = loss(lambda q, k, v, seen=seen: attend_splash(q, k, v, seen, make_mesh(mesh), interpret=True))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), there, loss(plain))


def test_a_block_that_sees_nothing_does_not_spoil_splash_attention():
    """Left padding of more than a block: pads see themselves, and every real token what it saw."""
    q, k, v = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(1, 896, 2, 16), (1, 2, 896, 16), (1, 2, 896, 16)]))
    at = jnp.arange(896)
    bias = jnp.where((at[None, :] >= 140) & (at[None, :] <= at[:, None]), 0.0, -1e30)[None]
    out = attend_splash(q, k, v, bias, interpret=True)
    assert jnp.isfinite(out).all()
    np.testing.assert_allclose(out[:, 140:], attend(q, k, v, bias)[:, 140:], atol=1e-5)


@pytest.mark.parametrize(("platform", "capability", "dtype", "head_dim", "kernel"), [
    ("gpu", "9.0", "bfloat16", 128, "attend_cudnn"), ("gpu", "8.0", "bfloat16", 64, "attend_cudnn"), ("gpu", "10.0", "bfloat16", 128, "attend_cudnn"),
    ("gpu", "7.5", "bfloat16", 64, None), ("gpu", "9.0", "float32", 128, None), ("gpu", "9.0", "bfloat16", 256, None),
    ("gpu", "9.0", "bfloat16", 36, None), ("gpu", "gfx942", "bfloat16", 64, None), ("cpu", None, "bfloat16", 64, None),
    ("tpu", None, "bfloat16", 128, "attend_splash"),
])  # fmt: skip
def test_attention_is_fused_where_there_is_a_kernel(platform, capability, dtype, head_dim, kernel):
    device = SimpleNamespace(platform=platform, **({} if capability is None else {"compute_capability": capability}))
    found = fused_attention(device, jnp.dtype(dtype), head_dim)
    assert (found and getattr(found, "func", found).__name__) == kernel


@CONFIGS
def test_a_model_with_fused_attention_is_the_model(cfg, monkeypatch):
    """Rows in order, rows of two dialogues, and rows padded on the left; and the gradient, also where what attention leaves is kept."""
    cfg, tokens, masks = replace(cfg, norm_eps=2e-5), tokens_for(cfg), []  # a config of its own: models of equal arguments are one
    plain = make_model(cfg, run=RunConfig(barrier="off", attention="plain"))
    params = plain.init(jax.random.key(1))
    kernel = lambda q, k, v, bias: masks.append(bias is not None) or KERNELS["cudnn"](q, k, v, bias)  # noqa: E731
    monkeypatch.setattr(transformer, "fused_attention", lambda *_: kernel)
    fused = make_model(cfg, run=RunConfig(barrier="off", remat="dots"))
    segment = jnp.broadcast_to(jnp.arange(12) >= 5, (3, 12))
    own = (segment[:, :, None] == segment[:, None]) & jnp.tri(12, dtype=bool)
    left = jnp.broadcast_to(jnp.maximum(jnp.arange(12) - 4, 0), (3, 12)), jnp.broadcast_to(jnp.arange(12) >= 4, (3, 12))
    for args, traced in (((tokens,), [False]), ((tokens, jnp.arange(12) - 5 * segment, own), [True]), ((tokens[:2], *(x[:2] for x in left)), [True])):
        masks.clear()
        real = 4 if len(args) == 3 and args[2].ndim == 2 else 0  # what pads see is nobody's concern
        np.testing.assert_allclose(fused.apply(params, *args)[0][:, real:], plain.apply(params, *args)[0][:, real:], atol=2e-5)
        assert masks == traced
    loss = lambda model: jax.grad(lambda p: jnp.mean(jnp.square(model.apply(p, tokens, None, own)[0])))(params)  # noqa: E731
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-3), loss(fused), loss(plain))


def test_no_row_is_written_to_the_cache_apart():
    """A scatter is what TPUs do row by row: every step writes one column of the cache."""
    model = make_model(TINY)
    params, cache = model.unrolled(model.init(jax.random.key(0))), model.init_cache(3, 12)
    step = lambda slot: model.apply(params, jnp.ones((3, 1), int), jnp.array([[4], [6], [5]]), jnp.ones((3, 1, 12), bool), cache, slot)  # noqa: E731
    assert "scatter" not in str(jax.make_jaxpr(step)(7))


def test_what_is_unrolled_is_in_the_compute_dtype_and_a_tree_per_layer():
    """Off a CPU: a loop over tokens neither slices the stack nor casts. Stacked or not makes no difference."""
    model, tokens = make_model(TINY, run=RunConfig(barrier="off", dtype="bfloat16")), tokens_for(TINY)
    params = model.init(jax.random.key(0))
    flat = model.unrolled(params)
    assert isinstance(flat["blocks"], tuple) and {x.dtype.name for x in jax.tree.leaves(flat) if x.ndim > 1} == {"bfloat16"}
    jax.tree.map(np.testing.assert_array_equal, flat, model.unrolled(unstacked(params)))
    shapes = jax.tree.map(lambda names, x: len(names) == x.ndim, unstacked_axes(model.axes(), TINY.layers), unstacked(params), is_leaf=is_axes)
    assert all(jax.tree.leaves(shapes))
    hidden = [model.apply(p, tokens, cache=model.init_cache(3, 12))[0] for p in (params, flat)]
    np.testing.assert_array_equal(*hidden)


@pytest.mark.parametrize("length", [1, 63, 64, 130, 300, 513])
def test_attention_in_parts_is_attention_and_so_is_its_gradient(length):
    """Of grouped heads, where each row holds two dialogues that meet at different places."""
    cuts = parts(length, length)
    assert [i for part, _ in cuts for i in range(part.start, part.stop)] == list(range(length)) and len(cuts) <= 4
    assert (len(cuts) > 1) == (length >= 64) and all(end == part.stop for part, end in cuts)
    q, k, v, g = (jax.random.normal(jax.random.key(i), (2, *s)) for i, s in enumerate([(length, 6, 8), (2, length, 8), (2, length, 8), (length, 6, 8)]))
    at = jnp.arange(length)
    segment = jnp.stack([at >= length // 2, at >= length // 3])
    bias = jnp.where((segment[:, :, None] == segment[:, None]) & (at[None] <= at[:, None]), 0.0, -1e30)
    (y, back), (expected, plain) = (jax.vjp(lambda *x, f=f: f(*x, bias), q, k, v) for f in (attend_in_parts, attend))
    np.testing.assert_allclose(y, expected, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), back(g), plain(g))
    assert jnp.all(jnp.isfinite(attend_in_parts(q * 1e4, k, v, bias)))


def test_rotation_depends_only_on_distance():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, TINY.head_dim))
    dot = lambda i, j: float(  # noqa: E731
        jnp.sum(
            rotate(q, *rotation(TINY, jnp.array([[i]]))) * rotate(k, *rotation(TINY, jnp.array([[j]])))
        )
    )
    assert dot(9, 4) == pytest.approx(dot(25, 20), abs=1e-4)
    assert dot(9, 4) != pytest.approx(dot(9, 5), abs=1e-2)


def test_config_survives_json():
    assert config_from_json(config_to_json(GROUPED)) == GROUPED
    with pytest.raises(ValueError, match="norm 'batch'"):
        replace(TINY, norm="batch")
