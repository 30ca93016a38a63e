"""Experiments: named stages that refer to each other, and sweeps over dotted paths.

    BASE = Experiment("pm_hh", (
        Tokenizer("tok", vocab=4096),
        LM("lm", tokenizer="tok", model="1M"),
        PM("pm", init="lm", data=ComparisonData()),
        Evaluate("eval", of="pm")))
    RUNS = grid(BASE, {"lm.model": ("0.4M", "1M"), "seed": (0, 1, 2)})
"""

import dataclasses
import itertools
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from hhjax.fields import ConfigError, config_or_default, conform, hinted_fields, nearest
from hhjax.identity import canonical, digest
from hhjax.stages import Stage, is_path, references, split_step

RESERVED = ("seed", "out", "only", "stage", "fast", "file")  # top-level addresses, so no stage is called this


@dataclass(frozen=True)
class Experiment:
    """An ordered tuple of stages, each of which refers only to earlier ones. Raises ConfigError otherwise."""

    name: str
    stages: tuple[Stage, ...]
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "stages", tuple(self.stages))
        earlier: dict[str, Stage] = {}
        for stage in self.stages:
            if not re.fullmatch(r"[A-Za-z]\w*", stage.name) or stage.name in RESERVED:
                raise ConfigError(f"stage name {stage.name!r}; use letters, digits and _, and none of {RESERVED}")
            if stage.name in earlier:
                raise ConfigError(f"two stages are called {stage.name!r}; give each its own name")
            for where, ref, kinds in references(stage, earlier):
                check_reference(f"{stage.name}.{where}", ref, kinds, earlier)
            earlier[stage.name] = stage

    def stage(self, name: str) -> Stage:
        """The stage of this name; ConfigError with the nearest name otherwise."""
        found = {s.name: s for s in self.stages}
        if name not in found:
            raise ConfigError(f"experiment {self.name!r} has no stage {name!r}{nearest(name, found)}")
        return found[name]


@dataclass(frozen=True)
class Run:
    """One point of a sweep. axes: the (path, label) pairs that tell it from the others."""

    experiment: Experiment
    axes: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """Such as `lm.model=1M,seed=0`; the experiment's name where nothing varies."""
        return ",".join(f"{path}={label}" for path, label in self.axes) or self.experiment.name

    @property
    def full_name(self) -> str:
        """The name that is unique in a file of several experiments: `pm_hh:lm.model=1M,seed=0`."""
        return f"{self.experiment.name}:{self.name}" if self.axes else self.name


def edit(experiment: Experiment, path: str, value) -> Experiment:
    """The experiment with the field at `path` replaced: "seed", or "STAGE.field.field".

    Raises ConfigError on an unknown address, naming the nearest, and on a wrong type.
    """
    if path == "seed":
        return replace(experiment, seed=conform(value, int, "seed"))
    name, _, rest = path.partition(".")
    if name not in {s.name for s in experiment.stages} or not rest:
        raise ConfigError(f"unknown field {path!r}{nearest(path, addresses(experiment))}")
    if rest == "name":
        raise ConfigError(f"{path!r} cannot be edited: other stages refer to it by name")
    new = edit_field(experiment.stage(name), rest.split("."), value, path, experiment)
    return replace(experiment, stages=tuple(new if s.name == name else s for s in experiment.stages))


def grid(experiment: Experiment, axes: Mapping) -> tuple[Run, ...]:
    """The product of `axes`: {path: values}, the last axis fastest.

    A key may be a tuple of paths that change together, and values may be a mapping
    from a label (for the run's name) to a value.
    """
    labelled = []
    for paths, values in axes.items():
        paths = (paths,) if isinstance(paths, str) else tuple(paths)
        pairs = values.items() if isinstance(values, Mapping) else [(label(v), v) for v in values]
        labelled.append([(paths, str(name), value) for name, value in pairs])
    runs = []
    for point in itertools.product(*labelled):
        changed = experiment
        for paths, _, value in point:
            for path in paths:
                changed = edit(changed, path, value)
        runs.append(Run(changed, tuple((paths[0], name) for paths, name, _ in point)))
    return unique_names(runs)


