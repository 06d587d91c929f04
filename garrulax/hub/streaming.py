"""Reads parts of stored tensors from files into arrays, with several threads.

Checkpoints store most matrices as [outputs, inputs] and models use [inputs, outputs], so most tensors are transposed
while they are read. The cost of that is memory traffic. This module moves each byte through main memory only twice: one
copy out of the page cache of the operating system, and one write of the array. To do so, a thread reads a block of at
most 64 rows into a scratch buffer, small enough to stay in the cache of its core, and writes it from there, transposed,
into the array.

The rows of a scratch buffer are one cache line further apart than they are long. Widths are often powers of two; rows
at such a distance put all numbers of a column into the same few sets of the cache, where they evict each other
(measured: six times slower).

Parts that need neither a transposition nor a conversion of dtype are read into the array directly.
"""

import concurrent.futures
import dataclasses
import itertools
import math
import os
import threading
from collections.abc import Iterable, Iterator

import numpy as np

from garrulax.core.layout import TensorLayout
from garrulax.hub.tensors import Rows, StoredTensor

ALIGNMENT = 64  # bytes of a cache line; JAX uses arrays that are aligned to it without a copy
ROWS = 64  # most rows of a block
BLOCK = 1 << 20  # most bytes of a block that goes through a scratch buffer
STRAIGHT = 1 << 22  # most bytes of a block that is read into the array directly
THREADS = min(8, os.cpu_count() or 1)


@dataclasses.dataclass(frozen=True)
class Window:
    """A part of a stored tensor and the array that receives it.

    Attributes:
        tensor: The stored tensor.
        target: The array, with its dimensions in the order of the file and any strides.
        first: Index of the part's first number in the flattened tensor.
        steps: For each dimension of `target`, the distance in the file from one entry to the next, in numbers.
    """

    tensor: StoredTensor
    target: np.ndarray
    first: int
    steps: tuple[int, ...]


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array, aligned so that JAX on CPUs uses its memory without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def window(tensor: StoredTensor, layout: TensorLayout, target: np.ndarray, index: tuple[slice, ...] = ()) -> Window:
    """The window that makes `target` equal to `parameter[index]`.

    Args:
        tensor: The stored tensor that contains the parameter.
        layout: Layout of the parameter in the tensor.
        target: Array of the shape of `parameter[index]`.
        index: A slice of every dimension of the parameter; empty for the entire parameter.

    Raises:
        ValueError: `tensor` has another size than the layout.
    """
    split = layout.split
    if math.prod(split) != math.prod(tensor.shape):
        raise ValueError(f"a tensor of shape {tensor.shape} does not split into {split}")
    taken = [range(i, i + 1) if isinstance(i, int) else range(n)[i] for n, i in zip(split, layout.index, strict=True)]
    kept = [at for at, i in enumerate(layout.index) if not isinstance(i, int)]
    for i, here in zip(layout.order, index, strict=bool(index)):
        taken[kept[i]] = taken[kept[i]][here]
    placed = target.transpose(np.argsort(layout.order))
    placed = np.expand_dims(placed, tuple(at for at, i in enumerate(layout.index) if isinstance(i, int)))
    steps = tuple(math.prod(split[at + 1 :]) for at in range(len(split)))
    return Window(tensor, placed, sum(part.start * step for part, step in zip(taken, steps, strict=True)), steps)


def read_windows(windows: Iterable[Window]) -> None:
    """Reads every window into its target. Takes no memory besides two scratch buffers a thread.

    Raises:
        ValueError: A file became shorter while it was read, or a float16 target cannot hold a number.
    """
    blocks = itertools.chain.from_iterable(map(_blocks, windows))
    lock, stop = threading.Lock(), threading.Event()

    def work(_: int) -> None:
        scratch = Scratch(), Scratch()
        try:
            while not stop.is_set():
                with lock:
                    block = next(blocks, None)
                if block is None:
                    return
                _read_block(block, *scratch)
        except BaseException:
            stop.set()
            raise

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        try:
            list(pool.map(work, range(THREADS)))
        finally:  # on Ctrl-C the threads must not start further blocks
            stop.set()


