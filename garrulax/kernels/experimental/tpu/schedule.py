"""The active blocks of a request, as the list over which the grids of the kernels run.

A block is a tile of block_q queries by block_k keys; it is active if any of its pairs attends. A rectangular grid would
take a step for every block, and the pipeline would copy keys and values even for blocks whose step does nothing. A
grid over a list has one step for each active block. The list is a traced array and its length a dynamic bound of the
grid: other documents or lengths run the same compiled program.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# The list lies in scalar memory, which is small, so each entry is one int32 word: 5 flags, then 12 bits for the column
# and 12 bits for the row.
MAX_SIDE = 1 << 12  # rows or columns of blocks that a word can address
MAX_ENTRIES = 1 << 16  # words that fit into scalar memory beside the other scalars

FIRST_OF_ROW, LAST_OF_ROW = 1, 2  # of the active blocks with the same queries
PARTIAL = 4  # some pairs of the block do not attend: evaluate the mask
FIRST_OF_BATCH, LAST_OF_BATCH = 8, 16  # of the active blocks of one sequence of the batch
_COLUMN, _ROW = 5, 17  # lowest bit of each number


class BlockSchedule(NamedTuple):
    """Active blocks, ordered by sequence of the batch, then row, then column.

    Attributes:
        words: int32 [n], where n counts all blocks: column << 5 | row << 17 | flags. Entries from `length` on are 0.
        batch: int32 [n], the sequence of each block.
        length: int32 scalar, the number of active blocks.
    """

    words: jax.Array
    batch: jax.Array
    length: jax.Array


def row(word: jax.Array) -> jax.Array:
    """Row of the block that a word encodes: its index among the blocks of queries."""
    return word >> _ROW


def column(word: jax.Array) -> jax.Array:
    """Column of the block that a word encodes: its index among the blocks of keys."""
    return (word >> _COLUMN) & (MAX_SIDE - 1)


def block_schedule(active: jax.Array, full: jax.Array) -> BlockSchedule:
    """The list of the active blocks.

    A row without an active block gets its first block all the same, as a partial one in which no pair attends, so that
    a kernel writes the output of every row.

    Args:
        active: bool [B, rows, columns], whether any pair of a block attends.
        full: bool [B, rows, columns], whether all pairs of a block attend.
    """
    _, rows, columns = active.shape
    active = active.at[:, :, 0].set(active[:, :, 0] | ~active.any(axis=2))
    flat = active.reshape(-1)  # [n]
    # A stable sort moves the active blocks to the front and keeps their order.
    order = jnp.argsort(~flat, stable=True).astype(jnp.int32)
    length = flat.sum(dtype=jnp.int32)
    line, batch = order // columns, order // (rows * columns)  # line: row among the rows of all sequences
    valid = jnp.arange(order.size, dtype=jnp.int32) < length
    flags = jnp.where(full.reshape(-1)[order], 0, jnp.int32(PARTIAL))
    for group, first, last in ((line, FIRST_OF_ROW, LAST_OF_ROW), (batch, FIRST_OF_BATCH, LAST_OF_BATCH)):
        group = jnp.where(valid, group, -1)
        flags |= jnp.where(group != jnp.roll(group, 1).at[0].set(-2), first, 0)
        flags |= jnp.where(group != jnp.roll(group, -1).at[-1].set(-2), last, 0)
    words = flags | (order % columns) << _COLUMN | (line % rows) << _ROW
    return BlockSchedule(jnp.where(valid, words, 0), jnp.where(valid, batch, 0), length)
