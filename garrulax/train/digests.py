"""Checksums that tell whether the files of a folder are those that were written.

The digest of a file is its size and a checksum of every 64 MiB of it, about. To compute one, each part of a mebibyte is
laid out as a matrix of 64-bit integers; the sums of its columns go into a CRC-32, and so do the bytes that are left at
the end. A flipped bit changes a sum; so do lost pages and exchanged ones, since the length of a row is a prime. Missed
are changes that cancel each other in one column, such as one of 250,000 pairs of random flips in a mebibyte, and one of
2**32 others. Reading the file takes most of the time; a CRC of all bytes would take more than twice as long. It is no
protection against somebody who changes files on purpose.
"""

import contextlib
import json
import os
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from garrulax.core.disk import sync

NAME = "digests.json"
_CHECKSUM = "checksum"  # the key of a sealed object
_VERSION = 2  # of the digests; increase it when those of the same bytes change
_COLUMNS = 2053  # a prime: pages that are exchanged do not lie in the same columns
_PIECE = 64 * _COLUMNS * 8  # bytes of a matrix
_BLOCK = 64 * _PIECE  # bytes that one thread reads
_THREADS = 4


class DamagedError(ValueError):
    """A file is not the one that was written: its bytes changed, or it is missing."""


def write(folder: Path, content: Mapping[str, Any] | None = None, name: str = NAME) -> None:
    """Waits until all files of a folder are on disk, and writes their digests and `content` into a file beside them.

    Args:
        folder: Must not change meanwhile.
        content: A JSON object to keep with them.
        name: Of the file.
    """
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p != folder / name)
    for path in names:
        sync(folder / path)
    files = dict(zip(names, of_files(folder, names), strict=True))
    record = {**(content or {}), "digests": _VERSION, "files": files}
    write_durably(folder / name, sealed(record))
    for inner in {
        folder,
        *(parent for path in names for parent in (folder / path).parents if folder in parent.parents),
    }:
        sync(inner)


def read(folder: Path, name: str = NAME) -> dict[str, Any]:
    """The content of the file that `write` wrote; "files" has the digests. Does not read the other files.

    Raises:
        DamagedError: If it is missing or damaged.
        ValueError: If another version of this program wrote it.
    """
    record = read_sealed(folder / name)
    if record.get("digests") != _VERSION:
        raise ValueError(f"{folder / name} was written by another version of garrulax: use that one for this folder")
    return record


def check(folder: Path, part: int = 0, parts: int = 1, name: str = NAME) -> None:
    """Compares the files of a folder with their digests; files without one are ignored.

    Args:
        folder: On which `write` was called.
        part: Index of the part of the files to read, so that several processes can share the work.
        parts: Number of parts.
        name: Of the file with the digests.

    Raises:
        DamagedError: It names the file.
    """
    files = read(folder, name)["files"]
    paths = sorted(files, key=lambda path: (-_size(files[path]), path))[part::parts]
    for path, found in zip(paths, of_files(folder, paths), strict=True):
        if found != files[path]:
            raise DamagedError(f"{folder / path} {_difference(found, files[path])}")


def of_files(folder: Path, names: Iterable[str]) -> list[str]:
    """The digest of each file: its size, and the checksum of each of its blocks. "missing" if it cannot be read.

    Args:
        folder: Of the files.
        names: Of the files, relative to the folder.
    """
    paths = [folder / name for name in names]
    sizes = [path.stat().st_size if path.is_file() else -1 for path in paths]
    with ThreadPoolExecutor(_THREADS) as threads:
        blocks = [[threads.submit(_checksum, path, start) for start in range(0, size, _BLOCK)]
                  for path, size in zip(paths, sizes, strict=True)]  # fmt: skip
        return [_digest(size, [b.result() for b in found]) for size, found in zip(sizes, blocks, strict=True)]


def sealed(record: Mapping[str, Any]) -> str:
    """A JSON object as a text that ends with a checksum of its content."""
    return json.dumps({**record, _CHECKSUM: _of_object(record)}, indent=2) + "\n"


def read_sealed(path: Path) -> dict[str, Any]:
    """The JSON object in a file that `sealed` made the text of, without the checksum.

    Raises:
        DamagedError: If the file is missing, is no JSON object, or has another content than was written.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(f"{path} cannot be read ({str(error) or type(error).__name__})") from None
    if not isinstance(record, dict) or _CHECKSUM not in record:
        raise DamagedError(f"{path} has no checksum")
    checksum = record.pop(_CHECKSUM)
    if checksum != _of_object(record):
        raise DamagedError(f"{path} is not as it was written (its checksum differs)")
    return record


def write_durably(path: Path, text: str) -> None:
    """Replaces a file at once: whoever reads it, also after a crash, gets the old text or the new one.

    Raises:
        OSError: If it cannot be written, such as on a full disk; the old file is as it was.
    """
    temporary = path.with_name(f".{path.name}.writing")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    sync(path.parent)


def _checksum(path: Path, start: int) -> int | None:
    checksum, piece = 0, memoryview(bytearray(_PIECE))
    matrix = np.frombuffer(piece, "<u8").reshape(-1, _COLUMNS)
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            for _ in range(_BLOCK // _PIECE):
                filled = 0
                while filled < _PIECE and (count := file.readinto(piece[filled:])):
                    filled += count
                if filled < _PIECE:
                    return zlib.crc32(piece[:filled], checksum)
                checksum = zlib.crc32(np.add.reduce(matrix, axis=0), checksum)
    except OSError:
        return None
    return checksum


def _digest(size: int, blocks: list[int | None]) -> str:
    known = [block for block in blocks if block is not None]
    if size < 0 or len(known) < len(blocks):
        return "missing"
    return f"{size}:" + ",".join(f"{block:08x}" for block in known)


def _size(digest: Any) -> int:
    text = str(digest).partition(":")[0]
    return int(text) if text.isdigit() else 0


def _difference(found: str, wanted: str) -> str:
    if found == "missing":
        return "is missing or cannot be read"
    if _size(found) != _size(wanted):
        return f"has {_size(found):,} bytes instead of {_size(wanted):,}"
    return "has other bytes than were written"


def _of_object(record: Mapping[str, Any]) -> str:
    text = json.dumps(json.loads(json.dumps(record)), sort_keys=True)  # tuples are lists in what is read
    return f"{zlib.crc32(text.encode()):08x}"
