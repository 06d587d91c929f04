"""Splitting the keys: the blocks that each sequence attends to, divided into splits of about one size.

A GPU has more processors than there are sequences, and sequences differ in length. So several programs share a
sequence, a split each, and a second kernel merges their results (Dao et al. 2023, Flash-Decoding). All of this is
traced: lengths and streams may change without a new compilation.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from garrulax.kernels.blocks import block_map
from garrulax.kernels.mask import Rule, Streams


class KeySplits(NamedTuple):
    """How the lists of active blocks are divided, for I programs.

    Attributes:
        sequence: int32 [I], index of the sequence.
        start: int32 [I], the split's first entry of the sequence's list.
        stop: int32 [I], the entry behind its last one; equal to `start` where the program has nothing to do.
    """

    sequence: jax.Array
    start: jax.Array
    stop: jax.Array


def active_blocks(
    rule: Rule, query: Streams, key: Streams, lengths: jax.Array, block: int, shape: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    """Lists, for every sequence, the blocks in which some query attends to some key.

    Args:
        rule: The mask's rule.
        query: int32 [B, T] by name, streams of the queries.
        key: int32 [B, N * block] by name, streams of the keys.
        lengths: int32 [B], valid slots of each sequence.
        block: Keys of a block.
        shape: (B, N), sequences and blocks.

    Returns:
        The lists, int32 [B, N], ascending, and their lengths, int32 [B]; entries behind a length are not valid. An
        entry is 2 * index + 1 where all pairs of the block attend, so that no mask is needed, and else 2 * index.
    """
    some, every = _classified(rule, query, key, lengths, block, shape)
    order = jnp.argsort(~some, axis=1, stable=True).astype(jnp.int32)  # active blocks first
    blocks = 2 * order + jnp.take_along_axis(every, order, axis=1).astype(jnp.int32)
    return blocks, some.sum(axis=1, dtype=jnp.int32)


def whole_sequences(
    rule: Rule, query: Streams, key: Streams, lengths: jax.Array, block: int, shape: tuple[int, int]
) -> tuple[jax.Array, KeySplits]:
    """Lists all blocks of every sequence, and for each one split, from its first to its last active block.

    Args:
        rule: As in `active_blocks`, like the others.
        query: See there.
        key: See there.
        lengths: See there.
        block: See there.
        shape: See there.

    Returns:
        The lists, int32 [B, N], with entries as there, and the B splits; `stop` is below `start` where nothing attends.
    """
    (B, N), index = shape, np.arange(shape[1], dtype=np.int32)[None]
    some, every = _classified(rule, query, key, lengths, block, shape)
    start, stop = jnp.min(jnp.where(some, index, N), axis=1), jnp.max(jnp.where(some, index + 1, 0), axis=1)
    # NumPy's arrays are constants of the program: those of JAX would be a kernel each in every step.
    return every.astype(jnp.int32) + 2 * index, KeySplits(jnp.asarray(np.arange(B, dtype=np.int32)), start, stop)


def _classified(
    rule: Rule, query: Streams, key: Streams, lengths: jax.Array, block: int, shape: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    """Whether any, and whether every pair of each block attends: bool [B, N]."""
    B, N = shape
    queries = next((s.shape[1] for s in query.values()), 1)
    some, every = (x[:, 0] for x in block_map(rule, query, key, queries, block, (B, 1, N)))  # [B, N]
    begin = jnp.arange(N, dtype=jnp.int32)[None] * block
    return some & (begin < lengths[:, None]), every & (begin + block <= lengths[:, None])


def split_blocks(counts: jax.Array, aim: int, fewest: int, least: int) -> tuple[KeySplits, jax.Array, jax.Array]:
    """Divides every sequence's list into equal splits.

    Args:
        counts: int32 [B], blocks in each list.
        aim: Splits wanted, of all sequences together.
        fewest: Splits that keep all processors busy.
        least: Blocks that a split should have, unless there are then fewer splits than `fewest`.

    Returns:
        The splits, I = aim + B of them, and int32 [B] each: every sequence's first split and its number of splits.
    """
    B, total = counts.shape[0], counts.sum(dtype=jnp.int32)
    size = jnp.maximum(jnp.maximum(-(-total // aim), jnp.minimum(least, -(-total // fewest))), 1)  # blocks of a split
    parts = -(-counts // size)  # [B], splits of a sequence
    ends = jnp.cumsum(parts, dtype=jnp.int32)
    first = ends - parts
    index = jnp.arange(aim + B, dtype=jnp.int32)
    sequence = jnp.minimum(jnp.searchsorted(ends, index, side="right", method="compare_all"), B - 1).astype(
        jnp.int32
    )  # [I]
    # Split `part` of a sequence's n: the first `more` splits have a block more than the others.
    part, n = index - first[sequence], jnp.maximum(parts[sequence], 1)
    even, more = counts[sequence] // n, counts[sequence] % n
    start = part * even + jnp.minimum(part, more)
    stop = jnp.where(index < ends[-1], start + even + (part < more).astype(jnp.int32), start)
    splits = KeySplits(*(x.astype(jnp.int32) for x in (sequence, start, stop)))
    return splits, first.astype(jnp.int32), parts.astype(jnp.int32)
