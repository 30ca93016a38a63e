"""Accelerators by name: what a chip has, how many a topology holds, and how fast an exchange along one of its axes can be."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from hhjax.fields import ConfigError, nearest
from hhjax.process import GPU_MEMORY_SHARE

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """flops: bf16 peak, FLOP/s. memory: bytes of HBM that a program may use. bandwidth: of HBM, bytes/s. link: of one link to one
    neighbour, one way, bytes/s. All are a chip's; devices: how many of jax's devices share it. axes: dimensions of the
    torus, 0 where there is none (GPUs). cores: what the number in a name such as v5p-128 counts, per chip; 0: no such names. host: GPUs
    of a machine, which their links join; network: what each has to other machines, one way, bytes/s."""

    flops: float
    memory: float
    bandwidth: float
    link: float
    devices: int = 1
    axes: int = 3
    cores: int = 0
    host: int = 0
    network: float = 0.0


# Peaks, HBM bandwidth and interconnect: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, November 2026. Their bidirectional
# bandwidth a chip (v5e 400, v6e 800, v5p and tpu7x 1200 GB/s) is shared by 4 or 6 links of two directions. v4's links: 50 GB/s
# each way (Jouppi et al. 2023, arXiv 2304.01433). Usable memory: what the compiler of libtpu 0.0.52 calls available, which is
# a little less than is built in (v4 32, v5e 16, v5p 96, v6e 32, tpu7x 192 GiB). GPUs: NVIDIA's data sheets of the SXM parts, dense
# bf16; NVLink 4 as one link of 450 GB/s each way; eight a machine with an adapter of 400 Gb/s each, as in DGX H100 and H200. Their usable
# memory is what CUDA sees of it (79.1 and 139.8 GiB) times the share that process.py has XLA take.
CHIPS = {
    "v4": Chip(275e12, 2 * 15.25 * GIB, 1200e9, 50e9, devices=2, cores=2),
    "v5e": Chip(197e12, 15.75 * GIB, 819e9, 50e9, axes=2, cores=1),
    "v5p": Chip(459e12, 95.73 * GIB, 2765e9, 100e9, cores=2),
    "v6e": Chip(918e12, 31.24 * GIB, 1638e9, 100e9, axes=2, cores=1),
    "tpu7x": Chip(2307e12, 2 * 94.74 * GIB, 7380e9, 100e9, devices=2),
    "h100": Chip(989e12, GPU_MEMORY_SHARE * 79.1 * GIB, 3350e9, 450e9, axes=0, host=8, network=50e9),
    "h200": Chip(989e12, GPU_MEMORY_SHARE * 139.8 * GIB, 4800e9, 450e9, axes=0, host=8, network=50e9),
}
# The shape that a number of chips gets unless another is asked for: docs.cloud.google.com/tpu/docs/{v5p,v6e}, "Configurations".
SHAPES = {
    2: ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)),
    3: ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8), (8, 8, 16), (8, 16, 16),
        (16, 16, 16), (16, 16, 24)),
}  # fmt: skip
ALIASES = {"v5litepod": "v5e"}
KINDS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU7x": "tpu7x", "H100": "h100", "H200": "h200"}


def device_peak(device_kind: str) -> float | None:
    """bf16 FLOP/s that the vendor states for one of jax's devices by its `device_kind`; None where it is not known."""
    name = KINDS.get(device_kind) or next((KINDS[word] for word in device_kind.split() if word in KINDS), None)
    return CHIPS[name].flops / CHIPS[name].devices if name else None


