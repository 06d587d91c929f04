"""Probabilities and gradients of scores of one block, in registers: the arithmetic of both backward kernels.

With p = exp(score - lse) and dp = cotangent·value, the gradient of a score is p * (dp - delta), where delta is the
sum of output * cotangent over the width (Dao et al. 2022, FlashAttention, arXiv 2205.14135, appendix B). Both products
are accumulated by the tensor cores, and an accumulator need not begin at zero: everything that can be added before the
products begins in the accumulator, so that it takes no further registers while the products run.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from garrulax.kernels.call import Options
from garrulax.kernels.gpu import scores
from garrulax.kernels.gpu.products import zeros
from garrulax.kernels.gpu.scores import ScoreBlock, ScoreExtras, Tile


def initial_scores(
    options: Options, block: ScoreBlock, extra: ScoreExtras, lse: Callable[[], jax.Array], masked: bool
) -> jax.Array:
    """The accumulator to which query·key is added, a float32 tile, in the unit of these products.

    It begins at (bias - lse) / scale, or, where a pair does not attend, so far down that its probability becomes 0.
    With a softcap, which applies to the products alone, or a scale that is not positive, only the mask is in it.

    Args:
        options: The static part of the request.
        block: The block of pairs.
        extra: References to the optional inputs of scores.
        lse: Gives float32, one entry a query, in base 2. A function, because it is not always called.
        masked: Whether not every pair of the block attends.
    """
    start = zeros(*block.tile.shape)
    if _begins_at_lse(options):
        start = block.tile.by_query(lse() * (-1 / scores.base2_scale(options)))
        start, _ = scores.unscaled(options, block, extra, start)
    if masked:
        start = jnp.where(scores.attending(options, block), start, -_far(options))
    return plgpu.layout_cast(start, plgpu.Layout.WGMMA)


def probabilities(
    options: Options,
    block: ScoreBlock,
    extra: ScoreExtras,
    products: jax.Array,
    lse: Callable[[], jax.Array],
    masked: bool,
) -> jax.Array:
    """exp(score - lse), a float32 tile, of products that were added to `initial_scores`; arguments as there."""
    if _begins_at_lse(options):
        return jnp.exp2(products * scores.base2_scale(options))
    x = scores.scores(options, block, extra, products) - block.tile.by_query(lse())
    # The mask is read from the accumulator, which is near -far only where a pair does not attend.
    return jnp.exp2(jnp.where(products * (1 / _far(options)) < -0.5, -jnp.inf, x) if masked else x)


def _begins_at_lse(options: Options) -> bool:
    return options.softcap is None and options.scale > 0


def _far(options: Options) -> float:
    """Larger than any product, with the scale's sign."""
    return math.copysign(2.0**100, options.scale)


def times_softcap_slope(options: Options, products: jax.Array, x: jax.Array) -> jax.Array:
    """x times the derivative of the softcap at the products."""
    slope = scores.softcap_slope(options, products)
    return x if slope is None else x * slope


def dropout_mask(options: Options, block: ScoreBlock, extra: ScoreExtras) -> jax.Array | None:
    """The probabilities that dropout keeps, a bool tile; None without dropout."""
    return scores.dropout_mask(options, block, extra) if options.dropout else None


def apply_dropout(options: Options, keep: jax.Array | None, x: jax.Array) -> jax.Array:
    """x after dropout: entries that stay are scaled up."""
    return x if keep is None else jnp.where(keep, x * (1 / (1 - options.dropout)), 0.0)


def initial_dp(options: Options, tile: Tile, delta: Callable[[], jax.Array]) -> jax.Array:
    """The accumulator to which cotangent·value is added, a float32 tile.

    It begins at -delta, which saves a subtraction, but at zero with dropout, which changes the products before delta
    is subtracted. delta gives float32, one entry a query, in the tile's layout.
    """
    if options.dropout:
        return zeros(*tile.shape)
    return plgpu.layout_cast(tile.by_query(-delta()), plgpu.Layout.WGMMA)


def minus_delta(
    options: Options, block: ScoreBlock, keep: jax.Array | None, products: jax.Array, delta: Callable[[], jax.Array]
) -> jax.Array:
    """dp - delta, a float32 tile, of products that were added to `initial_dp`."""
    return products if keep is None else apply_dropout(options, keep, products) - block.tile.by_query(delta())
