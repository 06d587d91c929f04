"""Gradients of queries: a program owns a tile of the queries of a head, 64 a warpgroup, and visits the blocks of keys
that they see."""

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from garrulax.kernels.blocks import VALID_KEY
from garrulax.kernels.call import Operands, Options
from garrulax.kernels.gpu import pieces, scores
from garrulax.kernels.gpu.pieces import ROWS, Arrays
from garrulax.kernels.gpu.products import accumulate, multiply, value, zeros
from garrulax.kernels.gpu.rows import Rows
from garrulax.kernels.gpu.scores import Block, Tile
from garrulax.kernels.mask import Streams


@dataclasses.dataclass(frozen=True)
class Plan:
    """keys: of a block. key_stages, value_stages: how many blocks are in shared memory; values are not needed as long
    as keys. queries: of a tile."""

    keys: int
    key_stages: int
    value_stages: int
    queries: int = 2 * ROWS


def plan(options: Options, width: int, value_width: int) -> Plan:
    """For heads of these widths, multiples of 16."""
    keys, streams = 64, len(options.rule.streams().key | {"position", VALID_KEY})
    left = pieces.SHARED_MEMORY - 1024 - 4 * ROWS * (width + value_width)
    value_bytes, key_bytes = 2 * keys * value_width, 2 * keys * width + 4 * keys * streams
    value_stages = min(3, left // (key_bytes + value_bytes))
    return Plan(keys, min(3, (left - value_stages * value_bytes) // key_bytes), value_stages)


def gradients(
    options: Options,
    operands: Operands,
    rows: Rows,
    lse: jax.Array,
    delta: jax.Array,
    cotangent: jax.Array,
    plan: Plan,
    interpret: bool,
) -> jax.Array:
    """Gradient of queries, in their shape and dtype.

    Lengths are multiples of the plan's, widths of 16. rows: of the plan's blocks. lse, delta: float32 [B, H, T], lse
    in base 2. cotangent: [B, T, H, Cv], in the dtype of the query.
    """
    o = operands
    (B, T, H, C), Cv, dtype = o.query.shape, o.value.shape[3], o.query.dtype
    scratch = {
        "query": pieces.operand(dtype, 2, ROWS, C),
        "cotangent": pieces.operand(dtype, 2, ROWS, Cv),
        "tile_ready": plgpu.Barrier(num_arrivals=2, num_barriers=2),
        "key": pieces.operand(dtype, plan.key_stages, plan.keys, C),
        "value": pieces.operand(dtype, plan.value_stages, plan.keys, Cv),
        "key_ready": plgpu.Barrier(num_arrivals=2 if o.key_streams else 1, num_barriers=plan.key_stages),
        "value_ready": plgpu.Barrier(num_barriers=plan.value_stages),
        "key_read": plgpu.Barrier(num_arrivals=2, num_barriers=plan.key_stages),
        "value_read": plgpu.Barrier(num_arrivals=2, num_barriers=plan.value_stages),
    }
    if o.key_streams:
        scratch["streams"] = plgpu.SMEM((plan.key_stages, len(o.key_streams), plan.keys), jnp.int32)
    kernel = plgpu.kernel(
        functools.partial(_program, options, plan, sorted(o.key_streams), H // o.key.shape[2], interpret),
        out_type=jax.ShapeDtypeStruct(o.query.shape, dtype),
        scratch_types=scratch,
        grid=(T // plan.queries, B, H),
        grid_names=("tile", "batch", "head"),
        num_threads=3,
        thread_name="warpgroup",
        kernel_name="attention_backward_queries",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    streams = o.query_streams, pieces.stacked(o.key_streams)
    return kernel(Arrays(o.query, o.key, o.value, cotangent, lse, delta, *streams, scores.added(o), rows))


def _program(
    options: Options,
    plan: Plan,
    names: list[str],
    group: int,
    interpret: bool,
    x: Arrays,
    out: Any,
    **scratch: Any,
) -> None:
    batch, head, warpgroup = (lax.axis_index(name) for name in ("batch", "head", "warpgroup"))
    row = x.rows.order[batch, lax.axis_index("tile")]
    whole, count = (x.rows.counts[batch, row, i] for i in range(2))
    start = row * plan.queries + warpgroup * ROWS
    p = _Program(options, plan, names, interpret, x, SimpleNamespace(**scratch), batch, head, row, start)

    @pl.when(warpgroup == 2)
    def _() -> None:
        plgpu.set_max_registers(24, action="decrease")
        _fetch(p, lax.div(head, jnp.int32(group)), count)

    @pl.when(warpgroup < 2)
    def _() -> None:
        plgpu.set_max_registers(240, action="increase")
        _gradient(p, warpgroup, whole, count, out)


@dataclasses.dataclass(frozen=True)
class _Program:
    """What its warpgroups know. names: of the keys' streams. shared: references in shared memory. start: of the
    queries of a warpgroup."""

    options: Options
    plan: Plan
    names: list[str]
    interpret: bool
    arrays: Arrays
    shared: Any
    batch: Any
    head: Any
    row: Any
    start: Any

    @property
    def tile(self) -> Tile:
        """64 queries by the keys of a block."""
        return Tile((ROWS, self.plan.keys))

    def key_start(self, i: Any) -> Any:
        """First key of the i-th block."""
        return self.arrays.rows.columns[self.batch, self.row, i] * self.plan.keys

    def streams_of_queries(self) -> Streams:
        """Every stream of the warpgroup's queries, in registers."""
        wanted, span = pieces.needed(self.options, self.arrays.extra, True).query, pl.ds(self.start, ROWS)
        own = self.arrays.own_streams
        return {name: self.tile.load_queries(own[name].at[self.batch, span]) for name in sorted(wanted)}

    def block(self, i: Any, queries: Streams, slot: Any, masked: bool) -> Block:
        """The i-th block, with what its scores read; its keys must be ready."""
        wanted, ref = pieces.needed(self.options, self.arrays.extra, masked).key, self.shared
        keys = {name: self.tile.load_keys(ref.streams.at[slot, self.names.index(name)]) for name in sorted(wanted)}
        return Block(self.tile, self.batch, self.head, self.start, self.key_start(i), queries, keys)


def _fetch(p: _Program, head: Any, count: Any) -> None:
    """Brings blocks of keys and values of the key/value head into shared memory."""
    x, s, plan = p.arrays, p.shared, p.plan

    def load(i: Any, _: None) -> None:
        span, slot = pl.ds(p.key_start(i), plan.keys), pieces.at(i, plan.key_stages)
        pieces.wait_again(s.key_read, i, plan.key_stages)
        plgpu.copy_gmem_to_smem(x.key.at[p.batch, span, head], s.key.at[slot], s.key_ready.at[slot])
        if p.names:
            plgpu.copy_gmem_to_smem(x.other_streams.at[p.batch, :, span], s.streams.at[slot], s.key_ready.at[slot])
        slot = pieces.at(i, plan.value_stages)
        pieces.wait_again(s.value_read, i, plan.value_stages)
        plgpu.copy_gmem_to_smem(x.value.at[p.batch, span, head], s.value.at[slot], s.value_ready.at[slot])

    lax.fori_loop(0, count, load, None)
    pieces.drain(s.key_read, count, plan.key_stages)
    pieces.drain(s.value_read, count, plan.value_stages)


def _gradient(p: _Program, own: Any, whole: Any, count: Any, out: Any) -> None:
    """The gradient of a warpgroup's queries."""
    x, s, o, tile = p.arrays, p.shared, p.options, p.tile
    span = pl.ds(p.start, ROWS)
    plgpu.copy_gmem_to_smem(x.query.at[p.batch, span, p.head], s.query.at[own], s.tile_ready.at[own])
    plgpu.copy_gmem_to_smem(x.cotangent.at[p.batch, span, p.head], s.cotangent.at[own], s.tile_ready.at[own])
    lse, delta = (tile.load_queries(ref.at[p.batch, p.head, span]) for ref in (x.lse, x.delta))
    streams = p.streams_of_queries()
    plgpu.barrier_wait(s.tile_ready.at[own])

    def step(masked: bool, i: Any, dq: jax.Array) -> jax.Array:
        key_slot, value_slot = pieces.at(i, p.plan.key_stages), pieces.at(i, p.plan.value_stages)
        key, values = s.key.at[key_slot], s.value.at[value_slot]
        query, cotangent = (ref.at[own + pieces.nought(i)] for ref in (s.query, s.cotangent))
        plgpu.barrier_wait(s.key_ready.at[key_slot])
        plgpu.barrier_wait(s.value_ready.at[value_slot])

        def products(dq: Any, scores: Any, dp: Any) -> None:
            multiply(scores, query, key, transposed=True)
            multiply(dp, cotangent, values, transposed=True)
            raw = value(scores, unfinished=1)
            weight = pieces.probabilities(o, block, x.extra, raw, lambda: lse, masked)
            keep = pieces.kept(o, block, x.extra)
            ds = pieces.sloped(o, raw, weight) * pieces.centred(o, block, keep, value(dp), lambda: delta)
            plgpu.barrier_arrive(s.value_read.at[value_slot])
            multiply(dq, ds.astype(x.query.dtype), key)

        block = p.block(i, streams, key_slot, masked)
        starts = (
            pieces.start_of_scores(o, block, x.extra, lambda: lse, masked),
            pieces.start_of_dp(o, tile, lambda: delta),
        )
        dq, _, _ = accumulate(products, dq, *starts, interpret=p.interpret)
        plgpu.barrier_arrive(s.key_read.at[key_slot])
        return dq

    dq = pieces.visit(o, step, whole, count, zeros(ROWS, x.query.shape[-1]))
    pieces.store(s.query.at[own], dq * o.scale, out.at[p.batch, span, p.head])
