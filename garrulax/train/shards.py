"""Tokenizes a corpus once, into memory-mapped files that all later runs and all processes share.

A data set is a folder, named by a hash of everything that decides its content: corpus, tokenizer and file format.

    <root>/<key>/meta.json             sizes, hashes and dtype; digests of the other files and of itself
    <root>/<key>/train-00000.bin ...   token ids, uint16 or uint32, little-endian, one document after the other
    <root>/<key>/train.documents       int64: the index of the first token of each document, then the number of tokens
    <root>/<key>/train.completions     int64: the index of the first token after the prompt of each document; only if a
                                       document has a prompt
    <root>/<key>/valid-...             the same for the held-out documents

It is built in a temporary folder and renamed when complete, so that no folder with the final name is incomplete. All
files are compared with their digests whenever a data set is opened, which takes a second for 5 GB.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from garrulax.core.disk import sync
from garrulax.train import digests
from garrulax.train.corpus import Corpus, Split
from garrulax.train.digests import DamagedError
from garrulax.train.reading import Document
from garrulax.train.shard_files import ShardWriter, durable
from garrulax.train.tokens import Tokens

FORMAT = 3  # part of the key: increase it when the files of the same corpus and tokenizer change
_META = "meta.json"
_PIECE = 2**20  # characters of a document that are encoded at once
_BATCH = 2**21  # characters that are encoded in parallel; this bounds the memory

#: Called with the split, the bytes of it encoded so far, and the bytes of the whole corpus.
ShardProgress = Callable[[str, int, int], None]


class Encoder(Protocol):
    """The parts of a tokenizer that building shards uses. Every `garrulax.hub.tokenizers.Tokenizer` has them."""

    vocab: int
    eos: int | None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of every text, without control tokens."""
        ...

    @property
    def fingerprint(self) -> str:
        """A hash of everything that the ids depend on."""
        ...


