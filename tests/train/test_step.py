"""The step: optimiser rules, weighted accumulation, determinism, meshes, overfitting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hhjax.bench import Numbers
from hhjax.data.comparisons import Comparison
from hhjax.data.packing import PackedSource
from hhjax.model.sizes import model_config
from hhjax.model.transformer import RunConfig, make_model
from hhjax.objectives.lm import lm_objective
from hhjax.objectives.preference import PreferenceLoss, preference_objective
from hhjax.sharding import MeshConfig, make_mesh, param_shardings, put_batch
from hhjax.train.state import OptimConfig, init_state, learning_rate, make_optimizer, state_shardings
from hhjax.train.step import make_train_step, shard_step
from hhjax.types import Pairs, Tokens

CFG = model_config("0.1M", 256)
OPTIM = OptimConfig(lr=3e-3, weight_decay=0.1)


def token_rows(n=8, width=16, seed=0):
    rng = np.random.default_rng(seed)
    length = rng.integers(4, width + 1, n).astype(np.int32)
    tokens = np.where(np.arange(width) < length[:, None], rng.integers(3, 256, (n, width)), 0).astype(np.int32)
    return Tokens(tokens, (length // 2).astype(np.int32), length)


def pair_rows(n=8):
    return Pairs(token_rows(n, seed=1), token_rows(n, seed=2), np.linspace(0.5, 2, n).astype(np.float32))


def objective(kind, model):
    return lm_objective(model) if kind == "lm" else preference_objective(model, PreferenceLoss(lm_coef=0.3))


def packed_rows():
    """Twelve pairs in 16 rows, of which some hold none, and a pair without weight."""
    rng = np.random.default_rng(3)
    words = lambda: " ".join(map(str, rng.integers(4, 250, rng.integers(1, 12))))  # noqa: E731
    rows = [Comparison(f"\n\nHuman: {words()}\n\nAssistant:", words(), words(), weight=float(i % 4) / 2) for i in range(12)]
    return PackedSource(rows, Numbers(), 32, 12, multiple=16).batch(0, 0)


def batch_of(kind):
    return {"lm": token_rows, "pm": pair_rows, "packed": packed_rows}[kind]()


def run(kind, steps=3, micro=1, mesh_cfg=None, devices=None):
    """(final params, metrics of every step) of a few updates on one batch, on a mesh or on one device."""
    mesh = make_mesh(mesh_cfg, devices) if mesh_cfg else None
    model = make_model(CFG, mesh, RunConfig(barrier="off"))
    params = model.init(jax.random.key(0))
    optimizer = make_optimizer(OPTIM, steps)
    step = make_train_step(objective(kind, model), optimizer, micro)
    if mesh is None:
        state, batch, step = init_state(params, optimizer, jax.random.key(1)), batch_of(kind), jax.jit(step)
    else:
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        shardings = state_shardings(optimizer, shapes, param_shardings(model.axes(), shapes, mesh), mesh)
        state = jax.device_put(init_state(params, optimizer, jax.random.key(1)), shardings)
        batch, step = put_batch(batch_of(kind), mesh), shard_step(step, shardings, mesh)
    metrics = []
    for _ in range(steps):
        state, m = step(state, batch)
        metrics.append(m)
    return state, metrics


def assert_same(a, b, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


@pytest.mark.parametrize("kind", ["lm", "pm", "packed"])
@pytest.mark.parametrize("micro", [2, 4])
def test_micro_batches_give_the_whole_batch_s_update(kind, micro):
    (whole, metrics), (parts, part_metrics) = run(kind), run(kind, micro=micro)
    assert_same(metrics, part_metrics, atol=2e-5)
    assert_same(whole.params, parts.params, atol=2e-4)


def test_rows_that_do_not_divide_into_micro_batches_are_an_error():
    with pytest.raises(ValueError, match="8 rows does not divide into 3"):
        run("lm", steps=1, micro=3)


MESHES = [MeshConfig(8), MeshConfig(1, 8), MeshConfig(1, 1, 2), MeshConfig(2, 2, 2), MeshConfig(4, 2), MeshConfig(1, 4, 2)]


@pytest.mark.parametrize("kind", ["lm", "pm", "packed"])
@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"{m.data}x{m.fsdp}x{m.tensor}")
def test_every_mesh_gives_the_one_device_losses_and_gradient_norms(kind, mesh):
    devices = jax.devices()[: mesh.data * mesh.fsdp * mesh.tensor]
    (one, metrics), (many, mesh_metrics) = run(kind), run(kind, mesh_cfg=mesh, devices=devices)
    assert_same(metrics, mesh_metrics, atol=2e-4)
    assert_same(one.params, many.params, atol=2e-3)
    up = many.params["blocks"]["up"]
    assert up.addressable_shards[0].data.size * mesh.fsdp * mesh.tensor == up.size  # really split
    moment = jax.tree.leaves(many.opt_state, is_leaf=lambda x: hasattr(x, "shape") and x.shape == up.shape)
    assert any(m.shape == up.shape and m.sharding == up.sharding for m in moment)


@pytest.mark.parametrize("mesh", MESHES[:4], ids=lambda m: f"{m.data}x{m.fsdp}x{m.tensor}")
def test_gradients_on_a_mesh_equal_the_one_device_gradients(mesh):
    devices = jax.devices()[: mesh.data * mesh.fsdp * mesh.tensor]
    grid = make_mesh(mesh, devices)
    model, sharded = make_model(CFG), make_model(CFG, grid)
    params = model.init(jax.random.key(0))
    batch = pair_rows()
    grad = lambda m: jax.jit(jax.grad(lambda p, b: objective("pm", m)(p, b, None)[0]))  # noqa: E731
    placed = jax.device_put(params, param_shardings(model.axes(), params, grid))
    assert_same(grad(model)(params, batch), grad(sharded)(placed, put_batch(batch, grid)), atol=1e-5)


def test_the_state_is_donated():
    model = make_model(CFG, mesh := make_mesh(MeshConfig(1, 8)))
    optimizer = make_optimizer(OPTIM, 1)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    shardings = state_shardings(optimizer, shapes, param_shardings(model.axes(), shapes, mesh), mesh)
    state = jax.device_put(init_state(model.init(jax.random.key(0)), optimizer, jax.random.key(1)), shardings)
    old = state.params["embed"]
    shard_step(make_train_step(lm_objective(model), optimizer), shardings, mesh)(state, put_batch(token_rows(), mesh))
    assert old.is_deleted()


def test_fsdp_costs_a_gather_a_layer_and_no_collective_on_activations():
    mesh = make_mesh(MeshConfig(1, 8))
    model = make_model(CFG, mesh, RunConfig(unroll=1))  # one layer in the program, scanned
    params = jax.device_put(model.init(jax.random.key(0)), param_shardings(model.axes(), model.init(jax.random.key(0)), mesh))
    rows = put_batch(token_rows(), mesh)
    forward = jax.jit(lambda p, b: model.apply(p, b.tokens)[0])
    hlo = forward.lower(params, rows).compile().as_text()
    gathers = hlo.count(" all-gather(") + hlo.count(" all-gather-start(")
    assert gathers <= 7  # the embedding, then q k v o up down of the layer
    assert " all-to-all(" not in hlo and " all-reduce(" not in hlo and " collective-permute(" not in hlo
    assert "fsdp" in forward(params, rows).sharding.spec[0]


def test_a_tiny_pm_overfits_one_batch():
    model = make_model(CFG)
    optimizer = make_optimizer(OptimConfig(lr=3e-3), 40)
    step = jax.jit(make_train_step(preference_objective(model), optimizer))
    state, losses = init_state(model.init(jax.random.key(0)), optimizer, jax.random.key(1)), []
    for _ in range(40):
        state, metrics = step(state, pair_rows())
        losses.append(float(metrics["pm_loss"]))
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6)
    assert losses[-1] < 0.05 and float(metrics["accuracy"]) == 1


def test_schedules_start_and_end_where_they_say():
    constant = learning_rate(OptimConfig(lr=1.0), 100)
    assert float(constant(0)) == float(constant(99)) == 1.0
    linear = learning_rate(OptimConfig(lr=1.0, schedule="linear", warmup_steps=10), 110)
    assert float(linear(0)) == pytest.approx(0.1) and float(linear(9)) == pytest.approx(1.0)
    assert float(linear(60)) == pytest.approx(0.5) and float(linear(110)) == pytest.approx(0.0)
    with pytest.raises(ValueError, match="schedule 'step'; choose one of constant"):
        learning_rate(OptimConfig(schedule="step"), 10)


def test_weight_decay_spares_norms_biases_and_the_score_head():
    model = make_model(CFG)
    params = model.init(jax.random.key(0)) | {"score": jnp.ones(CFG.width)}
    optimizer = make_optimizer(OptimConfig(lr=0.1, weight_decay=0.5), 1)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    np.testing.assert_allclose(updates["embed"], -0.05 * params["embed"], rtol=1e-5)
    for name in ("score", "final_norm_scale", "final_norm_bias"):
        np.testing.assert_array_equal(updates[name], 0)
    assert all(jnp.all(updates["blocks"][k] == 0) for k in params["blocks"] if k.endswith(("scale", "bias")))


def test_the_score_head_may_learn_faster():
    """Its update, and no other, is multiplied."""
    params = make_model(CFG).init(jax.random.key(0))
    grads = jax.tree.map(jnp.ones_like, params)
    updates = []
    for scale in (1.0, 10.0):
        optimizer = make_optimizer(OptimConfig(lr=0.1, score_lr=scale), 1)
        updates.append(optimizer.update(grads, optimizer.init(params), params)[0])
    plain, faster = updates
    np.testing.assert_allclose(faster.pop("score"), 10 * plain.pop("score"), rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, plain, faster)
