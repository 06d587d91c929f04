"""Settings as people write them: a TOML file, and `key=value` texts on a command line."""

import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from garrulax.train.sources import expanded, split_sources


def read_changes(file: str | os.PathLike | None = None, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """The values in a settings file and in `key=value` texts, unchecked, by name. Arguments: see `read_settings`."""
    return {**_toml(file), **pairs(overrides)}


def with_lists(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Values in which a text that lists sources is a list."""
    lists = {k: split_sources(changes[k]) for k in ("corpus", "valid") if isinstance(changes.get(k), str)}
    return {**changes, **lists}


def _toml(file: str | os.PathLike | None) -> dict[str, Any]:
    if file is None:
        return {}
    path = Path(expanded(file))
    if not path.is_file():
        raise FileNotFoundError(f"no settings file {file}")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{file} is not valid TOML: {error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 (byte {error.start}): save it as UTF-8") from None


def pairs(overrides: Iterable[str]) -> dict[str, str]:
    """The values of `key=value` texts, by name. Raises ValueError for another text."""
    found = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ValueError(f"{text!r} is not like key=value")
        found[key.strip()] = value.strip()
    return found
