"""The forward pass on Blackwell (sm_100a).

The tensor cores of Blackwell take their work from a single thread (`tcgen05`) and accumulate in a memory beside the
registers, "tensor memory": 128 rows by 512 columns of 32 bits. Accumulators take no registers, but scores must be
brought into registers for the exponentials, and the output must be brought there to be rescaled.

A program computes one row of blocks of one head with three warpgroups. Two of them have a tile of 128 queries each, one
query a row of tensor memory, and compute its exponentials. In the third, one warp fetches keys and values into a ring
of slots and another warp starts all products.

While the products of one tile run, exponentials of the other one are computed, an order of Zadouri et al. 2026
(FlashAttention-4, arXiv 2603.05451). Unlike there, every new maximum rescales the output, and no exponential is
computed as a polynomial.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from garrulax.kernels.call import Operands, Options
from garrulax.kernels.gpu import memory, scores
from garrulax.kernels.gpu.block_lists import BlockLists, visit
from garrulax.kernels.gpu.forward_program import LOWEST, ForwardProgram, launch
from garrulax.kernels.gpu.scores import Tile
from garrulax.kernels.mask import All

WIDTHS = (64, 128)  # of heads
TILES = 2  # of queries, a warpgroup each
QUERIES = 128  # of a tile: the rows of tensor memory
KEYS = 128  # of a block: two tiles of scores and two of the widest output fill the 512 columns of tensor memory
PART = 64  # columns of scores that are in registers at once, with the streams of their keys
REGISTERS = 208, 96  # of a thread that computes and of one that does not: 2 * 208 + 96 = 512
BLOCK_Q = TILES * QUERIES


class BlackwellForwardScratch(NamedTuple):
    """Shared memory, tensor memory and barriers of a program.

    Attributes:
        query: [tiles, 128, C].
        key: [stages, 128, C], a ring.
        value: [stages, 128, Cv], a ring.
        streams: int32 [stages, streams, 128], a ring; None without key streams.
        out: [tiles, 128, Cv], the output on its way to global memory; None where Cv = C, since it then takes the
            place of the query.
        lse: float32 [tiles, 128], on its way to global memory.
        scores_and_weights: Two views of the same columns of tensor memory. The first is float32
            [128, tiles * 128], the scores. Once they are in registers, the probabilities take their place: the second
            view, of a dtype of half the size, has twice as many columns. A tile's probabilities lie in the first half
            of its scores. The tensor cores can read the left side of a product from there, so that probabilities need
            no shared memory.
        sums: float32 [128, tiles * Cv] in tensor memory, the output so far, not normalised.
        ready_query: The queries of both tiles have arrived.
        ready_key: By slot: the keys have arrived.
        ready_value: By slot: the values have arrived.
        ready_streams: By slot: the key streams have arrived; None without key streams.
        free_key: By slot: the products have read the keys; the next copy may overwrite them.
        free_value: By slot: the products have read the values.
        free_streams: By slot: both tiles have read the key streams; None without key streams.
        scores: By tile: its scores are written, and all earlier products of the tile are done.
        weights: By tile: its probabilities are written and its output is rescaled.
    """

    query: Any
    key: Any
    value: Any
    streams: Any
    out: Any
    lse: Any
    scores_and_weights: Any
    sums: Any
    ready_query: Any
    ready_key: Any
    ready_value: Any
    ready_streams: Any
    free_key: Any
    free_value: Any
    free_streams: Any
    scores: Any
    weights: Any


def unsupported_reason(operands: Operands) -> str | None:
    """Why this kernel cannot compute a request of two-byte operands, or None where it can."""
    o = operands
    widths = {o.query.shape[3], o.value.shape[3]}
    if not widths <= set(WIDTHS):
        return f"heads {sorted(widths)} wide; on Blackwell they must be {' or '.join(map(str, WIDTHS))}"
    if o.bias is not None or o.steps is not None:
        return "a bias and relative positions are not computed on Blackwell"
    return None


def forward(options: Options, operands: Operands, lists: BlockLists) -> tuple[jax.Array, jax.Array]:
    """Attention of all heads.

    Args:
        options: The static part of the request.
        operands: Lengths are multiples of `BLOCK_Q` and `KEYS`, widths are in `WIDTHS`.
        lists: The blocks to visit, of `BLOCK_Q` queries and `KEYS` keys.

    Returns:
        Output [B, T, H, Cv] and lse [B, H, T], float32, natural logarithm.
    """
    program = functools.partial(
        BlackwellForwardProgram,
        options=options,
        tile=Tile((QUERIES, PART), layout=plgpu.Layout.TCGEN05),
        block_q=BLOCK_Q,
        block_k=KEYS,
        stages=stages(operands),
    )
    return launch(program, operands, lists, BLOCK_Q, TILES + 1, _scratch(operands))


@dataclasses.dataclass(frozen=True)
class BlackwellForwardProgram(ForwardProgram):
    """One warpgroup of a program; the index of a warpgroup that computes is that of its tile."""

    def run(self) -> None:
        """Computes, or, in the last warpgroup, fetches in one warp and multiplies in another."""
        computing, feeding = REGISTERS

        @pl.when(self.index < TILES)
        def compute():
            plgpu.set_max_registers(computing, action="increase")
            self.compute()

        @pl.when(self.index == TILES)
        def feed():
            plgpu.set_max_registers(feeding, action="decrease")

            @plgpu.warp_map
            def warps(warp):
                pl.when(warp == 0)(self.fetch)
                pl.when(warp == 1)(self.multiply)

    def fetch(self) -> None:
        """Copies the queries, then keys, key streams and values of every block, each as soon as its slot is free."""
        s, (_, count), kv_head, stages = self.scratch, self.counts, self.kv_head, self.stages

        @pl.when(count > 0)
        def load_queries():
            for tile in range(TILES):
                source = self.inputs.query.at[self.batch, self.queries_of(tile), self.head]  # [128, C]
                plgpu.copy_gmem_to_smem(source, s.query.at[tile], s.ready_query)

        @pl.loop(0, count)
        def load(i):
            keys, slot = pl.ds(self.key_start(i), KEYS), self.slot(i)
            memory.wait_until_free(s.free_key, i, stages)
            source = self.inputs.key.at[self.batch, keys, kv_head]  # [128, C]
            plgpu.copy_gmem_to_smem(source, s.key.at[slot], s.ready_key.at[slot])
            if self.names:
                memory.wait_until_free(s.free_streams, i, stages)
                source = self.inputs.key_streams.at[self.batch, :, keys]  # [streams, 128]
                plgpu.copy_gmem_to_smem(source, s.streams.at[slot], s.ready_streams.at[slot])
            memory.wait_until_free(s.free_value, i, stages)
            source = self.inputs.value.at[self.batch, keys, kv_head]  # [128, Cv]
            plgpu.copy_gmem_to_smem(source, s.value.at[slot], s.ready_value.at[slot])

        for barrier in (s.free_key, s.free_value, *([s.free_streams] if self.names else [])):
            memory.drain(barrier, count, stages)

    def multiply(self) -> None:
        """Starts all products of the row, for both tiles.

        Products end in the order in which they are started. So when the scores of block i + 1 of a tile are written,
        its probabilities·value of block i are done too: one barrier, `scores`, says both.
        """
        s, (_, count) = self.scratch, self.counts

        @pl.when(count > 0)
        def first_scores():
            plgpu.barrier_wait(s.ready_query)
            plgpu.barrier_wait(s.ready_key.at[self.slot(0)])
            for tile in range(TILES):
                self._start_scores(tile, 0)
                plgpu.tcgen05_commit_arrive(s.scores.at[tile])

        @pl.loop(0, count)
        def block(i):
            slot = self.slot(i)
            plgpu.barrier_wait(s.ready_value.at[slot])
            for tile in range(TILES):
                plgpu.barrier_wait(s.weights.at[tile])
                sums = s.sums.at[:, pl.ds(tile * s.value.shape[2], s.value.shape[2])]  # [128, Cv]
                # The slot is free when the last tile has read it.
                free = s.free_value.at[slot] if tile == TILES - 1 else None
                # The first block overwrites what tensor memory held before.
                plgpu.tcgen05_mma(sums, self._weights(tile), s.value.at[slot], free, accumulate=i > 0)

                # These scores overwrite the probabilities that the product above reads. That is in order, since the
                # tensor cores do one product after the other.
                @pl.when(i + 1 < count)
                def following(tile=tile):
                    if tile == 0:
                        plgpu.barrier_wait(s.ready_key.at[self.slot(i + 1)])
                    self._start_scores(tile, i + 1)

                plgpu.tcgen05_commit_arrive(s.scores.at[tile])

    def _start_scores(self, tile, i):
        """Starts query·key of a tile and block i: [128, C] times [C, 128]."""
        s, slot = self.scratch, self.slot(i)
        free = s.free_key.at[slot] if tile == TILES - 1 else None
        plgpu.tcgen05_mma(self._scores(tile), s.query.at[tile], s.key.at[slot].T, free, accumulate=False)

    def _scores(self, tile, start=0, size=KEYS):
        """Columns of a tile's scores in tensor memory."""
        return self.scratch.scores_and_weights[0].at[:, pl.ds(tile * KEYS + start, size)]

    def _weights(self, tile, start=0, size=KEYS):
        """Columns of a tile's probabilities in tensor memory, of half the size of scores: tiles are 2 * KEYS apart."""
        return self.scratch.scores_and_weights[1].at[:, pl.ds(tile * 2 * KEYS + start, size)]

    def _sums(self, start):
        """PART columns of the warpgroup's output in tensor memory."""
        return self.scratch.sums.at[:, pl.ds(self.index * self.scratch.value.shape[2] + start, PART)]

    def compute(self) -> None:
        """Output and lse of the warpgroup's queries."""
        full, count = self.counts
        query = self.load_query_streams()
        low, nothing = (self.vector(x) for x in (LOWEST, 0.0))
        step = functools.partial(self._step, query)
        top, total = visit(self.options.rule, step, full, count, (low, nothing))

        # After the last block the barrier says that the output is complete.
        @pl.when(count > 0)
        def last_products():
            plgpu.barrier_wait(self.scratch.scores.at[self.index])

        self._finish(top, total)

    def _step(self, query, masked, i, carry):
        """Writes probabilities of block i, relative to the maximum so far, and rescales the output to that maximum.

        The carry is (top, total): each query's maximum and the sum of its exponentials, float32 [128].
        """
        top, total = carry
        s, extra, slot, starts = self.scratch, self.inputs.extra, self.slot(i), range(0, KEYS, PART)
        if self.names:
            plgpu.barrier_wait(s.ready_streams.at[slot])
        plgpu.barrier_wait(s.scores.at[self.index])
        blocks = [self.block(i, query, masked, start) for start in starts]
        parts, new = [], top
        for block, start in zip(blocks, starts, strict=True):
            x = plgpu.async_load_tmem(self._scores(self.index, start, PART), layout=self.tile.layout)  # [128, PART]
            x, unit = scores.unscaled(self.options, block, extra, x)
            if masked and not isinstance(self.options.rule, All):
                x = jnp.where(scores.attending(self.options, block), x, -jnp.inf)
            new = jnp.maximum(new, x.max(axis=1) * unit)  # [128]
            parts.append(x)
        # All scores must be in registers before probabilities take their place.
        plgpu.wait_load_tmem()
        if self.names:
            plgpu.barrier_arrive(s.free_streams.at[slot])
        decay = jnp.exp2(top - new)
        total = total * decay
        for block, start, x in zip(blocks, starts, parts, strict=True):
            p = jnp.exp2(x * unit - self.tile.by_query(new))
            total = total + p.sum(axis=1)
            # Dropout comes after the sum: it drops normalised probabilities, and changes no normaliser.
            if extra.seeds is not None:
                p = jnp.where(scores.dropout_mask(self.options, block, extra), p, 0.0)
            plgpu.async_store_tmem(self._weights(self.index, start, PART), p.astype(s.value.dtype))

        # No product writes to the output now: the barrier above has said that those of block i - 1 are done, and
        # those of block i wait for these weights.
        @pl.when(i > 0)
        def rescale():
            for start in range(0, s.value.shape[2], PART):
                x = plgpu.async_load_tmem(self._sums(start), layout=self.tile.layout)  # [128, PART]
                plgpu.wait_load_tmem()
                plgpu.async_store_tmem(self._sums(start), x * self.tile.by_query(decay))

        # Waits for the stores to tensor memory; the tensor cores may read them after the barrier.
        plgpu.commit_tmem()
        plgpu.barrier_arrive(s.weights.at[self.index])
        return new, total

    def _finish(self, top, total):
        """Normalises the output and writes it and the lse."""
        attended = total > 0
        total = jnp.where(attended, total, 1.0)
        share = 1.0 / (total * (1.0 - self.options.dropout))
        s = self.scratch
        buffer = (s.query if s.out is None else s.out).at[self.index]
        for start in range(0, s.value.shape[2], PART):
            x = plgpu.async_load_tmem(self._sums(start), layout=self.tile.layout)  # [128, PART]
            # Where a query attends to nothing, tensor memory may hold anything.
            x = jnp.where(self.tile.by_query(attended), x * self.tile.by_query(share), 0.0)
            buffer.at[:, pl.ds(start, PART)][...] = x.astype(self.out.dtype)
        self.write(buffer, attended, top, total)
        # Shared memory must live until the copies have read it.
        plgpu.wait_smem_to_gmem(0)


