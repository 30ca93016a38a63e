"""Checks at the door of a config: values of the right type, and error messages that name the nearest known name."""

import dataclasses
import difflib
import itertools
import operator
import types
import typing
from collections.abc import Callable
from typing import Any, Union


class ConfigError(ValueError):
    """A wrong experiment, flag or input: the message names the value and the remedy; the process exits with 2."""


def conform(value, hint, where: str):
    """`value` as the type `hint`, an int becoming a float and a list a tuple; ConfigError on anything else."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return conform_any(value, args, where)
    if origin is tuple and isinstance(value, tuple | list):
        each = itertools.repeat(args[0]) if args[1:] == (...,) else args
        return tuple(conform(v, h, f"{where}[{i}]") for i, (v, h) in enumerate(zip(value, each)))
    if dataclasses.is_dataclass(hint) and isinstance(value, hint):
        fields = hinted_fields(type(value))
        changed = {f.name: conform(getattr(value, f.name), h, f"{where}.{f.name}") for f, h in fields}
        return dataclasses.replace(value, **changed)
    if hint in (Callable, typing.Callable) or origin is Callable:
        ok = callable(value)
    elif hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif hint is int and hasattr(value, "__index__") and not isinstance(value, bool):
        return operator.index(value)
    elif hint is None or hint is type(None):
        ok = value is None
    else:
        ok = isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    if not ok:
        raise ConfigError(f"{where}={value!r} is of type {type(value).__name__}; it must be {type_name(hint)}")
    return value


def conform_any(value, hints, where: str):
    """`value` as the first of `hints` that takes it."""
    for hint in hints:
        try:
            return conform(value, hint, where)
        except ConfigError:
            continue
    expected = " or ".join(map(type_name, hints))
    raise ConfigError(f"{where}={value!r} is of type {type(value).__name__}; it must be {expected}")


def config_or_default(value, hint):
    """`value`, or where it is None and the hint is of an optional config (`MeshConfig | None`) that config as it is by default: what fields
    within it are set on."""
    configs = [each for each in typing.get_args(hint) if dataclasses.is_dataclass(each)]
    return configs[0]() if value is None and configs else value


def type_name(hint) -> str:
    """As in source: `int`, `tuple[str, ...]`, `None`."""
    plain = "None" if hint is type(None) else getattr(hint, "__name__", str(hint))
    return str(hint) if typing.get_args(hint) else plain


def nearest(word: str, known) -> str:
    """The tail of an error message: the closest known name, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known[:12]) or 'none'}"


def names_in(text: str, known) -> list[str]:
    """The names in "a,b,c"; ConfigError on one that is not in `known`."""
    names = text.split(",")
    for name in names:
        if name not in known:
            raise ConfigError(f"unknown name {name!r} in {text!r}{nearest(name, known)}")
    return names


def hinted_fields(cls):
    hints = typing.get_type_hints(cls)
    return [(f, hints[f.name]) for f in dataclasses.fields(cls)]
