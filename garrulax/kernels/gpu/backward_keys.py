"""Gradients of keys and values.

A program owns a tile of keys of one key/value head and visits the blocks of queries that attend to it, of all query
heads that read this key/value head: so it sums up the whole gradient, and no two programs add to the same one.

Tiles of scores are keys x queries. Both gradients are products with such a tile on the left, which the tensor cores
take from registers: probabilities and gradients of scores are multiplied where they are computed.
"""

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
from garrulax.kernels.gpu import memory, scores, softmax_gradient
from garrulax.kernels.gpu.backward_program import BackwardInputs, BackwardProgram
from garrulax.kernels.gpu.block_lists import BlockLists, visit
from garrulax.kernels.gpu.products import ROWS, accumulate, multiply, value, zeros
from garrulax.kernels.gpu.scores import ScoreBlock, Tile
from garrulax.kernels.mask import Streams

HANDS = 2  # slots of the ring through which one warpgroup hands probabilities to the other


@dataclasses.dataclass(frozen=True)
class KeysPlan:
    """How the work of a program is divided.

    Attributes:
        keys: Of its tile.
        queries: Of a block.
        stages: Slots of the ring, how many blocks of queries are in shared memory.
        together: The two warpgroups that compute work on the same 64 keys, one for the gradient of the values, the
            other for that of the keys, because one warpgroup's registers cannot hold both. Otherwise each computes
            both gradients of 64 keys.
    """

    keys: int
    queries: int
    stages: int
    together: bool


