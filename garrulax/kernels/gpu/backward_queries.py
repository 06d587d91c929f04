"""Gradients of queries: a program owns a tile of the queries of a head, 64 a warpgroup, and visits the blocks of keys
that they attend to. Tiles of scores are queries x keys."""

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
from garrulax.kernels.gpu import memory, scores, softmax_gradient
from garrulax.kernels.gpu.backward_program import BackwardInputs, BackwardProgram
from garrulax.kernels.gpu.block_lists import BlockLists, visit
from garrulax.kernels.gpu.products import ROWS, accumulate, multiply, value, zeros
from garrulax.kernels.gpu.scores import ScoreBlock, Tile
from garrulax.kernels.mask import Streams


@dataclasses.dataclass(frozen=True)
class QueriesPlan:
    """How the work of a program is divided.

    Attributes:
        keys: Of a block.
        key_stages: Slots of the ring of keys and their streams.
        value_stages: Slots of the ring of values. There may be fewer, since a block's values are read once and early,
            and its keys twice.
        queries: Of a tile.
    """

    keys: int
    key_stages: int
    value_stages: int
    queries: int = 2 * ROWS


def plan(options: Options, width: int, value_width: int) -> QueriesPlan:
    """The plan for heads of these widths, multiples of 16."""
    keys, streams = 64, len(options.rule.streams().key | {"position", VALID_KEY})
    left = memory.SHARED_MEMORY - 1024 - 4 * ROWS * (width + value_width)
    value_bytes, key_bytes = 2 * keys * value_width, 2 * keys * width + 4 * keys * streams  # of a block
    value_stages = min(3, left // (key_bytes + value_bytes))
    return QueriesPlan(keys, min(3, (left - value_stages * value_bytes) // key_bytes), value_stages)


def gradients(
    options: Options,
    operands: Operands,
    lists: BlockLists,
    lse: jax.Array,
    delta: jax.Array,
    cotangent: jax.Array,
    plan: QueriesPlan,
    interpret: bool,
) -> jax.Array:
    """Gradient of queries.

    Args:
        options: The static part of the request.
        operands: Lengths are multiples of the plan's, widths of 16.
        lists: The plan's blocks to visit.
        lse: float32 [B, H, T], in base 2.
        delta: float32 [B, H, T].
        cotangent: [B, T, H, Cv], in the dtype of the query.
        plan: How the work is divided.
        interpret: Whether the kernel is interpreted.

    Returns:
        The gradient, in the shape and dtype of the queries.
    """
    o = operands
    B, T, H, _ = o.query.shape
    kernel = plgpu.kernel(
        functools.partial(_attention_backward_queries, options, plan, sorted(o.key_streams), interpret),
        out_type=jax.ShapeDtypeStruct(o.query.shape, o.query.dtype),
        scratch_types=_scratch(o, plan),
        grid=(T // plan.queries, B, H),
        grid_names=("tile", "batch", "head"),
        num_threads=3,
        thread_name="warpgroup",
        kernel_name="attention_backward_queries",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    streams, extra = (o.query_streams, scores.stack_streams(o.key_streams)), scores.score_extras(o)
    return kernel(BackwardInputs(o.query, o.key, o.value, cotangent, lse, delta, *streams, extra, lists))


def _scratch(o: Operands, plan: QueriesPlan) -> dict[str, Any]:
    """Shared memory and barriers of a program, by the names that `QueriesBackwardProgram` uses."""
    C, Cv, dtype = o.query.shape[3], o.value.shape[3], o.query.dtype
    scratch = {
        # The tile, 64 queries a warpgroup, which copies them itself.
        "query": memory.operand(dtype, 2, ROWS, C),
        "cotangent": memory.operand(dtype, 2, ROWS, Cv),
        "tile_ready": plgpu.Barrier(num_arrivals=2, num_barriers=2),  # by warpgroup, two copies each
        # The rings of blocks.
        "key": memory.operand(dtype, plan.key_stages, plan.keys, C),
        "value": memory.operand(dtype, plan.value_stages, plan.keys, Cv),
        # `ready` counts copies: keys and maybe streams; values.
        "key_ready": plgpu.Barrier(num_arrivals=2 if o.key_streams else 1, num_barriers=plan.key_stages),
        "value_ready": plgpu.Barrier(num_barriers=plan.value_stages),
        # `read` counts warpgroups: both are done with the slot, and the next copy may overwrite it.
        "key_read": plgpu.Barrier(num_arrivals=2, num_barriers=plan.key_stages),
        "value_read": plgpu.Barrier(num_arrivals=2, num_barriers=plan.value_stages),
    }
    if o.key_streams:
        scratch["streams"] = plgpu.SMEM((plan.key_stages, len(o.key_streams), plan.keys), jnp.int32)
    return scratch


def _attention_backward_queries(
    options: Options, plan: QueriesPlan, names: list[str], interpret: bool, x: BackwardInputs, out: Any, **scratch: Any
) -> None:
    """The kernel: gives every warpgroup its work. out: reference to the gradient."""
    batch, head, warpgroup = (lax.axis_index(name) for name in ("batch", "head", "warpgroup"))
    row = x.lists.order[batch, lax.axis_index("tile")]
    tile, shared = Tile((ROWS, plan.keys)), SimpleNamespace(**scratch)
    p = QueriesBackwardProgram(
        options=options,
        tile=tile,
        names=names,
        interpret=interpret,
        inputs=x,
        scratch=shared,
        batch=batch,
        head=head,
        row=row,
        start=row * plan.queries + warpgroup * ROWS,
        plan=plan,
        warpgroup=warpgroup,
        dquery=out,
    )
    full, count = (x.lists.counts[batch, row, i] for i in range(2))

    # A multiprocessor has 512 registers for each of the 128 threads of a warpgroup: 2 * 240 + 24 are at most 512.
    @pl.when(warpgroup == 2)
    def fetch() -> None:
        plgpu.set_max_registers(24, action="decrease")
        p.fetch(count)

    @pl.when(warpgroup < 2)
    def compute() -> None:
        plgpu.set_max_registers(240, action="increase")
        p.gradient(full, count)


@dataclasses.dataclass(frozen=True)
class QueriesBackwardProgram(BackwardProgram):
    """One warpgroup of a program.

    `head` is a query head, `row` the index of the program's tile of queries, and `start` the index of the warpgroup's
    first query.

    Attributes:
        plan: How the work is divided.
        warpgroup: Index of the warpgroup, int32 scalar.
        dquery: Reference to the gradient of the queries, [B, T, H, C].
    """

    plan: QueriesPlan
    warpgroup: Any
    dquery: Any

    def key_start(self, i: Any) -> Any:
        """Index of the first key of the i-th block."""
        return self.inputs.lists.columns[self.batch, self.row, i] * self.plan.keys

    def block(self, i: Any, queries: Streams, slot: Any, masked: bool) -> ScoreBlock:
        """The i-th block, which is in that slot; its streams must have arrived."""
        keys = self.visited_streams(slot, masked)
        return ScoreBlock(self.tile, self.batch, self.head, self.start, self.key_start(i), queries, keys)

    def fetch(self, count: Any) -> None:
        """Copies every block of keys and values, in order, each as soon as its slot is free."""
        x, s, plan = self.inputs, self.scratch, self.plan
        kv_head = lax.div(self.head, jnp.int32(x.query.shape[2] // x.key.shape[2]))

        def load(i: Any, _: None) -> None:
            span, slot = pl.ds(self.key_start(i), plan.keys), memory.ring_slot(i, plan.key_stages)
            memory.wait_until_free(s.key_read, i, plan.key_stages)
            ready = s.key_ready.at[slot]
            plgpu.copy_gmem_to_smem(x.key.at[self.batch, span, kv_head], s.key.at[slot], ready)  # [keys, C]
            if self.names:
                plgpu.copy_gmem_to_smem(x.visited_streams.at[self.batch, :, span], s.streams.at[slot], ready)
            slot = memory.ring_slot(i, plan.value_stages)
            memory.wait_until_free(s.value_read, i, plan.value_stages)
            ready = s.value_ready.at[slot]
            plgpu.copy_gmem_to_smem(x.value.at[self.batch, span, kv_head], s.value.at[slot], ready)  # [keys, Cv]

        lax.fori_loop(0, count, load, None)
        memory.drain(s.key_read, count, plan.key_stages)
        memory.drain(s.value_read, count, plan.value_stages)

    def gradient(self, full: Any, count: Any) -> None:
        """The gradient of a warpgroup's queries."""
        x, s, o, tile, own = self.inputs, self.scratch, self.options, self.tile, self.warpgroup
        span = pl.ds(self.start, ROWS)
        ready = s.tile_ready.at[own]
        plgpu.copy_gmem_to_smem(x.query.at[self.batch, span, self.head], s.query.at[own], ready)  # [64, C]
        plgpu.copy_gmem_to_smem(x.cotangent.at[self.batch, span, self.head], s.cotangent.at[own], ready)  # [64, Cv]
        lse, delta = (tile.load_queries(ref.at[self.batch, self.head, span]) for ref in (x.lse, x.delta))  # [64]
        streams = self.own_streams(self.start)
        plgpu.barrier_wait(ready)

        def step(masked: bool, i: Any, dq: jax.Array) -> jax.Array:
            key_slot = memory.ring_slot(i, self.plan.key_stages)
            value_slot = memory.ring_slot(i, self.plan.value_stages)
            key, values = s.key.at[key_slot], s.value.at[value_slot]
            query, cotangent = (ref.at[own + memory.opaque_zero(i)] for ref in (s.query, s.cotangent))
            plgpu.barrier_wait(s.key_ready.at[key_slot])
            plgpu.barrier_wait(s.value_ready.at[value_slot])

            def products(dq: Any, qk: Any, dp: Any) -> None:
                multiply(qk, query, key, transposed=True)  # [64, keys]
                multiply(dp, cotangent, values, transposed=True)  # [64, keys]
                # The scores are done while dp is not: the exponentials run beside that product.
                raw = value(qk, unfinished=1)
                weight = softmax_gradient.probabilities(o, block, x.extra, raw, lambda: lse, masked)
                keep = softmax_gradient.dropout_mask(o, block, x.extra)
                ds = softmax_gradient.times_softcap_slope(o, raw, weight)
                ds = ds * softmax_gradient.minus_delta(o, block, keep, value(dp), lambda: delta)
                # The values are read: their slot is free before the product with the keys is done.
                plgpu.barrier_arrive(s.value_read.at[value_slot])
                multiply(dq, ds.astype(x.query.dtype), key)  # [64, C]

            block = self.block(i, streams, key_slot, masked)
            initial = (
                softmax_gradient.initial_scores(o, block, x.extra, lambda: lse, masked),
                softmax_gradient.initial_dp(o, tile, lambda: delta),
            )
            dq, _, _ = accumulate(products, dq, *initial, interpret=self.interpret)
            plgpu.barrier_arrive(s.key_read.at[key_slot])
            return dq

        dq = visit(o.rule, step, full, count, zeros(ROWS, x.query.shape[-1]))
        # Only this warpgroup reads its queries, and it is done with them.
        memory.store(s.query.at[own], dq * o.scale, self.dquery.at[self.batch, span, self.head])
