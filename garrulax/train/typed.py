"""Typed reading of dataclass fields from a command line, TOML or JSON, with one-line errors that name the field."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any


def replace(instance: Any, changes: Mapping[str, Any], prefix: str = "") -> Any:
    """`instance` with fields changed. Keys may be dotted ("rope.theta"); values may be text, as on a command line.

    Raises ValueError for an unknown field, with the nearest known one, and for a value of another type; whatever the
    dataclass itself refuses is raised as it is.
    """
    hints = typing.get_type_hints(type(instance))
    values: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        name, _, rest = key.partition(".")
        if name not in {f.name for f in dataclasses.fields(instance)}:
            known = [prefix + f.name for f in dataclasses.fields(instance)]
            raise ValueError(f"unknown setting {prefix + name!r}{_nearest(prefix + name, known)}")
        if rest or isinstance(value, Mapping):
            nested.setdefault(name, {}).update({rest: value} if rest else value)
        else:
            values[name] = convert(hints[name], value, prefix + name)
    for name, inner in nested.items():
        if not dataclasses.is_dataclass(getattr(instance, name)):
            raise ValueError(f"setting {prefix + name!r} has no parts: give it one value")
        values[name] = replace(getattr(instance, name), inner, f"{prefix}{name}.")
    return dataclasses.replace(instance, **values)


def convert(hint: Any, value: Any, name: str) -> Any:
    """`value` (perhaps text) as the type `hint`: bool, int, float, str, a tuple of one of them, or a union of these."""
    if isinstance(hint, types.UnionType):
        return _one_of(typing.get_args(hint), value, name)
    if typing.get_origin(hint) is tuple:
        items = [v for v in value.split(",") if v] if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise ValueError(f"{name}={value!r} is not a list")
        return tuple(convert(typing.get_args(hint)[0], item, name) for item in items)
    if hint is bool:
        return _bool(value, name)
    if hint is str:
        return _checked(isinstance(value, str), value, name, "text")
    if isinstance(value, str):
        return _number(hint, value, name)
    whole = isinstance(value, int) and not isinstance(value, bool)
    if hint is int:
        return _checked(whole, value, name, "a whole number")
    return float(_checked(whole or isinstance(value, float), value, name, "a number"))


def _one_of(hints: tuple, value: Any, name: str) -> Any:
    if type(None) in hints and (value is None or value == "none"):
        return None
    *others, last = (h for h in hints if h is not type(None))
    for hint in others:
        try:
            return convert(hint, value, name)
        except ValueError:
            continue
    return convert(last, value, name)


def _bool(value: Any, name: str) -> bool:
    words = {"true": True, "false": False}
    return words[value] if value in words else _checked(isinstance(value, bool), value, name, "true or false")


def _number(hint: type, text: str, name: str) -> Any:
    try:
        return hint(text)
    except ValueError:
        raise ValueError(f"{name}={text!r} is not {'a whole number' if hint is int else 'a number'}") from None


def _checked(right: bool, value: Any, name: str, what: str) -> Any:
    if not right:
        raise ValueError(f"{name}={value!r} is not {what}")
    return value


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f": did you mean {close[0]!r}?" if close else f": choose from {', '.join(known)}"
