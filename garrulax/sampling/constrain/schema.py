"""JSON schemas that cannot be kept: which keyword is not supported, and where."""

import re
from collections.abc import Iterator
from typing import Any

#: Keywords whose value is a schema, a list of schemas, or schemas by name.
_ONE = ("additionalItems", "additionalProperties", "items", "not", "if", "then", "else", "contains", "propertyNames",
        "unevaluatedItems", "unevaluatedProperties", "contentSchema")  # fmt: skip
_MANY = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_NAMED = ("$defs", "definitions", "properties", "patternProperties", "dependentSchemas", "dependencies")


def subschemas(schema: Any, path: str = "#") -> Iterator[tuple[str, Any]]:
    """Each schema in a schema, with its path as a JSON pointer; the schema itself first."""
    yield path, schema
    if not isinstance(schema, dict):
        return
    for key, value in schema.items():
        here = f"{path}/{_escaped(key)}"
        if key in _ONE and isinstance(value, dict | bool):
            yield from subschemas(value, here)
        elif key in _MANY and isinstance(value, list):
            for i, entry in enumerate(value):
                yield from subschemas(entry, f"{here}/{i}")
        elif key in _NAMED and isinstance(value, dict):
            for name, entry in value.items():
                yield from subschemas(entry, f"{here}/{_escaped(name)}")


def refusal(schema: Any) -> str | None:
    """Why a schema cannot be kept, beyond what llguidance finds itself; None if it can.

    Documents may repeat a key that `properties` does not list, and a repeated key counts once.
    """
    for path, part in subschemas(schema):
        if not isinstance(part, dict):
            continue
        least, required = part.get("minProperties", 0), part.get("required", ())
        if isinstance(least, int | float) and isinstance(required, list | tuple) and least > max(1, len(required)):
            return f'the keyword "minProperties" at {path} is not supported above the number of required properties'
    return None


def explained(message: str, schema: Any) -> str:
    """llguidance's message about a schema, with the path of the keyword that it names."""
    if named := re.match(r'Unimplemented keys: \["([^"]*)"', message):
        paths = [path for path, part in subschemas(schema) if isinstance(part, dict) and named[1] in part]
        return f'the keyword "{named[1]}"{f" at {paths[0]}" if paths else ""} is not supported'
    if named := re.match(r"Unknown format: (.*)", message):
        paths = [path for path, part in subschemas(schema) if isinstance(part, dict) and part.get("format") == named[1]]
        return f'the format "{named[1]}"{f" at {paths[0]}" if paths else ""} is not supported'
    if "is not present in a registry" in message:
        return f"{message.split(' is not ')[0]} lies outside of the schema: only references within it are followed"
    if message.startswith("oneOf constraints"):
        paths = [path for path, part in subschemas(schema) if isinstance(part, dict) and "oneOf" in part]
        where = paths[0] if paths else "#"
        return f'the keyword "oneOf" at {where} is only supported where each schema excludes the others'
    if message.startswith("Unsatisfiable schema"):
        return f"nothing satisfies this schema: {message.removeprefix('Unsatisfiable schema: ')}"
    return message


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")