def stages(operands: Operands) -> int:
    """Slots of the ring: as many as fit into shared memory, up to 4."""
    o = operands
    width, value_width = o.query.shape[3], o.value.shape[3]
    tiles = BLOCK_Q * 2 * (width + (value_width if value_width != width else 0))  # bytes of queries and output
    left = memory.SHARED_MEMORY - 4096 - tiles  # 4096: barriers, lse, Mosaic GPU's own needs
    return min(4, left // (KEYS * (2 * (width + value_width) + 4 * len(o.key_streams))))


def _scratch(o: Operands) -> BlackwellForwardScratch:
    (C, Cv), dtype, slots = (o.query.shape[3], o.value.shape[3]), o.query.dtype, stages(o)
    streams = len(o.key_streams)

    def ordered(number: int) -> Any:
        """Barriers between tensor cores and threads, which need a fence that other barriers do without."""
        return plgpu.Barrier(num_barriers=number, orders_tensor_core=True)

    return BlackwellForwardScratch(
        query=memory.operand(dtype, TILES, QUERIES, C),
        key=memory.operand(dtype, slots, KEYS, C),
        value=memory.operand(dtype, slots, KEYS, Cv),
        streams=plgpu.SMEM((slots, streams, KEYS), jnp.int32) if streams else None,
        out=None if Cv == C else memory.operand(dtype, TILES, QUERIES, Cv),
        lse=plgpu.SMEM((TILES, QUERIES), jnp.float32),
        scores_and_weights=plgpu.RefUnion(
            plgpu.TMEM((QUERIES, TILES * KEYS), jnp.float32),
            plgpu.TMEM((QUERIES, TILES * 2 * KEYS), dtype, packed=True),
        ),
        sums=plgpu.TMEM((QUERIES, TILES * Cv), jnp.float32),
        ready_query=plgpu.Barrier(num_arrivals=TILES),
        ready_key=plgpu.Barrier(num_barriers=slots),
        ready_value=plgpu.Barrier(num_barriers=slots),
        ready_streams=plgpu.Barrier(num_barriers=slots) if streams else None,
        free_key=ordered(slots),
        free_value=ordered(slots),
        free_streams=plgpu.Barrier(num_arrivals=TILES, num_barriers=slots) if streams else None,
        scores=ordered(TILES),
        weights=ordered(TILES),
    )
