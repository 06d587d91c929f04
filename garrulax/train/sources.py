"""Names of texts in the settings: lists with commas, and paths that mean the same from every folder."""

import glob
import os
from pathlib import Path

STDLIB = "stdlib"  # a source that needs no download: the standard library of the running Python


def split_sources(text: str) -> list[str]:
    """Splits a list such as "one.txt,two.txt" at its commas, except those in the names of files that exist.

    Args:
        text: As on a command line. The longest name that exists wins: if there is a file "notes, 2024.txt", this is it.
    """
    parts, found = text.split(","), []
    while parts:
        joined = [",".join(parts[:n]) for n in range(len(parts), 0, -1)]
        name = next((name for name in joined if _exists(name) or _exists(name.strip())), parts[0])
        found.append(name if _exists(name) else name.strip())
        parts = parts[name.count(",") + 1 :]
    return [name for name in found if name]


def absolute_source(source: str) -> str:
    """A source as it is found from any folder: an absolute path or pattern, with `~` as the home folder.

    Args:
        source: Of a corpus; "stdlib" stays, unless there is a file or folder of that name.
    """
    if source == STDLIB and not os.path.exists(STDLIB):
        return source
    name = expanded(source)
    if os.path.isabs(name):
        return name
    if os.path.exists(name) or not glob.has_magic(name):
        return os.path.abspath(name)
    return os.path.join(glob.escape(os.getcwd()), name)  # the current folder's own name is no pattern


def expanded(source: str | os.PathLike) -> str:
    """A path in which a leading `~` is the home folder, unless a file of just that name exists."""
    name = os.fspath(source)
    return name if os.path.exists(name) else os.path.expanduser(name)


def _exists(name: str) -> bool:
    return bool(name) and (Path(expanded(name)).exists() or bool(glob.glob(expanded(name), recursive=True)))
