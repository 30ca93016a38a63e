"""Programs read from their text: products, bytes and exchanges, as often as loops run them."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from hhjax.hlo import Program, first_group, full_gathers, group_axes
from hhjax.sharding import MeshConfig, make_mesh

MESH = {"data": 1, "fsdp": 4, "tensor": 2}


def compiled(fn, *shapes, **shardings) -> Program:
    return Program(jax.jit(fn, **shardings).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).compile().as_text())


def layers(x, weights):
    return jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, weights)[0]


def test_a_loop_counts_as_often_as_it_runs():
    program = compiled(layers, (32, 64), (7, 64, 64))
    once = 2 * 32 * 64 * 64
    assert program.flops() == 7 * once and program.flops(looped=False) == once


def test_without_a_loop_the_products_are_those_of_xla():
    def both(x, w):
        return (x @ w) @ w.T

    found = jax.jit(both).lower(jnp.ones((48, 32)), jnp.ones((32, 16))).compile()
    assert Program(found.as_text()).flops() == 2 * 48 * 32 * 16 * 2 <= found.cost_analysis()["flops"]


def test_exchanges_of_a_real_program_have_axes_sizes_and_times():
    """Weights split over fsdp are gathered in every turn of the loop; the sum over tensor comes once."""
    mesh = make_mesh(MeshConfig(1, 4, 2))
    place = lambda *axes: NamedSharding(mesh, P(*axes))  # noqa: E731

    def step(x, weights):
        def layer(x, w):
            w = jax.lax.with_sharding_constraint(w, place())
            return jax.lax.with_sharding_constraint(jnp.sin(x @ w), place("fsdp")), None

        return jnp.sum(jax.lax.scan(layer, x, weights)[0])

    program = compiled(step, (32, 64), (7, 64, 64), in_shardings=(place("fsdp"), place(None, "fsdp")))
    found = program.collectives(dict(mesh.shape))
    [gather] = [c for c in found if c.kind == "all-gather"]
    assert (gather.axes, gather.group, gather.times, gather.looped, gather.bytes) == ("fsdp", 4, 7, True, 64 * 64 * 4)
    assert not list(full_gathers(found, {(7, 64, 64), (64, 64)}))
    assert [(c.times, c.looped) for c in found if c.kind == "all-reduce"] == [(1, False)]

    def all_at_once(x, weights):
        return layers(x, jax.lax.with_sharding_constraint(weights, place()))

    whole = compiled(all_at_once, (32, 64), (7, 64, 64), in_shardings=(place("fsdp"), place(None, "fsdp")))
    [gather] = full_gathers(whole.collectives(dict(mesh.shape)), {(7, 64, 64)})
    assert gather.bytes == 7 * 64 * 64 * 4 and not gather.looped


@pytest.mark.parametrize(("attributes", "group", "axes"), [
    ("replica_groups={{0,2,4,6},{1,3,5,7}}, x", [0, 2, 4, 6], "fsdp"),
    ("replica_groups=[4,2]<=[8], x", [0, 1], "tensor"),
    ("replica_groups=[2,4]<=[4,2]T(1,0), x", [0, 2, 4, 6], "fsdp"),
    ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, x", [0, 2, 4, 6], "fsdp"),
    ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1','axis_0'}, x", list(range(8)), "fsdp+tensor"),
    ("replica_groups={}, x", list(range(8)), "fsdp+tensor"),
    ("source_target_pairs={{0,0},{1,3},{3,1}}, x", [1, 3], "fsdp"),
])  # fmt: skip
def test_groups_are_read_in_every_way_that_they_are_written(attributes, group, axes):
    assert first_group(attributes, 8) == group
    assert group_axes(attributes, MESH) == (axes, len(group))


TPU = """HloModule m, is_scheduled=true

%scattered.all-reduce-scatter.1 (p: bf16[8,64]) -> bf16[8,16] {
  %p = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.1 = bf16[8,64]{1,0:T(8,128)(2,1)} all-reduce(%p), channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
  %zero = s32[]{:T(128)} constant(0)
  ROOT %slice.1 = bf16[8,16]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={8,16}
}

