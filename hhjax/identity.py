"""What makes two configs the same: canonical JSON of values, functions and files, and its sha256."""

import ast
import dataclasses
import functools
import hashlib
import inspect
import json
import math
import os
import re
import textwrap
import types
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hhjax.fields import ConfigError


def digest(value) -> str:
    """The first ten hex digits of sha256 over canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, read once while its size and time stay the same."""
    stat = path.stat()
    return digest_once(path.absolute(), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=None)
def digest_once(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def folder_digest(path: Path) -> str:
    """Ten hex digits for a file, or for all files below a folder with their names."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return digest([[str(p.relative_to(path)) if path.is_dir() else "", file_digest(p)] for p in files])


def identity_fields(value):
    return [f for f in dataclasses.fields(value) if f.metadata.get("identity", True)]


class Sources(NamedTuple):
    """What an identity says of functions. found: label -> source, or canonical value of what a function uses; labels: id of a function, class
    or module -> its label, which is its name, numbered where several have one."""

    found: dict
    labels: dict


def canonical(value, user=None, sources: Sources | None = None):
    """Plain JSON values for a config value; ConfigError for what has no stable text. user, sources: the function that uses the value, and
    what was collected for it so far: functions within the value are named, and their sources go there."""
    within = functools.partial(canonical, user=user, sources=sources)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: within(getattr(value, f.name)) for f in identity_fields(value)}
    if isinstance(value, tuple | list):
        return [within(v) for v in value]
    if isinstance(value, Mapping) and all(isinstance(k, str | int | float) for k in value):
        return {str(k): within(v) for k, v in sorted(value.items())}
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)  # JSON has no word for it
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, os.PathLike | np.dtype):
        return str(value)
    if isinstance(value, functools.partial):
        return {"partial": within(value.func), "args": within(value.args), "keywords": within(value.keywords)}
    if isinstance(value, types.MethodType):
        return {"method": within(value.__func__), "of": within(value.__self__)}
    if isinstance(value, types.ModuleType) or (callable(value) and hasattr(inspect.unwrap(value), "__name__")):
        return canonical_function(value) if user is None else name_of(value, user, sources)
    if hasattr(value, "dtype") and hasattr(value, "__array__"):
        array = np.asarray(value)
        return {"dtype": str(array.dtype), "shape": list(array.shape), "sha256": hashlib.sha256(array.tobytes()).hexdigest()}
    raise ConfigError(f"{value!r} cannot be part of a stage's identity; use numbers, text, tuples, dataclasses or functions")


def canonical_function(fn) -> dict:
    """A function's code without comments and docstrings, and whatever of its own folder and closure it uses.

    So a renamed variable is a new loss and a reworded comment is not; a changed helper, default or constant beside
    it counts. Functions imported from elsewhere count by name: the commit is in env.json.
    """
    sources = Sources({}, {})
    collect(inspect.unwrap(fn), sources)
    return dict(sorted(sources.found.items()))


def collect(fn, sources: Sources) -> str:
    """The label of a function, class or module, whose source is added to `sources`, with those of the functions, classes and modules beside
    it that it names, the names of those from elsewhere, and the values of its defaults and of the globals and closure variables it uses.
    Raises ConfigError on a value that has no stable text."""
    if id(fn) in sources.labels:
        return sources.labels[id(fn)]
    same = sum(label.partition("#")[0] == full_name(fn) for label in sources.labels.values())
    label = sources.labels[id(fn)] = f"{full_name(fn)}#{same}" if same else full_name(fn)
    sources.found[label] = code_of(fn)
    if isinstance(fn, types.FunctionType):
        names = set(re.findall(r"[A-Za-z_]\w*", sources.found[label]))
        used = {n: fn.__globals__[n] for n in names if n in fn.__globals__ and not n.startswith("__")}
        used |= dict(inspect.getclosurevars(fn).nonlocals)
        used |= {f"{p.name}=": p.default for p in inspect.signature(fn).parameters.values() if p.default is not p.empty}
        for name in sorted(used):  # in one order in every process: of equal names the first has no number
            sources.found[f"{label}.{name}"] = canonical(used[name], fn, sources)
    return label


def name_of(value, user, sources: Sources):
    """What stands for a function, class or module that the function `user` uses: its label where it lies in the same folder; where it lies
    elsewhere its name and package alone, since libraries move things, with the plain values that it closes over."""
    value = inspect.unwrap(value) if callable(value) else value
    if folder(value) == folder(user):
        return collect(value, sources)
    package = (getattr(value, "__module__", None) or value.__name__).split(".")[0]
    named = f"{package}: {getattr(value, '__qualname__', value.__name__)}"
    closed = inspect.getclosurevars(value).nonlocals if isinstance(value, types.FunctionType) else {}
    plain = {name: x for name, x in closed.items() if isinstance(x, bool | int | float | str)}
    return {named: canonical(plain)} if plain else named


@functools.lru_cache(maxsize=None)  # a sweep asks for the same few functions thousands of times
def code_of(value) -> str:
    """The source of a function, class or module in canonical layout. Raises ConfigError where there is none to read."""
    return strip_comments(source_of(value))


def full_name(value) -> str:
    return ".".join(filter(None, [getattr(value, "__module__", None), getattr(value, "__qualname__", value.__name__)]))


def source_of(value) -> str:
    """Raises ConfigError where there is none to read, or where it does not say which of two lambdas is meant."""
    try:
        source = textwrap.dedent(inspect.getsource(value))
    except (OSError, TypeError):
        source = ""
    if not source or (getattr(value, "__name__", "") == "<lambda>" and source.count("lambda") > 1):
        raise ConfigError(f"the source of {value!r} cannot be read; define it with `def` in the experiment's file")
    return source


def folder(value) -> Path | None:
    """Where the file of a function, class or module is; None for what has no file."""
    try:
        return Path(inspect.getfile(value)).absolute().parent
    except (OSError, TypeError):
        return None


def strip_comments(source: str) -> str:
    """Python source in one canonical layout, without comments and docstrings; as it is where it does not parse."""
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a lambda in the middle of a call
        return source.strip()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)