def override(run: Run, path: str, value) -> Run:
    """`edit` for a run; its name shows the new value, so that the index keeps it apart from the run without it, unless
    the field only says how it is executed."""
    axes = dict(run.axes)
    if path in axes or not is_execution(run.experiment, path):
        axes[path] = label(value)
    return Run(edit(run.experiment, path, value), tuple(axes.items()))


def is_execution(experiment: Experiment, path: str) -> bool:
    """Whether the field at `path`, or one that holds it, stays out of a stage's identity."""
    name, *names = path.split(".")
    owner = experiment.stage(name) if names else None
    for each in names:
        field = {f.name: f for f in dataclasses.fields(owner)}.get(each) if dataclasses.is_dataclass(owner) else None
        if field is None:
            return False  # `edit` says what is wrong
        if not field.metadata.get("identity", True):
            return each != "seed"  # the seed that results is part of it
        owner = getattr(owner, each)
    return False


def as_runs(found) -> tuple[Run, ...]:
    """What an experiment file may define (an Experiment, a Run, or several) as runs."""
    several = found if isinstance(found, Sequence) else (found,)
    for one in several:
        if not isinstance(one, Run | Experiment):
            raise ConfigError(f"RUNS holds {one!r}; it must be an Experiment, or the Runs that `grid` returns")
    return unique_names([Run(one) if isinstance(one, Experiment) else one for one in several])


def check_reference(where: str, ref: str, kinds, earlier: Mapping[str, Stage]) -> None:
    """Raises ConfigError unless `ref` is a folder or an earlier stage of one of these kinds."""
    name, _ = split_step(ref)
    if is_path(ref):
        return
    if name not in earlier:
        raise ConfigError(f"{where}={ref!r} is no earlier stage{nearest(name, earlier)}; a folder's name has a / in it")
    if earlier[name].kind not in kinds:
        raise ConfigError(f"{where}={ref!r} is a stage of kind {earlier[name].kind!r}; it must be {' or '.join(kinds)}")


# Fields and names -----------------------------------------------------------------------------------------------------


def edit_field(owner, names: list[str], value, path: str, experiment: Experiment):
    """`owner` with the field at the end of `names` replaced, and all that hold it rebuilt."""
    name, rest = names[0], names[1:]
    if not dataclasses.is_dataclass(owner) or name not in {f.name for f in dataclasses.fields(owner)}:
        raise ConfigError(f"unknown field {path!r}{nearest(path, addresses(experiment))}")
    hint = typing.get_type_hints(type(owner))[name]
    new = edit_field(config_or_default(getattr(owner, name), hint), rest, value, path, experiment) if rest else value
    if not rest and not isinstance(owner, Stage):
        new = conform(value, hint, path)
    return replace(owner, **{name: new})


def addresses(experiment: Experiment) -> list[str]:
    """Every path that `edit` takes."""

    def below(value, prefix):
        for f, hint in hinted_fields(type(value)):
            if (path := f"{prefix}.{f.name}") and f.name != "name":
                yield path
                if dataclasses.is_dataclass(inner := config_or_default(getattr(value, f.name), hint)):
                    yield from below(inner, path)

    return ["seed", *(path for stage in experiment.stages for path in below(stage, stage.name))]


def label(value) -> str:
    """A value in a run's name."""
    if isinstance(value, tuple | list):
        return "+".join(map(label, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value).__name__ + digest(canonical(value))[:4]
    return getattr(value, "__name__", None) or str(value)


def unique_names(runs: Sequence[Run]) -> tuple[Run, ...]:
    """The runs without repetition. Raises ConfigError when two different ones of an experiment share a name."""
    named: dict[str, Run] = {}
    for run in runs:
        if named.setdefault(run.full_name, run) != run:
            raise ConfigError(f"two runs are called {run.full_name!r}; give the axis a mapping from label to value")
    return tuple(named.values())
