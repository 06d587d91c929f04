"""From products query·key to scores, in the registers of a warpgroup; the forward and the backward pass share this.

Scores are in base 2, that is, multiplied by log2(e), because the hardware's exponential is 2^x.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from garrulax.kernels import dropout
from garrulax.kernels.call import Operands, Options
from garrulax.kernels.gpu.memory import load
from garrulax.kernels.mask import StreamNames, Streams

LOG2E = math.log2(math.e)


class ScoreExtras(NamedTuple):
    """References to the optional inputs of scores and dropout; None where the request has none.

    Attributes:
        bias: [B or 1, H or 1, T or 1, S]; [B or 1, H or 1, S, T or 1] where a tile's rows are keys.
        slopes: float32 [H], of ALiBi.
        steps: float32 [len(starts) + 1, H], a bias in steps of the distance.
        seeds: uint32 [B, H], of dropout.
    """

    bias: Any = None
    slopes: Any = None
    steps: Any = None
    seeds: Any = None


def score_extras(operands: Operands, query_axis: int = 0) -> ScoreExtras:
    """The request's arrays for `ScoreExtras`; `query_axis` is that of the kernel's `Tile`."""
    bias = operands.bias
    if bias is not None and query_axis == 1:
        bias = bias.swapaxes(2, 3)
    steps = None if operands.steps is None else operands.steps.astype(jnp.float32)
    return ScoreExtras(bias, operands.slopes, steps, operands.seeds)


def stack_streams(streams: Streams) -> jax.Array | None:
    """int32 [B, streams, tokens], sorted by name, so that one copy brings all streams; None where there are none."""
    return jnp.stack([streams[name] for name in sorted(streams)], axis=1) if streams else None


def needed_streams(options: Options, extra: ScoreExtras, masked: bool) -> StreamNames:
    """Names of the streams that the scores of a block read; `masked`: not every pair of the block attends."""
    reads = options.rule.streams() if masked else StreamNames(frozenset(), frozenset())
    if extra.slopes is not None or extra.steps is not None:
        reads = reads | StreamNames(frozenset({"position"}), frozenset({"position"}))
    return reads


@dataclasses.dataclass(frozen=True)
class Tile:
    """How a tile of scores lies in the registers of a warpgroup.

    The 128 threads of a warpgroup share a tile; the layout says which thread holds which entries. A vector with one
    entry a row (or column) has a layout reduced from it, so that every thread already holds the entries that belong
    to its part of the tile and a broadcast moves no data.

    Attributes:
        shape: (rows, columns).
        query_axis: 0 where rows are queries and columns are keys, 1 the other way round.
        layout: Of the tile.
    """

    shape: tuple[int, int]
    query_axis: int = 0
    layout: Any = plgpu.Layout.WGMMA

    def query_layout(self) -> Any:
        """Layout of a vector with one entry a query."""
        return self.layout.reduce(1 - self.query_axis)

    def key_layout(self) -> Any:
        """Layout of a vector with one entry a key."""
        return self.layout.reduce(self.query_axis)

    def by_query(self, x: jax.Array) -> jax.Array:
        """Broadcasts a vector with one entry a query to the tile's shape."""
        return jax.lax.broadcast_in_dim(x, self.shape, [self.query_axis])

    def by_key(self, x: jax.Array) -> jax.Array:
        """Broadcasts a vector with one entry a key to the tile's shape."""
        return jax.lax.broadcast_in_dim(x, self.shape, [1 - self.query_axis])

    def load_queries(self, ref: Any) -> jax.Array:
        """Loads a vector with one entry a query from a reference [queries of the tile]."""
        return load(ref, self.query_layout())

    def load_keys(self, ref: Any) -> jax.Array:
        """Loads a vector with one entry a key from a reference [keys of the tile]."""
        return load(ref, self.key_layout())


@dataclasses.dataclass(frozen=True)
class ScoreBlock:
    """A block of pairs, as its scores are computed from it.

    Attributes:
        tile: How the block lies in registers.
        batch: int32 scalar, index of the sequence.
        head: int32 scalar, index of the query head.
        query_start: int32 scalar, index of the block's first query.
        key_start: int32 scalar, index of the block's first key.
        query: Streams of the queries by name, vectors in the tile's query layout.
        key: Streams of the keys by name, vectors in the tile's key layout.
    """

    tile: Tile
    batch: Any
    head: Any
    query_start: Any
    key_start: Any
    query: Streams
    key: Streams


