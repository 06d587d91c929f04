"""A corpus: text on disk as a sequence of documents, with a fixed held-out part.

A corpus reads its files again in every iteration and never has the whole text in memory. The choice of the held-out
part depends on the text alone, so it is the same on every machine and in every process.
"""

import hashlib
import lzma
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from garrulax.train.dedup import duplicates
from garrulax.train.reading import Document, documents
from garrulax.train.sources import STDLIB

Split = Literal["train", "valid"]
_TAIL = 0.10  # share of every document that is held out if whole documents cannot be


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
            works; `~` is the home folder); the same as URLs of an object store (gs://bucket/folder); or "stdlib". A
            `.jsonl` file has one document a line, in the field `text`, or as a `prompt` and its `completion`; a line
            has at most 256 MiB. Any other file is UTF-8 text and is one document, or several if it is longer
            than 64 MiB: cut at the end of a line, or within one that is longer than 1 MiB. Each of them may be
            compressed as `.gz`. A byte order mark is left out. Documents come in the order of the sources, and sorted
            by path within a folder or glob.
        valid: Sources of the held-out text. If None, documents of `sources` are held out: those with the smallest
            hashes, until they make up `fraction` of the bytes; a larger document than that is never held out. If whole
            documents cannot give that share (they are few or of very different sizes), the last tenth of every document
            is held out instead, from the start of a line.
        fraction: Share of the bytes to hold out.
        dedup: Which documents of `sources` are left out because an earlier one is a copy: "none", "exact" (the same
            text) or "near" (`dedup.duplicates`). It is done before the split, so that no copy is on both sides.
        dedup_threshold: Least Jaccard index of near-duplicates.

    Raises:
        FileNotFoundError: When the corpus is read, for a source that matches no file.
        ValueError: When the corpus is read, for binary files, JSONL lines without text, and a corpus without text.
        ImportError: When the corpus is read, if a package for its URLs or for `dedup` is not installed.
    """

    def __init__(
        self,
        sources: str | os.PathLike | Sequence[str | os.PathLike] = STDLIB,
        *,
        valid: str | os.PathLike | Sequence[str | os.PathLike] | None = None,
        fraction: float = 0.035,
        dedup: str = "none",
        dedup_threshold: float = 0.8,
    ):
        if not 0 < fraction < 0.2:
            raise ValueError(f"the held-out fraction must be between 0 and 0.2, not {fraction}")
        self.sources = _as_list(sources)
        self.valid_sources = None if valid is None else _as_list(valid)
        self.fraction = fraction
        self.dedup, self.dedup_threshold = dedup, dedup_threshold

    def __iter__(self) -> Iterator[Document]:
        """All documents that are neither empty nor left out as copies, in order."""
        yield from self._own()
        if self.valid_sources is not None:
            yield from documents(self.valid_sources)

    def split(self, name: Split) -> Iterator[Document]:
        """The documents to train on ("train") or the held-out ones ("valid")."""
        if name not in ("train", "valid"):
            raise ValueError(f"a corpus has the splits 'train' and 'valid', not {name!r}")
        if self.valid_sources is not None:
            yield from self._own() if name == "train" else documents(self.valid_sources)
            return
        scan = self._scan
        for document in self._own():
            if scan.threshold is None:
                head, tail = _split_tail(document.text)
                part = head if name == "train" else tail
                if part:
                    yield Document(document.name, part, document.prompt if name == "train" else "")
            else:
                text = document.content.encode()
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
        for document in self._own():
            encoded = document.content.encode()
            total.update(hashlib.sha256(encoded).digest())
            keys.append(_key(encoded))
            sizes.append(len(encoded))
        if not keys:
            where = f"no text in {', '.join(map(str, self.sources))}" if self.sources else "it names no file or folder"
            raise ValueError(f"the corpus is empty: {where}")
        count, size = len(keys), sum(sizes)
        threshold, max_bytes = None, self.fraction * size
        if self.valid_sources is None:
            threshold = _choose_threshold(np.array(keys, np.uint64), np.array(sizes, np.int64), max_bytes)
        else:
            total.update(b"valid")
            held_out = 0
            for document in documents(self.valid_sources):
                encoded = document.content.encode()
                total.update(hashlib.sha256(encoded).digest())
                count, size, held_out = count + 1, size + len(encoded), held_out + 1
            if not held_out:
                raise ValueError(f"the held-out text is empty: no text in {', '.join(map(str, self.valid_sources))}")
        total.update(f"cut {threshold}".encode())
        return _Scan(total.hexdigest(), count, size, threshold, max_bytes)

    def _own(self) -> Iterator[Document]:
        """The documents of `sources` without copies of earlier ones."""
        copies = self._copies
        return (document for index, document in enumerate(documents(self.sources)) if index not in copies)

    @cached_property
    def _copies(self) -> set[int]:
        if self.dedup == "none":
            return set()
        texts = (document.content for document in documents(self.sources))
        return duplicates(texts, self.dedup, self.dedup_threshold)


class Corpora:
    """The corpora of a mixture, read one after the other as if they were one.

    Args:
        parts: The corpora, at least one.
    """

    def __init__(self, parts: Sequence[Corpus]):
        self.parts = tuple(parts)

    def __iter__(self) -> Iterator[Document]:
        """All documents of all corpora."""
        return (document for part in self.parts for document in part)

    def split(self, name: Split) -> Iterator[Document]:
        """The documents of all corpora to train on ("train"), or the held-out ones ("valid").

        A held-out text that the corpora have in common is read once.
        """
        read: list[Corpus] = []
        for part in self.parts:
            common = name == "valid" and part.valid_sources is not None
            if not (common and any(part.valid_sources == other.valid_sources for other in read)):
                yield from part.split(name)
            read.append(part)

    @property
    def hash(self) -> str:
        """The hashes of the corpora, joined by commas."""
        return ",".join(part.hash for part in self.parts)

    @property
    def documents(self) -> int:
        """Number of documents."""
        return sum(part.documents for part in self.parts)

    @property
    def bytes(self) -> int:
        """Size of all texts in UTF-8."""
        return sum(part.bytes for part in self.parts)


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
    """The smallest key such that documents with keys up to it have `wanted` bytes.

    None if all have fewer, or if these have more than twice as many: then many of them are copies of one document.
    """
    keys, sizes = keys[sizes <= wanted], sizes[sizes <= wanted]
    if sizes.sum() < wanted:
        return None
    order = np.argsort(keys)
    threshold = keys[order][np.searchsorted(np.cumsum(sizes[order]), wanted)]
    return int(threshold) if sizes[keys <= threshold].sum() <= 2 * wanted else None


def _split_tail(text: str) -> tuple[str, str]:
    """Splits off about the last tenth of a text, at the start of a line if one is near."""
    near = int(len(text) * (1 - _TAIL))
    line_end = text.rfind("\n", 0, near) + 1
    at = line_end if line_end > len(text) // 2 else near
    return text[:at], text[at:]


def _as_list(sources: str | os.PathLike | Sequence[str | os.PathLike]) -> list[str | os.PathLike]:
    return [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
