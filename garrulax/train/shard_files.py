"""Writes the files of a data set: token ids in files of a limited size."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np


class ShardWriter:
    """Writes a stream of ids into files.

    Args:
        folder: For the files.
        split: Begins their names.
        dtype: Of the ids.
        limit: Most tokens in a file.

    Attributes:
        tokens: Number of ids so far.
    """

    def __init__(self, folder: Path, split: str, dtype: np.dtype, limit: int):
        self._folder, self._split, self._dtype, self._limit = folder, split, dtype, limit
        self._file: BinaryIO | None = None
        self._shards: list[dict[str, Any]] = []
        self.tokens = 0

    def append(self, ids: list[int]) -> None:
        """Writes ids behind the others."""
        array = np.array(ids, self._dtype)
        while len(array):
            if self._file is None:
                self._shards.append({"file": f"{self._split}-{len(self._shards):05d}.bin", "tokens": 0})
                self._file = open(self._folder / self._shards[-1]["file"], "wb")  # noqa: SIM115  closed in _finish
            part = array[: self._limit - self._shards[-1]["tokens"]]
            self._file.write(part.tobytes())
            self._shards[-1]["tokens"] += len(part)
            self.tokens += len(part)
            array = array[len(part) :]
            if self._shards[-1]["tokens"] == self._limit:
                self._finish()

    def close(self) -> list[dict[str, Any]]:
        """Finishes the last file; returns name and size of every file."""
        self._finish()
        return self._shards

    def _finish(self) -> None:
        if self._file is not None:
            _to_disk(self._file)
            self._file.close()
            self._file = None


@contextmanager
def durable(path: Path) -> Iterator[BinaryIO]:
    """Opens a new file and, at the end, waits until it is on disk."""
    with open(path, "wb") as file:
        yield file
        _to_disk(file)


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
