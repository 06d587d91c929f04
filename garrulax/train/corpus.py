"""A corpus: text on disk as a sequence of documents, with a fixed held-out part.

A corpus reads its files again in every iteration and never has the whole text in memory. The choice of the held-out
part depends on the text alone, so it is the same on every machine and in every process.
"""

import glob
import gzip
import hashlib
import json
import lzma
import os
import sysconfig
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from garrulax.train.sources import STDLIB, expanded

Split = Literal["train", "valid"]
_NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_LONGEST = 2**26  # bytes; a longer plain file is read as several documents, to bound the memory
_LONGEST_LINE = 2**20  # bytes; a document that is cut goes on to the end of its line, but not further than this
_LONGEST_RECORD = 2**28  # bytes of a line of JSONL
_BOM = b"\xef\xbb\xbf"  # the byte order mark in UTF-8, which some editors write at the start of a file
_TAIL = 0.10  # share of every document that is held out if whole documents cannot be


@dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        name: The source: `file`, or `file:line` for JSONL.
        text: The content.
    """

    name: str
    text: str


@dataclass(frozen=True)
class _Scan:
    """The result of one pass over all documents."""

    hash: str
    documents: int
    bytes: int
    threshold: int | None  # documents with a smaller or equal key are held out; None: the tail of every document is
    max_bytes: float  # larger documents are never held out


class Corpus:
    """Documents from files, folders and globs.

    Args:
        sources: Paths of files, folders (all files in them, recursively, except hidden ones) or glob patterns (`**`
            works; `~` is the home folder); or "stdlib". A `.jsonl` file has one document a line, in the field `text`;
            a line has at most 256 MiB. Any other file is UTF-8 text and is one document, or several if it is longer
            than 64 MiB: cut at the end of a line, or within one that is longer than 1 MiB. Each of them may be
            compressed as `.gz`. A byte order mark is left out. Documents come in the order of the sources, and sorted
            by path within a folder or glob.
        valid: Sources of the held-out text. If None, documents of `sources` are held out: those with the smallest
            hashes, until they make up `fraction` of the bytes; a larger document than that is never held out. If whole
            documents cannot give that share (they are few or of very different sizes), the last tenth of every document
            is held out instead, from the start of a line.
        fraction: Share of the bytes to hold out.

    Raises:
        FileNotFoundError: When the corpus is read, for a source that matches no file.
        ValueError: When the corpus is read, for binary files, JSONL lines without `text`, and a corpus without text.
    """

    def __init__(
        self,
        sources: str | os.PathLike | Sequence[str | os.PathLike] = STDLIB,
        *,
        valid: str | os.PathLike | Sequence[str | os.PathLike] | None = None,
        fraction: float = 0.035,
    ):
        if not 0 < fraction < 0.2:
            raise ValueError(f"the held-out fraction must be between 0 and 0.2, not {fraction}")
        self.sources = _as_list(sources)
        self.valid_sources = None if valid is None else _as_list(valid)
        self.fraction = fraction

    def __iter__(self) -> Iterator[Document]:
        """All documents that are not empty, in order."""
        yield from _documents(self.sources)
        if self.valid_sources is not None:
            yield from _documents(self.valid_sources)

    def split(self, name: Split) -> Iterator[Document]:
        """The documents to train on ("train") or the held-out ones ("valid")."""
        if name not in ("train", "valid"):
            raise ValueError(f"a corpus has the splits 'train' and 'valid', not {name!r}")
        if self.valid_sources is not None:
            yield from _documents(self.sources if name == "train" else self.valid_sources)
            return
        scan = self._scan
        for document in _documents(self.sources):
            if scan.threshold is None:
                head, tail = _split_tail(document.text)
                part = head if name == "train" else tail
                if part:
                    yield Document(document.name, part)
            else:
                text = document.text.encode()
                if (len(text) <= scan.max_bytes and _key(text) <= scan.threshold) == (name == "valid"):
                    yield document

    @property
    def hash(self) -> str:
        """sha256 of the texts of all documents in order, and of the choice of the held-out ones."""
        return self._scan.hash

    @property
    def documents(self) -> int:
        """Number of documents."""
        return self._scan.documents

    @property
    def bytes(self) -> int:
        """Size of all texts in UTF-8."""
        return self._scan.bytes

    @cached_property
    def _scan(self) -> _Scan:
        total = hashlib.sha256()
        keys, sizes = array("Q"), array("Q")  # 16 bytes a document
        for document in _documents(self.sources):
            encoded = document.text.encode()
            total.update(hashlib.sha256(encoded).digest())
            keys.append(_key(encoded))
            sizes.append(len(encoded))
        if not keys:
            where = f"no text in {', '.join(map(str, self.sources))}" if self.sources else "it names no file or folder"
            raise ValueError(f"the corpus is empty: {where}")
        documents, size = len(keys), sum(sizes)
        threshold, max_bytes = None, self.fraction * size
        if self.valid_sources is None:
            threshold = _choose_threshold(np.array(keys, np.uint64), np.array(sizes, np.int64), max_bytes)
        else:
            total.update(b"valid")
            held_out = 0
            for document in _documents(self.valid_sources):
                total.update(hashlib.sha256(document.text.encode()).digest())
                documents, size, held_out = documents + 1, size + len(document.text.encode()), held_out + 1
            if not held_out:
                raise ValueError(f"the held-out text is empty: no text in {', '.join(map(str, self.valid_sources))}")
        total.update(f"cut {threshold}".encode())
        return _Scan(total.hexdigest(), documents, size, threshold, max_bytes)


def xz_bits_per_byte(texts: Iterable[str], limit: int = 2**24) -> float:
    """Bits per byte of a text compressed by `xz -9`, a baseline for the bits per byte of a model.

    Args:
        texts: The held-out text alone, such as `(d.text for d in corpus.split("valid"))`; they are joined.
        limit: Compress only this many bytes from the beginning.

    Raises:
        ValueError: If there is no text.
    """
    joined = bytearray()
    for text in texts:
        joined += text.encode()
        if len(joined) >= limit:
            break
    if not joined:
        raise ValueError("no text to compress")
    text_bytes = bytes(joined[:limit])
    return 8 * len(lzma.compress(text_bytes, preset=9)) / len(text_bytes)


# -- The held-out part ------------------------------------------------------------------------------------------------


def _key(text: bytes) -> int:
    """A hash in 0 .. 2**64 - 1; documents with small keys are held out."""
    return int.from_bytes(hashlib.sha256(b"garrulax" + text).digest()[:8])


def _choose_threshold(keys: np.ndarray, sizes: np.ndarray, wanted: float) -> int | None:
    """The smallest key such that documents with keys up to it have `wanted` bytes; None if all have fewer."""
    keys, sizes = keys[sizes <= wanted], sizes[sizes <= wanted]
    if sizes.sum() < wanted:
        return None
    order = np.argsort(keys)
    return int(keys[order][np.searchsorted(np.cumsum(sizes[order]), wanted)])


def _split_tail(text: str) -> tuple[str, str]:
    """Splits off about the last tenth of a text, at the start of a line if one is near."""
    near = int(len(text) * (1 - _TAIL))
    line_end = text.rfind("\n", 0, near) + 1
    at = line_end if line_end > len(text) // 2 else near
    return text[:at], text[at:]


# -- Reading ----------------------------------------------------------------------------------------------------------


def _as_list(sources: str | os.PathLike | Sequence[str | os.PathLike]) -> list[str | os.PathLike]:
    return [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)


def _documents(sources: Sequence[str | os.PathLike]) -> Iterator[Document]:
    for source in sources:
        if str(source) == STDLIB and not Path(STDLIB).exists():
            yield from _standard_library()
            continue
        if not _is_there(source):
            raise FileNotFoundError(_not_found(sources))
        for file in _files(source):
            yield from (document for document in _read(file) if document.text)


def _files(source: str | os.PathLike) -> list[Path]:
    source = expanded(source)
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        inside = (file for file in path.rglob("*") if file.is_file())
        return sorted(f for f in inside if not any(part.startswith(".") for part in f.relative_to(path).parts))
    return sorted(Path(file) for file in glob.glob(source, recursive=True) if os.path.isfile(file))


def _is_there(source: str | os.PathLike) -> bool:
    return str(source) == STDLIB or Path(expanded(source)).is_dir() or bool(_files(source))


def _not_found(sources: Sequence[str | os.PathLike]) -> str:
    """An error message that names all sources without a file: several may be one name with a comma in it."""
    lacking = [expanded(source) for source in sources if not _is_there(source)]
    comma = " (a comma separates names, unless a file has the whole name)" if len(sources) > 1 else ""
    return f"no text at {', '.join(lacking)}: no such file or folder, and no file matches it as a pattern{comma}"


def _read(file: Path) -> Iterator[Document]:
    """The documents of one file; errors name the file and say what to do."""
    opened: Any = gzip.open if file.suffix == ".gz" else open
    kind = Path(file.stem).suffix if file.suffix == ".gz" else file.suffix
    try:
        with opened(file, "rb") as stream:
            yield from _read_jsonl(file, stream) if kind == ".jsonl" else _read_text(file, stream)
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{file} is not a complete gzip file ({error}): copy it again or leave it out") from error


def _read_text(file: Path, stream: IO[Any]) -> Iterator[Document]:
    start, rest = 0, b""
    while block := rest + stream.read(_LONGEST - len(rest)):
        if len(block) == _LONGEST:
            block += stream.readline(_LONGEST_LINE)  # up to the end of a line
        block, rest = _whole_characters(block)
        text = block.removeprefix(_BOM) if start == 0 else block
        yield Document(
            f"{file}@{start}" if start else str(file), _decode(text, str(file), start + len(block) - len(text))
        )
        start += len(block)


def _whole_characters(block: bytes) -> tuple[bytes, bytes]:
    """Splits the beginning of a character off the end of a long block of UTF-8, if the block ends within one."""
    if len(block) < _LONGEST:  # the end of the file
        return block, b""
    for size in range(1, min(4, len(block))):
        if block[-size] >= 0xC0:  # the first byte of a character, which says how many follow
            following = 1 + (block[-size] >= 0xE0) + (block[-size] >= 0xF0)
            return (block[:-size], block[-size:]) if following >= size else (block, b"")
        if block[-size] < 0x80:
            break
    return block, b""


def _read_jsonl(file: Path, stream: IO[Any]) -> Iterator[Document]:
    lines = iter(lambda: stream.readline(_LONGEST_RECORD + 1), b"")
    for number, line in enumerate(lines, 1):
        where = f"{file}:{number}"
        if len(line) > _LONGEST_RECORD:
            raise ValueError(
                f"{where} is longer than {_LONGEST_RECORD >> 20} MiB: cut its text into several lines, or give it as a "
                "plain .txt file"
            )
        line = line.removeprefix(_BOM)  # also of a later line, where files were joined
        if not line.strip():
            continue
        try:
            record = json.loads(_decode(line, where))
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not valid JSON: {error}") from error
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise ValueError(f'{where} has no string field `text`: every line must be like {{"text": "..."}}')
        yield Document(where, record["text"].encode("utf-8", "replace").decode())  # JSON may have lone surrogates


def _decode(content: bytes, where: str, start: int = 0) -> str:
    advice = "only UTF-8 text can be trained on; leave it out (a pattern such as 'folder/**/*.txt' picks files)"
    if (at := content.find(0)) >= 0:
        raise ValueError(f"{where} is a binary file (NUL at byte {start + at}): {advice}")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 (byte {start + error.start}): {advice}") from error


def _standard_library() -> Iterator[Document]:
    """The Python source of the standard library, about 12 MB, without its tests and without installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in _NOT_STDLIB)
        for file in sorted(Path(folder, name) for name in files if name.endswith(".py")):
            if file.is_symlink():  # configuration of a Linux distribution
                continue
            try:
                text = _decode(file.read_bytes(), str(file))
            except ValueError:  # a few sources are in other encodings on purpose
                continue
            if text:
                yield Document(file.relative_to(root).as_posix(), text)
