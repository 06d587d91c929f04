"""Whole documents in rows of fixed length: first-fit decreasing (Johnson 1973).

The longest documents are put first, each into the first row that has room for it. Documents longer than a row are cut
into pieces of a row's length and a rest. Which documents share a row depends on the text and the seed alone, and is
computed once: an epoch visits all rows in another order, as in `sampler`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from garrulax.train.sampler import hash_of


def first_fit_decreasing(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Puts items into bins: the largest first, each into the first bin that has room.

    Items of equal size are put in together: they fill the open bins one after another. So the time grows with the
    number of different sizes times that of bins, not with the number of items times that of bins.

    Args:
        sizes: int64 [P], from 1 to `capacity`. Items of equal size are taken in the order given.
        capacity: Of a bin.

    Returns:
        int64 [P], the number of each item's bin; bins count from 0, none is empty.

    Raises:
        ValueError: If a size is out of range.

    Example:
        >>> first_fit_decreasing(np.array([4, 8, 1, 4, 2, 1]), 10).tolist()
        [1, 0, 1, 1, 0, 1]
    """
    if len(sizes) and not (sizes.min() >= 1 and sizes.max() <= capacity):
        raise ValueError(f"sizes from {sizes.min()} to {sizes.max()} do not fit into bins of {capacity}")
    order = np.argsort(-sizes, kind="stable")
    distinct, counts = np.unique(sizes, return_counts=True)
    bins = np.empty(len(sizes), np.int64)
    names, free = np.zeros(0, np.int64), np.zeros(0, np.int64)  # of the bins with room, in the order of their opening
    opened = done = 0
    for size, count in zip(distinct[::-1].tolist(), counts[::-1].tolist(), strict=True):
        fits = free // size
        before = np.cumsum(fits) - fits
        taken = np.clip(count - before, 0, fits)
        rest, each = count - int(taken.sum()), capacity // size
        new = -(-rest // each)
        names = np.concatenate([names, opened + np.arange(new)])
        taken = np.concatenate([taken, np.minimum(each, rest - each * np.arange(new))])
        free = np.concatenate([free, np.full(new, capacity)]) - taken * size
        bins[order[done : done + count]] = np.repeat(names, taken)
        has_room = free >= distinct[0]
        names, free = names[has_room], free[has_room]
        opened, done = opened + new, done + count
    return bins


@dataclass(frozen=True)
class Packing:
    """Documents, or pieces of long ones, in rows.

    Attributes:
        starts: int64 [P], the index in the text of the first token of each piece, row by row.
        sizes: int64 [P], tokens of each piece.
        rows: int64 [R + 1]: row r has the pieces from rows[r] to rows[r + 1] - 1.
        waste: Share of the places in the rows that no piece takes.
    """

    starts: np.ndarray
    sizes: np.ndarray
    rows: np.ndarray
    waste: float

    def __len__(self) -> int:
        return len(self.rows) - 1

    def pieces(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The pieces of some rows.

        Args:
            rows: int64 [B]; -1 is a row without pieces.

        Returns:
            (row [N], piece [N]): the index in `rows` of each piece, and its number.
        """
        first = self.rows[np.maximum(rows, 0)]
        count = np.where(rows < 0, 0, self.rows[np.maximum(rows, 0) + 1] - first)
        ends = np.cumsum(count)
        row = np.repeat(np.arange(len(rows)), count)
        return row, np.arange(len(row)) + np.repeat(first - ends + count, count)


def pack(
    documents: np.ndarray,
    capacity: int,
    longest: int,
    seed: int,
    room: Callable[[np.ndarray], np.ndarray],
    shortest: int = 1,
) -> Packing:
    """Packs the documents of a text into rows.

    Args:
        documents: int64 [D + 1], the index in the text of the first item of each document, and the end of the last.
        capacity: Places in a row.
        longest: Items of a piece at most; longer documents are cut.
        seed: Decides which of several pieces of the same length goes first.
        room: Maps the sizes of pieces to the places that they take, from 1 to `capacity`.
        shortest: Items that a piece needs; shorter ones are left out.

    Raises:
        ValueError: If no document is long enough.
    """
    lengths = np.diff(documents)
    counts = -(-lengths // longest)  # pieces of each document
    owner = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.asarray(documents)[owner] + number * longest
    sizes = np.minimum(longest, lengths[owner] - number * longest)
    kept = sizes >= shortest
    if not kept.any():
        raise ValueError("there is nothing to pack: no document has two tokens or more")
    shuffled = np.argsort(hash_of(seed, np.arange(len(kept))), kind="stable")
    shuffled = shuffled[kept[shuffled]]
    starts, sizes = starts[shuffled], sizes[shuffled]
    places = room(sizes)
    bins = first_fit_decreasing(places, capacity)
    order = np.argsort(bins, kind="stable")
    rows = np.concatenate([[0], np.cumsum(np.bincount(bins))])
    return Packing(starts[order], sizes[order], rows, float(1 - places.sum() / (capacity * (len(rows) - 1))))
