"""The blocks of a cache that decoding attention has to read: what a kernel goes through, and nothing else."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from garrulax.kernels.blocks import VALID_KEY, block_map, pad_axis
from garrulax.kernels.call import Options
from garrulax.kernels.decode.call import DecodeOperands
from garrulax.kernels.mask import All, KRange, Rule, Streams

FIRST, LAST, PARTIAL, IDLE = 1, 2, 4, 8  # flags of a step; its column and row stand above them
COLUMN, ROW = 4, 18  # where their bits begin
MOST_COLUMNS, MOST_ROWS = 1 << (ROW - COLUMN), 1 << (31 - ROW)


class Work(NamedTuple):
    """The steps of each split, one after another.

    words: int32 [splits · L], L = rows · columns: flags, column and row of each step. Behind the steps of a split
    follow idle ones, which repeat the last.
    pages: int32 [splits · L · n]: the n pages of each step. One in which nobody attends has the number of that which
    the step before had in its place, so that nothing is read for it. Empty where the cache is contiguous.
    most: int32 scalar, the most steps of any split.
    shared: int32 [splits, rows], the steps of each row in each split; where 0, its output is not written.
    """

    words: jax.Array
    pages: jax.Array
    most: jax.Array
    shared: jax.Array


def row_of(word: jax.Array) -> jax.Array:
    """The sequence of a step."""
    return word >> ROW


def column_of(word: jax.Array) -> jax.Array:
    """The block of a step, in the order of its sequence."""
    return (word >> COLUMN) & (MOST_COLUMNS - 1)


def in_order(options: Options, cached: DecodeOperands, size: int) -> tuple[Rule, Streams]:
    """The rule with the lengths in it, and the key streams of each sequence in order: int32 [B, columns · size].

    What lies behind a length repeats the last slot, so that the bounds of blocks stay tight.
    """
    streams = cached.key_streams
    if cached.table is None:
        B, slots = cached.query.shape[0], cached.key.shape[2]
    else:
        B, slots = cached.table.shape[0], cached.table.shape[1] * cached.key.shape[2]
        streams = {
            name: jnp.take(s, cached.table, axis=0, mode="clip").reshape(B, slots) for name, s in streams.items()
        }
    more = -slots % size
    streams = {name: pad_axis(s, more, mode="edge") for name, s in streams.items()}
    if cached.lengths is None and not more:
        return options.rule, streams
    lengths = jnp.full((B,), slots, jnp.int32) if cached.lengths is None else jnp.minimum(cached.lengths, slots)
    index = jnp.arange(slots + more, dtype=jnp.int32)
    live = index < lengths[:, None]
    if cached.lengths is not None:
        last = jnp.maximum(lengths - 1, 0)[:, None]
        streams = {name: jnp.where(live, s, jnp.take_along_axis(s, last, axis=1)) for name, s in streams.items()}
    counts = KRange(VALID_KEY, 1, 1)
    rule = counts if isinstance(options.rule, All) else options.rule & counts
    return rule, {**streams, VALID_KEY: live.astype(jnp.int32)}


def blocks_seen(
    rule: Rule, query: Streams, key: Streams, size: int, shape: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    """(any, all), bool of `shape` = (rows, columns), of blocks of `size` keys: whether some query of the row attends to
    some key, and every one to every one."""
    T = next(iter(query.values())).shape[1] if query else 1
    some, every = block_map(rule, query, key, T, size, (shape[0], 1, shape[1]))
    return some[:, 0], every[:, 0]


def listed(some: jax.Array, every: jax.Array, splits: int, table: jax.Array | None = None) -> Work:
    """The steps through blocks.

    some, every: as of `blocks_seen`: bool [B, columns] of blocks, or [B, columns, n] of the pages in them.
    splits: parts of about as many steps each that every row's blocks are dealt to, in order.
    table: int32 [B, columns, n], where the cache has pages.
    """
    seen, pages = some, some
    if table is not None:
        some, every = some.any(axis=2), every.all(axis=2)
    B, columns = some.shape
    some = some.at[:, 0].set(some[:, 0] | ~some.any(axis=1))  # every row's output is written
    rank = jnp.cumsum(some, axis=1, dtype=jnp.int32) - 1
    split = rank * splits // (rank[:, -1:] + 1)
    dealt = some & (split == jnp.arange(splits, dtype=jnp.int32)[:, None, None])
    end = jnp.int32(2 * B * columns)
    keys = 2 * jnp.arange(B * columns, dtype=jnp.int32).reshape(B, columns) + ~every
    order = jnp.sort(jnp.where(dealt, keys, end).reshape(splits, -1), axis=1)
    shared = dealt.sum(axis=2, dtype=jnp.int32)
    counts = shared.sum(axis=1)
    idle = order == end
    last = jnp.take_along_axis(order, jnp.maximum(counts - 1, 0)[:, None], axis=1)
    order = jnp.where(idle, jnp.where(last == end, 0, last), order)
    place = order >> 1
    row, column = place // columns, place % columns
    before = jnp.pad(row[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    behind = jnp.pad(jnp.where(idle, -1, row)[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    flags = FIRST * (row != before) + LAST * (row != behind) + PARTIAL * (order & 1)
    flags = jnp.where(idle, IDLE, flags)
    words = (flags | (column << COLUMN) | (row << ROW)).astype(jnp.int32)
    pages = jnp.zeros((1,), jnp.int32)
    if table is not None:
        pages = _held(table.reshape(B * columns, -1)[place], seen.reshape(B * columns, -1)[place] & ~idle[..., None])
    return Work(words.reshape(-1), pages.reshape(-1), counts.max(), shared)


def _held(pages: jax.Array, read: jax.Array) -> jax.Array:
    """Pages [splits, steps, n], in each place that of the last step that reads one; before any does, page 0."""
    index = jnp.arange(pages.shape[1], dtype=jnp.int32)[:, None]
    last = jax.lax.cummax(jnp.where(read, index, -1), axis=1)
    held = jnp.take_along_axis(pages, jnp.maximum(last, 0), axis=1)
    return jnp.where(last < 0, 0, held)
