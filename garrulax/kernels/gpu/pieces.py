"""What the two backward kernels share: operands in shared memory, streams of a block, probabilities."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from garrulax.kernels.call import Options
from garrulax.kernels.gpu import scores
from garrulax.kernels.gpu.products import zeros
from garrulax.kernels.gpu.rows import Rows
from garrulax.kernels.gpu.scores import Added, Block, Tile
from garrulax.kernels.mask import All, StreamNames, Streams

ROWS = 64  # rows of a warpgroup's tile: what one instruction of the tensor cores takes
SHARED_MEMORY = 227 * 1024  # bytes that a program may have on sm_90


class Arrays(NamedTuple):
    """References in global memory. lse and delta: float32 [B, H, T], lse in base 2. own_streams: int32 [B, tokens] of
    the side of which a program has a tile. other_streams: int32 [B, streams, tokens] of the other side, whose blocks
    it visits, sorted by name; None where there are none."""

    query: Any
    key: Any
    value: Any
    cotangent: Any
    lse: Any
    delta: Any
    own_streams: Streams
    other_streams: Any
    extra: Added
    rows: Rows


def operand(dtype: Any, *shape: int) -> Any:
    """Shared memory for operands of products, 2 bytes a number, in the order in which the tensor cores read them; the
    last axis a multiple of 16."""
    wide = math.gcd(64, shape[-1])
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, wide)), plgpu.SwizzleTransform(2 * wide)))


def stacked(streams: Streams) -> jax.Array | None:
    """int32 [B, streams, tokens], sorted by name; None of none."""
    return jnp.stack([streams[name] for name in sorted(streams)], axis=1) if streams else None


def needed(options: Options, extra: Added, masked: bool) -> StreamNames:
    """Streams that a block needs; `masked`: where not every pair attends."""
    reads = options.rule.streams() if masked else StreamNames(frozenset(), frozenset())
    if extra.slopes is not None or extra.steps is not None:
        reads = reads | StreamNames(frozenset({"position"}), frozenset({"position"}))
    return reads


def start_of_scores(
    options: Options, block: Block, extra: Added, lse: Callable[[], jax.Array], masked: bool
) -> jax.Array:
    """What the products of queries and keys begin at: what is added to scores, less lse, in the products' unit; where
    a pair does not attend, so far below everything that the exponential is 0. So that none of it takes registers
    while products run. With a softcap, or a scale not above 0, only the last is so.

    lse: gives one entry a query, in base 2."""
    start = zeros(*block.tile.shape)
    if _begins_at_lse(options):
        start = block.tile.by_query(lse() * (-1 / scores.unit(options)))
        start, _ = scores.unscaled(options, block, extra, start)
    if masked:
        start = jnp.where(scores.seen(options, block), start, -_far(options))
    return plgpu.layout_cast(start, plgpu.Layout.WGMMA)


def probabilities(
    options: Options, block: Block, extra: Added, products: jax.Array, lse: Callable[[], jax.Array], masked: bool
) -> jax.Array:
    """exp(score - lse), a float32 tile, of products that began at `start_of_scores`."""
    if _begins_at_lse(options):
        return jnp.exp2(products * scores.unit(options))
    x = scores.scores(options, block, extra, products) - block.tile.by_query(lse())
    return jnp.exp2(jnp.where(products * (1 / _far(options)) < -0.5, -jnp.inf, x) if masked else x)


def _begins_at_lse(options: Options) -> bool:
    return options.softcap is None and options.scale > 0


def _far(options: Options) -> float:
    return math.copysign(2.0**100, options.scale)


def sloped(options: Options, products: jax.Array, weights: jax.Array) -> jax.Array:
    """weights times the derivative of the softcap."""
    slope = scores.slope(options, products)
    return weights if slope is None else weights * slope


def kept(options: Options, block: Block, extra: Added) -> jax.Array | None:
    """Which probabilities dropout leaves; None where there is none."""
    return scores.kept(options, block, extra) if options.dropout else None


def dropped(options: Options, keep: jax.Array | None, x: jax.Array) -> jax.Array:
    """x after dropout."""
    return x if keep is None else jnp.where(keep, x * (1 / (1 - options.dropout)), 0.0)


def start_of_dp(options: Options, tile: Tile, delta: Callable[[], jax.Array]) -> jax.Array:
    """What the products of cotangents and values begin at: -delta, which saves a subtraction, but zeros where they are
    dropped before it. delta: gives one entry a query, in the tile's layout."""
    if options.dropout:
        return zeros(*tile.shape)
    return plgpu.layout_cast(tile.by_query(-delta()), plgpu.Layout.WGMMA)


def centred(
    options: Options, block: Block, keep: jax.Array | None, products: jax.Array, delta: Callable[[], jax.Array]
) -> jax.Array:
    """Gradients of probabilities less delta, of products that began at `start_of_dp`."""
    return products if keep is None else dropped(options, keep, products) - block.tile.by_query(delta())


def visit(options: Options, step: Callable[[bool, Any, Any], Any], whole: Any, count: Any, carry: Any) -> Any:
    """carry after step(masked, i, carry) for all i below count, of which those below `whole` need no mask."""
    carry = lax.fori_loop(0, whole, functools.partial(step, False), carry)
    return carry if isinstance(options.rule, All) else lax.fori_loop(whole, count, functools.partial(step, True), carry)


def nought(i: Any) -> Any:
    """0, though the compiler cannot tell, of the number of a block. Added to a place in shared memory it keeps the
    compiler from computing the descriptors of a tile for all blocks at once, which takes up to 64 registers."""
    return lax.shift_right_logical(i, jnp.int32(30))


def at(i: Any, size: int) -> Any:
    """Place of the i-th block in a ring of `size`."""
    return lax.rem(i, jnp.int32(size)) if size > 1 else nought(i)


def wait_again(barrier: Any, i: Any, size: int) -> None:
    """Waits until the place in a ring of `size`, that the i-th block is to have, was read; at once in the first
    round."""

    @pl.when(i >= size)
    def _() -> None:
        plgpu.barrier_wait(barrier.at[at(i, size)])


def drain(barrier: Any, count: Any, size: int) -> None:
    """Waits for what was announced in a ring of `size` after `count` blocks, and not yet waited for."""

    @pl.loop(jnp.maximum(count - size, 0), count)
    def _(i: Any) -> None:
        plgpu.barrier_wait(barrier.at[at(i, size)])


def store(shared: Any, x: jax.Array, target: Any) -> None:
    """Writes registers to global memory, through shared memory that nobody reads any more."""
    shared[...] = x.astype(shared.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(shared, target)
    plgpu.wait_smem_to_gmem(0)
