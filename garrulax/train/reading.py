"""The documents in files, folders, patterns and object stores, read one after the other."""

import glob
import gzip
import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from garrulax.train import remote
from garrulax.train.sources import STDLIB, expanded, is_remote

_NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_LONGEST = 2**26  # bytes; a longer plain file is read as several documents, to bound the memory
_LONGEST_LINE = 2**20  # bytes; a document that is cut goes on to the end of its line, but not further than this
_LONGEST_RECORD = 2**28  # bytes of a line of JSONL
_BOM = b"\xef\xbb\xbf"  # the byte order mark in UTF-8, which some editors write at the start of a file


@dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        name: The source: `file`, or `file:line` for JSONL.
        text: The content.
        prompt: What stands before `text` and is read, but not to be predicted; empty for plain texts.
    """

    name: str
    text: str
    prompt: str = ""

    @property
    def content(self) -> str:
        """All of it, as one text that identifies the document."""
        return f"{self.prompt}\0{self.text}" if self.prompt else self.text


def documents(sources: Sequence[str | os.PathLike]) -> Iterator[Document]:
    """The documents of some sources that are not empty, in order; sources and errors are those of `corpus.Corpus`."""
    for source in sources:
        if str(source) == STDLIB and not Path(STDLIB).exists():
            yield from _standard_library()
            continue
        if not _is_there(source):
            raise FileNotFoundError(_not_found(sources))
        for file in _files(source):
            yield from (document for document in _read(file) if document.text)


def _files(source: str | os.PathLike) -> list[str]:
    source = expanded(source)
    if is_remote(source):
        return remote.files(source)
    path = Path(source)
    if path.is_file():
        return [str(path)]
    if path.is_dir():
        inside = sorted(file for file in path.rglob("*") if file.is_file())
        return [str(f) for f in inside if not any(part.startswith(".") for part in f.relative_to(path).parts)]
    return [str(file) for file in sorted(Path(name) for name in glob.glob(source, recursive=True)) if file.is_file()]


def _is_there(source: str | os.PathLike) -> bool:
    if str(source) == STDLIB:
        return True
    return (not is_remote(source) and Path(expanded(source)).is_dir()) or bool(_files(source))


def _not_found(sources: Sequence[str | os.PathLike]) -> str:
    """An error message that names all sources without a file: several may be one name with a comma in it."""
    lacking = [expanded(source) for source in sources if not _is_there(source)]
    comma = " (a comma separates names, unless a file has the whole name)" if len(sources) > 1 else ""
    return f"no text at {', '.join(lacking)}: no such file or folder, and no file matches it as a pattern{comma}"


@contextmanager
def _opened(file: str) -> Iterator[Any]:
    """The bytes of a file, decompressed if its name ends with .gz."""
    with remote.opened(file) if is_remote(file) else open(file, "rb") as stream:
        if file.endswith(".gz"):
            with gzip.open(stream, "rb") as decompressed:
                yield decompressed
        else:
            yield stream


def _read(file: str) -> Iterator[Document]:
    """The documents of one file; errors name the file and say what to do."""
    try:
        with _opened(file) as stream:
            is_jsonl = file.removesuffix(".gz").endswith(".jsonl")
            yield from _read_jsonl(file, stream) if is_jsonl else _read_text(file, stream)
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{file} is not a complete gzip file ({error}): copy it again or leave it out") from error


def _read_text(file: str, stream: IO[Any]) -> Iterator[Document]:
    start, rest = 0, b""
    while block := rest + stream.read(_LONGEST - len(rest)):
        if len(block) == _LONGEST:
            block += stream.readline(_LONGEST_LINE)  # up to the end of a line
        block, rest = _whole_characters(block)
        text = block.removeprefix(_BOM) if start == 0 else block
        yield Document(f"{file}@{start}" if start else file, _decode(text, file, start + len(block) - len(text)))
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


def _read_jsonl(file: str, stream: IO[Any]) -> Iterator[Document]:
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
        yield _record(record, where)


def _record(record: Any, where: str) -> Document:
    """The document of a line of JSONL: its `text`, or a `prompt` and its `completion`."""
    fields = record if isinstance(record, dict) else {}
    for names in (("text",), ("completion", "prompt")):
        values = [fields[name] for name in names if isinstance(fields.get(name), str)]
        if len(values) == len(names):  # JSON may have lone surrogates
            return Document(where, *(value.encode("utf-8", "replace").decode() for value in values))
    raise ValueError(
        f'{where} has no string field `text`: every line must be like {{"text": "..."}} or '
        '{"prompt": "...", "completion": "..."}'
    )


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
