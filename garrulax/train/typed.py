"""Reads dataclass fields from a command line, TOML or JSON. Errors are one line and name the field."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from garrulax.core.names import nearest

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


def replace(instance: T, changes: Mapping[str, Any], prefix: str = "") -> T:
    """A copy of a dataclass instance with some fields changed.

    Args:
        instance: Of a dataclass.
        changes: New values by field. Keys may be dotted ("rope.theta"); values may be texts, as on a command line.
        prefix: Put before the names of fields in errors, such as "model.".

    Raises:
        ValueError: For an unknown field, naming the nearest known one, and for a value of another type. Errors of the
            dataclass's own checks are passed on.
    """
    hints = typing.get_type_hints(type(instance))
    values: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        name, _, rest = key.partition(".")
        if name not in {f.name for f in dataclasses.fields(instance)}:
            known = [prefix + f.name for f in dataclasses.fields(instance)]
            close = nearest(prefix + name, known)
            hint = f"did you mean {close!r}?" if close else f"choose from {', '.join(known)}"
            raise ValueError(f"unknown setting {prefix + name!r}: {hint}")
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
    """Converts a value, such as a text from a command line, to the type of a field.

    Args:
        hint: bool, int, float, str, a tuple of one of them, or a union of these.
        value: To convert.
        name: Of the field, for errors.

    Raises:
        ValueError: If the value is not of that type.
    """
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
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if hint is int:
        return _checked(is_int, value, name, "a whole number")
    return float(_checked(is_int or isinstance(value, float), value, name, "a number"))


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


def _checked(valid: bool, value: Any, name: str, expected: str) -> Any:
    if not valid:
        raise ValueError(f"{name}={value!r} is not {expected}")
    return value
