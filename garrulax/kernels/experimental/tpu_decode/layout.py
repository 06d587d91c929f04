"""Sizes of a call of the decoding kernel, its arrays in the layouts that it reads, and which block each step reads.

Letters of shapes: B sequences, T queries of a sequence, H query heads, K key/value heads, G = H / K, C and Cv widths of
keys and values, P pages of the cache. A row of the kernel is a pair of a query head and a query: row g·T + t of a
key/value head.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from garrulax.kernels.blocks import pad_axis
from garrulax.kernels.decode.call import DecodeOperands
from garrulax.kernels.experimental.tpu_decode import step_list
from garrulax.kernels.mask import Streams

LOG2_E = math.log2(math.e)
LANES, SUBLANES = 128, 8  # of a vector register of 32-bit numbers

#: Rows of the smallest tile of each dtype in vector memory: narrow dtypes pack several rows into a sublane.
TILE_ROWS = {
    jnp.dtype(dtype): n
    for dtype, n in (
        (jnp.float32, 8),
        (jnp.bfloat16, 16),
        (jnp.int8, 32),
        (jnp.float8_e4m3fn, 32),
        (jnp.float8_e5m2, 32),
    )
}


@dataclasses.dataclass(frozen=True)
class TpuDecodePlan:
    """The static part of a kernel call.

    Attributes:
        rows: Rows of a key/value head, padded to whole tiles.
        size: Slots of a step.
        columns: Steps that a sequence can have at most.
        pages: Pages of a step; 0 for a contiguous cache.
        transposed: Which of "key" and "value" are read as [..., width, slots]. XLA stores arrays whose width does not
            fill lanes that way, so that `swapaxes` changes no byte, where the other order would copy the cache.
        query_names: Names of the query streams, in the order of their columns.
        splits: As in `TpuDecode`.
        vmem_bytes: As in `TpuDecode`.
        interpret: As in `TpuDecode`.
    """

    rows: int
    size: int
    columns: int
    pages: int
    transposed: frozenset[str]
    query_names: tuple[str, ...]
    splits: int
    vmem_bytes: int
    interpret: Any


def make_plan(
    cached: DecodeOperands, step_bytes: int, most_keys: int, splits: int, vmem_bytes: int, interpret: Any
) -> TpuDecodePlan:
    """The plan of a request; arguments as in `TpuDecode`."""
    (_, T, H, C), (_, K, slots, Cv) = cached.query.shape, cached.value.shape
    wanted = step_bytes // (K * (C + Cv) * cached.key.dtype.itemsize)
    wanted = max(LANES, min(wanted, most_keys) // LANES * LANES)
    if cached.table is None:
        pages, total, together = 0, slots, 1
        size = total if total <= LANES else min(wanted, -(-total // LANES) * LANES)
    else:
        total = cached.table.shape[1] * slots
        together = LANES // math.gcd(slots, LANES)  # pages that fill lanes together
        pages = max(1, wanted // slots // together) * together
        pages = min(pages, -(-cached.table.shape[1] // together) * together)
        size = pages * slots
    rows = H // K * T
    tile = TILE_ROWS.get(cached.query.dtype, SUBLANES)
    return TpuDecodePlan(
        rows=-(-rows // tile) * tile,
        size=size,
        columns=-(-total // size),
        pages=pages,
        transposed=frozenset(name for name, n in (("key", C), ("value", Cv)) if n % LANES and together == 1),
        query_names=tuple(sorted(cached.query_streams)),
        splits=splits,
        vmem_bytes=vmem_bytes,
        interpret=interpret,
    )


class DecodeSpecs:
    """Block specs: which block of an array a step of the grid (splits, steps) has in vector memory.

    The pipeline evaluates them one step ahead, on words and page numbers that are in scalar memory before the kernel
    starts ("prefetch"), and copies the next blocks while the present ones are computed: each array has two buffers.
    """

    def __init__(self, plan: TpuDecodePlan, batch: int) -> None:
        self.plan, self.steps = plan, batch * plan.columns

    def _at(self, shape: tuple[int, ...], index: Any) -> pl.BlockSpec:
        """A block with the index index(word, split)."""
        return pl.BlockSpec(shape, lambda s, i, words, *_: index(words[s * self.steps + i], s))

    def of_row(self, *shape: int) -> pl.BlockSpec:
        """The step's sequence of an array [B, *shape]."""
        return self._at((1, *shape), lambda word, _: (step_list.row_of(word), *[0] * len(shape)))

    def of_split(self, *shape: int) -> pl.BlockSpec:
        """The step's split and sequence of an array [splits, B, *shape]."""
        return self._at((1, 1, *shape), lambda word, split: (split, step_list.row_of(word), *[0] * len(shape)))

    def of_slots(self, axis: int, *shape: int) -> pl.BlockSpec:
        """The step's sequence and block of an array [B, ...] whose blocks have this shape; slots along `axis` of it."""

        def index(word: Any, _: Any) -> tuple:
            columns = (step_list.column_of(word) if a == axis else 0 for a in range(len(shape)))
            return (step_list.row_of(word), *columns)

        return self._at((1, *shape), index)

    def of_page(self, j: int, *shape: int) -> pl.BlockSpec:
        """The j-th page of the step of an array of pages [P, *shape]."""
        n = self.plan.pages

        def index(s: Any, i: Any, _words: Any, pages: Any, _lengths: Any) -> tuple:
            return (pages[(s * self.steps + i) * n + j], *[0] * len(shape))

        return pl.BlockSpec((1, *shape), index)


