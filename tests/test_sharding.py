"""The axis table: errors that name what does not fit, specs, batches."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from hhjax.sharding import MeshConfig, batch_host, batch_ways, check_batch, gathered_spec, make_mesh, param_shardings, put_batch, spec


def test_a_mesh_fills_the_devices():
    assert dict(make_mesh(MeshConfig(-1, 2, 2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    with pytest.raises(ValueError, match="does not fill 8 devices"):
        make_mesh(MeshConfig(3, 1, 1))
    with pytest.raises(ValueError, match="does not fill 8 devices"):
        make_mesh(MeshConfig(-1, 3, 1))
    with pytest.raises(ValueError, match="one of them may be -1"):
        make_mesh(MeshConfig(-1, -1, 1))


def test_specs_follow_the_table():
    assert spec(("layers", "embed", "mlp")) == P(None, "fsdp", "tensor")
    assert gathered_spec(("layers", "embed", "mlp")) == P(None, None, "tensor")
    with pytest.raises(KeyError):
        spec(("width",))


def test_a_dimension_that_does_not_divide_names_parameter_and_axis():
    mesh = make_mesh(MeshConfig(1, 8, 1))
    with pytest.raises(ValueError, match=r"'up'.*axis 'embed' of size 12 is not divisible by fsdp=8"):
        param_shardings({"up": ("embed", "mlp")}, {"up": np.zeros((12, 16))}, mesh)


def test_two_dimensions_on_one_mesh_axis_are_an_error():
    mesh = make_mesh(MeshConfig(1, 1, 8))
    with pytest.raises(ValueError, match="two dimensions want the mesh axis 'tensor'"):
        param_shardings({"w": ("heads", "mlp")}, {"w": np.zeros((8, 8))}, mesh)


def test_a_batch_is_split_over_data_and_fsdp():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    x = put_batch({"a": np.arange(8)}, mesh)["a"]
    assert batch_ways(mesh) == 4 and x.addressable_shards[0].data.shape == (2,)
    np.testing.assert_array_equal(jax.device_get(x), np.arange(8))
    with pytest.raises(ValueError, match="batch 6 is not divisible by data[*]fsdp=4; use 4 or 8"):
        check_batch(6, mesh)


class Device:
    """As much of a device as a mesh needs to tell which process owns it."""

    def __init__(self, process_index):
        self.process_index = process_index


def owned(*processes, shape):
    """A stand-in for a mesh whose devices belong to these processes."""
    devices = np.array([Device(p) for p in processes]).reshape(shape)
    return SimpleNamespace(devices=devices, shape=dict(zip(("data", "fsdp", "tensor"), shape)))


def test_a_process_brings_the_run_of_rows_that_its_devices_hold():
    assert batch_host(make_mesh(MeshConfig(2, 2, 2))) == (0, 1)
    assert batch_host(owned(0, 0, 1, 1, shape=(2, 2, 1))) == (0, 2)
    assert batch_host(owned(1, 1, 0, 0, shape=(4, 1, 1))) == (1, 2)  # devices in another order than processes
    assert batch_host(owned(0, 1, shape=(1, 1, 2))) == (0, 1)  # tensor across processes: both bring every row
    assert batch_host(owned(0, 1, 2, 3, shape=(2, 1, 2))) == (0, 2)


def test_a_mesh_that_scatters_a_process_s_rows_is_refused():
    with pytest.raises(ValueError, match=r"processes \[\[0\], \[1\], \[0\], \[1\]\]; choose sizes"):
        batch_host(owned(0, 1, 0, 1, shape=(4, 1, 1)))
