"""Which blocks a kernel visits: of every row of blocks a list of its columns, made of traced arrays."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from garrulax.kernels.blocks import block_map
from garrulax.kernels.mask import Rule, Streams


class Rows(NamedTuple):
    """The blocks in which anybody attends, by row.

    columns: int32 [B, rows, columns]: each row's, first those where every pair attends (no mask to compute), then the
    others, both ascending; what is behind them is not to be read.
    counts: int32 [B, rows, 2]: how many blocks of a row are whole, and how many there are together with the others.
    order: int32 [B, rows]: the rows, longest first, so that no long one starts when the device has little left to do.
    """

    columns: jax.Array
    counts: jax.Array
    order: jax.Array


def rows(
    rule: Rule,
    query: Streams,
    key: Streams,
    block_q: int,
    block_k: int,
    shape: tuple[int, int, int],
    *,
    by_key: bool = False,
) -> Rows:
    """The blocks of `shape` = (batch, blocks of queries, blocks of keys); arguments as of `blocks.block_map`.

    by_key: rows are blocks of keys and columns blocks of queries, for gradients of keys and values.
    """
    some, every = block_map(rule, query, key, block_q, block_k, shape)
    if by_key:
        some, every = some.swapaxes(1, 2), every.swapaxes(1, 2)
    whole = some & every
    columns = jnp.argsort(jnp.where(whole, 0, jnp.where(some, 1, 2)), axis=-1, stable=True)
    counts = jnp.stack([whole.sum(-1), some.sum(-1)], axis=-1)
    order = jnp.argsort(-counts[..., 1], axis=-1, stable=True)
    return Rows(*(x.astype(jnp.int32) for x in (columns, counts, order)))
