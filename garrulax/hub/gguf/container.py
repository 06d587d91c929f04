"""The header of a GGUF file: its metadata, and where its tensors lie.

A file is the magic "GGUF", a version, the numbers of tensors and of metadata entries, the entries (key, type, value),
the tensors' names, shapes, types and offsets, and after padding the data; all little-endian
(https://github.com/ggml-org/ggml, docs/gguf.md). A file may be damaged or hostile: every count is checked against the
size of the file before anything of that size is made.
"""

import dataclasses
import io
import math
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np

from garrulax.hub.files import is_file
from garrulax.hub.gguf.blocks import FORMATS, NAMES
from garrulax.hub.tensors import is_printable_name

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # they differ in files of big-endian machines alone, which are refused
HEADER_BYTES = 200_000_000  # the largest vocabularies that are published take about 20 MB
ENTRIES = 4_000_000  # most strings of a file: half a million tokens and as many merges are far below
CHUNK = 1 << 20  # bytes that are read at once
_STRING, _ARRAY, _BOOL = 8, 9, 7
#: Type of a metadata value -> numpy's type.
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "<u1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor as the header states it.

    Attributes:
        shape: Its shape, the slowest dimension first (files have the fastest first).
        kind: Number of its type, a key of `blocks.FORMATS`.
        file: The open file.
        start: Position of its first byte in the file.
    """

    shape: tuple[int, ...]
    kind: int
    file: io.FileIO
    start: int


@dataclasses.dataclass(frozen=True)
class Container:
    """The header of a GGUF file, or of the files into which one was split.

    Attributes:
        path: The file; of a split one the first.
        metadata: Key -> value. A value is an int, float, bool or str, a list of str, or an array of numbers.
        tensors: The tensors by name.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Entry]


def read_container(path: Path) -> Container:
    """The header of the GGUF file `path`; of a split one that of all its files.

    Raises:
        FileNotFoundError: One of the files of a split one is missing.
        ValueError: The file is damaged, or of a version that is not read.
    """
    found = _SPLIT.fullmatch(path.name)
    if found is None:
        return _read_file(path)
    count = int(found[3])
    if not 1 <= count <= 1000:
        raise ValueError(f"{path} says in its name that it is one of {count} files")
    paths = [path.with_name(f"{found[1]}-{number:05d}-of-{found[3]}.gguf") for number in range(1, count + 1)]
    if missing := [part.name for part in paths if not is_file(part)]:
        raise FileNotFoundError(f"{path} is one of {count} files, and {', '.join(missing[:3])} is not beside it")
    parts = [_read_file(part) for part in paths]
    tensors: dict[str, Entry] = {}
    for number, part in enumerate(parts):
        if (part.metadata.get("split.no"), part.metadata.get("split.count")) != (number, count):
            raise ValueError(f"{part.path} is not part {number + 1} of {count}, as its name says")
        if twice := tensors.keys() & part.tensors.keys():
            raise ValueError(f"{part.path} holds tensor {min(twice)}, which another of the {count} files holds too")
        tensors |= part.tensors
    return Container(paths[0], parts[0].metadata, tensors)


