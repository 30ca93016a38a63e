"""Programs read from their text: products, bytes and exchanges, as often as loops run them."""

import math
from pathlib import Path

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


TPU = (Path(__file__).parent / "golden" / "tpu_step.hlo").read_text()  # in the manner of libtpu, cut to the shapes that matter


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


GPU = (Path(__file__).parent / "golden" / "gpu_step.hlo").read_text()  # in the manner of XLA for CUDA


def test_a_gpu_program_in_numbers():
    program = Program(GPU)
    products, heads = 2 * 2 * 8 * 64 * 128, 2 * 2 * 4 * 256 * 256 * 16  # one in a fusion and one of cuBLAS; a batched product of attention
    forward, back = 2 * heads // 2, 5 * heads  # causal, so half of it is made; and whole
    assert program.flops() == products + forward + back
    rows, up, weights, array = 8 * 64 * 2, 8 * 128 * 2, 64 * 128 * 2, 2 * 4 * 256 * 16 * 2
    told = 8 * 4  # ids, and places
    kinds = [
        (0, 2 * rows + told),  # of the table eight rows
        (products / 2, rows + weights + up),  # through a view
        (0, 2 * 8 * 4 * 16 * 2 + told),  # one slot of the cache
        (products / 2, up + weights + rows + 4096),
        (forward, 3 * array + array + 2 * 4 * 256 * 4),
        (back, 4 * array + 2 * 4 * 256 * 4 + 3 * array),
    ]
    assert program.hbm_bytes() == sum(moved for _, moved in kinds)
    assert program.serial_seconds(1e9, 1e8) == pytest.approx(sum(max(work / 1e9, moved / 1e8) for work, moved in kinds))


def test_a_kernel_of_pallas_says_things_in_lines_of_its_own_and_is_counted():
    """Splash attention of 8 heads over 256 tokens of 64: two products, of which half are made; another kernel of which nothing is known."""
    call = """ENTRY %main (q: bf16[8,256,64], ids: s8[1,2,2]) -> bf16[8,256,64] {
  %q = bf16[8,256,64]{2,1,0} parameter(0)
  %ids = s8[1,2,2]{2,1,0} parameter(1)
  %closed_call.1 = (f32[128,128]{1,0}, bf16[8,256,64]{2,1,0}) custom-call(%ids, %q, %q, %q), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 128}"
}}, metadata={op_name="jit(f)/splash_mha_fwd_residuals/pallas_call"}
  ROOT %y = bf16[8,256,64]{2,1,0} get-tuple-element(%closed_call.1), index=1, frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}
}"""
    assert Program(call).flops() == 2 * 2 * 8 * 256 * 256 * 64 // 2
    assert Program(call.replace("fwd_residuals", "dkv_no_residuals")).flops() == 5 * 2 * 8 * 256 * 256 * 64 // 2
    assert Program(call.replace("splash_mha_fwd_residuals", "other")).flops() == 0
    assert Program(call).hbm_bytes() == 4 * 8 * 256 * 64 * 2 + 4 + 128 * 128 * 4


def test_what_is_fetched_beside_the_rest_counts_its_bytes_and_no_time():
    """A slice of a stack that goes into the chip's own memory, as TPUs do before they need it; a scatter into two arrays."""
    text = """%fetch (stack: f32[4,64,128]) -> f32[1,64,128] {
  %stack = f32[4,64,128]{2,1,0} parameter(0)
  ROOT %slice.1 = f32[1,64,128]{2,1,0:S(1)} slice(%stack), slice={[0:1], [0:64], [0:128]}
}

ENTRY %main (stack: f32[4,64,128], a: f32[9,128], b: f32[9,128], at: s32[2], x: f32[2,128], y: f32[2,128]) -> f32[1,64,128] {
  %stack = f32[4,64,128]{2,1,0} parameter(0)
  %a = f32[9,128]{1,0} parameter(1)
  %b = f32[9,128]{1,0} parameter(2)
  %at = s32[2]{0} parameter(3)
  %x = f32[2,128]{1,0} parameter(4)
  %y = f32[2,128]{1,0} parameter(5)
  %slice-start = ((f32[4,64,128]{2,1,0}), f32[1,64,128]{2,1,0:S(1)}, u32[]) async-start(%stack), calls=%fetch
  %scatter.1 = (f32[9,128]{1,0}, f32[9,128]{1,0}) scatter(%a, %b, %at, %x, %y), to_apply=%replaced
  ROOT %slice-done = f32[1,64,128]{2,1,0:S(1)} async-done(%slice-start)
}"""
    fetched, changed = 64 * 128 * 4, 2 * (2 * 2 * 128 * 4)
    assert Program(text).hbm_bytes() == fetched + changed and Program(text).serial_seconds(1.0, 1.0) == changed


def test_bytes_of_a_plain_program_are_its_operands_and_results():
    program = compiled(lambda x, y: jnp.sin(x) + y, (128, 256), (128, 256))
    assert program.hbm_bytes() == 3 * math.prod((128, 256)) * 4


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        Program("HloModule m")