class Dataset:
    """A data set on disk, opened.

    Args:
        folder: Of the data set.

    Attributes:
        train: `Tokens` to train on.
        valid: held-out `Tokens`.
        meta: The content of meta.json: format, hashes of corpus and tokenizer, vocab, eos, dtype, sizes of each split.

    Raises:
        FileNotFoundError: If there is no such folder.
        DamagedError: If one of its files is missing or has other bytes than were written; it names the file.
        ValueError: If it is of another format.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        if not any(self.folder.glob("*.bin")):
            raise FileNotFoundError(f"no data set at {self.folder}: it has no token ids")
        try:
            self.meta = digests.read(self.folder, _META)
            digests.check(self.folder, name=_META)
        except DamagedError as error:
            raise DamagedError(f"{error}: delete {self.folder} to make the token ids anew") from None
        if self.meta["format"] != FORMAT:
            raise ValueError(
                f"{self.folder} has data format {self.meta['format']}, this program reads {FORMAT}: rebuild it"
            )
        self.train = self._open("train")
        self.valid = self._open("valid")

    @property
    def tokens(self) -> dict[str, int]:
        """Number of tokens of each split."""
        return {"train": len(self.train), "valid": len(self.valid)}

    @property
    def bytes(self) -> dict[str, int]:
        """Bytes of text of each split."""
        return {"train": self.train.bytes, "valid": self.valid.bytes}

    def _open(self, split: str) -> Tokens:
        meta = self.meta["splits"][split]
        dtype = np.dtype(self.meta["dtype"])
        shards = [self._map(shard["file"], dtype, shard["tokens"]) for shard in meta["shards"]]
        documents = self._map(f"{split}.documents", np.dtype("<i8"), meta["documents"] + 1)
        completions = (
            self._map(f"{split}.completions", np.dtype("<i8"), meta["documents"]) if meta.get("prompts") else None
        )
        return Tokens(shards, meta["bytes"], documents, completions)

    def _map(self, name: str, dtype: np.dtype, count: int) -> np.ndarray:
        return np.memmap(self.folder / name, dtype, mode="r", shape=(count,))


def build_shards(
    corpus: Corpus,
    tokenizer: Encoder,
    root: str | os.PathLike | None = None,
    *,
    shard_tokens: int = 2**27,
    progress: ShardProgress | None = None,
    say: Callable[[str], None] | None = None,
) -> Dataset:
    """Opens the data set of a corpus and a tokenizer; builds it first if it does not exist or is damaged.

    The tokenizer's eos follows every document. A document longer than 2**20 characters is encoded in pieces that end
    with a line, to bound the memory. Several processes may call this at once: one builds, the others wait.

    Args:
        corpus: To tokenize.
        tokenizer: Any tokenizer of garrulax.hub. Its vocab decides between uint16 and uint32.
        root: Folder of all data sets; None is `default_root()`.
        shard_tokens: Most tokens in one file.
        progress: Called after every batch of documents.
        say: Called with a line that names the damaged file, if the data set is built again.

    Raises:
        ValueError: If a split has several documents and the tokenizer has no eos to separate them, or if the tokenizer
            cannot encode a document, which is named.
        OSError: If the folder cannot be written or the disk is full; the incomplete data set is deleted.
    """
    root = default_root() if root is None else Path(root)
    identity, key = _identity(corpus.hash, tokenizer, shard_tokens)
    final = root / key
    if final.exists():
        with contextlib.suppress(DamagedError):
            return _opened(final, identity)
    with _explained(root), _lock(root / f"{key}.lock"):
        if final.exists():
            try:
                return _opened(final, identity)  # another process built it while this one waited
            except DamagedError as error:
                if say is not None:
                    say(f"{str(error).partition(': delete')[0]}: the token ids are made again")
                final.rename(root / f".{key}-damaged")
        for stale in root.glob(f".{key}-*"):  # damaged, or left by a process that was killed: we hold the lock
            shutil.rmtree(stale, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=root))
        try:
            splits = {split: _write_split(folder, split, corpus, tokenizer, shard_tokens, progress)
                      for split in ("train", "valid")}  # fmt: skip
            meta = identity | {"dtype": _dtype(tokenizer).str, "splits": splits}
            digests.write(folder, meta, _META)
            folder.chmod(0o755)  # mkdtemp makes private folders, but users share this one
            folder.rename(final)
            sync(root)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    return Dataset(final)


def find_shards(
    corpus_hash: str, tokenizer: Encoder, root: str | os.PathLike | None = None, *, shard_tokens: int = 2**27
) -> Dataset | None:
    """The data set that `build_shards` once built of a corpus with this hash, or None; the text is not needed.

    Args:
        corpus_hash: `Corpus.hash`.
        tokenizer: As for `build_shards`.
        root: As for `build_shards`.
        shard_tokens: As for `build_shards`.

    Raises:
        DamagedError: If the data set is damaged.
    """
    identity, key = _identity(corpus_hash, tokenizer, shard_tokens)
    folder = (default_root() if root is None else Path(root)) / key
    return _opened(folder, identity) if folder.exists() else None


def _opened(folder: Path, identity: Mapping[str, Any]) -> Dataset:
    """A data set, after comparing what it says of itself with what its name stands for."""
    try:
        dataset = Dataset(folder)
    except FileNotFoundError as error:  # the folder is there: somebody has deleted its files
        raise DamagedError(str(error)) from None
    if {name: dataset.meta.get(name) for name in identity} != dict(identity):
        raise DamagedError(f"{folder} has the token ids of another text or tokenizer: delete it to make them anew")
    return dataset


def default_root() -> Path:
    """The folder of all data sets: $GARRULAX_CACHE/shards, or garrulax/shards in the user's cache folder.

    Raises:
        OSError: If there is neither the variable nor a home folder.
    """
    if cache := os.environ.get("GARRULAX_CACHE"):
        return Path(cache).expanduser() / "shards"
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "garrulax" / "shards"
    except RuntimeError as error:
        raise OSError(
            "there is no home folder to keep token ids in: set GARRULAX_CACHE to a folder for them"
        ) from error


def _identity(corpus_hash: str, tokenizer: Encoder, shard_tokens: int) -> tuple[dict[str, Any], str]:
    """Everything that decides the content of a data set, and the hash of it that names the folder."""
    identity = {"format": FORMAT, "corpus": corpus_hash, "tokenizer": tokenizer.fingerprint, "eos": tokenizer.eos,
                "vocab": tokenizer.vocab, "shard_tokens": shard_tokens}  # fmt: skip
    return identity, hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]


@contextmanager
def _explained(root: Path) -> Iterator[None]:
    """Makes the folder of the data sets. Says in the errors of writing there which variable names another folder."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        outside = error.filename is not None and not Path(os.fspath(error.filename)).is_relative_to(root)
        parents = error.filename is not None and root.is_relative_to(Path(os.fspath(error.filename)))
        if outside and not parents:  # an error of reading the corpus
            raise
        raise OSError(
            f"token ids cannot be written to {root}: {error.strerror or error}; set GARRULAX_CACHE to another folder"
        ) from error