def _read_file(path: Path) -> Container:
    size = path.stat().st_size
    with path.open("rb") as file:
        reader = _Reader(file, path, size)
        tensors_count, entries_count = _read_counts(reader)
        metadata: dict[str, Any] = {}
        for _ in range(entries_count):
            key = reader.string("a metadata key")
            if not is_printable_name(key) or key in metadata:
                raise reader.error(f"metadata key {key[:100]!r} is {'given twice' if key in metadata else 'invalid'}")
            metadata[key] = reader.value(key)
        headers = [reader.tensor() for _ in range(tensors_count)]
        at = reader.position
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise reader.error(f"general.alignment={alignment!r} is not a power of two up to a million")
    start = -(-at // alignment) * alignment
    raw = io.FileIO(path)  # stays open: tensors are read from it
    tensors: dict[str, Entry] = {}
    for name, shape, kind, offset in headers:
        if name in tensors:
            raise reader.error(f"tensor {name} is given twice")
        if offset % alignment:
            raise reader.error(f"tensor {name} begins at {offset:,}, which is no multiple of {alignment}")
        tensors[name] = Entry(shape, kind, raw, start + offset)
    _check_places(reader, tensors, size)
    return Container(path, metadata, tensors)


def _read_counts(reader: "_Reader") -> tuple[int, int]:
    """Numbers of tensors and of metadata entries. Raises ValueError for another kind of file."""
    if reader.size < 24 or reader.take(4) != MAGIC:
        raise ValueError(f"{reader.path} is not a GGUF file: it does not begin with GGUF and a header")
    version = reader.number("<u4")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        advice = "which is a file for big-endian machines" if swapped in VERSIONS else "convert the model again"
        raise ValueError(f"{reader.path}: GGUF version {version} is not read (only 2 and 3, little-endian): {advice}")
    tensors, entries = reader.number("<u8"), reader.number("<u8")
    for what, count, least in (("tensors", tensors, 24), ("metadata entries", entries, 13)):  # least bytes of one
        if count * least > min(reader.size, HEADER_BYTES):
            raise reader.error(f"it cannot hold {count:,} {what}")
    return tensors, entries


def _check_places(reader: "_Reader", tensors: dict[str, Entry], size: int) -> None:
    """Raises ValueError for tensors that overlap or end after the file."""
    before = 0
    for name, entry in sorted(tensors.items(), key=lambda item: item[1].start):
        end = entry.start + FORMATS[entry.kind].size(entry.shape)
        if end > size:
            raise reader.error(f"tensor {name} ends at byte {end:,}, the file at {size:,} (is it half a download?)")
        if entry.start < before:
            raise reader.error(f"tensor {name} overlaps with another")
        before = end


_LENGTH = struct.Struct("<Q")


class _Reader:
    """Reads the values of a header in their order."""

    def __init__(self, file: Any, path: Path, size: int):
        self._file, self.path, self.size = file, path, size
        self._strings = 0
        self._buffer, self._at = b"", 0  # a part of the file, and how much of it has been taken
        self.position = 0

    def error(self, problem: str) -> ValueError:
        """The error of a problem in the file."""
        return ValueError(f"{self.path} is damaged: {problem}")

    def take(self, count: int) -> bytes:
        """The next `count` bytes. Raises ValueError if the header is not so long."""
        if self.position + count > min(self.size, HEADER_BYTES):
            raise self.error("its header does not end where the file does (is it half a download?)")
        if self._at + count > len(self._buffer):
            self._buffer = self._buffer[self._at :] + self._file.read(max(count, CHUNK))
            self._at = 0
        content = self._buffer[self._at : self._at + count]
        if len(content) < count:
            raise self.error("it ends inside its header (is it half a download?)")
        self._at += count
        self.position += count
        return content

    def number(self, kind: str) -> Any:
        """A number of a numpy type."""
        return np.frombuffer(self.take(int(kind[2:])), kind)[0].item()

    def string(self, what: str) -> str:
        """A string: its length in bytes, and UTF-8."""
        return self.strings(what, 1)[0]

    def strings(self, what: str, count: int) -> list[str]:
        """Several strings. A vocabulary has a hundred thousand, so those inside the buffer are cut out at once."""
        self._strings += count
        if self._strings > ENTRIES:
            raise self.error(f"it has more than {ENTRIES:,} strings")
        contents: list[bytes] = []
        while len(contents) < count:
            buffer, start = self._buffer, self._at
            while len(contents) < count and self._at + 8 <= len(buffer):
                end = self._at + 8 + _LENGTH.unpack_from(buffer, self._at)[0]
                if end > len(buffer):
                    break
                contents.append(buffer[self._at + 8 : end])
                self._at = end
            self.position += self._at - start
            if len(contents) < count:
                contents.append(self.take(_LENGTH.unpack(self.take(8))[0]))
        if self.position > HEADER_BYTES:
            raise self.error("its header does not end where the file does (is it half a download?)")
        try:
            return [content.decode("utf-8") for content in contents]
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8") from error

    def value(self, key: str) -> Any:
        """The value of a metadata entry: its type and content."""
        kind = self.number("<u4")
        if kind == _ARRAY:
            inner, count = self.number("<u4"), self.number("<u8")
            if inner == _STRING:
                if count > ENTRIES:
                    raise self.error(f"{key} has {count:,} strings")
                return self.strings(key, count)
            if inner not in _SCALARS:
                raise self.error(f"{key} is an array of the unknown type {inner}")
            dtype = np.dtype(_SCALARS[inner])
            return np.frombuffer(self.take(count * dtype.itemsize), dtype)
        if kind == _STRING:
            return self.string(key)
        if kind not in _SCALARS:
            raise self.error(f"{key} is of the unknown type {kind}")
        number = self.number(_SCALARS[kind])
        return bool(number) if kind == _BOOL else number

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, type and offset of a tensor."""
        name = self.string("the name of a tensor")
        if not is_printable_name(name):
            raise self.error(f"a tensor has the name {name[:100]!r}")
        dimensions = self.number("<u4")
        if not 1 <= dimensions <= 4:
            raise self.error(f"tensor {name} has {dimensions} dimensions")
        shape = tuple(self.number("<u8") for _ in range(dimensions))[::-1]
        kind, offset = self.number("<u4"), self.number("<u8")
        if kind not in FORMATS:
            known = ", ".join(found.name for found in FORMATS.values())
            raise ValueError(
                f"{self.path}: tensor {name} is of type {NAMES.get(kind, kind)}, which is not implemented ({known} are)"
            )
        if 0 in shape or math.prod(shape) > 1 << 48 or shape[-1] % FORMATS[kind].values:
            raise self.error(f"tensor {name} of type {FORMATS[kind].name} cannot have the shape {shape}")
        return name, shape, kind, offset
