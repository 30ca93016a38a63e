"""Checkpoints: Orbax writes them, a manifest of checksums says which of them are good.

    checkpoints/<step>/{params,train,position}    committed by one atomic rename; in a bucket, by a file commit_success.txt
    checkpoints/<step>.json                       the manifest, written after the commit

Orbax has no checksum on array data and lists damaged folders as steps, so a step counts only
if its manifest is there and every leaf restored has the checksum that it records.
"""

import json
import logging
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from hhjax.cluster import agreed, all_agree
from hhjax.io.files import checkpoints_dir, write_atomically

SEEN_S = 60.0  # how long a shared file system may take to show process 0's files to the others

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports every save at INFO and WARNING


class DamagedCheckpoint(ValueError):
    """A step that cannot be used: unreadable, or a leaf that differs from its checksum."""


class CheckpointWriter:
    """Saves in the background and keeps the last `keep` good steps.

    on_saved(step) is called, on a thread, when a step is good.
    Errors of a background save are raised by the next `save`, `wait` or `close`.
    """

    def __init__(self, run_dir: Path, keep: int = 2, on_saved: Callable[[int], None] = lambda step: None):
        self.folder, self.keep, self.on_saved = checkpoints_dir(run_dir), keep, on_saved
        self.orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self.thread, self.pending = ThreadPoolExecutor(1), Future()
        self.pending.set_result(None)
        if jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob("*.orbax-checkpoint-tmp*"):
                leftover.rmtree()

    def save(self, step: int, state, position: dict) -> None:
        """Starts to save `state`, a NamedTuple with a field `params`; it may be donated once this returns.

        position: JSON values that say where the run is.
        """
        self.wait()
        parts = flat_parts(state)
        names = [f"{part}/{leaf}" for part, leaves in parts.items() for leaf in leaves]
        sums = checksums([x for leaves in parts.values() for x in leaves.values()])
        arrays = {part: ocp.args.StandardSave(leaves) for part, leaves in parts.items()}
        if jax.process_index() == 0:
            manifest_path(self.folder, step).unlink(missing_ok=True)
            if (self.folder / str(step)).exists():  # a damaged folder of this step
                (self.folder / str(step)).rmtree()
        # force: another process may look before that; it only looks.
        args = ocp.args.Composite(**arrays, position=ocp.args.JsonSave(position))
        self.orbax.save(self.folder / str(step), args=args, force=True)
        self.pending = self.thread.submit(self.finish, step, names, sums, position)

    def finish(self, step: int, names, sums, position: dict) -> None:
        """Waits for the commit, then writes the manifest and drops old steps."""
        self.orbax.wait_until_finished()
        if jax.process_index() == 0:
            leaves = dict(zip(names, np.asarray(sums).tolist(), strict=True))
            write_atomically(manifest_path(self.folder, step), json.dumps({"leaves": leaves, "position": position}))
            for old in good_steps(self.folder)[: -self.keep]:
                manifest_path(self.folder, old).unlink()
                (self.folder / str(old)).rmtree()
        self.on_saved(step)

    def wait(self) -> None:
        """Returns when the last save is committed."""
        self.pending.result()

    def close(self) -> None:
        self.wait()
        self.thread.shutdown()
        self.orbax.close()


def restore(run_dir: Path, like, shardings, on_damaged: Callable[[int, str], None] = lambda step, why: None):
    """The newest good state and its position, laid out by `shardings`, or None where there is none; the same on every process.

    like, shardings: trees of the saved state's structure, of shapes and of NamedShardings; the mesh
    may be another than at the save. on_damaged(step, reason) hears of every step that was passed over.
    """
    folder, passed = checkpoints_dir(run_dir), sys.maxsize
    # Process 0 says which step is next: a shared file system may show the newest to some processes later than to others.
    while (step := agreed(max((s for s in steps_on_disk(folder) if s < passed), default=-1))) >= 0:
        passed, reason = step, f"step {step}: no manifest that every process sees: an unfinished save"
        if is_good(folder, step):
            try:
                return restore_step(folder, step, like, shardings)
            except DamagedCheckpoint as error:
                reason = str(error)
        on_damaged(step, reason)
    return None


def is_good(folder: Path, step: int) -> bool:
    """Whether process 0 finds a step's manifest, and every other does within SEEN_S; the same on every process."""
    path, until = manifest_path(folder, step), time.monotonic() + SEEN_S
    if not agreed(path.is_file()):
        return False
    while not path.is_file() and time.monotonic() < until:
        time.sleep(0.1)
    return all_agree(path.is_file())


def restore_step(folder: Path, step: int, like, shardings):
    """The state and position of one step. Raises DamagedCheckpoint."""
    manifest = read_manifest(folder, step)
    likes, places = flat_parts(like), flat_parts(shardings)
    parts = {part: read_part(folder, step, part, likes[part], places[part], manifest) for part in likes}
    return unflatten_parts(like, parts), manifest["position"]


def load_params(run_dir: Path, step: int | None, like, shardings):
    """The parameters of a finished or running stage: of `step`, or of its newest good one, which is the same on every process.

    Raises FileNotFoundError, naming the good steps, where there is none such.
    """
    folder = checkpoints_dir(run_dir)
    chosen = step if step is not None else agreed(max(good_steps(folder), default=-1))
    if chosen < 0 or not is_good(folder, chosen):
        wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
        raise FileNotFoundError(f"{folder}: no good {wanted}; good steps are {good_steps(folder) or 'none'}")
    leaves = flatten(like)
    values = read_part(folder, chosen, "params", leaves, flatten(shardings), read_manifest(folder, chosen))
    return jax.tree.unflatten(jax.tree.structure(like), [values[name] for name in leaves])