@dataclasses.dataclass(frozen=True)
class Block:
    """Rows of numbers and the array that receives them. The numbers of a row are contiguous in the file.

    Attributes:
        tensor: The stored tensor.
        target: Array [rows, columns].
        first: Index of the first number in the flattened tensor.
        step: Distance in the file from row to row, in numbers.
        dtype: The dtype as which the numbers are read.
        straight: Whether they can be read into `target` directly.
    """

    tensor: StoredTensor
    target: np.ndarray
    first: int
    step: int
    dtype: np.dtype
    straight: bool


def _blocks(w: Window) -> Iterator[Block]:
    """Cuts a window into blocks."""
    dtype, target = w.tensor.numpy_dtype, w.target
    if target.dtype == dtype:  # no conversion: copy as integers, which numpy does faster than bfloat16
        dtype = np.dtype(f"u{dtype.itemsize}")
        target = target.view(dtype)
    dims = _merged_dimensions(w)
    sizes, steps, strides = zip(*dims, strict=True)
    target = np.lib.stride_tricks.as_strided(target, sizes, strides)
    straight = target.dtype == dtype and strides[-1] == dtype.itemsize
    rows, columns = sizes[-2:]
    height = min(rows, ROWS)
    width = (STRAIGHT if straight else BLOCK) // max(dtype.itemsize, target.itemsize) // height
    for index in np.ndindex(*sizes[:-2]):
        start = w.first + sum(i * n for i, n in zip(index, steps, strict=False))
        for row, column in itertools.product(range(0, rows, height), range(0, columns, width)):
            part = target[index][row : row + height, column : column + width]
            yield Block(w.tensor, part, start + row * steps[-2] + column, steps[-2], dtype, straight)


def _merged_dimensions(w: Window) -> list[tuple[int, int, int]]:
    """(size, step in the file, stride of the target) of each dimension, after merging dimensions where possible.

    There are at least two dimensions. The last one is contiguous in the file.
    """
    dims: list[tuple[int, int, int]] = []
    for size, step, stride in zip(w.target.shape, w.steps, w.target.strides, strict=True):
        if dims and dims[-1][1:] == (size * step, size * stride):
            dims[-1] = (dims[-1][0] * size, step, stride)
        elif size != 1:
            dims.append((size, step, stride))
    if not dims or dims[-1][1] != 1:
        dims.append((1, 1, w.target.itemsize))
    return dims if len(dims) > 1 else [(1, 0, 0), *dims]


class Scratch:
    """Buffer of one thread for one block."""

    def __init__(self) -> None:
        self._memory = np.empty(BLOCK + ROWS * ALIGNMENT, np.uint8)
        self._views: dict[tuple[int, int], Rows] = {}

    def rows(self, rows: int, width: int) -> Rows:
        """Rows of `width` bytes with a gap of one cache line after each."""
        if (rows, width) not in self._views:
            block = self._memory[: rows * (width + ALIGNMENT)].reshape(rows, -1)[:, :width]
            self._views[rows, width] = Rows(block, [memoryview(row) for row in block])
        return self._views[rows, width]


def _read_block(b: Block, scratch: Scratch, converted: Scratch) -> None:
    rows, columns = b.target.shape
    if b.straight:
        b.tensor.read(b.first, b.step, Rows.of(b.target))
        return
    block = scratch.rows(rows, columns * b.dtype.itemsize)
    b.tensor.read(b.first, b.step, block)
    numbers = block.array.view(b.dtype)  # [rows, columns]
    if b.target.dtype != b.dtype:  # convert, then transpose: both in one assignment is six times slower
        numbers = converted.rows(rows, columns * b.target.itemsize).array.view(b.target.dtype)
        with np.errstate(over="ignore"):
            numbers[...] = block.array.view(b.dtype)
        if b.target.dtype == np.float16 and np.isinf(numbers).any():
            raise ValueError(f"{b.tensor.file.name} holds numbers beyond float16's 65,504: choose another dtype")
    b.target[...] = numbers


def chunks(tensor: StoredTensor, count: int = STRAIGHT // 8) -> Iterator[np.ndarray]:
    """The numbers of a tensor, `count` at a time. Each array is valid only until the next one is taken."""
    size, memory = math.prod(tensor.shape), np.empty(count, tensor.numpy_dtype)
    for first in range(0, size, count):
        part = memory[: size - first]
        tensor.read(first, 0, Rows.of(part[None]))
        yield part
