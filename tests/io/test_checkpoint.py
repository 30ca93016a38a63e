"""Checkpoints: what is saved comes back on any mesh, and what is damaged does not."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from hhjax.io import checkpoint
from hhjax.sharding import MeshConfig, make_mesh


class State(NamedTuple):
    step: Any
    params: Any
    key: Any


SPECS = State(P(), {"w": P("fsdp", "tensor"), "half": P("fsdp"), "flags": P()}, P())


def make_state(seed: int) -> State:
    w_key, half_key = jax.random.split(jax.random.key(seed))
    half = jax.random.normal(half_key, (16,)).astype(jnp.bfloat16)
    params = {"w": jax.random.normal(w_key, (16, 8)), "half": half, "flags": jnp.arange(6) % 2 == 0}
    return State(jnp.int32(seed), params, jax.random.key(seed))


LIKE = jax.eval_shape(lambda: make_state(0))


def on_mesh(cfg: MeshConfig) -> State:
    mesh = make_mesh(cfg)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS, is_leaf=lambda x: isinstance(x, P))


def saved(folder, steps=(1, 2, 3), keep=3):
    shardings = on_mesh(MeshConfig(fsdp=8, data=1))
    writer = checkpoint.CheckpointWriter(folder, keep)
    for step in steps:
        writer.save(step, jax.device_put(make_state(step), shardings), {"step": step})
    writer.close()
    return shardings


def equal(a, b) -> bool:
    raw = [checkpoint.flat_parts(x) for x in (a, b)]
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool(np.array_equal(x, y)) and x.dtype == y.dtype, *raw)))


@pytest.mark.parametrize("cfg", [MeshConfig(fsdp=8, data=1), MeshConfig(fsdp=4, tensor=2, data=1), MeshConfig(data=8)])
def test_restores_every_leaf_on_any_mesh(tmp_path, cfg):
    saved(tmp_path)
    state, position = checkpoint.restore(tmp_path, LIKE, on_mesh(cfg))
    assert equal(state, make_state(3)) and position == {"step": 3}
    assert state.params["w"].sharding.is_equivalent_to(on_mesh(cfg).params["w"], 2)
    assert jax.random.bits(state.key) == jax.random.bits(jax.random.key(3))


def test_keeps_the_last_steps(tmp_path):
    saved(tmp_path, steps=(1, 2, 3, 4), keep=2)
    folder = Path(checkpoint.checkpoints_dir(tmp_path))
    assert checkpoint.good_steps(folder) == checkpoint.steps_on_disk(folder) == [3, 4]


def test_nothing_saved_restores_nothing(tmp_path):
    assert checkpoint.restore(tmp_path, LIKE, on_mesh(MeshConfig())) is None
    with pytest.raises(FileNotFoundError, match="no good checkpoint"):
        checkpoint.load_params(tmp_path, None, LIKE.params, on_mesh(MeshConfig()).params)


def test_load_params_of_a_step(tmp_path):
    shardings = saved(tmp_path)
    params = checkpoint.load_params(tmp_path, 2, LIKE.params, shardings.params)
    assert np.array_equal(params["w"], make_state(2).params["w"])
    with pytest.raises(FileNotFoundError, match=r"step 9; good steps are \[1, 2, 3\]"):
        checkpoint.load_params(tmp_path, 9, LIKE.params, shardings.params)


def test_the_state_may_be_donated_after_save(tmp_path):
    shardings = on_mesh(MeshConfig(fsdp=8, data=1))
    bump = jax.jit(lambda s: s._replace(params=s.params | {"w": s.params["w"] + 1}), donate_argnums=0)
    writer = checkpoint.CheckpointWriter(tmp_path)
    state = jax.device_put(make_state(1), shardings)
    writer.save(1, state, {})
    for _ in range(20):
        state = bump(state)
    writer.close()
    assert equal(checkpoint.restore(tmp_path, LIKE, shardings)[0], make_state(1))


def flip_a_byte_of_w(folder):
    """Rewrites a step in the same layout with one bit of one element changed, which Orbax itself would not notice."""
    shardings = on_mesh(MeshConfig(fsdp=8, data=1))
    state = make_state(int(folder.name))
    bits = jax.lax.bitcast_convert_type(state.params["w"], jnp.uint32).at[3, 5].add(1)
    w = jax.lax.bitcast_convert_type(bits, jnp.float32)
    manifest = checkpoint.manifest_path(folder.parent, int(folder.name)).read_text()
    writer = checkpoint.CheckpointWriter(folder.parent.parent, keep=9)
    writer.save(int(folder.name), jax.device_put(state._replace(params=state.params | {"w": w}), shardings), {})
    writer.close()
    checkpoint.manifest_path(folder.parent, int(folder.name)).write_text(manifest)


def garble_files(folder):
    for file in folder.rglob("d/*"):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 0x10
        file.write_bytes(data)


def truncate_files(folder):
    for file in folder.rglob("d/*"):
        file.write_bytes(file.read_bytes()[:10])


def drop_manifest(folder):
    checkpoint.manifest_path(folder.parent, int(folder.name)).unlink()


def tear_manifest(folder):
    path = checkpoint.manifest_path(folder.parent, int(folder.name))
    path.write_text(path.read_text()[:20])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("orphaned_reads")
@pytest.mark.parametrize("damage", [flip_a_byte_of_w, garble_files, truncate_files, drop_manifest, tear_manifest])
def test_falls_back_to_the_newest_good_step(tmp_path, damage):
    shardings = saved(tmp_path)
    damage(Path(checkpoint.checkpoints_dir(tmp_path)) / "3")
    passed_over = []
    state, position = checkpoint.restore(tmp_path, LIKE, shardings, lambda step, why: passed_over.append((step, why)))
    assert equal(state, make_state(2)) and position == {"step": 2}
    assert [step for step, _ in passed_over] == [3]
    # The damaged step can be saved again.
    writer = checkpoint.CheckpointWriter(tmp_path, keep=3)
    writer.save(3, jax.device_put(make_state(3), shardings), {"step": 3})
    writer.close()
    assert equal(checkpoint.restore(tmp_path, LIKE, shardings)[0], make_state(3))


def test_a_killed_save_leaves_nothing_that_counts(tmp_path):
    saved(tmp_path)
    folder = Path(checkpoint.checkpoints_dir(tmp_path))
    (folder / "4.orbax-checkpoint-tmp").mkdir()
    (folder / "4").mkdir()
    assert checkpoint.good_steps(folder) == [1, 2, 3]
    assert checkpoint.restore(tmp_path, LIKE, on_mesh(MeshConfig()))[1] == {"step": 3}
    checkpoint.CheckpointWriter(tmp_path).close()
    assert not list(folder.glob("*tmp*"))


def numpy_checksum(x) -> int:
    bits = np.asarray(x).reshape(-1).view({1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize]).astype(np.uint64)
    weights = 2 * (np.arange(bits.size, dtype=np.uint64) * 0x9E3779B1) + 1
    return int((bits * (weights % 2**32)).sum() % 2**32)


def test_checksums_match_their_formula_in_every_layout():
    for cfg in (MeshConfig(), MeshConfig(fsdp=4, tensor=2, data=1), MeshConfig(tensor=8, data=1)):
        leaves = checkpoint.flat_parts(jax.device_put(make_state(5), on_mesh(cfg)))
        leaves = [x for part in leaves.values() for x in part.values()]
        assert checkpoint.checksums(leaves).tolist() == [numpy_checksum(x) for x in leaves]


def test_every_flipped_bit_and_every_swap_changes_the_checksum():
    x = jax.random.normal(jax.random.key(0), (4, 8))
    before = checkpoint.checksums([x])[0]
    for place, bit in ((0, 0), (7, 31), (31, 13)):
        bits = jax.lax.bitcast_convert_type(x.reshape(-1), jnp.uint32)
        flipped = jax.lax.bitcast_convert_type(bits.at[place].set(bits[place] ^ np.uint32(1 << bit)), jnp.float32)
        assert checkpoint.checksums([flipped.reshape(4, 8)])[0] != before
    assert checkpoint.checksums([x[::-1]])[0] != before