def plan(options: Options, width: int, value_width: int) -> KeysPlan:
    """The plan for heads of these widths, multiples of 16. A softcap and dropout take registers, too."""
    streams = len(options.rule.streams().query | {"position"})
    together = width + value_width > (256 if options.softcap is None and not options.dropout else 192)
    keys, queries, row = (ROWS if together else 2 * ROWS), 64, 2 * (width + value_width)  # row: bytes of a token
    left = memory.SHARED_MEMORY - 1024 - keys * row - (2 * HANDS * keys * queries if together else 0)
    # Of each query there are a row, lse and delta, and the streams.
    return KeysPlan(keys, queries, min(4, left // (queries * (row + 8 + 4 * streams))), together)


def gradients(
    options: Options,
    operands: Operands,
    lists: BlockLists,
    lse: jax.Array,
    delta: jax.Array,
    cotangent: jax.Array,
    plan: KeysPlan,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """Gradients of keys and values.

    Args:
        options: The static part of the request.
        operands: Lengths are multiples of the plan's, widths of 16.
        lists: The plan's blocks to visit, by key.
        lse: float32 [B, H, T], in base 2.
        delta: float32 [B, H, T].
        cotangent: [B, T, H, Cv], in the dtype of the query.
        plan: How the work is divided.
        interpret: Whether the kernel is interpreted.

    Returns:
        The gradients, in the shapes and dtypes of keys and values.
    """
    o = operands
    (B, S, K, _), dtype = o.key.shape, o.key.dtype
    kernel = plgpu.kernel(
        functools.partial(_attention_backward_keys, options, plan, sorted(o.query_streams), interpret),
        out_type=(jax.ShapeDtypeStruct(o.key.shape, dtype), jax.ShapeDtypeStruct(o.value.shape, dtype)),
        scratch_types=_scratch(o, plan),
        grid=(S // plan.keys, B, K),
        grid_names=("tile", "batch", "head"),
        num_threads=3,
        thread_name="warpgroup",
        kernel_name="attention_backward_keys",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    streams, extra = (o.key_streams, scores.stack_streams(o.query_streams)), scores.score_extras(o, 1)
    return kernel(BackwardInputs(o.query, o.key, o.value, cotangent, lse, delta, *streams, extra, lists))


def _scratch(o: Operands, plan: KeysPlan) -> dict[str, Any]:
    """Shared memory and barriers of a program, by the names that `KeysBackwardProgram` uses."""
    stages, queries, owners = plan.stages, plan.queries, plan.keys // ROWS
    C, Cv, dtype = o.key.shape[3], o.value.shape[3], o.key.dtype
    scratch = {
        # The tile. Each owner is a warpgroup with 64 keys, or both warpgroups together.
        "key": memory.operand(dtype, owners, ROWS, C),
        "value": memory.operand(dtype, owners, ROWS, Cv),
        "tile_ready": plgpu.Barrier(num_arrivals=2 * owners),  # keys and values of all owners
        # The ring of blocks.
        "query": memory.operand(dtype, stages, queries, C),
        "cotangent": memory.operand(dtype, stages, queries, Cv),
        "lse": plgpu.SMEM((stages, queries), jnp.float32),
        "delta": plgpu.SMEM((stages, queries), jnp.float32),
        # `ready` counts copies: query, lse and maybe streams; cotangent and delta. They are two barriers because the
        # warpgroups of `together` need one half of a block before the other.
        "query_ready": plgpu.Barrier(num_arrivals=3 if o.query_streams else 2, num_barriers=stages),
        "cotangent_ready": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        # `read` counts warpgroups: both are done with the slot, and the next copy may overwrite it.
        "query_read": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "cotangent_read": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    }
    if o.query_streams:
        scratch["streams"] = plgpu.SMEM((stages, len(o.query_streams), queries), jnp.int32)
    if plan.together:
        scratch |= {
            # Probabilities on their way from the values' warpgroup to the keys' one, in a ring of their own.
            "weights": memory.operand(dtype, HANDS, ROWS, queries),
            "given": plgpu.Barrier(num_barriers=HANDS),  # by slot: they are written
            "taken": plgpu.Barrier(num_barriers=HANDS),  # by slot: they are read, and may be overwritten
        }
    return scratch


def _attention_backward_keys(
    options: Options, plan: KeysPlan, names: list[str], interpret: bool, x: BackwardInputs, *out: Any, **scratch: Any
) -> None:
    """The kernel: gives every warpgroup its work. out: references to the gradients of keys and of values."""
    batch, head, warpgroup = (lax.axis_index(name) for name in ("batch", "head", "warpgroup"))
    row = x.lists.order[batch, lax.axis_index("tile")]
    tile, shared = Tile((ROWS, plan.queries), query_axis=1), SimpleNamespace(**scratch)
    p = KeysBackwardProgram(
        options=options,
        tile=tile,
        names=names,
        interpret=interpret,
        inputs=x,
        scratch=shared,
        batch=batch,
        head=head,
        row=row,
        start=row * plan.keys,
        plan=plan,
        dkey=out[0],
        dvalue=out[1],
    )
    full, count = p.counts

    # A multiprocessor has 512 registers for each of the 128 threads of a warpgroup: 2 * 232 + 40 are at most 512.
    @pl.when(warpgroup == 2)
    def fetch() -> None:
        plgpu.set_max_registers(40, action="decrease")
        p.fetch(count)

    if not plan.together:

        @pl.when(warpgroup < 2)
        def compute() -> None:
            plgpu.set_max_registers(232, action="increase")
            p.both_gradients(warpgroup, full, count)

        return

    for index, work in enumerate((p.key_gradient, p.value_gradient)):

        @pl.when(warpgroup == index)
        def compute_one(work: Any = work) -> None:
            plgpu.set_max_registers(232, action="increase")
            work(full, count)


@dataclasses.dataclass(frozen=True)
class KeysBackwardProgram(BackwardProgram):
    """One program. `head` is a key/value head, `row` the index of its tile of keys, `start` that of the first key.

    Attributes:
        plan: How the work is divided.
        dkey: Reference to the gradient of the keys, [B, S, K, C].
        dvalue: Reference to the gradient of the values, [B, S, K, Cv].
    """

    plan: KeysPlan
    dkey: Any
    dvalue: Any

    @property
    def group(self) -> int:
        """How many query heads read one key/value head."""
        return self.inputs.query.shape[2] // self.inputs.key.shape[2]

    @property
    def counts(self) -> tuple[Any, Any]:
        """How many full blocks there are, and how many blocks in all: a block of the list for every query head."""
        counts = self.inputs.lists.counts
        return counts[self.batch, self.row, 0] * self.group, counts[self.batch, self.row, 1] * self.group

    def place(self, i: Any) -> tuple[Any, Any]:
        """Query head and first query of the i-th block: all heads of one column of the list, then the next column."""
        column = self.inputs.lists.columns[self.batch, self.row, lax.div(i, jnp.int32(self.group))]
        return self.head * self.group + lax.rem(i, jnp.int32(self.group)), column * self.plan.queries

    def block(self, i: Any, key_start: Any, keys: Streams, slot: Any, masked: bool) -> ScoreBlock:
        """The i-th block, which is in that slot; its streams must have arrived."""
        head, start = self.place(i)
        queries = self.visited_streams(slot, masked)
        return ScoreBlock(self.tile, self.batch, head, start, key_start, queries, keys)

    def fetch(self, count: Any) -> None:
        """Copies the tile, then every block, in order, each as soon as its slot is free."""
        x, s, stages = self.inputs, self.scratch, self.plan.stages
        for owner in range(self.plan.keys // ROWS):
            span = pl.ds(self.start + owner * ROWS, ROWS)
            plgpu.copy_gmem_to_smem(x.key.at[self.batch, span, self.head], s.key.at[owner], s.tile_ready)
            plgpu.copy_gmem_to_smem(x.value.at[self.batch, span, self.head], s.value.at[owner], s.tile_ready)

        def load(i: Any, _: None) -> None:
            slot = memory.ring_slot(i, stages)
            head, start = self.place(i)
            span = pl.ds(start, self.plan.queries)
            memory.wait_until_free(s.query_read, i, stages)
            ready = s.query_ready.at[slot]
            plgpu.copy_gmem_to_smem(x.query.at[self.batch, span, head], s.query.at[slot], ready)  # [queries, C]
            plgpu.copy_gmem_to_smem(x.lse.at[self.batch, head, span], s.lse.at[slot], ready)
            if self.names:
                plgpu.copy_gmem_to_smem(x.visited_streams.at[self.batch, :, span], s.streams.at[slot], ready)
            memory.wait_until_free(s.cotangent_read, i, stages)
            ready = s.cotangent_ready.at[slot]
            plgpu.copy_gmem_to_smem(x.cotangent.at[self.batch, span, head], s.cotangent.at[slot], ready)
            plgpu.copy_gmem_to_smem(x.delta.at[self.batch, head, span], s.delta.at[slot], ready)

        lax.fori_loop(0, count, load, None)
        memory.drain(s.query_read, count, stages)
        memory.drain(s.cotangent_read, count, stages)

    def both_gradients(self, owner: Any, full: Any, count: Any) -> None:
        """Both gradients of the 64 keys of one warpgroup."""
        s, o, extra, dtype = self.scratch, self.options, self.inputs.extra, self.inputs.key.dtype
        start = self.start + owner * ROWS
        streams = self.own_streams(start)
        plgpu.barrier_wait(s.tile_ready)

        def step(masked: bool, i: Any, sums: Any) -> Any:
            slot = memory.ring_slot(i, self.plan.stages)
            lse, delta = (functools.partial(self.tile.load_queries, ref.at[slot]) for ref in (s.lse, s.delta))
            query, cotangent = s.query.at[slot], s.cotangent.at[slot]
            key, values = (ref.at[owner + memory.opaque_zero(i)] for ref in (s.key, s.value))
            plgpu.barrier_wait(s.query_ready.at[slot])
            plgpu.barrier_wait(s.cotangent_ready.at[slot])
            block = self.block(i, start, streams, slot, masked)

            def products(dk: Any, dv: Any, x: Any, dp: Any) -> None:
                multiply(x, key, query, transposed=True)  # [64, queries]
                multiply(dp, values, cotangent, transposed=True)  # [64, queries]
                # The scores are done while dp is not: the exponentials run beside that product.
                raw = value(x, unfinished=1)
                weight = softmax_gradient.probabilities(o, block, extra, raw, lse, masked)
                keep = softmax_gradient.dropout_mask(o, block, extra)
                multiply(dv, softmax_gradient.apply_dropout(o, keep, weight).astype(dtype), cotangent)  # [64, Cv]
                ds = softmax_gradient.times_softcap_slope(o, raw, weight)
                # Waits for dp, not for the product above.
                ds = ds * softmax_gradient.minus_delta(o, block, keep, value(dp, unfinished=1), delta)
                multiply(dk, ds.astype(dtype), query)  # [64, C]

            initial = (
                softmax_gradient.initial_scores(o, block, extra, lse, masked),
                softmax_gradient.initial_dp(o, self.tile, delta),
            )
            dk, dv, _, _ = accumulate(products, *sums, *initial, interpret=self.interpret)
            plgpu.barrier_arrive(s.query_read.at[slot])
            plgpu.barrier_arrive(s.cotangent_read.at[slot])
            return dk, dv

        sums = tuple(zeros(ROWS, ref.shape[-1]) for ref in (self.dkey, self.dvalue))
        dk, dv = visit(o.rule, step, full, count, sums)
        # Nobody but this warpgroup reads its part of the tile, and now it does not either.
        target = self.batch, pl.ds(start, ROWS), self.head
        memory.store(s.key.at[owner], dk * o.scale, self.dkey.at[target])
        memory.store(s.value.at[owner], dv, self.dvalue.at[target])

    def value_gradient(self, full: Any, count: Any) -> None:
        """The values' gradient of 64 keys; gives the other warpgroup the probabilities, so that it computes none."""
        s, o, extra, dtype = self.scratch, self.options, self.inputs.extra, self.inputs.value.dtype
        streams = self.own_streams(self.start)
        plgpu.barrier_wait(s.tile_ready)

        def step(masked: bool, i: Any, dv: jax.Array) -> jax.Array:
            slot, hand = memory.ring_slot(i, self.plan.stages), memory.ring_slot(i, HANDS)
            plgpu.barrier_wait(s.query_ready.at[slot])
            block = self.block(i, self.start, streams, slot, masked)
            lse = functools.partial(self.tile.load_queries, s.lse.at[slot])
            (raw,) = accumulate(  # [64, queries]
                lambda x: multiply(x, s.key.at[memory.opaque_zero(i)], s.query.at[slot], transposed=True),
                softmax_gradient.initial_scores(o, block, extra, lse, masked),
                interpret=self.interpret,
            )
            weight = softmax_gradient.probabilities(o, block, extra, raw, lse, masked)
            plgpu.barrier_arrive(s.query_read.at[slot])
            memory.wait_until_free(s.taken, i, HANDS)
            # Plain writes that the other warpgroup reads with plain loads: the barrier is enough, without a fence.
            s.weights[hand] = softmax_gradient.times_softcap_slope(o, raw, weight).astype(dtype)
            plgpu.barrier_arrive(s.given.at[hand])
            keep = softmax_gradient.dropout_mask(o, block, extra)
            left = softmax_gradient.apply_dropout(o, keep, weight).astype(dtype)
            plgpu.barrier_wait(s.cotangent_ready.at[slot])
            (dv,) = accumulate(lambda x: multiply(x, left, s.cotangent.at[slot]), dv, interpret=self.interpret)
            plgpu.barrier_arrive(s.cotangent_read.at[slot])
            return dv

        dv = visit(o.rule, step, full, count, zeros(ROWS, self.dvalue.shape[-1]))
        memory.drain(s.taken, count, HANDS)
        # The other warpgroup multiplies these values, too. It has taken the last weights, and it does that after its
        # last product with the values. Likewise it stores over the keys only after the last weights are given.
        memory.store(s.value.at[0], dv, self.dvalue.at[self.batch, pl.ds(self.start, ROWS), self.head])

    def key_gradient(self, full: Any, count: Any) -> None:
        """The keys' gradient of 64 keys, with the probabilities that the other warpgroup gives."""
        s, o, extra, dtype = self.scratch, self.options, self.inputs.extra, self.inputs.key.dtype
        plgpu.barrier_wait(s.tile_ready)

        def step(masked: bool, i: Any, dk: jax.Array) -> jax.Array:
            slot, hand = memory.ring_slot(i, self.plan.stages), memory.ring_slot(i, HANDS)
            head, start = self.place(i)
            block = ScoreBlock(self.tile, self.batch, head, start, self.start, {}, {})  # dropout reads no streams
            delta = functools.partial(self.tile.load_queries, s.delta.at[slot])
            plgpu.barrier_wait(s.cotangent_ready.at[slot])
            (dp,) = accumulate(  # [64, queries]
                lambda x: multiply(x, s.value.at[memory.opaque_zero(i)], s.cotangent.at[slot], transposed=True),
                softmax_gradient.initial_dp(o, self.tile, delta),
                interpret=self.interpret,
            )
            plgpu.barrier_arrive(s.cotangent_read.at[slot])
            dp = softmax_gradient.minus_delta(o, block, softmax_gradient.dropout_mask(o, block, extra), dp, delta)
            plgpu.barrier_wait(s.given.at[hand])
            ds = memory.load(s.weights.at[hand], plgpu.Layout.WGMMA).astype(jnp.float32) * dp
            plgpu.barrier_arrive(s.taken.at[hand])
            plgpu.barrier_wait(s.query_ready.at[slot])
            (dk,) = accumulate(lambda x: multiply(x, ds.astype(dtype), s.query.at[slot]), dk, interpret=self.interpret)
            plgpu.barrier_arrive(s.query_read.at[slot])
            return dk

        dk = visit(o.rule, step, full, count, zeros(ROWS, self.dkey.shape[-1]))
        memory.store(s.key.at[0], dk * o.scale, self.dkey.at[self.batch, pl.ds(self.start, ROWS), self.head])
