"""The cost model against XLA's count, and ceilings that are measured."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from hhjax import bench, roofline
from hhjax.model.sizes import model_config
from hhjax.model.transformer import RunConfig, make_model
from hhjax.objectives.lm import LMLoss, lm_objective
from hhjax.objectives.preference import PreferenceLoss, preference_objective
from hhjax.types import Pairs, Tokens

ROWS, WIDTH = 8, 64
GPT = model_config("1M", 2048)
LLAMA = replace(GPT, kv_heads=1, norm="rms", gated_mlp=True, activation="silu", tied_embeddings=False)


def xla_flops(fn, *args) -> float:
    """XLA's count for the program before it is optimised: layers are unrolled on CPU, so none is counted once for all."""
    return jax.jit(fn).lower(*args).cost_analysis()["flops"]


def shapes(model, rows=ROWS, width=WIDTH):
    tokens, count = jax.ShapeDtypeStruct((rows, width), jnp.int32), jax.ShapeDtypeStruct((rows,), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0)), Tokens(tokens, count, count)


@pytest.mark.parametrize("cfg", [GPT, LLAMA], ids=["gpt", "llama"])
def test_a_forward_costs_what_xla_counts(cfg):
    """XLA counts norms, GELU and softmax too, which are a few percent."""
    model = make_model(cfg)
    params, rows = shapes(model)
    hidden = xla_flops(lambda p, b: model.apply(p, b.tokens)[0], params, rows)
    assert 1.0 < hidden / roofline.forward_flops(cfg, ROWS, WIDTH) < 1.06
    both = xla_flops(lambda p, b: model.logits(p, model.apply(p, b.tokens)[0]), params, rows)
    assert both - hidden == pytest.approx(roofline.logits_flops(cfg, ROWS * WIDTH), rel=1e-3)


@pytest.mark.parametrize("cfg", [GPT, LLAMA], ids=["gpt", "llama"])
def test_of_what_is_not_read_the_last_layer_makes_keys_and_values_alone(cfg):
    """Where layers are unrolled; what it saves is what XLA counts less."""
    model, loop = make_model(cfg), make_model(cfg, run=RunConfig(unroll=1))
    params, rows = shapes(model)
    whole = xla_flops(lambda p, b: model.apply(p, b.tokens)[0], params, rows)
    one = xla_flops(lambda p, b: model.apply(p, b.tokens, read=b.length[:, None])[0], params, rows)
    counted = roofline.forward_flops(cfg, ROWS, WIDTH) - roofline.forward_flops(cfg, ROWS, WIDTH, 1)
    assert whole - one == pytest.approx(counted, rel=0.06) and counted > 0.5 * roofline.forward_flops(cfg, ROWS, WIDTH) / cfg.layers
    assert roofline.forward_flops(cfg, ROWS, WIDTH, WIDTH) == roofline.forward_flops(cfg, ROWS, WIDTH)
    read = [roofline.read_on(cfg, run, platform, 1) for run, platform in ((RunConfig(), "cpu"), (RunConfig(unroll=1), "cpu"), (RunConfig(), "gpu"))]
    assert read == [1, None, None]
    counts = [xla_flops(lambda p, b: loop.apply(p, b.tokens, read=read)[0], params, rows) for read in (None, jnp.zeros((ROWS, 1), int))]  # noqa: B023
    assert counts[0] == pytest.approx(counts[1], rel=0.01)


@pytest.mark.parametrize("barrier, more", [("off", 1.0), ("on", 0.25)])
def test_attention_is_counted_over_a_causal_row(barrier, more):
    """The plain program computes every position against every other, twice what counts; in four parts ten sixteenths of that."""
    model, width = make_model(GPT, run=RunConfig(barrier=barrier)), 512
    params, rows = shapes(model, width=width)
    counted = 2 * GPT.layers * GPT.width * width * ROWS * width
    found = xla_flops(lambda p, b: model.apply(p, b.tokens)[0], params, rows)
    assert found == pytest.approx(roofline.forward_flops(GPT, ROWS, width) + more * counted, rel=0.03)


def test_steps_cost_three_forwards():
    model = make_model(GPT)
    params, rows = shapes(model)
    pairs = Pairs(rows, rows, jax.ShapeDtypeStruct((ROWS,), jnp.float32))

    def step(objective, batch):
        return xla_flops(jax.value_and_grad(lambda p, b: objective(p, b, None)[0]), params, batch)

    lm = step(lm_objective(model, LMLoss(chunk=0)), rows)
    assert 1.0 < lm / roofline.lm_step_flops(GPT, ROWS, WIDTH) < 1.06
    pm = step(preference_objective(model), pairs)
    assert 1.0 < pm / roofline.pm_step_flops(GPT, 2 * ROWS, WIDTH, read=1) < 1.06
    aux = step(preference_objective(model, PreferenceLoss(lm_coef=0.5, lm_chunk=0)), pairs)
    assert 1.0 < aux / roofline.pm_step_flops(GPT, 2 * ROWS, WIDTH, ROWS, read=1) < 1.06


def test_ceilings_are_measured():
    for rate in (roofline.matmul_ceiling(size=256, repeats=2), roofline.copy_ceiling(1, repeats=2), roofline.attention_ceiling(1)):
        assert 1e7 < rate < 1e15


def test_simulated_devices_share_one_machine(monkeypatch):
    monkeypatch.setattr(roofline, "matmul_ceiling", lambda dtype, size: 5.0)
    assert jax.device_count() == 8 and roofline.ceiling.__wrapped__("float32") == 5.0


def test_a_noisy_machine_says_so(monkeypatch):
    readings = iter([4e9, 2e9, 2e9, 8e9, 8e9, 8e9])
    monkeypatch.setattr(bench, "matmul_ceiling", lambda dtype, size: next(readings))
    monkeypatch.setattr(bench, "attention_ceiling", lambda: 3e9)
    monkeypatch.setattr(bench, "copy_ceiling", lambda: 1e10)
    row = bench.ceiling(3)
    assert (row["matmul_f32_gflops_best"], row["matmul_f32_gflops_median"], row["matmul_bf16_gflops_best"]) == (4, 2, 8)
    assert row["noisy"] and "a neighbour is busy" in bench.report(row)
