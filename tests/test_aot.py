"""Compiling for TPUs and GPUs that are not there."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from hhjax import aot
from hhjax.chips import Topology, parse_topology
from hhjax.fields import ConfigError
from hhjax.hlo import Program
from hhjax.model.sizes import model_config
from hhjax.model.transformer import RunConfig, make_model
from hhjax.sharding import MeshConfig, make_mesh

TPU, CUDA = aot.COMPILERS["tpu"], aot.COMPILERS["cuda"]
needs_libtpu = pytest.mark.skipif(not TPU.package, reason="libtpu is not installed: pip install -e '.[plan]'")
needs_cuda = pytest.mark.skipif(not CUDA.package, reason="jax's CUDA plugin is not installed: pip install -e '.[cuda]'")


def test_buffers_in_hbm_are_added_up():
    text = """
allocation 0: size 4, color 8, page 0, thread-local:
allocation 1: size 4096, page 0, thread-local:
allocation 2: size 1000, page 0, parameter 3, shape |f32[250]| at ShapeIndex {}, maybe-live-out:
allocation 3: size 24, page 0, parameter 0, shape |f32[6]| at ShapeIndex {}:
allocation 4: size 512, page 0, constant:
allocation 5: size 77, color 1, page 0, preallocated-temp:
allocation 6: size 2048, page 0, preallocated-temp:
"""
    assert aot.buffer_bytes(text) == (1024, 2048)


@pytest.mark.parametrize(("compiler", "extra"), [(TPU, "plan"), (CUDA, "cuda")])
def test_without_a_compiler_the_remedy_is_told(compiler, extra, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"pip install -e '\.\[{extra}\]'"):
        aot.compile_ahead(compiler, resharded)


def devices(topology: str):
    return aot.topology_devices(parse_topology(topology))


def resharded(topology: str = "v5p:2x2x2"):
    """An array that goes from rows over eight devices to rows and columns over them: the partitioner finds no way."""
    mesh = make_mesh(MeshConfig(1, 4, 2), devices(topology))
    put = lambda x, *axes: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*axes)))  # noqa: E731

    def fn(x):
        return put(jnp.sin(put(2 * x.reshape(8, 64, 128), None, ("fsdp", "tensor"))), "tensor", None, "fsdp")

    return jax.jit(fn, in_shardings=NamedSharding(mesh, P("fsdp"))).lower(jax.ShapeDtypeStruct((512, 128), jnp.float32)), {"said": 1}


def too_large():
    place = NamedSharding(make_mesh(MeshConfig(4), devices("v5e:2x2")), P())
    fn = jax.jit(lambda x: jnp.sin(x), in_shardings=place, out_shardings=place)
    return fn.lower(jax.ShapeDtypeStruct((2**16, 2**16), jnp.float32)), {}


def refused():
    raise ValueError("batch 3 is not divisible by data*fsdp=4; use 4")


@pytest.mark.parametrize(("compiler", "topology"), [pytest.param(TPU, "v5p:2x2x2", marks=needs_libtpu, id="tpu"),
                                                    pytest.param(CUDA, "h100:8", marks=needs_cuda, id="cuda")])  # fmt: skip
def test_resharding_by_full_copies_is_seen(compiler, topology):
    found = aot.compile_ahead(compiler, resharded, topology)
    assert len(found.warnings) >= 1 and found.facts == {"said": 1} and not found.failure
    assert found.text.startswith("HloModule") and found.arguments == 512 * 128 * 4 // 4 and found.seconds > 0


@needs_libtpu
def test_what_does_not_fit_says_so():
    found = aot.compile_ahead(TPU, too_large)
    assert "HBM" in found.failure and "15.75G" in found.failure and not found.text


@needs_libtpu
def test_what_the_run_would_refuse_is_refused():
    with pytest.raises(ConfigError, match="batch 3 is not divisible"):
        aot.compile_ahead(TPU, refused)


def decoder(attention: str, heads: int, topology: Topology):
    """The gradient of a decoder of the ladder's shape on rows of 384 tokens, of two dialogues each."""
    mesh = make_mesh(MeshConfig(-1, 1, heads), aot.topology_devices(topology))
    model = make_model(model_config("13M", 1000), mesh, RunConfig(attention=attention))
    rows = jax.ShapeDtypeStruct((4, 384), jnp.int32, sharding=NamedSharding(mesh, P(("data", "fsdp"))))

    def loss(params, tokens):
        at = jnp.arange(384)
        own = ((at[:, None] >= 200) == (at >= 200)) & (at <= at[:, None])
        return jnp.sum(model.apply(params, tokens, mask=jnp.broadcast_to(own, (4, 384, 384)))[0].astype(jnp.float32))

    return jax.jit(jax.grad(loss)).lower(jax.eval_shape(model.init, jax.random.key(0)), rows), {}


