"""Gradients of keys and values: a program owns a tile of keys and visits the blocks of queries that see it, of all the
query heads of its key/value head. Tiles of scores are keys x queries, so that probabilities and gradients of scores
are multiplied from the registers in which they are made."""

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from garrulax.kernels.call import Operands, Options
from garrulax.kernels.gpu import pieces, scores
from garrulax.kernels.gpu.pieces import ROWS, Arrays
from garrulax.kernels.gpu.products import accumulate, multiply, value, zeros
from garrulax.kernels.gpu.rows import Rows
from garrulax.kernels.gpu.scores import Block, Tile
from garrulax.kernels.mask import Streams


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the work of a program is divided.

    keys: of its tile. queries: of a block. stages: how many blocks are in shared memory.
    together: its two warpgroups work on the same 64 keys, one for the gradient of the values, the other for that of
    the keys, because both are too wide for one's registers; else each does both, of 64 keys of its own.
    """

    keys: int
    queries: int
    stages: int
    together: bool


def plan(options: Options, width: int, value_width: int) -> Plan:
    """For heads of these widths, multiples of 16. A softcap and dropout take registers, too."""
    streams = len(options.rule.streams().query | {"position"})
    together = width + value_width > (256 if options.softcap is None and not options.dropout else 192)
    keys, queries, row = (ROWS if together else 2 * ROWS), 64, 2 * (width + value_width)
    left = pieces.SHARED_MEMORY - 1024 - keys * row - (4 * keys * queries if together else 0)
    return Plan(keys, queries, min(4, left // (queries * (row + 8 + 4 * streams))), together)


def gradients(
    options: Options,
    operands: Operands,
    rows: Rows,
    lse: jax.Array,
    delta: jax.Array,
    cotangent: jax.Array,
    plan: Plan,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """Gradients of keys and values, in their shapes and dtypes.

    Lengths are multiples of the plan's, widths of 16. rows: of the plan's blocks, by key. lse, delta: float32
    [B, H, T], lse in base 2. cotangent: [B, T, H, Cv], in the dtype of the query.
    """
    o, stages, queries = operands, plan.stages, plan.queries
    (B, S, K, C), Cv, dtype = o.key.shape, o.value.shape[3], o.key.dtype
    owners = plan.keys // ROWS
    scratch = {
        "key": pieces.operand(dtype, owners, ROWS, C),
        "value": pieces.operand(dtype, owners, ROWS, Cv),
        "query": pieces.operand(dtype, stages, queries, C),
        "cotangent": pieces.operand(dtype, stages, queries, Cv),
        "lse": plgpu.SMEM((stages, queries), jnp.float32),
        "delta": plgpu.SMEM((stages, queries), jnp.float32),
        "tile_ready": plgpu.Barrier(num_arrivals=2 * owners),
        "query_ready": plgpu.Barrier(num_arrivals=3 if o.query_streams else 2, num_barriers=stages),
        "cotangent_ready": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "query_read": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "cotangent_read": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    }
    if o.query_streams:
        scratch["streams"] = plgpu.SMEM((stages, len(o.query_streams), queries), jnp.int32)
    if plan.together:
        scratch |= {
            "weights": pieces.operand(dtype, 2, ROWS, queries),
            "given": plgpu.Barrier(num_barriers=2),
            "taken": plgpu.Barrier(num_barriers=2),
        }
    kernel = plgpu.kernel(
        functools.partial(_program, options, plan, sorted(o.query_streams), o.query.shape[2] // K, interpret),
        out_type=(jax.ShapeDtypeStruct(o.key.shape, dtype), jax.ShapeDtypeStruct(o.value.shape, dtype)),
        scratch_types=scratch,
        grid=(S // plan.keys, B, K),
        grid_names=("tile", "batch", "head"),
        num_threads=3,
        thread_name="warpgroup",
        kernel_name="attention_backward_keys",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    streams = o.key_streams, pieces.stacked(o.query_streams)
    return kernel(Arrays(o.query, o.key, o.value, cotangent, lse, delta, *streams, scores.added(o, 1), rows))


def _program(
    options: Options,
    plan: Plan,
    names: list[str],
    group: int,
    interpret: bool,
    x: Arrays,
    *out: Any,
    **scratch: Any,
) -> None:
    batch, head, warpgroup = (lax.axis_index(name) for name in ("batch", "head", "warpgroup"))
    row = x.rows.order[batch, lax.axis_index("tile")]
    whole, count = (x.rows.counts[batch, row, i] * group for i in range(2))

    def place(i: Any) -> tuple[Any, Any]:
        column = x.rows.columns[batch, row, lax.div(i, jnp.int32(group))]
        return head * group + lax.rem(i, jnp.int32(group)), column * plan.queries

    p = _Program(options, plan, names, interpret, x, SimpleNamespace(**scratch), batch, head, row * plan.keys, place)

    @pl.when(warpgroup == 2)
    def _() -> None:
        plgpu.set_max_registers(40, action="decrease")
        _fetch(p, count)

    if not plan.together:

        @pl.when(warpgroup < 2)
        def _() -> None:
            plgpu.set_max_registers(232, action="increase")
            _both(p, warpgroup, whole, count, *out)

        return

    for own, work in enumerate((_keys, _values)):

        @pl.when(warpgroup == own)
        def _(work: Any = work, gradient: Any = out[own]) -> None:
            plgpu.set_max_registers(232, action="increase")
            work(p, whole, count, gradient)


@dataclasses.dataclass(frozen=True)
class _Program:
    """What its warpgroups know. names: of the queries' streams. shared: references in shared memory. start: of its
    keys. place(i): head and first query of the i-th block."""

    options: Options
    plan: Plan
    names: list[str]
    interpret: bool
    arrays: Arrays
    shared: Any
    batch: Any
    head: Any
    start: Any
    place: Any

    @property
    def tile(self) -> Tile:
        """64 keys by the queries of a block."""
        return Tile((ROWS, self.plan.queries), query_axis=1)

    def streams_of_keys(self, start: Any) -> Streams:
        """Every stream of 64 keys, in registers."""
        wanted, span = pieces.needed(self.options, self.arrays.extra, True).key, pl.ds(start, ROWS)
        own = self.arrays.own_streams
        return {name: self.tile.load_keys(own[name].at[self.batch, span]) for name in sorted(wanted)}

    def block(self, i: Any, key_start: Any, keys: Streams, slot: Any, masked: bool) -> Block:
        """The i-th block, in that slot, with what its scores read; its queries must be ready."""
        head, start = self.place(i)
        wanted, ref = pieces.needed(self.options, self.arrays.extra, masked).query, self.shared
        queries = {
            name: self.tile.load_queries(ref.streams.at[slot, self.names.index(name)]) for name in sorted(wanted)
        }
        return Block(self.tile, self.batch, head, start, key_start, queries, keys)


def _fetch(p: _Program, count: Any) -> None:
    """Brings the tile and its blocks into shared memory."""
    x, s, stages = p.arrays, p.shared, p.plan.stages
    for own in range(p.plan.keys // ROWS):
        span = pl.ds(p.start + own * ROWS, ROWS)
        plgpu.copy_gmem_to_smem(x.key.at[p.batch, span, p.head], s.key.at[own], s.tile_ready)
        plgpu.copy_gmem_to_smem(x.value.at[p.batch, span, p.head], s.value.at[own], s.tile_ready)

    def load(i: Any, _: None) -> None:
        slot = pieces.at(i, stages)
        head, start = p.place(i)
        span = pl.ds(start, p.plan.queries)
        pieces.wait_again(s.query_read, i, stages)
        plgpu.copy_gmem_to_smem(x.query.at[p.batch, span, head], s.query.at[slot], s.query_ready.at[slot])
        plgpu.copy_gmem_to_smem(x.lse.at[p.batch, head, span], s.lse.at[slot], s.query_ready.at[slot])
        if p.names:
            plgpu.copy_gmem_to_smem(x.other_streams.at[p.batch, :, span], s.streams.at[slot], s.query_ready.at[slot])
        pieces.wait_again(s.cotangent_read, i, stages)
        ready = s.cotangent_ready.at[slot]
        plgpu.copy_gmem_to_smem(x.cotangent.at[p.batch, span, head], s.cotangent.at[slot], ready)
        plgpu.copy_gmem_to_smem(x.delta.at[p.batch, head, span], s.delta.at[slot], ready)

    lax.fori_loop(0, count, load, None)
    pieces.drain(s.query_read, count, stages)
    pieces.drain(s.cotangent_read, count, stages)


def _both(p: _Program, own: Any, whole: Any, count: Any, key_gradient: Any, value_gradient: Any) -> None:
    """Both gradients of 64 keys."""
    s, o, extra, dtype = p.shared, p.options, p.arrays.extra, p.arrays.key.dtype
    start = p.start + own * ROWS
    streams = p.streams_of_keys(start)
    plgpu.barrier_wait(s.tile_ready)

    def step(masked: bool, i: Any, sums: Any) -> Any:
        slot = pieces.at(i, p.plan.stages)
        lse, delta = (functools.partial(p.tile.load_queries, ref.at[slot]) for ref in (s.lse, s.delta))
        query, cotangent = s.query.at[slot], s.cotangent.at[slot]
        key, values = (ref.at[own + pieces.nought(i)] for ref in (s.key, s.value))
        plgpu.barrier_wait(s.query_ready.at[slot])
        plgpu.barrier_wait(s.cotangent_ready.at[slot])
        block = p.block(i, start, streams, slot, masked)

        def products(dk: Any, dv: Any, x: Any, dp: Any) -> None:
            multiply(x, key, query, transposed=True)
            multiply(dp, values, cotangent, transposed=True)
            raw = value(x, unfinished=1)
            weight = pieces.probabilities(o, block, extra, raw, lse, masked)
            keep = pieces.kept(o, block, extra)
            multiply(dv, pieces.dropped(o, keep, weight).astype(dtype), cotangent)
            ds = pieces.sloped(o, raw, weight) * pieces.centred(o, block, keep, value(dp, unfinished=1), delta)
            multiply(dk, ds.astype(dtype), query)

        starts = pieces.start_of_scores(o, block, extra, lse, masked), pieces.start_of_dp(o, p.tile, delta)
        dk, dv, _, _ = accumulate(products, *sums, *starts, interpret=p.interpret)
        plgpu.barrier_arrive(s.query_read.at[slot])
        plgpu.barrier_arrive(s.cotangent_read.at[slot])
        return dk, dv

    sums = tuple(zeros(ROWS, ref.shape[-1]) for ref in (key_gradient, value_gradient))
    dk, dv = pieces.visit(o, step, whole, count, sums)
    target = p.batch, pl.ds(start, ROWS), p.head
    pieces.store(s.key.at[own], dk * o.scale, key_gradient.at[target])
    pieces.store(s.value.at[own], dv, value_gradient.at[target])


def _values(p: _Program, whole: Any, count: Any, gradient: Any) -> None:
    """The values' gradient of 64 keys; gives the other warpgroup the probabilities."""
    s, o, extra, dtype = p.shared, p.options, p.arrays.extra, p.arrays.value.dtype
    streams = p.streams_of_keys(p.start)
    plgpu.barrier_wait(s.tile_ready)

    def step(masked: bool, i: Any, dv: jax.Array) -> jax.Array:
        slot, hand = pieces.at(i, p.plan.stages), pieces.at(i, 2)
        plgpu.barrier_wait(s.query_ready.at[slot])
        block = p.block(i, p.start, streams, slot, masked)
        lse = functools.partial(p.tile.load_queries, s.lse.at[slot])
        (raw,) = accumulate(
            lambda x: multiply(x, s.key.at[pieces.nought(i)], s.query.at[slot], transposed=True),
            pieces.start_of_scores(o, block, extra, lse, masked),
            interpret=p.interpret,
        )
        weight = pieces.probabilities(o, block, extra, raw, lse, masked)
        plgpu.barrier_arrive(s.query_read.at[slot])
        pieces.wait_again(s.taken, i, 2)
        s.weights[hand] = pieces.sloped(o, raw, weight).astype(dtype)
        plgpu.barrier_arrive(s.given.at[hand])
        left = pieces.dropped(o, pieces.kept(o, block, extra), weight).astype(dtype)
        plgpu.barrier_wait(s.cotangent_ready.at[slot])
        (dv,) = accumulate(lambda x: multiply(x, left, s.cotangent.at[slot]), dv, interpret=p.interpret)
        plgpu.barrier_arrive(s.cotangent_read.at[slot])
        return dv

    dv = pieces.visit(o, step, whole, count, zeros(ROWS, gradient.shape[-1]))
    pieces.drain(s.taken, count, 2)
    pieces.store(s.value.at[0], dv, gradient.at[p.batch, pl.ds(p.start, ROWS), p.head])


