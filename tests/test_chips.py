"""Names of topologies, and the speed of an exchange along a torus."""

import pytest

from hhjax.chips import CHIPS, GIB, Topology, device_peak, parse_topology
from hhjax.fields import ConfigError


@pytest.mark.parametrize(("text", "name", "chips", "devices"), [
    ("v5p:4x4x4", "v5p:4x4x4", 64, 64),
    ("v5p-128", "v5p:4x4x4", 64, 64),  # two cores a chip
    ("v4-64", "v4:2x4x4", 32, 64),
    ("v5litepod-256", "v5e:16x16", 256, 256),
    ("v6e-8", "v6e:2x4", 8, 8),
    ("tpu7x:4x4x4", "tpu7x:4x4x4", 64, 128),
    ("H200:8", "h200:8", 8, 8),
])  # fmt: skip
def test_a_topology_has_a_name_chips_and_devices(text, name, chips, devices):
    found = parse_topology(text)
    assert (found.name, found.chips, found.devices) == (name, chips, devices)


@pytest.mark.parametrize(("text", "message"), [
    ("v5q:4x4x4", "unknown chip 'v5q'"),
    ("v5p-100", "choose one of v5p-8, v5p-16"),
    ("v5p:4x4", "give v5p:4x4x4, 3 numbers"),
    ("v5e:4x0", "give v5e:4x4"),
    ("tpu7x-128", "give tpu7x:4x4x4"),
    ("", "give --topology, such as v5p:4x4x4"),
    ("+x", "unknown chip '[+]x'"),
    ("v5p:3x5x7", "no such slice; choose v5p:SHAPE of 2x2x1, 2x2x2"),
    ("v5p:8x4x4", "multiples of 4, smallest first"),
    ("v6e:4x2", "no such slice; choose v6e:SHAPE of 1x1, 2x2, 2x4"),
    ("v5e:32x32", "no such slice"),
    ("h100", "give h100:8, the number of GPUs"),
])  # fmt: skip
def test_what_is_no_topology_is_refused_with_the_remedy(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_topology(text)


def test_rings_and_lines():
    cube, flat = Topology("v5p", (4, 4, 4)), Topology("v5p", (2, 2, 4))
    link = CHIPS["v5p"].link
    assert cube.bandwidth({0: 4}) == 2 * link  # a ring: both directions
    assert cube.bandwidth({0: 4, 1: 4}) == 4 * link  # an axis over two dimensions uses the links of both
    assert cube.bandwidth({0: 2}) == link  # a part of a dimension is a line
    assert flat.bandwidth({2: 4}) == link  # not all dimensions are multiples of 4: no ring
    assert Topology("v5e", (16, 16)).bandwidth({0: 16}) == 2 * Topology("v5e", (8, 8)).bandwidth({0: 8})
    assert Topology("v4", (4, 4, 4)).bandwidth({0: 4}) == CHIPS["v4"].link  # two devices share a chip's links
    assert Topology("v4", (4, 4, 4)).bandwidth({}) == CHIPS["v4"].bandwidth / 2  # and exchange through its memory


def test_gpus_are_joined_in_machines_of_eight():
    pair, rack, chip = Topology("h100", (2,)), Topology("h100", (32,)), CHIPS["h100"]
    assert pair.hosts == (1, 2) and rack.hosts == (4, 8)
    assert rack.bandwidth({2: 8}) == chip.link  # dimension 2 is the place in a machine, 1 the machine
    assert rack.bandwidth({1: 4}) == chip.network  # one GPU of each: its own adapter
    assert rack.bandwidth({1: 4, 2: 8}) == 8 * chip.network  # all of each: all adapters
    with pytest.raises(ConfigError, match="12 GPUs do not fill machines of 8"):
        parse_topology("h100:12")


def test_chips_are_plausible():
    """Between a hundred and a thousand FLOPs for a byte of HBM, and links slower than HBM."""
    for chip in CHIPS.values():
        assert 100 < chip.flops / chip.bandwidth < 1000 and chip.link < chip.bandwidth / 5 and chip.memory > 15 * GIB


@pytest.mark.parametrize(("kind", "peak"), [("TPU v5 lite", 197e12), ("TPU v5", 459e12), ("TPU v4", 137.5e12), ("NVIDIA H100 80GB HBM3", 989e12),
                                            ("cpu", None), ("NVIDIA A100-SXM4-40GB", None)])  # fmt: skip
def test_a_device_s_peak_is_known_by_its_kind(kind, peak):
    assert device_peak(kind) == peak
