"""Splitting the keys: the blocks that each sequence sees, cut into pieces of about one size, and put together again.

A GPU has more processors than there are sequences, and sequences differ in length: every piece is a program of its
own, and `merged` weighs their results. All of it is traced: lengths and streams may change without a new program.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from garrulax.kernels.blocks import block_map
from garrulax.kernels.mask import Rule, Streams


class Pieces(NamedTuple):
    """How the lists of active blocks are cut.

    sequence: int32 [I], whose piece it is; B where there is none.
    start, stop: int32 [I], from which entry of its list to which (exclusive).
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


def pieces(counts: jax.Array, aim: int, fewest: int, least: int) -> Pieces:
    """Cuts lists of `counts` blocks, int32 [B], into equal pieces: about `aim` of them in all, each of `least` blocks
    or more, unless that makes fewer than `fewest`. There are I = aim + B places."""
    B, total = counts.shape[0], counts.sum()
    size = jnp.maximum(jnp.maximum(-(-total // aim), jnp.minimum(least, -(-total // fewest))), 1)
    parts = -(-counts // size)
    ends = jnp.cumsum(parts)
    index = jnp.arange(aim + B, dtype=jnp.int32)
    sequence = jnp.searchsorted(ends, index, side="right", method="compare_all").astype(jnp.int32)
    own = jnp.minimum(sequence, B - 1)
    part, n = index - (ends - parts)[own], jnp.maximum(parts[own], 1)
    even, more = counts[own] // n, counts[own] % n
    start = part * even + jnp.minimum(part, more)
    stop = start + even + (part < more)
    return Pieces(sequence, *(jnp.where(sequence == B, 0, x).astype(jnp.int32) for x in (start, stop)))


def merged(out: jax.Array, lse: jax.Array, sequence: jax.Array, batch: int) -> tuple[jax.Array, jax.Array]:
    """Results [B, ..., C] and lse [B, ...] of pieces' results [I, ..., C] and lse [I, ...], float32.

    Places without a piece (sequence B) hold anything. What no piece saw is 0 and -inf."""
    mine = sequence == jnp.arange(batch, dtype=jnp.int32)[:, None]
    spread = mine.reshape(*mine.shape, *(1,) * (lse.ndim - 1))
    top = jnp.where(spread, lse, -jnp.inf).max(axis=1)
    own = jnp.minimum(sequence, batch - 1)
    weights = jnp.exp(lse - jnp.where(jnp.isneginf(top), 0, top)[own])
    there = (sequence < batch).reshape(-1, *(1,) * (lse.ndim - 1))
    weights, out = jnp.where(there, weights, 0), jnp.where(there[..., None], out, 0)
    both = jnp.concatenate([weights[..., None] * out, weights[..., None]], axis=-1)
    both = jnp.einsum("BI,I...->B...", mine.astype(jnp.float32), both, precision=jax.lax.Precision.HIGHEST)
    total = both[..., -1]
    return both[..., :-1] / jnp.where(total == 0, 1, total)[..., None], jnp.log(total) + top
