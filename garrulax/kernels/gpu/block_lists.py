"""The blocks of scores that a kernel visits: for every row of blocks a list of columns, computed by traced code."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from garrulax.kernels.blocks import block_map
from garrulax.kernels.call import Operands, Options
from garrulax.kernels.mask import All, Rule, Streams


class BlockLists(NamedTuple):
    """The blocks that contain at least one attending pair, listed for every row of blocks.

    Every list begins with the full blocks, in which every pair attends. A kernel can then run two loops, one without
    any code for the mask and one with it, instead of a branch in every step.

    Attributes:
        columns: int32 [B, rows, columns], the columns to visit in each row: full blocks, then partial ones, both
            ascending. Only the first `counts[..., 1]` entries are valid.
        counts: int32 [B, rows, 2], the number of full blocks and the number of all blocks of each row.
        order: int32 [B, rows], the rows from the longest list to the shortest. Programs start in this order: a long
            one that started last would run while the rest of the device is idle.
    """

    columns: jax.Array
    counts: jax.Array
    order: jax.Array


class RequestLists(NamedTuple):
    """The lists of a request that is differentiated.

    Attributes:
        forward: Of the forward pass.
        backward: Of the kernels for keys and values and for queries; None where XLA computes the gradients.
    """

    forward: BlockLists
    backward: tuple[BlockLists, ...] | None


def block_lists(
    rule: Rule,
    query: Streams,
    key: Streams,
    block_q: int,
    block_k: int,
    shape: tuple[int, int, int],
    *,
    by_key: bool = False,
) -> BlockLists:
    """Lists the blocks to visit.

    Args:
        rule: The mask's rule.
        query: int32 [B, T] by name, streams of the queries.
        key: int32 [B, S] by name, streams of the keys.
        block_q: Queries of a block.
        block_k: Keys of a block.
        shape: (B, T / block_q, S / block_k).
        by_key: Rows are blocks of keys and columns blocks of queries, as the gradients of keys and values need them.

    Returns:
        The lists, one for every row of every sequence of the batch.
    """
    some, every = block_map(rule, query, key, block_q, block_k, shape)
    if by_key:
        some, every = some.swapaxes(1, 2), every.swapaxes(1, 2)
    full = some & every
    # A stable sort by 0 (full), 1 (partial), 2 (skipped) keeps columns of one kind ascending.  # [B, rows, columns]
    columns = jnp.argsort(jnp.where(full, 0, jnp.where(some, 1, 2)), axis=-1, stable=True)
    counts = jnp.stack([full.sum(-1), some.sum(-1)], axis=-1)  # [B, rows, 2]
    order = jnp.argsort(-counts[..., 1], axis=-1, stable=True)  # [B, rows]
    return BlockLists(*(x.astype(jnp.int32) for x in (columns, counts, order)))


def lists_of(options: Options, operands: Operands, block_q: int, block_k: int, *, by_key: bool = False) -> BlockLists:
    """`block_lists` for the streams of a request, whose lengths are multiples of the block sizes."""
    o = operands
    shape = o.query.shape[0], o.query.shape[1] // block_q, o.key.shape[1] // block_k
    return block_lists(options.rule, o.query_streams, o.key_streams, block_q, block_k, shape, by_key=by_key)


def visit(rule: Rule, step: Callable[[bool, Any, Any], Any], full: Any, count: Any, carry: Any) -> Any:
    """Runs step(masked, i, carry) for i = 0, ..., count - 1 and returns the last carry.

    The first `full` blocks get masked=False. Under the rule `All` no block is partial, so the second loop, which would
    only make the kernel longer, is left out.
    """
    carry = lax.fori_loop(0, full, functools.partial(step, False), carry)
    return carry if isinstance(rule, All) else lax.fori_loop(full, count, functools.partial(step, True), carry)
