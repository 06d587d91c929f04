"""The token ids of a text in memory-mapped files, as one array."""

from collections.abc import Sequence
from typing import Any

import numpy as np


class Tokens:
    """The token ids of one split: one array in one or several memory-mapped shards.

    `len(tokens)` is the number of tokens; `tokens[i]` is an int, `tokens[a:b]` an int32 array (copied from disk).

    Attributes:
        bytes: Size of the text in UTF-8 without separators: the denominator of bits per byte.
        documents: int64 [D + 1], the index of the first token of each document, then `len(tokens)`. The separator after
            a document belongs to it.
        completions: int64 [D], the index of the first token of each document after its prompt; None if no document has
            a prompt.
    """

    def __init__(
        self, shards: Sequence[np.ndarray], bytes: int, documents: np.ndarray, completions: np.ndarray | None = None
    ):
        self._shards = list(shards)
        self._ends = np.cumsum([len(shard) for shard in self._shards], dtype=np.int64)
        self.bytes = bytes
        self.documents = documents
        self.completions = completions

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._shards else 0

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            return self._read(start, max(start, stop))[::step] if step > 0 else self[:][index]
        return int(self._read(range(len(self))[index], range(len(self))[index] + 1)[0])

    def _read(self, start: int, stop: int) -> np.ndarray:
        out = np.empty(stop - start, np.int32)
        shard = int(np.searchsorted(self._ends, start, side="right"))
        index = start
        while index < stop:
            first = int(self._ends[shard]) - len(self._shards[shard])
            part = self._shards[shard][index - first : stop - first]
            out[index - start : index - start + len(part)] = part
            index += len(part)
            shard += 1
        return out

    def take(self, index: np.ndarray) -> np.ndarray:
        """The tokens at some indices: int32, of the shape of `index`."""
        if len(self._shards) == 1:
            return np.asarray(self._shards[0])[index].astype(np.int32)
        out = np.empty(index.shape, np.int32)
        shards = np.searchsorted(self._ends, index, side="right")
        for shard in np.unique(shards):
            here = shards == shard
            out[here] = self._shards[shard][index[here] - (self._ends[shard] - len(self._shards[shard]))]
        return out

    def completion_of(self, index: np.ndarray) -> np.ndarray:
        """The index of the first token of the completion, in the document that has the token at each index.

        Args:
            index: int64, any shape.

        Returns:
            int64, the shape of `index`; the document's first token where it has no prompt.
        """
        starts = self.documents[:-1] if self.completions is None else self.completions
        return np.asarray(starts)[np.searchsorted(self.documents, index, side="right") - 1]

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Windows of equal length.

        Args:
            starts: int64 [B], index of the first token of every window.
            length: Of a window.

        Returns:
            int32 [B, length].
        """
        shard = np.searchsorted(self._ends, starts, side="right")
        # Fast path: all windows lie in one shard.
        if len(starts) and (shard == shard[0]).all() and starts.max() + length <= self._ends[shard[0]]:
            view = np.lib.stride_tricks.sliding_window_view(self._shards[shard[0]], length)
            first = self._ends[shard[0]] - len(self._shards[shard[0]])
            return view[starts - first].astype(np.int32)
        return np.stack([self._read(start, start + length) for start in starts.tolist()])
