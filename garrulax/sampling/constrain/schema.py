"""JSON schemas that cannot be kept: which keyword is not supported, and where."""

import re
from collections.abc import Iterator
from typing import Any

from garrulax.core.names import nearest

#: Keywords whose value is a schema, a list of schemas, or schemas by name.
_ONE = ("additionalItems", "additionalProperties", "items", "not", "if", "then", "else", "contains", "propertyNames",
        "unevaluatedItems", "unevaluatedProperties", "contentSchema")  # fmt: skip
_MANY = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_NAMED = ("$defs", "definitions", "properties", "patternProperties", "dependentSchemas", "dependencies")
#: Keywords that forbid documents, of all drafts. A misspelt one would be an annotation, which forbids nothing.
_FORBIDDING = (*_ONE, *_MANY, *_NAMED[2:], "$ref", "$dynamicRef", "$recursiveRef", "type", "enum", "const", "format",
               "pattern", "minLength", "maxLength", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum",
               "multipleOf", "required", "dependentRequired", "minProperties", "maxProperties", "minItems", "maxItems",
               "uniqueItems", "minContains", "maxContains", "contentEncoding", "contentMediaType")  # fmt: skip


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
        for key in part:
            if meant := _misspelt(key):
                return (
                    f'the keyword "{key}" at {path} is not known: write "{meant}", or "x-{key}" if it is an annotation'
                )
        if part.get("type") != "integer" and (keyword := _narrow(_bounds(part, schema, set()))):
            return f'the keyword "{keyword}" at {path} is not supported with another bound less than 1 away'
        least, required = part.get("minProperties", 0), part.get("required", ())
        if isinstance(least, int | float) and isinstance(required, list | tuple) and least > max(1, len(required)):
            return f'the keyword "minProperties" at {path} is not supported above the number of required properties'
    return None


def _misspelt(key: str) -> str | None:
    """The keyword that an unknown key of a schema seems to mean; None for a keyword, and for an annotation."""
    if key in _FORBIDDING or key.startswith("x-"):
        return None
    folded, letters = {_folded(name): name for name in _FORBIDDING}, _folded(key)
    if letters in folded:
        return folded[letters]
    # With short names or a lower cutoff, words would count as misspelt: "note" for "not", "constraints" for "contains".
    long = [name for name in folded if len(name) > 3]
    swapped = next((name for name in long if sorted(name) == sorted(letters)), "")
    return folded.get(swapped or nearest(letters, long, cutoff=0.85))


def _folded(name: str) -> str:
    """The name without what conventions of writing change: min_length, min-length and MinLength become minlength."""
    return re.sub("[_-]", "", name).casefold()


def _narrow(bounds: list[tuple[str, float]]) -> str | None:
    """The exclusive bound that is a whole number and less than 1 from an opposite bound; llguidance would allow it."""
    for keyword, bound in bounds:
        sign = {"exclusiveMinimum": 1, "exclusiveMaximum": -1}.get(keyword)
        opposite = "aximum" if keyword == "exclusiveMinimum" else "inimum"
        if sign and float(bound).is_integer() and any(
            name.endswith(opposite) and 0 < sign * (other - bound) < 1 for name, other in bounds
        ):  # fmt: skip
            return keyword
    return None


def _bounds(part: Any, root: Any, seen: set[str]) -> list[tuple[str, float]]:
    """Keywords and values of the bounds of numbers that may apply together with those of a schema."""
    if not isinstance(part, dict):
        return []
    names = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
    found = [(name, part[name]) for name in names if type(part.get(name)) in (int, float)]
    for name in ("allOf", "anyOf", "oneOf"):
        for other in part.get(name, ()) if isinstance(part.get(name), list) else ():
            found += _bounds(other, root, seen)
    reference = part.get("$ref")
    if isinstance(reference, str) and reference not in seen:
        seen.add(reference)
        for path, target in subschemas(root):
            if path == reference:
                found += _bounds(target, root, seen)
    return found


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
