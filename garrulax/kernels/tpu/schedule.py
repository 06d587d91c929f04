"""The blocks of pairs that a kernel visits, as a list that its grid walks along."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

SIDE = 4096  # blocks on a side: a word has 12 bits for a row and for a column
ENTRIES = 1 << 16  # words that fit into scalar memory beside everything else

FIRST, LAST, PARTIAL, OPENS, CLOSES = 1, 2, 4, 8, 16  # of its row; not all of its pairs attend; of its batch row
_COLUMN, _ROW = 5, 17


class Schedule(NamedTuple):
    """Active blocks in the order of (batch row, row, column).

    words: int32 [n]: column << 5 | row << 17 | bits. batch: int32 [n]. length: how many of them are meant.
    """

    words: jax.Array
    batch: jax.Array
    length: jax.Array


def row(word: jax.Array) -> jax.Array:
    """Row of the block that a word names."""
    return word >> _ROW


def column(word: jax.Array) -> jax.Array:
    """Column of the block that a word names."""
    return (word >> _COLUMN) & (SIDE - 1)


def schedule(some: jax.Array, every: jax.Array) -> Schedule:
    """The list of a `blocks.block_map` [B, rows, columns]. A row without an active block gets its first one, in which
    nobody attends, so that a kernel writes its output."""
    _, rows, columns = some.shape
    some = some.at[:, :, 0].set(some[:, :, 0] | ~some.any(axis=2))
    active = some.reshape(-1)
    order = jnp.argsort(~active, stable=True).astype(jnp.int32)
    count = active.sum(dtype=jnp.int32)
    line, batch = order // columns, order // (rows * columns)
    inside = jnp.arange(order.size) < count
    bits = jnp.where(every.reshape(-1)[order], 0, PARTIAL)
    for group, opening, closing in ((line, FIRST, LAST), (batch, OPENS, CLOSES)):
        group = jnp.where(inside, group, -1)
        bits |= jnp.where(group != jnp.roll(group, 1).at[0].set(-2), opening, 0)
        bits |= jnp.where(group != jnp.roll(group, -1).at[-1].set(-2), closing, 0)
    words = bits | (order % columns) << _COLUMN | (line % rows) << _ROW
    return Schedule(jnp.where(inside, words, 0), jnp.where(inside, batch, 0), count)