def base2_scale(options: Options) -> float:
    """The factor from products query·key to scores in base 2."""
    return options.scale * LOG2E


def attending(options: Options, block: ScoreBlock) -> jax.Array:
    """The mask of the block: a bool tile, True where the query attends to the key."""
    query = {name: block.tile.by_query(x) for name, x in block.query.items()}
    key = {name: block.tile.by_key(x) for name, x in block.key.items()}
    return options.rule.evaluate(query, key)


def scores(options: Options, block: ScoreBlock, extra: ScoreExtras, products: jax.Array) -> jax.Array:
    """Scores in base 2, a float32 tile, without the mask."""
    x, factor = unscaled(options, block, extra, products)
    return x * factor


def unscaled(options: Options, block: ScoreBlock, extra: ScoreExtras, products: jax.Array) -> tuple[jax.Array, float]:
    """A float32 tile x and a positive factor with x * factor = scores in base 2, without the mask.

    The factor is left to the caller because exp2(x * factor - y) is a multiply-add and an exponential, one instruction
    less than exp2(x - y) of an x that was multiplied before. The softcap comes first, then biases are added.
    """
    if options.softcap is not None:
        x, factor = _half_tanh(options, options.softcap, products), 2.0 * options.softcap * LOG2E
    elif options.scale > 0:
        x, factor = products, base2_scale(options)
    else:  # the factor must be positive, so that the maximum of x * factor is that of x
        x, factor = products * options.scale, LOG2E
    added = bias(options, block, extra, LOG2E / factor)
    return (x if added is None else x + added), factor


def bias(options: Options, block: ScoreBlock, extra: ScoreExtras, one: float) -> jax.Array | None:
    """The sum of everything that is added to scores: bias, ALiBi and relative positions.

    Args:
        options: The static part of the request.
        block: The block of pairs.
        extra: References to the optional inputs.
        one: The value that stands for a score of 1.

    Returns:
        A float32 tile; None if nothing is added.
    """
    x = None if extra.bias is None else _bias(block, extra.bias) * one
    if extra.slopes is not None:
        # Converts a vector of positions, not a tile of distances, to float32: exact for positions below 2^24, and far
        # cheaper.
        key, query = (s["position"].astype(jnp.float32) for s in (block.key, block.query))
        alibi = (block.tile.by_key(key) - block.tile.by_query(query)) * (extra.slopes[block.head] * one)
        x = alibi if x is None else x + alibi
    if extra.steps is not None:
        distance = block.tile.by_key(block.key["position"]) - block.tile.by_query(block.query["position"])
        step = jnp.full(block.tile.shape, extra.steps[0, block.head] * one)
        for i, start in enumerate(options.starts):  # a thread cannot look up a table by an entry of a tile
            step = jnp.where(distance >= start, extra.steps[i + 1, block.head] * one, step)
        x = step if x is None else x + step
    return x


def softcap_slope(options: Options, products: jax.Array) -> jax.Array | None:
    """Derivative of the softcap (of the tanh alone, without the scale) at the products; None where there is none."""
    if options.softcap is None:
        return None
    t = _half_tanh(options, options.softcap, products)
    return 1.0 - 4.0 * (t * t)


def dropout_mask(options: Options, block: ScoreBlock, extra: ScoreExtras) -> jax.Array:
    """The probabilities that dropout keeps: a bool tile, a function of the seed and the two tokens' indices only."""
    tile = block.tile
    shape = tile.shape if tile.query_axis == 0 else tile.shape[::-1]
    query = _indices(shape[0], tile.query_layout()) + block.query_start
    key = _indices(shape[1], tile.key_layout()) + block.key_start
    row = dropout.hash_query(extra.seeds[block.batch, block.head], query)
    return dropout.keep_mask_from_hash(tile.by_query(row), tile.by_key(key), options.dropout)


def _half_tanh(options: Options, softcap: float, products: jax.Array) -> jax.Array:
    """tanh(y) / 2 of y = scale * products / softcap.

    The hardware's tanh has 11 good bits, too few for a cap of 50. With r = 1 / sqrt(exp(2y) + 1), tanh(y) / 2 is
    1/2 - r^2: one exponential and one reciprocal square root, accurate to float32.
    """
    power = jnp.exp2(products * (2.0 * base2_scale(options) / softcap))
    root = jax.lax.rsqrt(power + 1.0)
    return 0.5 - root * root


def _bias(block: ScoreBlock, ref: Any) -> jax.Array:
    """The block's part of a bias, float32; any dimension of the bias but that of the keys may have size 1."""
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