def _keys(p: _Program, whole: Any, count: Any, gradient: Any) -> None:
    """The keys' gradient of 64 keys."""
    s, o, extra, dtype = p.shared, p.options, p.arrays.extra, p.arrays.key.dtype
    plgpu.barrier_wait(s.tile_ready)

    def step(masked: bool, i: Any, dk: jax.Array) -> jax.Array:
        slot, hand = pieces.at(i, p.plan.stages), pieces.at(i, 2)
        head, start = p.place(i)
        block = Block(p.tile, p.batch, head, start, p.start, {}, {})
        delta = functools.partial(p.tile.load_queries, s.delta.at[slot])
        plgpu.barrier_wait(s.cotangent_ready.at[slot])
        (dp,) = accumulate(
            lambda x: multiply(x, s.value.at[pieces.nought(i)], s.cotangent.at[slot], transposed=True),
            pieces.start_of_dp(o, p.tile, delta),
            interpret=p.interpret,
        )
        plgpu.barrier_arrive(s.cotangent_read.at[slot])
        dp = pieces.centred(o, block, pieces.kept(o, block, extra), dp, delta)
        plgpu.barrier_wait(s.given.at[hand])
        ds = scores.load(s.weights.at[hand], plgpu.Layout.WGMMA).astype(jnp.float32) * dp
        plgpu.barrier_arrive(s.taken.at[hand])
        plgpu.barrier_wait(s.query_ready.at[slot])
        (dk,) = accumulate(lambda x: multiply(x, ds.astype(dtype), s.query.at[slot]), dk, interpret=p.interpret)
        plgpu.barrier_arrive(s.query_read.at[slot])
        return dk

    dk = pieces.visit(o, step, whole, count, zeros(ROWS, gradient.shape[-1]))
    pieces.store(s.key.at[0], dk * o.scale, gradient.at[p.batch, pl.ds(p.start, ROWS), p.head])
