"""From an experiment file and a command line to runs: the file's RUNS, and flags for every field of every stage."""

import contextlib
import dataclasses
import fnmatch
import importlib.util
import inspect
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from hhjax.experiment import Run, as_runs, override
from hhjax.fields import ConfigError, config_or_default, nearest

# A bool of a stage takes a value, as every --STAGE.path does; a top-level bool is a switch.
VALUED = tyro.conf.FlagConversionOff
SWITCHES = (tyro.conf.FlagCreatePairsOff,)


@dataclass(frozen=True)
class LaunchConfig:
    """How an experiment file is run. Every stage's fields can be set too: --STAGE.path VALUE."""

    only: str = "*"
    """Runs whose name matches this pattern."""
    stage: str | None = None
    """This stage alone; what it needs must be done (sweep: this stage and what it needs)."""
    out: str = "runs"
    """Where run directories are: a folder, or gs://BUCKET/PREFIX (needs gcsfs)."""
    checkpoints: str | None = None
    """Where checkpoints are, if not in the run directories: a folder, or gs://BUCKET/PREFIX (needs gcsfs)."""
    seed: int | None = None
    """Replaces the experiment's seed."""
    data_dir: Path | None = None
    """The data folder; otherwise $HHJAX_DATA, otherwise ./data."""
    jobs: int = 1
    """Processes that share the stages on this machine."""
    share: bool = False
    """Take whatever stage is ready and nobody else is at: for several processes, or machines, of one command."""
    fast: bool = False
    """A small version of the experiment, where the file has one."""
    dry_run: bool = False
    """Show shapes, parameters, FLOPs and memory (sweep: what would be started), and run nothing."""
    print_config: bool = False
    """Show every stage's config and folder, and run nothing."""
    heartbeat_timeout_s: int = 30
    """Seconds of silence after which a peer counts as lost."""


class Command(NamedTuple):
    """A parsed command line. file: the experiment file; argv: all after the subcommand."""

    file: Path
    launch: LaunchConfig
    runs: tuple[Run, ...]
    argv: tuple[str, ...]


def parse(argv: Sequence[str], prog: str, extra: type | None = None) -> tuple[Command, Any]:
    """FILE and its flags -> the command, and an instance of the dataclass `extra` (more top-level flags) or None.

    tyro ends the process with 2 on a flag that does not exist, naming the nearest. Raises
    ConfigError on what is wrong with the file or the values.
    """
    own = [LaunchConfig, *([extra] if extra else [])]
    file, rest = experiment_file(argv, prog, own)
    module = load_file(file)
    options = file_options(module)
    top = [f for cls in (*own, options) for f in plain_fields(cls) if f[0] != "fast" or cls is LaunchConfig]
    # Which stages there are may depend on the file's own flags, so those are read first.
    known = make_dataclass("Flags", top)
    name = f"{prog} {file}"
    early, _ = tyro.cli(known, args=without_help(rest), prog=name, config=SWITCHES, return_unknown_args=True)
    found = as_runs(module.RUNS if hasattr(module, "RUNS") else module.runs(**picked(options, early)))
    if not found:
        raise ConfigError(f"{file} defines no runs")
    first = found[0].experiment
    stages = [(s.name, cls := flags_class(s), field(default_factory=cls)) for s in first.stages]
    if rest != without_help(rest):
        print(module.__doc__ or "")  # tyro would set it as one paragraph
    flags = tyro.cli(make_dataclass("Flags", top + stages), args=rest, prog=name, description="", config=SWITCHES)
    launch = LaunchConfig(**picked(LaunchConfig, flags))
    if launch.jobs < 1:
        raise ConfigError(f"--jobs {launch.jobs}; give at least 1")
    if launch.fast and hasattr(module, "RUNS"):
        raise ConfigError(f"{file} has no fast version: it defines RUNS; --fast needs a function `runs(fast)`")
    changes = {path: value_at(flags, path) for path in given_paths(rest)}
    changes |= {"seed": launch.seed} if launch.seed is not None else {}
    runs = tuple(changed(r, changes) for r in found)
    command = Command(file, launch, select(as_runs(runs), launch.only), tuple(argv))
    return command, extra(**picked(extra, flags)) if extra else None


def load_file(path: Path) -> types.ModuleType:
    """The experiment file as a module, its folder first on sys.path. Raises ConfigError unless it defines runs, and where it imports what
    is not there."""
    sys.path.insert(0, str(path.parent.absolute()))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{path} imports {error.name!r}, which is neither installed nor in {path.parent.absolute()}") from error
    if not hasattr(module, "RUNS") and not callable(getattr(module, "runs", None)):
        raise ConfigError(f"{path} defines neither RUNS nor a function `runs`; RUNS may be an Experiment or grid(...)")
    return module


def modules_beside(path: Path) -> list[Path]:
    """The files of all modules that were imported from the experiment file's folder, itself left out."""
    files = {Path(m.__file__).absolute() for m in list(sys.modules.values()) if getattr(m, "__file__", None)}
    beside = (f for f in files if f.parent == path.parent.absolute() and f != path.absolute())
    return sorted(f for f in beside if f.suffix == ".py" and f.is_file())  # some modules name files that never were


