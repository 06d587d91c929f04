"""Splitting the keys: the blocks that each sequence sees, cut into pieces of about one size.

A GPU has more processors than there are sequences, and sequences differ in length: every piece is a program of its
own. All of this is traced: lengths and streams may change without a new program.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from garrulax.kernels.blocks import block_map
from garrulax.kernels.mask import Rule, Streams


class Pieces(NamedTuple):
    """How the lists of active blocks are cut.

    sequence: int32 [I], whose piece it is. start, stop: int32 [I], from which entry of its list to which (exclusive);
    equal where there is no piece.
    """

    sequence: jax.Array
    start: jax.Array
    stop: jax.Array


def active(
    rule: Rule, query: Streams, key: Streams, lengths: jax.Array, block: int, shape: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    """Of `shape` = (B, N) sequences and blocks: int32 [B, N], each sequence's active blocks in order, and their number,
    int32 [B]; entries behind it mean nothing. A block is 2·index + 1 where every pair of it attends, else 2·index.

    query: int32 [B, T] by name. key: int32 [B, N·block] by name. lengths: int32 [B].
    """
    B, N = shape
    queries = next((s.shape[1] for s in query.values()), 1)
    some, every = (x[:, 0] for x in block_map(rule, query, key, queries, block, (B, 1, N)))
    begin = jnp.arange(N, dtype=jnp.int32) * block
    some &= begin < lengths[:, None]
    every &= begin + block <= lengths[:, None]
    order = jnp.argsort(~some, axis=1, stable=True)
    blocks = 2 * order + jnp.take_along_axis(every, order, axis=1)
    return blocks.astype(jnp.int32), some.sum(axis=1, dtype=jnp.int32)


def pieces(counts: jax.Array, aim: int, fewest: int, least: int) -> tuple[Pieces, jax.Array, jax.Array]:
    """Cuts lists of `counts` blocks, int32 [B], into equal pieces: about `aim` of them in all, each of `least` blocks
    or more, unless that makes fewer than `fewest`. There are I = aim + B places.

    Returns them, and of each sequence the first and their number, int32 [B]."""
    B, total = counts.shape[0], counts.sum()
    size = jnp.maximum(jnp.maximum(-(-total // aim), jnp.minimum(least, -(-total // fewest))), 1)
    parts = -(-counts // size)
    ends = jnp.cumsum(parts)
    first = ends - parts
    index = jnp.arange(aim + B, dtype=jnp.int32)
    sequence = jnp.minimum(jnp.searchsorted(ends, index, side="right", method="compare_all"), B - 1)
    part, n = index - first[sequence], jnp.maximum(parts[sequence], 1)
    even, more = counts[sequence] // n, counts[sequence] % n
    start = part * even + jnp.minimum(part, more)
    stop = jnp.where(index < ends[-1], start + even + (part < more), start)
    cut = Pieces(*(x.astype(jnp.int32) for x in (sequence, start, stop)))
    return cut, first.astype(jnp.int32), parts.astype(jnp.int32)