def good_steps(folder: Path) -> list[int]:
    """Steps with a manifest, in order; their leaves are checked when they are read."""
    return [step for step in steps_on_disk(folder) if manifest_path(folder, step).is_file()]


def read_checksums(run_dir: Path, step: int | None = None) -> dict[str, int]:
    """Leaf name -> checksum, as recorded for `step` (None: the newest good one)."""
    folder = checkpoints_dir(run_dir)
    return read_manifest(folder, good_steps(folder)[-1] if step is None else step)["leaves"]


# Checksums ------------------------------------------------------------------------------------------------------------


@jax.jit
def checksums(leaves: list) -> jax.Array:
    """One uint32 per leaf: sum over i of bits[i] * (2 * i * 0x9E3779B1 + 1) mod 2^32, i the row-major position.

    Integer sums are exact in any order, so the value does not depend on how the leaf is split over
    devices. Weights are odd, so that any single changed element, and any single flipped bit, shows.
    """
    return jnp.stack([checksum(x) for x in leaves])


def checksum(x) -> jax.Array:
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    x = x.astype(jnp.uint8) if x.dtype == bool else x
    bits = jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32)
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    weight = 2 * (index * jnp.uint32(0x9E3779B1)) + jnp.uint32(1)
    return jnp.sum(bits * weight, dtype=jnp.uint32)


# Files and trees ------------------------------------------------------------------------------------------------------


def read_part(folder: Path, step: int, part: str, leaves: dict, shardings: dict, manifest: dict) -> dict:
    """Leaf name -> array of one part of a step, checked. Raises DamagedCheckpoint; of several processes one that cannot read raises RuntimeError,
    which ends them all."""
    wanted = {name: raw_struct(leaf, shardings[name]) for name, leaf in leaves.items()}
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
            args = ocp.args.Composite(**{part: ocp.args.StandardRestore(wanted)})
            values = reader.restore(folder / str(step), args=args)[part]
    except Exception as error:  # whatever a damaged file makes the reader raise
        reason = f"{type(error).__name__}: {str(error):.200}"  # the rest is the reader's whole configuration
        if jax.process_count() > 1:  # the others may have read theirs, and wait: no older step can be agreed upon
            raise RuntimeError(f"{folder / str(step)}: {part} is unreadable on process {jax.process_index()}: {reason}; if it stays so, move "
                               f"that step away and start again") from error  # fmt: skip
        raise DamagedCheckpoint(f"step {step}: {part} is unreadable: {reason}") from error
    sums = np.asarray(checksums([values[name] for name in leaves]))
    for name, value in zip(leaves, sums.tolist(), strict=True):
        if (recorded := manifest["leaves"].get(f"{part}/{name}")) != value:
            raise DamagedCheckpoint(f"step {step}: {part}/{name} has checksum {value}, its manifest says {recorded}")
    return {name: wrapped(values[name], leaf) for name, leaf in leaves.items()}


def read_manifest(folder: Path, step: int) -> dict:
    """Raises DamagedCheckpoint where there is none, or none that can be read."""
    try:
        manifest = json.loads(manifest_path(folder, step).read_text())
        return {"leaves": manifest["leaves"], "position": manifest["position"]}
    except (OSError, ValueError, KeyError) as error:
        raise DamagedCheckpoint(f"step {step}: no manifest ({type(error).__name__}): an unfinished save") from None


def steps_on_disk(folder: Path) -> list[int]:
    return sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit() and p.is_dir())


def manifest_path(folder: Path, step: int) -> Path:
    return folder / f"{step}.json"


def flat_parts(state) -> dict[str, dict]:
    """A state as {"params": {leaf name: leaf}, "train": {...}}, PRNG keys as their raw uint32."""
    rest = {name: value for name, value in state._asdict().items() if name != "params"}
    return {"params": flatten(state.params), "train": flatten(rest)}


def unflatten_parts(like, parts: dict[str, dict]):
    """The state of `like`'s structure from what `flat_parts` gave."""
    rest = {name: value for name, value in like._asdict().items() if name != "params"}
    rebuilt = {
        part: jax.tree.unflatten(jax.tree.structure(tree), [parts[part][name] for name in flatten(tree)])
        for part, tree in (("params", like.params), ("train", rest))
    }
    return type(like)(params=rebuilt["params"], **rebuilt["train"])


def flatten(tree) -> dict:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): raw(leaf) for path, leaf in leaves}


def is_key(leaf) -> bool:
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def raw(leaf):
    """A PRNG key's uint32 words, which Orbax can save; any other leaf as it is."""
    return jax.random.key_data(leaf) if is_key(leaf) and isinstance(leaf, jax.Array) else leaf


def raw_struct(leaf, sharding) -> jax.ShapeDtypeStruct:
    """What Orbax is to read for `leaf`."""
    leaf = jax.eval_shape(jax.random.key_data, leaf) if is_key(leaf) else leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def wrapped(value, leaf):
    """The inverse of `raw`, for a leaf like `leaf`; keys are of the default implementation."""
    return jax.random.wrap_key_data(value) if is_key(leaf) else value
