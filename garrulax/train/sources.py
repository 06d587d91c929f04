"""Names of texts in the settings: lists with commas, weights, and paths that mean the same from every folder."""

import glob
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

STDLIB = "stdlib"  # a source that needs no download: the standard library of the running Python
_WEIGHT = re.compile(r"(.+):([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|[+-]?inf|nan)(x?)")


@dataclass(frozen=True)
class Weighted:
    """A source of a mixture.

    Attributes:
        name: Of the source.
        weight: Its share of the rows, relative to the other weights; None if it has none.
        epochs: Whether the weight counts passes: 2x reads each of its rows twice as often as those of a source with 1x.
    """

    name: str
    weight: float | None = None
    epochs: bool = False


def split_weight(source: str) -> Weighted:
    """Splits "a.txt:0.7" or "a.txt:2x" into name and weight. A file of the whole name is a name without a weight."""
    match = _WEIGHT.fullmatch(source)
    if match is None or _exists(source):
        return Weighted(source)
    return Weighted(match[1], float(match[2]), bool(match[3]))


def mixture(sources: Sequence[str]) -> list[Weighted]:
    """The sources of a mixture; empty where no source has a weight, for then they are one corpus.

    Args:
        sources: As in `Settings.corpus`.

    Raises:
        ValueError: If only some sources have weights, or weights of both kinds; if one is negative or no number; or if
            all are zero.
    """
    parts = [split_weight(source) for source in sources]
    weights = [part.weight for part in parts if part.weight is not None]
    if not weights:
        return []
    listed = ",".join(sources)
    if len(weights) < len(parts):
        lacking = ", ".join(part.name for part in parts if part.weight is None)
        raise ValueError(f"corpus={listed}: {lacking} has no weight; give every source one, such as a.txt:0.7, or none")
    if len({part.epochs for part in parts}) > 1:
        raise ValueError(f"corpus={listed}: some weights are shares (0.7) and some are passes (2x); use one kind")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
        raise ValueError(f"corpus={listed}: a weight must be a number that is not negative")
    if not any(weights):
        raise ValueError(f"corpus={listed}: all weights are zero; give at least one source a positive weight")
    return parts


def split_sources(text: str) -> list[str]:
    """Splits a list such as "one.txt,two.txt" at its commas, except those in the names of files that exist.

    Args:
        text: As on a command line. The longest name that exists wins: if there is a file "notes, 2024.txt", this is it.
            Names may have weights (`split_weight`).
    """
    parts, found = text.split(","), []
    while parts:
        joined = [",".join(parts[:n]) for n in range(len(parts), 0, -1)]
        name = next((name for name in joined if _is_named(name) or _is_named(name.strip())), parts[0])
        found.append(name if _is_named(name) else name.strip())
        parts = parts[name.count(",") + 1 :]
    return [name for name in found if name]


def absolute_source(source: str) -> str:
    """A source as it is found from any folder: an absolute path or pattern, with `~` as the home folder.

    Args:
        source: Of a corpus, with or without a weight; URLs stay, and "stdlib" unless there is a file or folder of that
            name.
    """
    plain = split_weight(source).name
    return _absolute(plain) + source[len(plain) :]


def is_remote(source: str | os.PathLike) -> bool:
    """Whether a source is a URL, such as gs://bucket/folder."""
    return "://" in os.fspath(source)


def expanded(source: str | os.PathLike) -> str:
    """A path in which a leading `~` is the home folder, unless a file of just that name exists."""
    name = os.fspath(source)
    return name if is_remote(name) or os.path.exists(name) else os.path.expanduser(name)


def _absolute(source: str) -> str:
    if is_remote(source) or (source == STDLIB and not os.path.exists(STDLIB)):
        return source
    name = expanded(source)
    if os.path.isabs(name):
        return name
    if os.path.exists(name) or not glob.has_magic(name):
        return os.path.abspath(name)
    return os.path.join(glob.escape(os.getcwd()), name)  # the current folder's own name is no pattern


def _is_named(source: str) -> bool:
    return _exists(split_weight(source).name)


def _exists(name: str) -> bool:
    if not name or is_remote(name):
        return False
    return Path(expanded(name)).exists() or bool(glob.glob(expanded(name), recursive=True))
