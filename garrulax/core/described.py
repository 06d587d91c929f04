"""Texts that say exactly what a static argument of a program is, the same in every process."""

import dataclasses
import functools
import types
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

PACKAGES = ("garrulax", "jax", "jaxlib", "numpy", "builtins")  # whose functions and classes their names describe


class NotDescribable(ValueError):
    """A value is, or holds, something that its name and its parts do not describe, such as a function of the user."""


def describe(value: Any) -> str:
    """A text that two values share only if programs that were traced with them are the same.

    Functions and classes are described by their names and by the values that they enclose. So the text holds for one
    version of the packages in which they are written.

    Args:
        value: None, a number, a text, a dtype, an array, a class or a function of `PACKAGES`, or a tuple, list, set,
            dict or dataclass of these.

    Raises:
        NotDescribable: It is something else, or of another package.

    Example:
        >>> from garrulax.core.described import describe
        >>> describe({"rows": (2, 4), "dtype": None})
        "dict(str('rows'): builtins.tuple(int(2), int(4)), str('dtype'): None)"
    """
    if value is None or value is Ellipsis:
        return repr(value)
    if isinstance(value, bool | int | float | complex | str | bytes | np.dtype | np.generic):
        return f"{type(value).__name__}({value!r})"
    if isinstance(value, np.ndarray):
        return f"array({value.dtype}, {value.shape}, {value.tobytes().hex()})"
    if isinstance(value, Mapping):
        inside = (f"{describe(key)}: {describe(x)}" for key, x in value.items())
        return f"{type(value).__name__}({', '.join(inside)})"
    if isinstance(value, set | frozenset):
        return f"set({', '.join(sorted(map(describe, value)))})"
    if isinstance(value, functools.partial):
        return f"partial({_all((value.func, value.args, value.keywords))})"
    if isinstance(value, type):
        return _name(value)
    if isinstance(value, tuple | list):
        return f"{_name(type(value))}({_all(value)})"
    if dataclasses.is_dataclass(value):
        return f"{_name(type(value))}({_all(getattr(value, field.name) for field in dataclasses.fields(value))})"
    return _function(value)


def describe_tree(tree: jax.tree_util.PyTreeDef) -> str:
    """`describe` of the structure of a tree: its nodes and their static parts."""
    node = tree.node_data()
    if node is None:
        return "*" if tree.num_leaves else "None"
    kind, static = node
    return f"{_name(kind)}({describe(static)}; {', '.join(map(describe_tree, tree.children()))})"


def _all(values: Iterable[Any]) -> str:
    return ", ".join(map(describe, values))


def _function(value: Any) -> str:
    """A function by its name, its place, and what it encloses."""
    function = getattr(value, "__wrapped__", value)  # of what jax.jit returns
    if isinstance(function, types.BuiltinFunctionType):
        return _name(function)
    if not isinstance(function, types.FunctionType):
        raise NotDescribable(f"{type(value).__qualname__} is no function, number, text or dataclass")
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    inside = (*cells, function.__defaults__, function.__kwdefaults__)
    return f"{_name(function)}:{function.__code__.co_firstlineno}({_all(inside)})"


def _name(thing: Any) -> str:
    module = thing.__module__ or "builtins"
    if module.partition(".")[0] not in PACKAGES:
        raise NotDescribable(f"{module}.{thing.__qualname__} may be another one in the next process")
    return f"{module}.{thing.__qualname__}"