@dataclass(frozen=True)
class Topology:
    """Chips in a grid: `shape` along each dimension, one number for GPUs."""

    kind: str
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        """jax's devices: two a chip on v4 and tpu7x."""
        return self.chips * self.chip.devices

    @property
    def hosts(self) -> tuple[int, int]:
        """GPUs: (machines, GPUs of each)."""
        per = min(self.chips, self.chip.host)
        return self.chips // per, per

    @property
    def name(self) -> str:
        """As `jax.experimental.topologies` takes it for TPUs."""
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"

    def bandwidth(self, extent: Mapping[int, int]) -> float:
        """Bytes/s that one device can send in a ring exchange whose group spans `extent`: dimension of the torus -> places in it.

        A dimension that is spanned whole and closed to a ring gives two links, any other one. Dimensions close where they
        are a multiple of 4 in every direction (v4, v5p, tpu7x: cubes) or 16 (v5e, v6e: a whole pod's side). Devices
        of one chip exchange at the speed of its HBM. Of GPUs dimension 1 is the machine and 2 the place in it: a group that spans
        machines sends between them through the adapters of all its GPUs in one.
        """
        chip, spans = self.chip, {dim: n for dim, n in extent.items() if n > 1}
        if not chip.axes:
            return chip.link if spans.keys() <= {2} else min(chip.link, spans.get(2, 1) * chip.network)
        if not spans:
            return chip.bandwidth / chip.devices
        closed = lambda dim: self.shape[dim] % (4 if chip.axes == 3 else 16) == 0  # noqa: E731
        cubes = chip.axes == 2 or all(map(closed, range(3)))
        links = sum(2 if cubes and closed(dim) and n == self.shape[dim] else 1 for dim, n in spans.items())
        return links * chip.link / chip.devices


def parse_topology(text: str) -> Topology:
    """`v5p:4x4x4`, `v5p-128` (two cores a chip: 64 chips) or `h200:8`. Raises ConfigError on what is none, naming the nearest."""
    if not text.strip():
        raise ConfigError("no topology: give --topology, such as v5p:4x4x4, v6e:16x16, v5p-128 or h200:8")
    found = re.fullmatch(r"(\w+)([:-]?)(.*)", text.strip().lower())
    kind, mark, size = found.groups() if found else (text, "", "")
    kind = ALIASES.get(kind, kind)
    if kind not in CHIPS:
        raise ConfigError(f"topology {text!r}: unknown chip {kind!r}{nearest(kind, CHIPS)}; such as v5p:4x4x4, v6e:16x16, v5p-128, h200:8")
    chip = CHIPS[kind]
    if mark == "-" and size.isdigit() and chip.cores:
        for shape in SHAPES[chip.axes]:
            if math.prod(shape) * chip.cores == int(size):
                return Topology(kind, shape)
        known = ", ".join(f"{kind}-{math.prod(s) * chip.cores}" for s in SHAPES[chip.axes])
        raise ConfigError(f"topology {text!r}: choose one of {known}, or say the shape: {kind}:{'x'.join('4' * chip.axes)}")
    shape = tuple(int(n) for n in size.split("x")) if re.fullmatch(r"\d+(x\d+)*", size) and mark == ":" else ()
    if len(shape) != (chip.axes or 1) or 0 in shape:
        example = f"{kind}:{'x'.join('4' * chip.axes)}, {chip.axes} numbers of chips" if chip.axes else f"{kind}:8, the number of GPUs"
        raise ConfigError(f"topology {text!r}: give {example}")
    if not chip.axes and shape[0] > chip.host and shape[0] % chip.host:
        raise ConfigError(f"topology {text!r}: {shape[0]} GPUs do not fill machines of {chip.host}; choose a multiple of {chip.host}, or fewer")
    # docs.cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus: larger slices of a 3D torus are of whole cubes, smallest side first.
    cubes = chip.axes == 3 and all(n % 4 == 0 for n in shape) and list(shape) == sorted(shape)
    if chip.axes and shape not in SHAPES[chip.axes] and not cubes:
        known = ", ".join("x".join(map(str, s)) for s in SHAPES[chip.axes])
        more = ", or multiples of 4, smallest first" if chip.axes == 3 else ""
        raise ConfigError(f"topology {text!r}: there is no such slice; choose {kind}:SHAPE of {known}{more}")
    return Topology(kind, shape)
