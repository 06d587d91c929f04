"""The blocks of a cache that decoding attention has to read, as the list of steps over which the kernel's grid runs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from garrulax.kernels.blocks import VALID_KEY, block_map, pad_axis
from garrulax.kernels.call import Options
from garrulax.kernels.decode.call import DecodeOperands
from garrulax.kernels.mask import All, KRange, Rule, Streams

# A step is one int32 word in scalar memory: 4 flags, then 14 bits for the column and 13 bits for the row.
FIRST, LAST = 1, 2  # of the steps of a row in a split
PARTIAL = 4  # some pairs of the block do not attend: evaluate the mask
IDLE = 8  # nothing to compute
_COLUMN, _ROW = 4, 18  # lowest bit of each number
MAX_COLUMNS, MAX_ROWS = 1 << (_ROW - _COLUMN), 1 << (31 - _ROW)


class DecodeSteps(NamedTuple):
    """The steps of all splits, one split after another, each in L = rows · columns entries.

    Attributes:
        words: int32 [splits · L], flags, column and row of each step. A split's unused entries are idle steps, which
            repeat its last block, so that nothing is copied for them.
        pages: int32 [splits · L · n], the numbers of the n pages of each step. A page in which nothing attends has the
            number of the page at the same place of the previous step: the pipeline copies a block only if its index
            changes, so it skips this page. [1] for a contiguous cache.
        most: int32 scalar, the number of steps of the longest split.
        shared: int32 [splits, rows], the number of steps of each row in each split. Where it is 0, the kernel does not
            write the row's output of that split.
    """

    words: jax.Array
    pages: jax.Array
    most: jax.Array
    shared: jax.Array


def row_of(word: jax.Array) -> jax.Array:
    """Row of a step: its sequence."""
    return word >> _ROW


def column_of(word: jax.Array) -> jax.Array:
    """Column of a step: the index of its block among those of the sequence."""
    return (word >> _COLUMN) & (MAX_COLUMNS - 1)


def slots_of(cached: DecodeOperands) -> int:
    """Number of slots that a sequence has at most."""
    return cached.key.shape[2] * (1 if cached.table is None else cached.table.shape[1])


def lengths_of(cached: DecodeOperands) -> jax.Array:
    """int32 [B], the number of valid slots of each sequence."""
    if cached.lengths is None:
        return jnp.full((cached.query.shape[0],), slots_of(cached), jnp.int32)
    return jnp.minimum(cached.lengths, slots_of(cached))


def ordered_streams(options: Options, cached: DecodeOperands, size: int) -> tuple[Rule, Streams]:
    """The rule with the lengths in it, and the key streams of each sequence in the order of its tokens.

    Streams of pages are gathered: they are small beside the pages themselves. Slots behind a sequence's length repeat
    the stream of its last slot, so that the block_bounds of blocks stay tight, and do not attend.

    Args:
        options: Of the request.
        cached: Of the request.
        size: Slots of a step; the streams are padded to a multiple of it.

    Returns:
        The rule, and streams int32 [B, columns · size].
    """
    streams, B, slots = cached.key_streams, cached.query.shape[0], slots_of(cached)
    if cached.table is not None:
        streams = {
            name: jnp.take(s, cached.table, axis=0, mode="clip").reshape(B, slots) for name, s in streams.items()
        }
    more = -slots % size
    streams = {name: pad_axis(s, more, mode="edge") for name, s in streams.items()}
    if cached.lengths is None and not more:
        return options.rule, streams
    lengths = lengths_of(cached)
    index = jnp.arange(slots + more, dtype=jnp.int32)[None]
    live = index < lengths[:, None]  # [B, columns · size]
    if cached.lengths is not None:
        last = jnp.maximum(lengths - 1, 0)[:, None]
        streams = {name: jnp.where(live, s, jnp.take_along_axis(s, last, axis=1)) for name, s in streams.items()}
    within_length = KRange(VALID_KEY, 1, 1)
    rule = within_length if isinstance(options.rule, All) else options.rule & within_length
    return rule, {**streams, VALID_KEY: live.astype(jnp.int32)}


def block_activity(
    rule: Rule, query: Streams, key: Streams, size: int, shape: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    """Which blocks of keys are active and which are full.

    Args:
        rule: As from `ordered_streams`.
        query: Query streams [B, T].
        key: Key streams, as from `ordered_streams`.
        size: Keys of a block.
        shape: (rows, columns) of blocks.

    Returns:
        bool of `shape` each: whether any query of the row attends to any key of the block, and whether all queries
        attend to all keys.
    """
    T = next(iter(query.values())).shape[1] if query else 1
    active, full = block_map(rule, query, key, T, size, (shape[0], 1, shape[1]))
    return active[:, 0], full[:, 0]


def decode_steps(active: jax.Array, full: jax.Array, splits: int, table: jax.Array | None = None) -> DecodeSteps:
    """The list of steps through the active blocks.

    Args:
        active: bool [B, columns] of blocks, or [B, columns, n] of the n pages of each block, as from `block_activity`.
        full: Of the same shape.
        splits: Number of parts of about as many steps, into which each row's active blocks are divided in order.
        table: int32 [B, columns, n], page numbers, if the cache has pages.
    """
    page_active = active
    if table is not None:
        active, full = active.any(axis=2), full.all(axis=2)
    B, columns = active.shape
    # A row without an active block gets its first block all the same, so that its output is written.
    active = active.at[:, 0].set(active[:, 0] | ~active.any(axis=1))
    # Divide the active blocks of each row: the i-th of m goes to split i * splits // m.
    rank = jnp.cumsum(active, axis=1, dtype=jnp.int32) - 1
    split = rank * splits // (rank[:, -1:] + 1)
    in_split = active & (split == jnp.arange(splits, dtype=jnp.int32)[:, None, None])  # [splits, B, columns]
    # One sort of 2 * index + (not full) brings the blocks of each split to the front, in order, with their flag.
    end = jnp.int32(2 * B * columns)
    keys = 2 * jnp.arange(B * columns, dtype=jnp.int32).reshape(B, columns)
    keys += (~full).astype(jnp.int32)
    order = jnp.sort(jnp.where(in_split, keys, end).reshape(splits, -1), axis=1)  # [splits, L]
    shared = in_split.sum(axis=2, dtype=jnp.int32)
    counts = shared.sum(axis=1)
    # Idle steps repeat the split's last block.
    idle = order == end
    last = jnp.take_along_axis(order, jnp.maximum(counts - 1, 0)[:, None], axis=1)
    order = jnp.where(idle, jnp.where(last == end, 0, last), order)
    index = order >> 1
    row, column = index // columns, index % columns
    row_before = jnp.pad(row[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    row_after = jnp.pad(jnp.where(idle, -1, row)[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    first, last_of_row = ((row != other).astype(jnp.int32) for other in (row_before, row_after))
    flags = FIRST * first + LAST * last_of_row + PARTIAL * (order & 1)
    flags = jnp.where(idle, IDLE, flags)
    words = (flags | (column << _COLUMN) | (row << _ROW)).astype(jnp.int32)
    pages = jnp.zeros((1,), jnp.int32)
    if table is not None:
        numbers, read = (x.reshape(B * columns, -1)[index] for x in (table, page_active))  # [splits, L, n]
        pages = _repeat_unread(numbers, read & ~idle[..., None])
    return DecodeSteps(words.reshape(-1), pages.reshape(-1), counts.max(), shared)


def _repeat_unread(pages: jax.Array, read: jax.Array) -> jax.Array:
    """Replaces the numbers of unread pages, so that no new page is copied for them.

    Args:
        pages: int32 [splits, L, n], page numbers.
        read: bool [splits, L, n], whether the page is read.

    Returns:
        int32 [splits, L, n]: an unread entry holds the number that was last read in its column, or 0.
    """
    index = jnp.arange(pages.shape[1], dtype=jnp.int32)[:, None]
    last = jax.lax.cummax(jnp.where(read, index, -1), axis=1)
    repeated = jnp.take_along_axis(pages, jnp.maximum(last, 0), axis=1)
    return jnp.where(last < 0, 0, repeated)
