"""JSON files from strangers: one clear error for whatever is wrong with them."""

import json
from pathlib import Path
from typing import Any

DEPTH = 32  # of nested lists and objects; published files have six
CONFIG_BYTES = 16_000_000  # published ones have at most some 100 kB
INDEX_BYTES = 100_000_000


def read_object(path: Path, limit: int = CONFIG_BYTES, unique: bool = False) -> dict[str, Any]:
    """The object in a JSON file of at most `limit` bytes. unique: refuse a key that stands twice.

    Raises ValueError, in one line, for a file that is larger, is not UTF-8, not JSON, no object, or nested too deeply.
    """
    size = path.stat().st_size
    if size > limit:
        raise ValueError(f"{path} has {size:,} bytes; such a file has at most {limit:,}")
    return parse_object(path.read_bytes(), str(path), unique)


def parse_object(content: bytes, what: str, unique: bool = False) -> dict[str, Any]:
    """The object that `content` holds as JSON in UTF-8; `what` names it in errors. Raises as `read_object` does."""
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_unique if unique else None)
    except RecursionError:
        raise ValueError(f"{what} is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{what} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{what} is not a JSON object")
    _check_depth(value, what, DEPTH)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice[:100]!r} stands twice")
    return out


def _check_depth(value: Any, what: str, depth: int) -> None:
    if not isinstance(value, dict | list):
        return
    if not depth:
        raise ValueError(f"{what} is nested too deeply")
    for child in value.values() if isinstance(value, dict) else value:
        _check_depth(child, what, depth - 1)
