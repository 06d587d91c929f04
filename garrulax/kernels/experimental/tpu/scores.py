"""Scores of a tile of products of queries and keys, for all passes.

A tile is queries by keys in the forward pass and keys by queries in the backward pass: streams broadcast to either, so
that one code serves both. Scores are in base 2 (multiplied by log2(e)): the hardware has exp2, not exp.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from garrulax.kernels import dropout
from garrulax.kernels.experimental.tpu.layout import BlockIndex, Named, TpuPlan

LOG2_E = math.log2(math.e)
LOWEST = -0.7 * float(jnp.finfo(jnp.float32).max)  # score of a pair that does not attend; differences stay finite

Streams = dict[str, jax.Array]


def score_mask(plan: TpuPlan, query: Streams, key: Streams, shape: tuple[int, int]) -> Callable[[jax.Array], jax.Array]:
    """A function that sets the scores of a tile's pairs that do not attend to `LOWEST`.

    Args:
        plan: Of the call.
        query: Query streams of the tile, broadcastable to its shape.
        key: Key streams of the tile, broadcastable to its shape.
        shape: Of the tile.
    """
    attends = jnp.broadcast_to(plan.options.rule.evaluate(query, key), shape)
    if plan.group == 1:
        return lambda scores: jnp.where(attends, scores, LOWEST)
    # The heads of a group apply the same mask. A minimum with a float32 tile is cheaper for each of them than a select.
    ceiling = jnp.where(attends, jnp.inf, LOWEST)
    return lambda scores: jnp.minimum(scores, ceiling)


def tile_scores(
    plan: TpuPlan,
    scalars: Named,
    block: BlockIndex,
    head: Any,
    products: jax.Array,
    query: Streams,
    key: Streams,
    bias: jax.Array | None,
    buffer: Any,
) -> tuple[jax.Array, jax.Array | None]:
    """Scores of one head's tile, before masking and without `alibi_offset`, in base 2.

    Args:
        plan: Of the call.
        scalars: References to scalar memory.
        block: The block that the tile lies in.
        head: Index among all query heads.
        products: query·key, float32, of the tile's shape.
        query: Query streams, broadcastable to the tile.
        key: Key streams, broadcastable to the tile.
        bias: Broadcastable to the tile, or None.
        buffer: Reference to float32 scratch of the tile's shape, for T5's bias; None without it.

    Returns:
        The scores, and the derivative of the softcap at each of them (None without a softcap).
    """
    o, slope = plan.options, None
    if o.softcap is None:
        x = products * (o.scale * LOG2_E)
    else:
        capped = jnp.tanh(products * (o.scale / o.softcap))
        x, slope = capped * (o.softcap * LOG2_E), 1 - capped * capped
    if bias is not None:
        x += bias.astype(jnp.float32) * LOG2_E
    if "slopes" in scalars:
        ahead = key["position"] - scalars["origin"][block.batch, block.row]
        x += ahead.astype(jnp.float32) * (scalars["slopes"][head] * LOG2_E)
    if "steps" in scalars:
        x += step_bias(scalars, block, head, query, key, buffer) * LOG2_E
    return x, slope


def alibi_offset(scalars: Named, block: BlockIndex, head: Any, query: Streams) -> jax.Array | float:
    """The part of ALiBi's bias that depends on the query alone, with the sign reversed, in base e.

    ALiBi adds slope * (key position - query position). `tile_scores` adds slope * (key position - origin), where origin
    is the position of the block's first query: one number for each key instead of one for each pair. The rest is the
    same for all keys of a query, so it does not change the probabilities; it is subtracted from the row's lse once.
    """
    if "slopes" not in scalars:
        return 0.0
    behind = query["position"] - scalars["origin"][block.batch, block.row]
    return behind.astype(jnp.float32) * scalars["slopes"][head]


def step_bias(scalars: Named, block: BlockIndex, head: Any, query: Streams, key: Streams, buffer: Any) -> jax.Array:
    """T5's bias of a tile.

    The loop goes from the least step of the block to the greatest. In most blocks these are equal: it does not run.
    """
    low, high = step_range(scalars, block)
    buffer[...] = jnp.full(buffer.shape, scalars["steps"][low, head])

    def step(i, _):
        distance = key["position"] - query["position"]
        buffer[...] = jnp.where(distance >= scalars["starts"][i], scalars["steps"][i + 1, head], buffer[...])

    jax.lax.fori_loop(low, high, step, None)
    return buffer[...]


def step_range(scalars: Named, block: BlockIndex) -> tuple[jax.Array, jax.Array]:
    """The least and the greatest index of a step that the distances of a block may have."""
    both = scalars["steps_in_block"][block.batch, block.row, block.column]
    return both & 0xFFFF, both >> 16


def dropout_mask(
    plan: TpuPlan,
    scalars: Named,
    block: BlockIndex,
    head: Any,
    corner: tuple[int, int],
    shape: tuple[int, int],
    key_axis: int,
) -> jax.Array:
    """Which probabilities of a tile survive dropout: bool, of the tile's shape.

    The random number of a pair depends on the indices of its query and key in the whole request, not on block sizes,
    so that the backward pass draws the same ones.

    Args:
        plan: Of the call.
        scalars: References to scalar memory.
        block: The block that the tile lies in.
        head: Index among all query heads.
        corner: The tile's first query and first key, counted from the start of the block.
        shape: Of the tile.
        key_axis: The axis of the tile along which its keys lie.
    """
    q, k = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (1 - key_axis, key_axis))
    q += block.row * plan.block_q + corner[0]
    k += scalars["first_key"][0] + block.column * plan.block_k + corner[1]
    return dropout.keep_mask(scalars["seeds"][block.batch, head], q, k, plan.options.dropout)


def bias_tile(plan: TpuPlan, bias: Any, head: Any, corner: tuple[int, int]) -> jax.Array | None:
    """Bias of a head's tile, queries by keys: [strip or 1, chunk].

    Args:
        plan: Of the call.
        bias: Reference to the bias of the block, or None.
        head: Index among the query heads of the part.
        corner: The tile's first query and first key, counted from the start of the block.
    """
    if bias is None:
        return None
    rows = pl.ds(corner[0], plan.strip) if bias.shape[3] > 1 else slice(None)
    return bias[0, 0, head if bias.shape[2] > 1 else 0, rows, pl.ds(corner[1], plan.chunk)]