KERNELS = [
    pytest.param(CUDA, Topology("h100", (1,)), (r"fmhaScaleBiasSoftmax\"", "BiasSoftmaxBackward"), marks=needs_cuda, id="cudnn"),
    pytest.param(TPU, Topology("v5e", (1, 1)), ("tpu_custom_call.*splash_mha_fwd", "tpu_custom_call.*splash_mha_dkv"), marks=needs_libtpu, id="splash"),
]


@pytest.mark.parametrize(("compiler", "topology", "names"), KERNELS)
def test_attention_is_one_kernel_and_makes_no_scores(compiler, topology, names):
    """Planned for the chip by its own compiler, forward and back; half of the products are never made, and nothing of [heads, T, T] is kept."""
    fused, plain = (aot.compile_ahead(compiler, decoder, attention, 1, topology) for attention in ("auto", "plain"))
    assert not fused.failure and not plain.failure and fused.arguments == plain.arguments > 0
    calls = lambda found, name: sum(op.kind == "custom-call" and "_call_target" in op.attributes and bool(re.search(name, op.attributes))  # noqa: E731
                                    for ops in Program(found.text).computations.values() for op in ops.values())  # fmt: skip
    assert [calls(fused, name) for name in names] == [1, 1] and [calls(plain, name) for name in names] == [0, 0]  # none made anew for the gradient
    scores = 2 * 2 * 4 * 8 * 384 * 384 * 64  # the two products of a layer's attention, forward
    saved = Program(plain.text).flops() - Program(fused.text).flops()
    assert saved == pytest.approx(4 * scores * (4 - 3.5 / 2), rel=0.15)  # plain: forward, again, and twice as much back; fused: 2 + 5 products, halved
    made = lambda found: any(s.dims[-2:] == (384, 384) and s.size > 4 * 384**2 for ops in Program(found.text).computations.values()  # noqa: E731
                             for op in ops.values() for s in op.shapes)  # fmt: skip
    assert made(plain) and not made(fused) and fused.temporaries < plain.temporaries
    assert Program(fused.text).hbm_bytes() < Program(plain.text).hbm_bytes()


@pytest.mark.parametrize(("compiler", "topology", "own"), [
    pytest.param(CUDA, Topology("h100", (4,)), 'dimensions": ["2", "4", "384", "384"]', marks=needs_cuda, id="cudnn"),
    pytest.param(TPU, Topology("v5e", (2, 2)), "bf16[4,384,64]", marks=needs_libtpu, id="splash"),  # row by row
])  # fmt: skip
def test_fused_attention_is_split_over_rows_and_heads(compiler, topology, own):
    """Two of four rows a device, and four of eight heads."""
    found = aot.compile_ahead(compiler, decoder, "auto", 2, topology)
    assert not found.failure and found.warnings == () and own in found.text
    kinds = {(c.kind, c.axes) for c in Program(found.text).collectives({"data": 2, "fsdp": 1, "tensor": 2})}
    assert ("all-gather", "data") not in kinds and ("all-reduce", "tensor") in kinds