def _dtype(tokenizer: Encoder) -> np.dtype:
    return np.dtype("<u2" if tokenizer.vocab <= 2**16 else "<u4")


@dataclass(frozen=True)
class _Piece:
    """A document, or a part of one: of a long one, or its prompt."""

    document: str
    text: str
    first: bool  # of the document
    last: bool
    completes: bool  # whether the completion begins with it


def _pieces(documents: Iterable[Document]) -> Iterator[_Piece]:
    for document in documents:
        parts = [document.prompt, document.text] if document.prompt else [document.text]
        for number, text in enumerate(parts):
            is_last, start = number == len(parts) - 1, 0
            while start < len(text):
                stop = start + _PIECE
                if stop < len(text):
                    stop = text.rfind("\n", start, stop) + 1 or stop
                begins = start == 0
                yield _Piece(
                    document.name,
                    text[start:stop],
                    first=begins and number == 0,
                    last=is_last and stop >= len(text),
                    completes=begins and is_last,
                )
                start = stop


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(tokenizer: Encoder, batch: list[_Piece]) -> list[list[int]]:
    try:
        return tokenizer.encode_batch([piece.text for piece in batch])
    except ValueError:
        for piece in batch:  # one by one, to find the document
            try:
                tokenizer.encode_batch([piece.text])
            except ValueError as error:
                raise ValueError(f"{piece.document}: {error}") from error
        raise


def _write_split(
    folder: Path, split: Split, corpus: Corpus, tokenizer: Encoder, shard_tokens: int, progress: ShardProgress | None
) -> dict[str, Any]:
    """Writes the files of one split and returns its part of meta.json."""
    shards = ShardWriter(folder, split, _dtype(tokenizer), shard_tokens)
    separator = [] if tokenizer.eos is None else [tokenizer.eos]
    documents = size = 0
    completions = array("q")  # 8 bytes a document
    has_prompts = False
    with durable(folder / f"{split}.documents") as starts:
        for batch in _batches(_pieces(corpus.split(split))):
            for piece, ids in zip(batch, _encode(tokenizer, batch), strict=True):
                if piece.first:
                    if documents and not separator:
                        raise ValueError(
                            "the corpus has several documents but the tokenizer no end-of-text token to separate them: "
                            "train it with specials=('<|endoftext|>',)"
                        )
                    starts.write(np.array([shards.tokens], "<i8").tobytes())
                    documents += 1
                if piece.completes:
                    completions.append(shards.tokens)
                    has_prompts = has_prompts or not piece.first
                shards.append(ids + separator if piece.last else ids)
                size += len(piece.text.encode())
            if progress is not None:
                progress(split, size, corpus.bytes)
        starts.write(np.array([shards.tokens], "<i8").tobytes())
    if has_prompts:
        with durable(folder / f"{split}.completions") as file:
            file.write(np.array(completions, "<i8").tobytes())
    return {
        "prompts": has_prompts,
        "tokens": shards.tokens,
        "bytes": size,
        "documents": documents,
        "shards": shards.close(),
    }


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on `path`; the operating system releases it if this process dies."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
