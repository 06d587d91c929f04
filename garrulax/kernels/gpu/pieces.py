"""What the two backward kernels share: operands in shared memory, streams of a block, probabilities."""

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
from garrulax.kernels.mask import Reads, Streams

ROWS = 64  # rows of a warpgroup's tile: what one instruction of the tensor cores takes
SHARED_MEMORY = 227 * 1024  # bytes that a program may have on sm_90


class Arrays(NamedTuple):
    """References in global memory; lse and delta float32 [B, H, T], lse in base 2."""

    query: Any
    key: Any
    value: Any
    cotangent: Any
    lse: Any
    delta: Any
    query_streams: Streams
    key_streams: Streams
    extra: Added
    rows: Rows


def operand(dtype: Any, *shape: int) -> Any:
    """Shared memory for operands of products, 2 bytes a number, in the order in which the tensor cores read them; the
    last axis a multiple of 16."""
    wide = math.gcd(64, shape[-1])
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, wide)), plgpu.SwizzleTransform(2 * wide)))


def names(options: Options, extra: Added, masked: bool) -> tuple[list[str], list[str]]:
    """Streams of queries and of keys that a block needs; `masked`: where not every pair attends."""
    reads = options.rule.streams() if masked else Reads(frozenset(), frozenset())
    if extra.slopes is not None or extra.steps is not None:
        reads = reads | Reads(frozenset({"position"}), frozenset({"position"}))
    return sorted(reads.query), sorted(reads.key)


def vectors(streams: Streams, wanted: list[str], load: Callable[[Any], jax.Array], batch: Any, span: Any) -> Streams:
    """The wanted streams' entries of a span of tokens, in registers."""
    return {name: load(streams[name].at[batch, span]) for name in wanted}


def probabilities(
    options: Options, block: Block, extra: Added, products: jax.Array, lse: jax.Array, masked: bool
) -> jax.Array:
    """exp(score - lse), a float32 tile; lse in base 2, one entry a query, in the tile's layout."""
    p = jnp.exp2(scores.scores(options, block, extra, products) - block.tile.by_query(lse))
    return jnp.where(scores.seen(options, block), p, 0.0) if masked else p


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


def centred(options: Options, block: Block, keep: jax.Array | None, dp: jax.Array, delta: jax.Array) -> jax.Array:
    """Gradients of probabilities less their mean delta, of products that began at `before`."""
    return dp if keep is None else dropped(options, keep, dp) - block.tile.by_query(delta)


def before(options: Options, tile: Tile, delta: jax.Array) -> jax.Array:
    """What the products of cotangents and values begin at: -delta, which saves a subtraction, but not where they are
    dropped before it."""
    return zeros(*tile.shape) if options.dropout else plgpu.layout_cast(tile.by_query(-delta), plgpu.Layout.WGMMA)


def visit(step: Callable[[bool, Any, Any], Any], whole: Any, count: Any, carry: Any) -> Any:
    """carry after step(masked, i, carry) for all i below count, of which those below `whole` need no mask."""
    for masked, low, high in ((False, 0, whole), (True, whole, count)):
        carry = lax.fori_loop(low, high, lambda i, x, masked=masked: step(masked, i, x), carry)
    return carry


def at(i: Any, size: int) -> Any:
    """Place of the i-th block in a ring of `size`."""
    return lax.rem(i, jnp.int32(size))


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