def select(runs: tuple[Run, ...], pattern: str) -> tuple[Run, ...]:
    """The runs whose name, or EXPERIMENT:name, or value along an axis (such as 52B) matches. Raises ConfigError where none does."""
    names = lambda r: (r.name, r.full_name, *(label for _, label in r.axes))  # noqa: E731
    chosen = tuple(r for r in runs if any(fnmatch.fnmatchcase(n, pattern) for n in names(r)))
    if not chosen:
        raise ConfigError(f"--only {pattern!r} matches no run{nearest(pattern, [r.full_name for r in runs])}")
    return chosen


def changed(run: Run, changes: dict) -> Run:
    """The run with every change made. A stage that this run does not have is an error, named by `edit`."""
    for path, value in changes.items():
        run = override(run, path, value)
    return run


# Helpers --------------------------------------------------------------------------------------------------------------


def experiment_file(argv: Sequence[str], prog: str, own: Sequence[type]) -> tuple[Path, list[str]]:
    """The first argument as a file, and the rest. Where help is asked for without one, lists the flags of the classes `own`, which
    every file has, and ends the process with 0."""
    if argv and argv[0] in ("-h", "--help"):
        print(f"FILE is an experiment file, such as experiments/pm_hh.py; its stages have flags of their own: `{prog} FILE --help` lists them.\n")
        every = make_dataclass("Flags", [f for cls in own for f in plain_fields(cls)])
        tyro.cli(every, args=["--help"], prog=f"{prog} FILE", description="", config=SWITCHES)
    if not argv or argv[0].startswith("-"):
        raise ConfigError(f"usage: {prog} FILE [flags]; `{prog} FILE --help` lists the flags of an experiment file")
    if not Path(argv[0]).is_file() or Path(argv[0]).suffix != ".py":
        what = "is no Python file" if Path(argv[0]).exists() else "does not exist"
        raise ConfigError(f"{argv[0]!r} {what}; give the path of an experiment file, such as experiments/pm_hh.py")
    return Path(argv[0]), list(argv[1:])


def without_help(args: list[str]) -> list[str]:
    return [a for a in args if a not in ("-h", "--help")]


def file_options(module) -> type:
    """The keyword arguments of the file's `runs` as a dataclass. Raises ConfigError on one without a default."""
    if hasattr(module, "RUNS"):
        return make_dataclass("FileOptions", [])
    parameters = inspect.signature(module.runs).parameters.values()
    for p in parameters:
        if p.default is p.empty:
            raise ConfigError(f"runs({p.name}) has no default; give it one, so that it can become a flag")
    hints = typing.get_type_hints(module.runs)
    fields = [(p.name, hints.get(p.name, type(p.default)), field(default=p.default)) for p in parameters]
    return make_dataclass("FileOptions", fields, frozen=True)


def flags_class(value) -> type:
    """A dataclass with the fields of a stage (or component config) that a command line can set, as they are now."""
    hints, fields = typing.get_type_hints(type(value)), []
    for f in dataclasses.fields(value):
        current = config_or_default(getattr(value, f.name), hints[f.name])
        if f.name == "name" or callable(current):
            continue
        if dataclasses.is_dataclass(current):
            cls = flags_class(current)
            fields.append((f.name, cls, field(default_factory=cls)))
        else:
            hint = type(current) if hints[f.name] is Any else hints[f.name]
            fields.append((f.name, Annotated[hint, VALUED], field(default=current)))
    doc = (inspect.getdoc(type(value)) or "").split("\n\n")[0]
    return make_dataclass(type(value).__name__, fields, frozen=True, namespace={"__doc__": doc})


def plain_fields(cls) -> list[tuple]:
    hints = typing.get_type_hints(cls)
    helps = attribute_docs(cls)
    return [
        (f.name, Annotated[hints[f.name], tyro.conf.arg(help=helps.get(f.name))], field(default=f.default))
        for f in dataclasses.fields(cls)
    ]


def attribute_docs(cls) -> dict[str, str]:
    """Field name -> the text below it in the source of the class, or of one that it extends."""
    lines = []
    for each in reversed(cls.__mro__):
        with contextlib.suppress(OSError, TypeError):
            lines += inspect.getsource(each).splitlines()
    pairs = zip(lines, lines[1:])
    return {a.split(":")[0].strip(): b.strip().strip('"') for a, b in pairs if b.strip().startswith('"""') and ":" in a}


def picked(cls, flags) -> dict:
    """The values of `flags` that are fields of `cls`."""
    return {f.name: getattr(flags, f.name) for f in dataclasses.fields(cls)}


def given_paths(args: Sequence[str]) -> list[str]:
    """The stage paths that a command line sets: `--pm.optim.lr 1e-4` -> pm.optim.lr."""
    names = (a[2:].partition("=")[0] for a in args if a.startswith("--"))
    return [n.replace("-", "_") for n in names if "." in n]


def value_at(flags, path: str):
    for name in path.split("."):
        flags = getattr(flags, name)
    return flags
