"""What every pass does to a tile of products of queries and keys, either way round: queries by keys, or keys by
queries. Scores are in base 2, so that exponentials are powers of two."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from garrulax.kernels import dropout
from garrulax.kernels.tpu.plan import Arrays, Place, Plan

LOG2_E = math.log2(math.e)
LOWEST = -0.7 * float(jnp.finfo(jnp.float32).max)  # of pairs that do not attend: differences of two stay finite

Streams = dict[str, jax.Array]


def masking(plan: Plan, query: Streams, key: Streams, shape: tuple[int, int]) -> Callable[[jax.Array], jax.Array]:
    """What turns the scores of a tile's pairs that do not attend into the lowest. Heads that share a tile's mask share
    a float32 tile of the greatest scores that pairs may have, which costs each of them less than a choice."""
    seen = jnp.broadcast_to(plan.options.rule.evaluate(query, key), shape)
    if plan.group == 1:
        return lambda scores: jnp.where(seen, scores, LOWEST)
    ceiling = jnp.where(seen, jnp.inf, LOWEST)
    return lambda scores: jnp.minimum(scores, ceiling)


def scored(
    plan: Plan, scalars: Arrays, place: Place, head: Any, products: jax.Array, query: Streams, key: Streams,
    bias: jax.Array | None, buffer: Any,
) -> tuple[jax.Array, jax.Array | None]:  # fmt: skip
    """Scores of one head's tile, and the slope of the softcap there (None without one).

    With ALiBi they lack what `tilt` gives, which is the same for all keys. head: index among all query heads.
    bias: of the tile, broadcastable. buffer: a reference to float32 of the tile's shape, for T5's steps.
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
        ahead = key["position"] - scalars["origin"][place.batch, place.row]
        x += ahead.astype(jnp.float32) * (scalars["slopes"][head] * LOG2_E)
    if "steps" in scalars:
        x += stepped(scalars, place, head, query, key, buffer) * LOG2_E
    return x, slope


def tilt(scalars: Arrays, place: Place, head: Any, query: Streams) -> jax.Array | float:
    """What ALiBi takes off the scores of each query, in base e: keys are counted from the block's first query, which
    makes their share one number a key."""
    if "slopes" not in scalars:
        return 0.0
    behind = query["position"] - scalars["origin"][place.batch, place.row]
    return behind.astype(jnp.float32) * scalars["slopes"][head]


def stepped(scalars: Arrays, place: Place, head: Any, query: Streams, key: Streams, buffer: Any) -> jax.Array:
    """T5's bias of a tile: one number where all distances of the block are in one step, which most are."""
    low, high = steps_met(scalars, place)
    buffer[...] = jnp.full(buffer.shape, scalars["steps"][low, head])

    def step(i, _):
        distance = key["position"] - query["position"]
        buffer[...] = jnp.where(distance >= scalars["starts"][i], scalars["steps"][i + 1, head], buffer[...])

    jax.lax.fori_loop(low, high, step, None)
    return buffer[...]


def steps_met(scalars: Arrays, place: Place) -> tuple[jax.Array, jax.Array]:
    """The least and the greatest step of the distances in a block."""
    both = scalars["steps_met"][place.batch, place.row, place.column]
    return both & 0xFFFF, both >> 16


def kept(
    plan: Plan, scalars: Arrays, place: Place, head: Any, corner: tuple[int, int], shape: tuple[int, int], key_axis: int
) -> jax.Array:
    """Which probabilities of a tile dropout keeps. corner: the tile's first query and key in its block."""
    q, k = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (1 - key_axis, key_axis))
    q += place.row * plan.block_q + corner[0]
    k += scalars["first_key"][0] + place.column * plan.block_k + corner[1]
    return dropout.keep_mask(scalars["seeds"][place.batch, head], q, k, plan.options.dropout)


def bias_tile(plan: Plan, bias: Any, head: Any, corner: tuple[int, int]) -> jax.Array | None:
    """Bias of a head's tile, queries by keys; bias: the reference to the block's, or None."""
    if bias is None:
        return None
    rows = pl.ds(corner[0], plan.strip) if bias.shape[3] > 1 else slice(None)
    return bias[0, 0, head if bias.shape[2] > 1 else 0, rows, pl.ds(corner[1], plan.chunk)]
