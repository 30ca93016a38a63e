"""What makes two stages the same, and so where each lives: OUT/<kind>/<size>-s<seed>-<id>."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from hhjax.data.comparisons import ComparisonData
from hhjax.data.sources import ExamData, TextData, data_files
from hhjax.experiment import Run
from hhjax.fields import ConfigError
from hhjax.identity import canonical, digest, file_digest, folder_digest, identity_fields
from hhjax.model.sizes import model_config
from hhjax.stages import DEFAULT_SIZE, Clinic, Questions, Stage, Tokenizer, Training, is_path, references, split_step


class Placed(NamedTuple):
    """A stage of a run with all that is decided before it starts.

    identity: the canonical config whose hash is `id`. parents: reference text -> folder.
    after: names of the stages of this run that it needs.
    """

    stage: Stage
    id: str
    identity: dict
    seed: int
    size: str
    dir: Path
    parents: dict[str, Path]
    after: tuple[str, ...]


def place(run: Run, out: Path, data_dir: Path | None = None) -> tuple[Placed, ...]:
    """Where each stage of a run lives: OUT/<kind>/<size>-s<seed>-<id>.

    Reads the data files and external folders that identities hash; their errors pass through.
    """
    placed: dict[str, Placed] = {}
    for stage in run.experiment.stages:
        refs = list(dict.fromkeys(ref for _, ref, _ in references(stage, placed)))
        parents = {ref: reference_dir(ref, placed) for ref in refs}
        own_seed = getattr(stage, "seed", None)
        seed = run.experiment.seed if own_seed is None else own_seed
        identity = {"kind": stage.kind} | ({"seed": seed} if stage.seeded else {})
        identity |= canonical_stage(stage, {ref: reference_id(ref, placed) for ref in refs}, data_dir)
        size = size_of(stage, parents, placed)
        folder = "-".join([size, *([f"s{seed}"] if stage.seeded else []), digest(identity)])
        after = tuple(dict.fromkeys(name for name, _ in map(split_step, refs) if name in placed))
        where = Path(out) / stage.kind / folder
        placed[stage.name] = Placed(stage, digest(identity), identity, seed, size, where, parents, after)
    return tuple(placed.values())


def reference_dir(ref: str, placed: Mapping[str, Placed]) -> Path:
    """The folder that a reference means. Raises ConfigError where a local one does not exist."""
    target, _ = split_step(ref)
    if target in placed:
        return placed[target].dir
    if "://" not in target and not Path(target).exists():
        raise ConfigError(f"{ref!r}: there is no such folder; name a stage, or a folder that exists")
    return Path(target) if "://" not in target else target


def reference_id(ref: str, placed: Mapping[str, Placed]) -> str:
    """What stands for a reference in the identity of a child: the stage's id, or what a folder holds.

    A run directory is known by the id it was made with, any other local folder by the bytes of its
    files, a remote one by its address (whose content is taken on trust).
    """
    target, step = split_step(ref)
    suffix = "" if step is None else f"@{step}"
    if target in placed:
        return placed[target].id + suffix
    if "://" in target:
        return ref
    config = read_config(target)
    return (config["id"] if "id" in config else folder_digest(Path(target))) + suffix


def size_of(stage: Stage, parents: Mapping, placed: Mapping[str, Placed]) -> str:
    """What a run directory's name begins with: the rung of the ladder, the vocabulary, or the parent's size, which for
    a folder that is no run directory is its name."""
    if isinstance(stage, Tokenizer):
        return f"v{stage.vocab}"
    if isinstance(stage, Clinic):
        return stage.part
    if isinstance(stage, Questions):
        return f"{stage.data.limit}each"
    if isinstance(stage, Training) and not stage.init:
        return stage.model or DEFAULT_SIZE
    first = next(iter(parents))
    name, _ = split_step(first)
    return placed[name].size if name in placed else read_config(parents[first]).get("size") or folder_name(name)


def folder_name(path: str) -> str:
    """The last part of a path or address as part of a file name."""
    return re.sub(r"[^\w.]+", "_", Path(path).absolute().name).strip("_.") or "external"


def read_config(folder) -> dict:
    """The config.json of a run directory; {} where there is none (a Hugging Face folder has one without an id)."""
    path = Path(folder) / "config.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def canonical_stage(stage: Stage, ids: Mapping[str, str], data_dir: Path | None) -> dict:
    """The stage's identity fields as JSON values: references as ids, functions as source, data as hashes."""
    result = {}
    for f in identity_fields(stage):
        value = getattr(stage, f.name)
        if f.metadata.get("ref"):
            named = [ids[ref] for ref in ((value,) if isinstance(value, str) else value or ())]
            result[f.name] = named if isinstance(value, tuple) else next(iter(named), None)
        elif f.name == "model":
            result["model"] = None if stage.init else architecture(value or DEFAULT_SIZE)
        elif isinstance(value, ComparisonData | TextData | ExamData):
            result[f.name] = canonical_data(value, ids, data_dir)
        else:
            result[f.name] = canonical(value)
    return result


def canonical_data(data, ids: Mapping[str, str], data_dir: Path | None) -> dict:
    """A data config by what its files hold, not by where they lie."""
    sources = [ids.get(s, "file" if is_path(s) else s) for s in data.sources]
    own = [type(data)(sources=(s,)) for s in data.sources if s not in ids]
    files = [file_digest(Path(p)) for each in own for p in data_files(each, data_dir)]
    return canonical(data) | {"sources": sources, "files": files}


def architecture(size: str) -> dict:
    """The settings behind a size's name; the vocabulary is the tokenizer's, which has an id of its own."""
    return {k: v for k, v in canonical(model_config(size, 0)).items() if k != "vocab"}
