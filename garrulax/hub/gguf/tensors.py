"""Tensors of GGUF files, in the form in which the Hugging Face checkpoint of the same model stores them."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from garrulax.core.coded import Coded
from garrulax.hub.gguf.blocks import FORMATS, Format
from garrulax.hub.gguf.container import Entry
from garrulax.hub.quantised.formats import check_scales
from garrulax.hub.tensors import DTYPES, Rows, StoredTensor, read_buffers


@dataclasses.dataclass(frozen=True)
class BlockTensor(StoredTensor):
    """A tensor in blocks, or with its rows in another order: `read` gives the numbers that the checkpoint has.

    Attributes:
        format: How the numbers are stored; a row is a whole number of blocks.
        rows: For each row of the checkpoint's tensor its row in the file; None where the order is the same.
    """

    format: Format
    rows: np.ndarray | None

    @property
    def quantised(self) -> bool:
        """Whether the numbers are stored as codes."""
        return self.format.codes is not None and len(self.shape) == 2

    def coded(self) -> Coded:
        """The codes of a matrix, with its rows in the order of the checkpoint. Raises ValueError as `read` does."""
        assert self.format.codes is not None
        raw = np.empty((math.prod(self.shape) // self.format.values, self.format.bytes), np.uint8)
        octets = raw.reshape(-1)
        read_buffers(self.file, self.start, 0, [octets], len(octets))
        found = (None if a is None else a.reshape(self.shape[0], -1) for a in self.format.codes(raw))
        codes, scale, minimum = found
        assert codes is not None
        assert scale is not None
        kind, group = "table" if self.format.table else "int", self.shape[1] // scale.shape[1]
        whole = Coded(codes, scale, minimum, group, None, kind, self.format.bits, self.format.table)
        return check_scales(whole if self.rows is None else whole.rows(self.rows), str(self.file.name), zeros=True)

    def read(self, first: int, step: int, rows: Rows) -> None:
        """As `StoredTensor.read`; numbers of quantised tensors are float32."""
        count = rows.array.shape[1] // self.numpy_dtype.itemsize
        if self.rows is None and (step == count or len(rows.array) == 1):  # one run of numbers
            block, phase = divmod(first, self.format.values)
            numbers = self._numbers((block,), phase, len(rows.array) * count)
            rows.array[...] = numbers.view(np.uint8).reshape(rows.array.shape)
            return
        width = self.shape[-1]
        if self.rows is not None and step == count == width and first % width == 0:  # whole rows
            places = self.rows[first // width :][: len(rows.array)] * (width // self.format.values)
            rows.array[...] = self._numbers(places.tolist(), 0, count).view(np.uint8)
            return
        pieces = self._pieces(first, step, rows.buffers)
        for (phase, count), run in itertools.groupby(pieces, lambda piece: piece[1:3]):
            starts, _, _, buffers = zip(*run, strict=True)
            for buffer, numbers in zip(buffers, self._numbers(starts, phase, count), strict=True):
                np.frombuffer(buffer, np.uint8)[:] = numbers.view(np.uint8)

    def _pieces(self, first: int, step: int, rows: list) -> Iterator[tuple[int, int, int, memoryview]]:
        """The runs of numbers, cut where the order of rows changes: (first block, number in it, count, buffer)."""
        size, width = self.numpy_dtype.itemsize, self.shape[-1] if len(self.shape) > 1 else 1
        for i, row in enumerate(rows):
            at, buffer = first + i * step, memoryview(row)
            while len(buffer):
                count, place = len(buffer) // size, at
                if self.rows is not None:
                    number, column = divmod(at, width)
                    count = min(count, width - column)
                    place = int(self.rows[number]) * width + column
                yield (*divmod(place, self.format.values), count, buffer[: count * size])
                at, buffer = at + count, buffer[count * size :]

    def _numbers(self, starts: Sequence[int], phase: int, count: int) -> np.ndarray:
        """`count` numbers of each run, which begins with number `phase` of the block `starts[i]`: [runs, count]."""
        blocks = -(-(phase + count) // self.format.values)
        raw = self._blocks(starts, blocks)
        if self.format.codes is None:
            return raw.view(self.numpy_dtype)
        numbers = self.format.decode(raw.reshape(-1, self.format.bytes))
        return np.ascontiguousarray(numbers.reshape(len(starts), -1)[:, phase : phase + count])

    def _blocks(self, starts: Sequence[int], count: int) -> np.ndarray:
        """`count` blocks of each run, from the block `starts[i]` on: uint8 [runs, count * bytes of a block]."""
        raw = np.empty((len(starts), count * self.format.bytes), np.uint8)
        begin, span = min(starts), max(starts) - min(starts) + count
        if span <= 2 * count * len(starts):  # one piece of the file, with the runs in any order
            piece = np.empty((span, self.format.bytes), np.uint8)
            read_buffers(self.file, self.start + begin * self.format.bytes, 0, [piece.reshape(-1)], piece.size)
            places = np.asarray(starts)[:, None] - begin + np.arange(count)
            np.take(piece, places.reshape(-1), axis=0, out=raw.reshape(-1, self.format.bytes))
            return raw
        for start, buffer in zip(starts, raw, strict=True):
            read_buffers(self.file, self.start + start * self.format.bytes, 0, [buffer], raw.shape[1])
        return raw


def stored_tensor(entry: Entry, shape: tuple[int, ...], rows: np.ndarray | None = None) -> StoredTensor:
    """The tensor of a checkpoint that an entry of a GGUF file holds.

    Args:
        entry: The entry.
        shape: Shape of the tensor in the checkpoint.
        rows: As in `BlockTensor`.
    """
    format = FORMATS[entry.kind]
    if format.dtype is not None and rows is None:
        return StoredTensor(shape, format.name, entry.file, entry.start)
    dtype = format.name if format.name in DTYPES else "F32"
    return BlockTensor(shape, dtype, entry.file, entry.start, format, rows)
