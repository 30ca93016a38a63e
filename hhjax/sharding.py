"""Where arrays live: the device mesh, the one table of axis rules, and shardings made from them."""

from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

AXES = ("data", "fsdp", "tensor")

# Logical axis of an array -> mesh axes that split it. Every sharding of the project follows from this table.
RULES = {
    "batch": ("data", "fsdp"),
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "layers": None,
    "length": None,
    "head_dim": None,
}


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 (one axis at most) takes what the others leave."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


def make_mesh(cfg: MeshConfig = MeshConfig(), devices=None) -> Mesh:
    """A data x fsdp x tensor mesh over `devices` (all of them by default).

    On TPUs the axes follow the torus: whole dimensions of it where the sizes allow, parts of dimensions elsewhere
    (fsdp 32 x tensor 8 on 16 x 16 chips). Raises ValueError when the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes, types = mesh_sizes(cfg, len(devices)), (AxisType.Auto,) * 3  # Auto: Explicit refuses sharding constraints inside jit
    try:
        return jax.make_mesh(sizes, AXES, axis_types=types, devices=devices)
    except NotImplementedError:  # jax says so where the sizes are no products of whole dimensions of the torus
        return Mesh(mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True), AXES, axis_types=types)
    except AssertionError:  # v4 with two devices a chip, which jax lays out in no way of its own: by their numbers
        return Mesh(np.array(devices).reshape(sizes), AXES, axis_types=types)


def mesh_sizes(cfg: MeshConfig, devices: int) -> tuple[int, ...]:
    """Sizes along AXES on so many devices, the -1 filled in. Raises ValueError as `make_mesh`."""
    sizes = [cfg.data, cfg.fsdp, cfg.tensor]
    if sizes.count(-1) > 1 or any(n < 1 and n != -1 for n in sizes):
        raise ValueError(f"mesh {dict(zip(AXES, sizes))}: sizes are positive, and one of them may be -1")
    fixed = int(np.prod([n for n in sizes if n != -1]))
    if -1 in sizes and devices % fixed == 0:
        sizes[sizes.index(-1)] = devices // fixed
    if -1 in sizes or int(np.prod(sizes)) != devices:
        raise ValueError(
            f"mesh {dict(zip(AXES, sizes))} does not fill {devices} devices; "
            f"choose sizes whose product is {devices}, or -1 for one of them"
        )
    return tuple(sizes)


def spec(axes: tuple[str | None, ...]) -> P:
    """The PartitionSpec of an array whose dimensions have these logical axes; KeyError on an unknown axis."""
    return P(*(None if name is None else RULES[name] for name in axes))


def gathered_spec(axes: tuple[str | None, ...]) -> P:
    """As `spec`, with the fsdp split undone: how a weight is used, one layer at a time."""
    return P(*(None if RULES.get(name) == "fsdp" else RULES.get(name) for name in axes))


def param_shardings(axes, shapes, mesh: Mesh):
    """NamedShardings for a tree of parameters.

    axes: tree of tuples of logical axis names. shapes: matching tree with `.shape`.
    Raises ValueError naming the parameter and the axis where a dimension does not
    divide or two dimensions want one mesh axis.
    """

    def one(path, names, leaf):
        where, used = jax.tree_util.keystr(path), set()
        for name, size in zip(names, leaf.shape, strict=True):
            rule = RULES[name] if name else None
            for axis in (rule,) if isinstance(rule, str) else rule or ():
                if axis in used and mesh.shape[axis] > 1:
                    raise ValueError(f"parameter {where} {names}: two dimensions want the mesh axis {axis!r}")
                used.add(axis)
                if size % mesh.shape[axis]:
                    raise ValueError(
                        f"parameter {where}: axis {name!r} of size {size} is not divisible by "
                        f"{axis}={mesh.shape[axis]}; choose a mesh whose {axis} divides it"
                    )
        return NamedSharding(mesh, spec(names))

    return jax.tree_util.tree_map_with_path(one, axes, shapes, is_leaf=is_axes)


def is_axes(x) -> bool:
    """True for a leaf of an axes tree: a plain tuple of names."""
    return type(x) is tuple and all(n is None or isinstance(n, str) for n in x)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis over data and fsdp, the rest whole."""
    return NamedSharding(mesh, P(RULES["batch"]))


def batches_sharding(mesh: Mesh) -> NamedSharding:
    """The second axis over data and fsdp: several batches, stacked."""
    return NamedSharding(mesh, P(None, RULES["batch"]))


def batch_ways(mesh: Mesh) -> int:
    """How many shards the batch axis has."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_host(mesh: Mesh) -> tuple[int, int]:
    """(index, count): which of how many equal runs of every batch this process must bring.

    Processes that only a tensor axis parts bring the same rows. Raises ValueError where the devices of
    the batch axis do not go to processes in runs.
    """
    owners = np.vectorize(lambda d: d.process_index)(mesh.devices).reshape(batch_ways(mesh), -1)
    shards = [frozenset(row) for row in owners.tolist()]
    runs = [shard for i, shard in enumerate(shards) if i == 0 or shard != shards[i - 1]]
    even = len(shards) % len(runs) == 0 and shards == [r for r in runs for _ in range(len(shards) // len(runs))]
    if not even or sum(map(len, runs)) != len(frozenset().union(*runs)):
        raise ValueError(
            f"mesh {dict(mesh.shape)} gives the batch's {len(shards)} shards to processes {[sorted(s) for s in shards]}; "
            f"choose sizes by which each process, or each group of them, holds one run of shards"
        )
    mine = [i for i, run in enumerate(runs) if jax.process_index() in run]
    return (mine[0] if mine else 0), len(runs)


def check_batch(batch_size: int, mesh: Mesh) -> None:
    """Raises ValueError unless `batch_size` rows divide over data*fsdp."""
    ways = batch_ways(mesh)
    if batch_size % ways:
        near = sorted({max(ways, batch_size // ways * ways), (batch_size // ways + 1) * ways})
        raise ValueError(f"batch {batch_size} is not divisible by data*fsdp={ways}; use {' or '.join(map(str, near))}")


def put_batch(batch, mesh: Mesh):
    """This process's share of a global batch (numpy leaves) -> global arrays split over data and fsdp."""
    return put_split(batch, batch_sharding(mesh))


def put_batches(batches, mesh: Mesh):
    """The same of several batches, stacked along a first axis that is not split."""
    return put_split(batches, batches_sharding(mesh))


def put_split(tree, sharding: NamedSharding):
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree)
