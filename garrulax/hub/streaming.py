"""From files into arrays: the parts of stored tensors that parameters need, read by threads straight to their place.

Most matrices are stored as [outputs, inputs] and used as [inputs, outputs], so their order changes on the way. What
that costs is memory traffic, and the plan is to touch main memory twice only: once to copy out of the page cache, once
to write the array. A thread reads a block of 64 rows, small enough to stay in its cache, and scatters it into the
array from there. The rows of the block lie a cache line further apart than their length: at a distance of a power of
two, which widths are, a column of them falls into a few sets of the cache and drives itself out (six times slower).
Parts whose order stays are read into the array itself.
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
from garrulax.hub.tensors import StoredTensor

ALIGNMENT = 64  # bytes: of arrays that JAX takes over without a copy, and of a cache line
ROWS = 64  # of a block
BLOCK = 1 << 20  # bytes of a block
STRAIGHT = 1 << 22  # bytes read at once into the array itself
THREADS = min(8, os.cpu_count() or 1)


@dataclasses.dataclass(frozen=True)
class Window:
    """A part of a stored tensor, and where it goes.

    target: the array, any strides, in the order of the file. first: the part's first number, counted in the tensor.
    steps: how many numbers lie from one entry to the next, for each dimension of the target.
    """

    tensor: StoredTensor
    target: np.ndarray
    first: int
    steps: tuple[int, ...]


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array that JAX on CPUs takes over without a copy; pages cost memory once they are written."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def window(tensor: StoredTensor, layout: TensorLayout, target: np.ndarray, index: tuple[slice, ...] = ()) -> Window:
    """What to read for `target` to become `parameter[index]`, of the parameter that lies in `tensor` by `layout`; all
    of it by default. Raises ValueError for a tensor of another size."""
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


def fill(windows: Iterable[Window]) -> None:
    """Reads every window into its target.

    A block of each thread is all the memory it takes. Raises ValueError for a file that became shorter meanwhile,
    and for numbers that a float16 target cannot hold.
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
                _read(block, *scratch)
        except BaseException:
            stop.set()
            raise

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        try:
            list(pool.map(work, range(THREADS)))
        finally:  # Ctrl-C: the threads go no further
            stop.set()


@dataclasses.dataclass(frozen=True)
class Block:
    """Rows of numbers that are contiguous in the file, and their target [rows, columns].

    first: as in Window. step: numbers from row to row. kind: the dtype as which they are read. straight: whether they
    can be read into the target itself.
    """

    tensor: StoredTensor
    target: np.ndarray
    first: int
    step: int
    kind: np.dtype
    straight: bool


def _blocks(w: Window) -> Iterator[Block]:
    kind, target = w.tensor.kind, w.target
    if target.dtype == kind:  # numpy copies plain integers faster than bfloat16
        kind = np.dtype(f"u{kind.itemsize}")
        target = target.view(kind)
    dims = _dims(w)
    sizes, steps, strides = zip(*dims, strict=True)
    target = np.lib.stride_tricks.as_strided(target, sizes, strides)
    straight = target.dtype == kind and strides[-1] == kind.itemsize
    rows, columns = sizes[-2:]
    high = min(rows, ROWS)
    wide = (STRAIGHT if straight else BLOCK) // max(kind.itemsize, target.itemsize) // high
    for index in np.ndindex(*sizes[:-2]):
        start = w.first + sum(i * n for i, n in zip(index, steps, strict=False))
        for row, column in itertools.product(range(0, rows, high), range(0, columns, wide)):
            part = target[index][row : row + high, column : column + wide]
            yield Block(w.tensor, part, start + row * steps[-2] + column, steps[-2], kind, straight)


def _dims(w: Window) -> list[tuple[int, int, int]]:
    """(size, step in the file, stride of the target) of as few dimensions as possible, but two at least; the last is
    contiguous in the file."""
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
    """Memory of one thread for one block."""

    def __init__(self) -> None:
        self._memory = np.empty(BLOCK + ROWS * ALIGNMENT, np.uint8)
        self._known: dict[tuple[int, int], tuple[np.ndarray, list[memoryview]]] = {}

    def rows(self, rows: int, width: int) -> tuple[np.ndarray, list[memoryview]]:
        """`rows` rows of `width` bytes, a cache line apart; and each as a buffer."""
        if (rows, width) not in self._known:
            block = self._memory[: rows * (width + ALIGNMENT)].reshape(rows, -1)[:, :width]
            self._known[rows, width] = block, [memoryview(row) for row in block]
        return self._known[rows, width]


def _read(b: Block, scratch: Scratch, converted: Scratch) -> None:
    rows, columns = b.target.shape
    if b.straight:
        read_bytes(b.tensor, b.first, b.step, list(b.target.view(np.uint8)))
        return
    block, buffers = scratch.rows(rows, columns * b.kind.itemsize)
    read_bytes(b.tensor, b.first, b.step, buffers)
    numbers = block.view(b.kind)
    if b.target.dtype != b.kind:  # first the dtype, then the order: both at once is six times slower
        numbers = converted.rows(rows, columns * b.target.itemsize)[0].view(b.target.dtype)
        with np.errstate(over="ignore"):
            numbers[...] = block.view(b.kind)
        if b.target.dtype == np.float16 and np.isinf(numbers).any():
            raise ValueError(f"{b.tensor.file.name} holds numbers beyond float16's 65,504: choose another dtype")
    b.target[...] = numbers


def read_bytes(tensor: StoredTensor, first: int, step: int, rows: list) -> None:
    """Fills buffers, all of one size, from the file: row i from number `first + i * step` of the tensor on.

    Raises ValueError where the file ends before.
    """
    size = tensor.kind.itemsize
    start, width = tensor.start + first * size, len(rows[0])
    if step * size == width and os.preadv(tensor.file.fileno(), rows, start) == width * len(rows):
        return
    for i, row in enumerate(rows):
        done = 0
        while done < width:
            count = os.preadv(tensor.file.fileno(), [row[done:]], start + i * step * size + done)
            if not count:
                raise ValueError(f"{tensor.file.name} became shorter while it was read")
            done += count


def chunks(tensor: StoredTensor) -> Iterator[np.ndarray]:
    """The bytes of a tensor, some at a time; each array is only valid until the next."""
    size, memory = math.prod(tensor.shape), np.empty(STRAIGHT, np.uint8)
    for first in range(0, size, STRAIGHT // tensor.kind.itemsize):
        part = memory[: (size - first) * tensor.kind.itemsize]
        read_bytes(tensor, first, 0, [part])
        yield part