%fused (stack: bf16[64,8,16], i: s32[]) -> bf16[8,16] {
  %stack = bf16[64,8,16]{2,1,0:T(8,128)(2,1)} parameter(0)
  %i = s32[]{:T(128)} parameter(1)
  %zero.1 = s32[]{:T(128)} constant(0)
  %one = bf16[1,8,16]{2,1,0:T(8,128)(2,1)} dynamic-slice(%stack, %i, %zero.1, %zero.1), dynamic_slice_sizes={1,8,16}
  ROOT %flat = bf16[8,16]{1,0:T(8,128)(2,1)} bitcast(%one)
}

%condition (c: (s32[], bf16[64,8,16])) -> pred[] {
  %c = (s32[]{:T(128)}, bf16[64,8,16]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %n = s32[]{:T(128)} constant(64)
  %at = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt = pred[]{:T(512)} compare(%at, %n), direction=LT
}

%body (b: (s32[], bf16[64,8,16])) -> (s32[], bf16[64,8,16]) {
  %b = (s32[]{:T(128)}, bf16[64,8,16]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %at.1 = s32[]{:T(128)S(6)} get-tuple-element(%b), index=0
  %stack.1 = bf16[64,8,16]{2,1,0:T(8,128)(2,1)} get-tuple-element(%b), index=1
  %picked = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} fusion(%stack.1, %at.1), kind=kLoop, calls=%fused
  %wide = bf16[8,64]{1,0:T(8,128)(2,1)} broadcast(%picked), dimensions={}
  %fusion.9 = bf16[8,16]{1,0:T(8,128)(2,1)} fusion(%wide), kind=kCustom, calls=%scattered.all-reduce-scatter.1
  ROOT %next = (s32[]{:T(128)}, bf16[64,8,16]{2,1,0:T(8,128)(2,1)}) tuple(%at.1, %stack.1)
}

ENTRY %main (start: s32[], all: bf16[64,8,16], q: bf16[2,16,1024,128], k: bf16[2,16,1024,128]) -> (s32[], bf16[64,8,16]) {
  %start = s32[]{:T(128)} parameter(0)
  %all = bf16[64,8,16]{2,1,0:T(8,128)(2,1)} parameter(1)
  %q = bf16[2,16,1024,128]{3,2,1,0:T(8,128)(2,1)} parameter(2)
  %k = bf16[2,16,1024,128]{3,2,1,0:T(8,128)(2,1)} parameter(3)
  %qk = f32[2,16,1024,1024]{3,2,1,0:T(8,128)} convolution(%q, %k), window={size=2x16 stride=1x15 lhs_dilate=2x16}, dim_labels=01bf_01oi->01bf
  %both = (s32[]{:T(128)}, bf16[64,8,16]{2,1,0:T(8,128)(2,1)}) tuple(%start, %all)
  ROOT %loop = (s32[]{:T(128)}, bf16[64,8,16]{2,1,0:T(8,128)(2,1)}) while(%both), condition=%condition, body=%body
}
"""


def test_a_tpu_program_in_numbers():
    program = Program(TPU)
    # A batched product written as a convolution whose windows meet one element each.
    assert program.flops() == 2 * (2 * 16) * 1024 * 1024 * 128
    scores = 2 * 16 * 1024 * 1024 * 4
    per_turn = 8 * 16 * 2  # one slice of the stack; what lies on the chip is free
    per_turn += 8 * 64 * 2  # the broadcast writes
    per_turn += 8 * 64 * 2 + 8 * 16 * 2  # the scatter reads and writes
    assert program.hbm_bytes() == 64 * per_turn + 2 * (2 * 16 * 1024 * 128 * 2) + scores
    [found] = program.collectives(MESH)
    assert (found.kind, found.axes, found.times, found.looped, found.bytes) == ("reduce-scatter", "fsdp", 64, True, 8 * 64 * 2)


def test_bytes_of_a_plain_program_are_its_operands_and_results():
    program = compiled(lambda x, y: jnp.sin(x) + y, (128, 256), (128, 256))
    assert program.hbm_bytes() == 3 * math.prod((128, 256)) * 4


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        Program("HloModule m")
