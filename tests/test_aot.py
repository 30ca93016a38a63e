"""Compiling for TPUs that are not there."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from hhjax import aot
from hhjax.fields import ConfigError
from hhjax.sharding import MeshConfig, make_mesh

needs_libtpu = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed: pip install -e '.[plan]'")


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


def test_without_libtpu_the_remedy_is_told(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[plan\]'"):
        aot.compile_for_tpu(resharded)


def devices(topology: str):
    from jax.experimental import topologies

    return topologies.get_topology_desc(topology_name=topology, platform="tpu").devices


def resharded():
    """An array that goes from rows over eight devices to rows and columns over them: the partitioner finds no way."""
    mesh = make_mesh(MeshConfig(1, 4, 2), devices("v5p:2x2x2"))
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


@needs_libtpu
def test_resharding_by_full_copies_is_seen():
    found = aot.compile_for_tpu(resharded)
    assert len(found.warnings) >= 1 and found.facts == {"said": 1} and not found.failure
    assert found.text.startswith("HloModule") and found.arguments == 512 * 128 * 4 // 4 and found.seconds > 0


@needs_libtpu
def test_what_does_not_fit_says_so():
    found = aot.compile_for_tpu(too_large)
    assert "HBM" in found.failure and "15.75G" in found.failure and not found.text


@needs_libtpu
def test_what_the_run_would_refuse_is_refused():
    with pytest.raises(ConfigError, match="batch 3 is not divisible"):
        aot.compile_for_tpu(refused)
