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

from garrulax.kernels.call import Operands, Options
from garrulax.kernels.gpu import scores
from garrulax.kernels.gpu.pieces import (
    ROWS, SHARED_MEMORY, Arrays, at, before, centred, drain, kept, names, operand, probabilities, sloped, store,
    vectors, visit, wait_again,
)  # fmt: skip
from garrulax.kernels.gpu.products import accumulate, multiply, value, zeros
from garrulax.kernels.gpu.rows import Rows
from garrulax.kernels.gpu.scores import Added, Block, Tile
from garrulax.kernels.mask import Streams


@dataclasses.dataclass(frozen=True)
class Plan:
    """keys: of a block. key_stages, value_stages: how many blocks are in shared memory; values are not needed as long
    as keys. queries: of a tile."""

    keys: int
    key_stages: int
    value_stages: int
    queries: int = 2 * ROWS


def plan(width: int, value_width: int) -> Plan:
    """For heads of these widths, multiples of 16."""
    keys = 64
    left = SHARED_MEMORY - 1024 - 4 * ROWS * (width + value_width)
    values = min(3, left // (2 * keys * (width + value_width)))
    more = left - values * 2 * keys * value_width
    return Plan(keys, min(3, more // (2 * keys * width)), values)


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
    ring = {"key": plan.key_stages, "value": plan.value_stages}
    scratch = {
        "query": operand(dtype, 2, ROWS, C),
        "cotangent": operand(dtype, 2, ROWS, Cv),
        "tile_ready": plgpu.Barrier(num_arrivals=2, num_barriers=2),
        "key": operand(dtype, plan.key_stages, plan.keys, C),
        "value": operand(dtype, plan.value_stages, plan.keys, Cv),
        **{f"{name}_ready": plgpu.Barrier(num_barriers=n) for name, n in ring.items()},
        **{f"{name}_read": plgpu.Barrier(num_arrivals=2, num_barriers=n) for name, n in ring.items()},
    }
    kernel = plgpu.kernel(
        functools.partial(_program, options, plan, H // o.key.shape[2], interpret),
        out_type=jax.ShapeDtypeStruct(o.query.shape, dtype),
        scratch_types=scratch,
        grid=(T // plan.queries, B, H),
        grid_names=("tile", "batch", "head"),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    arrays = o.query, o.key, o.value, cotangent, lse, delta, o.query_streams, o.key_streams, scores.added(o), rows
    return kernel(Arrays(*arrays))


def _program(options: Options, plan: Plan, group: int, interpret: bool, x: Arrays, out: Any, **scratch: Any) -> None:
    batch, head, warpgroup = (lax.axis_index(name) for name in ("batch", "head", "warpgroup"))
    s = SimpleNamespace(**scratch)
    row = x.rows.order[batch, lax.axis_index("tile")]
    whole, count = (x.rows.counts[batch, row, i] for i in range(2))
    start = row * plan.queries + warpgroup * ROWS

    @pl.when(warpgroup == 2)
    def _() -> None:
        plgpu.set_max_registers(24, action="decrease")
        shared_head = lax.div(head, jnp.int32(group))

        def load(i: Any, _: None) -> None:
            span = pl.ds(x.rows.columns[batch, row, i] * plan.keys, plan.keys)
            _bring(s, "key", x.key.at[batch, span, shared_head], i, plan.key_stages)
            _bring(s, "value", x.value.at[batch, span, shared_head], i, plan.value_stages)

        lax.fori_loop(0, count, load, None)
        drain(s.key_read, count, plan.key_stages)
        drain(s.value_read, count, plan.value_stages)

    @pl.when(warpgroup < 2)
    def _() -> None:
        plgpu.set_max_registers(240, action="increase")
        place = batch, pl.ds(start, ROWS), head
        query, cotangent = s.query.at[warpgroup], s.cotangent.at[warpgroup]
        plgpu.copy_gmem_to_smem(x.query.at[place], query, s.tile_ready.at[warpgroup])
        plgpu.copy_gmem_to_smem(x.cotangent.at[place], cotangent, s.tile_ready.at[warpgroup])

        tile, span = Tile((ROWS, plan.keys)), pl.ds(start, ROWS)
        lse, delta = (tile.load_queries(ref.at[batch, head, span]) for ref in (x.lse, x.delta))
        queries = vectors(x.query_streams, names(options, x.extra, True)[0], tile.load_queries, batch, span)
        plgpu.barrier_wait(s.tile_ready.at[warpgroup])

        def step(masked: bool, i: Any, dq: jax.Array) -> jax.Array:
            key_start = x.rows.columns[batch, row, i] * plan.keys
            wanted = names(options, x.extra, masked)[1]
            keys = vectors(x.key_streams, wanted, tile.load_keys, batch, pl.ds(key_start, plan.keys))
            block = Block(tile, batch, head, start, key_start, queries, keys)
            key_slot, value_slot = at(i, plan.key_stages), at(i, plan.value_stages)
            key, values = s.key.at[key_slot], s.value.at[value_slot]
            plgpu.barrier_wait(s.key_ready.at[key_slot])
            plgpu.barrier_wait(s.value_ready.at[value_slot])

            def products(dq: Any, scores: Any, dp: Any) -> None:
                multiply(scores, query, key, transposed=True)
                multiply(dp, cotangent, values, transposed=True)
                raw = value(scores, unfinished=1)
                weight = sloped(options, raw, probabilities(options, block, x.extra, raw, lse, masked))
                gradient = centred(options, block, kept(options, block, x.extra), value(dp), delta)
                plgpu.barrier_arrive(s.value_read.at[value_slot])
                multiply(dq, (weight * gradient).astype(query.dtype), key)

            starts = zeros(*tile.shape), before(options, tile, delta)
            dq, _, _ = accumulate(products, dq, *starts, interpret=interpret)
            plgpu.barrier_arrive(s.key_read.at[key_slot])
            return dq

        dq = visit(step, whole, count, zeros(ROWS, x.query.shape[-1]))
        store(query, dq * options.scale, out.at[place])


def _bring(s: Any, name: str, source: Any, i: Any, size: int) -> None:
    """Brings the i-th block into the ring of that name."""
    slot = at(i, size)
    wait_again(getattr(s, f"{name}_read"), i, size)
    plgpu.copy_gmem_to_smem(source, getattr(s, name).at[slot], getattr(s, f"{name}_ready").at[slot])
