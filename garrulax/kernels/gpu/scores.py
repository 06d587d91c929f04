"""What both passes do to a block of products in the registers of a warpgroup: everything between query·key and the
exponential. Scores are in base 2, that is, times log2(e), because the hardware's exponential is 2^x."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from garrulax.kernels import dropout
from garrulax.kernels.call import Operands, Options
from garrulax.kernels.mask import Streams

LOG2E = math.log2(math.e)
_load: Any = plgpu.load  # whose arguments changed with jax 0.11


class Added(NamedTuple):
    """References to what enters scores beside the products; None where it was not given. As of `Operands`, but
    that a bias of a tile whose rows are keys is [B or 1, H or 1, S, T or 1]."""

    bias: Any = None
    slopes: Any = None
    steps: Any = None
    seeds: Any = None


def added(operands: Operands, query_axis: int = 0) -> Added:
    """Arrays of the request for `Added`; query_axis as of `Tile`."""
    bias = operands.bias
    if bias is not None and query_axis == 1:
        bias = bias.swapaxes(2, 3)
    steps = None if operands.steps is None else operands.steps.astype(jnp.float32)
    return Added(bias, operands.slopes, steps, operands.seeds)


@dataclasses.dataclass(frozen=True)
class Tile:
    """How scores lie in registers.

    shape: of the tile, (rows, columns). query_axis: 0 where rows are queries and columns keys, 1 the other way round.
    layout: of the tile.
    """

    shape: tuple[int, int]
    query_axis: int = 0
    layout: Any = plgpu.Layout.WGMMA

    def query_layout(self) -> Any:
        """Of a vector with one entry a query."""
        return self.layout.reduce(1 - self.query_axis)

    def key_layout(self) -> Any:
        """Of a vector with one entry a key."""
        return self.layout.reduce(self.query_axis)

    def by_query(self, x: jax.Array) -> jax.Array:
        """A tile of a vector with one entry a query."""
        return jax.lax.broadcast_in_dim(x, self.shape, [self.query_axis])

    def by_key(self, x: jax.Array) -> jax.Array:
        """A tile of a vector with one entry a key."""
        return jax.lax.broadcast_in_dim(x, self.shape, [1 - self.query_axis])

    def load_queries(self, ref: Any) -> jax.Array:
        """A vector, one entry a query, of a reference [queries of the tile]."""
        return load(ref, self.query_layout())

    def load_keys(self, ref: Any) -> jax.Array:
        """A vector, one entry a key, of a reference [keys of the tile]."""
        return load(ref, self.key_layout())


@dataclasses.dataclass(frozen=True)
class Block:
    """One block of pairs.

    batch, head: int32 scalars. query_start, key_start: int32 scalars, index of its first query and key.
    query, key: streams as vectors in the tile's layouts.
    """

    tile: Tile
    batch: Any
    head: Any
    query_start: Any
    key_start: Any
    query: Streams
    key: Streams


def load(ref: Any, layout: Any) -> jax.Array:
    """What a reference in global or shared memory holds, in registers of that layout."""
    return _load(ref, layout=layout, optimized=False)


def plain(options: Options, operands: Operands) -> bool:
    """Whether scores in base 2 are just products times a positive `unit`, which the exponential's multiply-add takes
    care of."""
    rest = (operands.bias, operands.slopes, operands.steps)
    return options.softcap is None and options.scale > 0 and all(x is None for x in rest)


def unit(options: Options) -> float:
    """What products are multiplied by to be scores in base 2."""
    return options.scale * LOG2E


def seen(options: Options, block: Block) -> jax.Array:
    """Which pairs attend: a bool tile."""
    query = {name: block.tile.by_query(x) for name, x in block.query.items()}
    key = {name: block.tile.by_key(x) for name, x in block.key.items()}
    return options.rule.evaluate(query, key)


def scores(options: Options, block: Block, extra: Added, products: jax.Array) -> jax.Array:
    """Scores in base 2 of the products, a float32 tile; not masked."""
    x, factor = unscaled(options, block, extra, products)
    return x * factor


def unscaled(options: Options, block: Block, extra: Added, products: jax.Array) -> tuple[jax.Array, float]:
    """A float32 tile and a positive number, whose product is the scores in base 2, not masked: exp2(x * factor - y) is
    one instruction less than exp2(x - y) of an x that was multiplied before. Softcap first, then what is added."""
    if options.softcap is not None:
        x, factor = _half_tanh(options, options.softcap, products), 2.0 * options.softcap * LOG2E
    elif options.scale > 0:
        x, factor = products, unit(options)
    else:
        x, factor = products * options.scale, LOG2E
    one = LOG2E / factor  # what 1 in the units of scores is in those of x
    if extra.bias is not None:
        x = x + _bias(block, extra.bias) * one
    if extra.slopes is not None:
        # Differences of float32 are exact for positions below 2^24, and far cheaper than converting every integer.
        key, query = (s["position"].astype(jnp.float32) for s in (block.key, block.query))
        x = x + (block.tile.by_key(key) - block.tile.by_query(query)) * (extra.slopes[block.head] * one)
    if extra.steps is not None:
        distance = block.tile.by_key(block.key["position"]) - block.tile.by_query(block.query["position"])
        step = jnp.full(block.tile.shape, extra.steps[0, block.head] * one)
        for i, start in enumerate(options.starts):
            step = jnp.where(distance >= start, extra.steps[i + 1, block.head] * one, step)
        x = x + step
    return x, factor


def slope(options: Options, products: jax.Array) -> jax.Array | None:
    """Derivative of the softcap at the products (that of tanh alone, without the scale); None where it is 1."""
    if options.softcap is None:
        return None
    t = _half_tanh(options, options.softcap, products)
    return 1.0 - 4.0 * (t * t)


def kept(options: Options, block: Block, extra: Added) -> jax.Array:
    """Which probabilities dropout leaves: a bool tile."""
    tile = block.tile
    shape = tile.shape if tile.query_axis == 0 else tile.shape[::-1]
    query = _indices(shape[0], tile.query_layout()) + block.query_start
    key = _indices(shape[1], tile.key_layout()) + block.key_start
    row = dropout.hash_query(extra.seeds[block.batch, block.head], query)
    return dropout.keep_mask_from_hash(tile.by_query(row), tile.by_key(key), options.dropout)


def _half_tanh(options: Options, softcap: float, products: jax.Array) -> jax.Array:
    """tanh(scale * products / softcap) / 2. The hardware's own is good to 11 bits, too few for a cap of 50: an
    exponential and a reciprocal, as the square of the one of the root, are good to float32's."""
    power = jnp.exp2(products * (2.0 * unit(options) / softcap))
    root = jax.lax.rsqrt(power + 1.0)
    return 0.5 - root * root


def _bias(block: Block, ref: Any) -> jax.Array:
    """The block of a bias, whose dimensions may be 1 (not that of keys), in float32."""
    tile = block.tile
    batch, head = (i if n > 1 else 0 for i, n in zip((block.batch, block.head), ref.shape[:2], strict=True))
    starts = (block.query_start, block.key_start) if tile.query_axis == 0 else (block.key_start, block.query_start)
    spans: list[Any] = [pl.ds(start, size) for start, size in zip(starts, tile.shape, strict=True)]
    if ref.shape[2 + tile.query_axis] > 1:
        return load(ref.at[batch, head, spans[0], spans[1]], tile.layout).astype(jnp.float32)
    spans[tile.query_axis] = 0
    return tile.by_key(tile.load_keys(ref.at[batch, head, spans[0], spans[1]]).astype(jnp.float32))


def _indices(size: int, layout: Any) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=layout)
