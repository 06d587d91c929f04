"""Reads JSON files that may be damaged or hostile: every fault is a ValueError with one clear line."""

import json
from pathlib import Path
from typing import Any

MAX_DEPTH = 32  # levels of nested lists and objects; published files have six
CONFIG_BYTES = 16_000_000  # published files have at most about 100 kB
INDEX_BYTES = 100_000_000


def read_object(path: Path, limit: int = CONFIG_BYTES, unique: bool = False) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: The file.
        limit: Largest size of the file in bytes.
        unique: Whether to refuse a key that appears twice in an object.

    Raises:
        ValueError: The file is too large, not UTF-8, not JSON, not an object, or nested too deeply.
    """
    size = path.stat().st_size
    if size > limit:
        raise ValueError(f"{path} has {size:,} bytes; such a file has at most {limit:,}")
    return parse_object(path.read_bytes(), str(path), unique)


def parse_object(content: bytes, label: str, unique: bool = False) -> dict[str, Any]:
    """The object in `content`, JSON in UTF-8; `label` names it in errors. Raises as `read_object` does."""
    try:  # utf-8-sig drops a byte order mark, which some editors write
        value = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_object_of if unique else None)
    except RecursionError:
        raise ValueError(f"{label} is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{label} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{label} is not a JSON object")
    _check_depth(value, label, MAX_DEPTH)
    return value


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The dict of key-value pairs. Raises ValueError for a key that appears twice."""
    out = dict(pairs)
    if len(out) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice[:100]!r} appears twice")
    return out


def _check_depth(value: Any, label: str, depth: int) -> None:
    if not isinstance(value, dict | list):
        return
    if not depth:
        raise ValueError(f"{label} is nested too deeply")
    for child in value.values() if isinstance(value, dict) else value:
        _check_depth(child, label, depth - 1)