def kernel_inputs(
    plan: TpuDecodePlan, specs: DecodeSpecs, streams: Streams, c: DecodeOperands
) -> dict[str, tuple[jax.Array, pl.BlockSpec]]:
    """The arrays that the kernel reads and their block specs, by name.

    The pages of a step lie anywhere in the cache, so each is an input with a block spec: "key0", "key1", ..., all of
    the same array. The pipeline then copies them like any other block.
    """
    (B, T, H, C), K = c.query.shape, c.value.shape[1]
    G = H // K
    more = plan.rows - G * T
    x = c.query.reshape(B, T, K, G, C).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, C)
    inputs = {"query": (pad_axis(x, more, 2), specs.of_row(K, plan.rows, C))}  # [B, K, rows, C]
    if plan.query_names:
        x = jnp.stack([c.query_streams[name] for name in plan.query_names], axis=2)  # [B, T, streams]
        # [B, rows, streams]: the same for every query head
        inputs["query_streams"] = pad_axis(jnp.tile(x, (1, G, 1)), more, 1, "edge"), specs.of_row(plan.rows, x.shape[2])
    if streams:
        x = jnp.stack([streams[name] for name in sorted(streams)], axis=1)  # [B, streams, columns · size]
        inputs["key_streams"] = x, specs.of_slots(1, x.shape[1], plan.size)
    if c.slopes is not None:
        x = pad_axis(jnp.repeat(c.slopes.reshape(K, G, 1) * LOG2_E, T, axis=1), more, 1)  # [K, rows, 1]
        inputs["slopes"] = x, pl.BlockSpec(x.shape, lambda *_: (0, 0, 0))
    for name, scales in (("key_scales", c.key_scales), ("value_scales", c.value_scales)):
        if scales is not None:
            inputs[name] = _ordered_scales(scales, c, plan), specs.of_slots(1, K, plan.size)
    for name, x in (("key", c.key), ("value", c.value)):
        transposed = name in plan.transposed
        x = x.swapaxes(2, 3) if transposed else x
        if plan.pages:
            inputs |= {f"{name}{j}": (x, specs.of_page(j, *x.shape[1:])) for j in range(plan.pages)}
        else:
            shape = (x.shape[2], plan.size) if transposed else (plan.size, x.shape[3])
            inputs[name] = x, specs.of_slots(1 + transposed, K, *shape)
    return inputs


def _ordered_scales(scales: jax.Array, c: DecodeOperands, plan: TpuDecodePlan) -> jax.Array:
    """Scales [B, K, columns · size] in the order of each sequence's tokens, zeros behind them."""
    if c.table is not None:
        scales = jnp.moveaxis(jnp.take(scales, c.table, axis=0, mode="clip"), 2, 1)  # [B, K, pages, page]
        scales = scales.reshape(*scales.shape[:2], -1)
    return jnp.pad(scales, ((0, 0), (0, 0), (0, plan.columns * plan.size - scales.shape[2])))
