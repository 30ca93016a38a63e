"""What makes two configs the same: canonical JSON of values, functions and files, and its sha256."""

import ast
import dataclasses
import functools
import hashlib
import inspect
import json
import re
import textwrap
import types
from collections.abc import Mapping
from pathlib import Path

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


def canonical(value):
    """Plain JSON values for a config value; ConfigError for what has no stable text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: canonical(getattr(value, f.name)) for f in identity_fields(value)}
    if isinstance(value, tuple | list):
        return [canonical(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): canonical(v) for k, v in sorted(value.items())}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if callable(value):
        return canonical_function(value)
    if hasattr(value, "dtype") and hasattr(value, "__array__"):
        array = np.asarray(value)
        return {"dtype": str(array.dtype), "shape": list(array.shape), "sha256": hashlib.sha256(array.tobytes()).hexdigest()}
    raise ConfigError(f"{value!r} cannot be part of a stage's identity; use numbers, text, tuples or dataclasses")


def canonical_function(fn) -> dict:
    """A function's code without comments and docstrings, and whatever of its own folder and closure it uses.

    So a renamed variable is a new loss and a reworded comment is not; a changed helper or constant beside
    it counts. Functions imported from elsewhere count by name: the commit is in env.json.
    """
    return dict(sorted(collect_sources(fn, {}).items()))


def collect_sources(fn, found: dict) -> dict:
    """Adds to `found` the source of `fn`, of the functions, classes and modules beside it that it names, and the
    values of the globals and closure variables it uses. Raises ConfigError on a value that has no stable text."""
    fn = inspect.unwrap(fn)
    found[full_name(fn)] = code_of(fn)
    if not isinstance(fn, types.FunctionType):
        return found
    names = set(re.findall(r"[A-Za-z_]\w*", found[full_name(fn)]))
    used = {n: fn.__globals__[n] for n in names if n in fn.__globals__ and not n.startswith("__")}
    for name, value in (used | dict(inspect.getclosurevars(fn).nonlocals)).items():
        value = inspect.unwrap(value) if callable(value) else value
        if isinstance(value, types.FunctionType | types.ModuleType | type):
            if folder(value) == folder(fn) and full_name(value) not in found:
                collect_sources(value, found)
        elif not callable(value):  # what is callable still belongs to a library
            found[f"{full_name(fn)}.{name}"] = canonical(value)
    return found


@functools.lru_cache(maxsize=None)  # a sweep asks for the same few functions thousands of times
def code_of(value) -> str:
    """The source of a function, class or module in canonical layout. Raises ConfigError where there is none to read."""
    return strip_comments(source_of(value))


def full_name(value) -> str:
    return ".".join(filter(None, [getattr(value, "__module__", None), getattr(value, "__qualname__", value.__name__)]))


def source_of(value) -> str:
    """Raises ConfigError where there is none to read."""
    try:
        return textwrap.dedent(inspect.getsource(value))
    except (OSError, TypeError):
        message = f"the source of {value!r} cannot be read; define it with `def` in the experiment's file"
        raise ConfigError(message) from None


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
