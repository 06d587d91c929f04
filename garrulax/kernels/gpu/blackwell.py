"""The forward pass on Blackwell (sm_100a), whose tensor cores multiply on their own and keep what they add up in a
memory of theirs, "tensor memory".

A group of threads computes one row of blocks of one head: two warpgroups have 128 of its queries each, a row of the
tile a query; of a third one warp fetches keys and values into a ring of slots and another one starts all products.
While products of one tile run, exponentials of the other one are computed (as Zadouri et al. 2026, FlashAttention-4,
arXiv 2603.05451, order them; every maximum rescales the output here, and no exponential is a polynomial).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from garrulax.kernels.call import Operands, Options
from garrulax.kernels.gpu import pieces, scores
from garrulax.kernels.gpu.forward import LOW, Inputs
from garrulax.kernels.gpu.rows import Rows
from garrulax.kernels.gpu.scores import LOG2E, Block, Tile
from garrulax.kernels.mask import All

WIDTHS = (64, 128)  # of heads
TILES = 2  # of queries, a warpgroup each
QUERIES = 128  # of a tile: the rows of tensor memory
KEYS = 128  # of a block: two tiles of scores and two of the widest output fill the 512 columns of tensor memory
PART = 64  # columns that are brought into registers at once, with their keys' streams
REGISTERS = 208, 96  # of a thread that computes and of one that does not
BLOCK_Q = TILES * QUERIES


class Scratch(NamedTuple):
    """Shared and tensor memory, and barriers: `ready_*` when a slot is filled, `free_*` when all have read it,
    `scores` when a tile's products are done and `weights` when its probabilities are written, both by tile.

    memory: scores float32 [128, tiles * keys], and in their place, once they are read, probabilities. A tile's lie in
    the first half of its scores: [128, 2 * tiles * keys] of a dtype of half the size. out: None where it fits into the
    query's place. sums: the output so far, in tensor memory.
    """

    query: Any
    key: Any
    value: Any
    streams: Any
    out: Any
    lse: Any
    memory: Any
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
    """What it cannot compute, of two-byte operands, or None."""
    o = operands
    widths = {o.query.shape[3], o.value.shape[3]}
    if not widths <= set(WIDTHS):
        return f"heads {sorted(widths)} wide; on Blackwell they must be {' or '.join(map(str, WIDTHS))}"
    if o.bias is not None or o.steps is not None:
        return "a bias and relative positions are not computed on Blackwell"
    return None


def forward(options: Options, operands: Operands, rows: Rows) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, H, Cv] and lse [B, H, T] float32, natural.

    Lengths are multiples of `BLOCK_Q` and `KEYS`, widths are of `WIDTHS`. rows: those of these blocks.
    """
    o = operands
    B, T, H, _ = o.query.shape
    names = tuple(sorted(o.key_streams))
    streams = pieces.stacked(o.key_streams)
    inputs = Inputs(o.query, o.key, o.value, dict(o.query_streams), streams, rows, scores.added(o))
    leaves, tree = jax.tree.flatten(inputs)
    call = functools.partial(Program, options=options, stages=stages(o), names=names)

    def attention_forward(*refs):
        inputs, (out, lse, scratch) = jax.tree.unflatten(tree, refs[: len(leaves)]), refs[len(leaves) :]
        index = jax.lax.axis_index("warpgroup")
        head, batch = jax.lax.axis_index("head"), jax.lax.axis_index("batch")
        row = inputs.rows.order[batch, jax.lax.axis_index("row")]
        program = call(inputs=inputs, out=out, lse=lse, scratch=scratch, index=index, head=head, batch=batch, row=row)
        computing, feeding = REGISTERS

        @pl.when(index < TILES)
        def compute():
            plgpu.set_max_registers(computing, action="increase")
            program.compute()

        @pl.when(index == TILES)
        def feed():
            plgpu.set_max_registers(feeding, action="decrease")

            @plgpu.warp_map
            def warps(warp):
                pl.when(warp == 0)(program.fetch)
                pl.when(warp == 1)(program.multiply)

    kernel = plgpu.kernel(
        attention_forward,
        out_type=(
            jax.ShapeDtypeStruct((B, T, H, o.value.shape[3]), o.query.dtype),
            jax.ShapeDtypeStruct((B, H, T), jnp.float32),
        ),
        grid=(T // BLOCK_Q, B, H),  # longest rows first; heads that share keys next to one another
        grid_names=("row", "batch", "head"),
        num_threads=TILES + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        scratch_types=[_scratch(o, len(names))],
    )
    return kernel(*leaves)


@dataclasses.dataclass(frozen=True)
class Program:
    """One warpgroup at work on one row of blocks: what is static, the references, and where it is. index: the
    warpgroup's, and that of its tile."""

    options: Options
    stages: int
    names: tuple[str, ...]
    inputs: Inputs
    out: Any
    lse: Any
    scratch: Scratch
    index: Any
    head: Any
    batch: Any
    row: Any

    @property
    def tile(self) -> Tile:
        """Of the part of scores that is in registers at once: rows are queries."""
        return Tile((QUERIES, PART), layout=plgpu.Layout.TCGEN05)

    @property
    def counts(self) -> tuple[Any, Any]:
        """How many blocks of the row are whole, and how many there are."""
        counts = self.inputs.rows.counts
        return counts[self.batch, self.row, 0], counts[self.batch, self.row, 1]

    def span(self, tile: Any) -> Any:
        """Queries of a tile."""
        return pl.ds(self.row * BLOCK_Q + tile * QUERIES, QUERIES)

    def slot(self, i: Any) -> Any:
        """Where block i of the row lies in the ring."""
        return pieces.at(i, self.stages)

    def key_start(self, i: Any) -> Any:
        """Index of the first key of block i of the row."""
        return self.inputs.rows.columns[self.batch, self.row, i] * KEYS

    def fetch(self) -> None:
        """Queries; keys, values and key streams of every block, in order, each as soon as its slot is free."""
        s, (_, count), stages = self.scratch, self.counts, self.stages
        group = self.inputs.query.shape[2] // self.inputs.key.shape[2]
        kv_head = jax.lax.div(self.head, jnp.int32(group))

        @pl.when(count > 0)
        def load_queries():
            for tile in range(TILES):
                source = self.inputs.query.at[self.batch, self.span(tile), self.head]
                plgpu.copy_gmem_to_smem(source, s.query.at[tile], s.ready_query)

        @pl.loop(0, count)
        def load(i):
            keys, slot = pl.ds(self.key_start(i), KEYS), self.slot(i)
            pieces.wait_again(s.free_key, i, stages)
            source = self.inputs.key.at[self.batch, keys, kv_head]
            plgpu.copy_gmem_to_smem(source, s.key.at[slot], s.ready_key.at[slot])
            if self.names:
                pieces.wait_again(s.free_streams, i, stages)
                source = self.inputs.key_streams.at[self.batch, :, keys]
                plgpu.copy_gmem_to_smem(source, s.streams.at[slot], s.ready_streams.at[slot])
            pieces.wait_again(s.free_value, i, stages)
            source = self.inputs.value.at[self.batch, keys, kv_head]
            plgpu.copy_gmem_to_smem(source, s.value.at[slot], s.ready_value.at[slot])

        for barrier in (s.free_key, s.free_value, *([s.free_streams] if self.names else [])):
            pieces.drain(barrier, count, stages)

    def multiply(self) -> None:
        """All products of the row. They are done in the order in which they are started: when a tile's scores are,
        so is what was added to its output before."""
        s, (_, count) = self.scratch, self.counts

        @pl.when(count > 0)
        def first():
            plgpu.barrier_wait(s.ready_query)
            plgpu.barrier_wait(s.ready_key.at[self.slot(0)])
            for tile in range(TILES):
                self._score(tile, 0)
                plgpu.tcgen05_commit_arrive(s.scores.at[tile])

        @pl.loop(0, count)
        def block(i):
            slot = self.slot(i)
            plgpu.barrier_wait(s.ready_value.at[slot])
            for tile in range(TILES):
                plgpu.barrier_wait(s.weights.at[tile])
                sums = s.sums.at[:, pl.ds(tile * s.value.shape[2], s.value.shape[2])]
                free = s.free_value.at[slot] if tile == TILES - 1 else None
                plgpu.tcgen05_mma(sums, self._weights(tile), s.value.at[slot], free, accumulate=i > 0)

                @pl.when(i + 1 < count)
                def following(tile=tile):
                    if tile == 0:
                        plgpu.barrier_wait(s.ready_key.at[self.slot(i + 1)])
                    self._score(tile, i + 1)

                plgpu.tcgen05_commit_arrive(s.scores.at[tile])

    def _score(self, tile, i):
        s, slot = self.scratch, self.slot(i)
        free = s.free_key.at[slot] if tile == TILES - 1 else None
        plgpu.tcgen05_mma(self._scores(tile), s.query.at[tile], s.key.at[slot].T, free, accumulate=False)

    def _scores(self, tile, start=0, size=KEYS):
        return self.scratch.memory[0].at[:, pl.ds(tile * KEYS + start, size)]

    def _weights(self, tile, start=0, size=KEYS):
        return self.scratch.memory[1].at[:, pl.ds(tile * 2 * KEYS + start, size)]

    def _sums(self, start):
        return self.scratch.sums.at[:, pl.ds(self.index * self.scratch.value.shape[2] + start, PART)]

    def compute(self) -> None:
        """Output and lse of the warpgroup's queries."""
        whole, count = self.counts
        query = {
            name: self.tile.load_queries(ref.at[self.batch, self.span(self.index)])
            for name, ref in self.inputs.query_streams.items()
        }
        low, nothing = (self._vector(x) for x in (LOW, 0.0))
        step = functools.partial(self._step, query)
        top, total = pieces.visit(self.options, step, whole, count, (low, nothing))

        @pl.when(count > 0)
        def last():
            plgpu.barrier_wait(self.scratch.scores.at[self.index])

        self._finish(top, total)

    def _step(self, query, masked, i, carry):
        """Probabilities of block i, relative to the maximum so far, and the output brought to that maximum."""
        top, total = carry
        s, extra, slot, starts = self.scratch, self.inputs.extra, self.slot(i), range(0, KEYS, PART)
        if self.names:
            plgpu.barrier_wait(s.ready_streams.at[slot])
        plgpu.barrier_wait(s.scores.at[self.index])
        blocks = [self._block(i, start, query, masked) for start in starts]
        parts, new = [], top
        for block, start in zip(blocks, starts, strict=True):
            x = plgpu.async_load_tmem(self._scores(self.index, start, PART), layout=self.tile.layout)
            x, unit = scores.unscaled(self.options, block, extra, x)
            if masked and not isinstance(self.options.rule, All):
                x = jnp.where(scores.seen(self.options, block), x, -jnp.inf)
            new = jnp.maximum(new, x.max(axis=1) * unit)
            parts.append(x)
        plgpu.wait_load_tmem()  # probabilities take the place of scores
        if self.names:
            plgpu.barrier_arrive(s.free_streams.at[slot])
        decay = jnp.exp2(top - new)
        total = total * decay
        for block, start, x in zip(blocks, starts, parts, strict=True):
            p = jnp.exp2(x * unit - self.tile.by_query(new))
            total = total + p.sum(axis=1)
            if extra.seeds is not None:
                p = jnp.where(scores.kept(self.options, block, extra), p, 0.0)
            plgpu.async_store_tmem(self._weights(self.index, start, PART), p.astype(s.value.dtype))

        @pl.when(i > 0)
        def rescale():
            for start in range(0, s.value.shape[2], PART):
                x = plgpu.async_load_tmem(self._sums(start), layout=self.tile.layout)
                plgpu.wait_load_tmem()
                plgpu.async_store_tmem(self._sums(start), x * self.tile.by_query(decay))

        plgpu.commit_tmem()
        plgpu.barrier_arrive(s.weights.at[self.index])
        return new, total

    def _block(self, i, start, query, masked):
        wanted = pieces.needed(self.options, self.inputs.extra, masked).key
        place = self.scratch.streams
        key = {
            name: self.tile.load_keys(place.at[self.slot(i), self.names.index(name), pl.ds(start, PART)])
            for name in wanted
        }
        query_start = self.span(self.index).start
        return Block(self.tile, self.batch, self.head, query_start, self.key_start(i) + start, query, key)

    def _finish(self, top, total):
        seen = total > 0
        total = jnp.where(seen, total, 1.0)
        share = 1.0 / (total * (1.0 - self.options.dropout))
        s, span = self.scratch, self.span(self.index)
        buffer = (s.query if s.out is None else s.out).at[self.index]
        for start in range(0, s.value.shape[2], PART):
            x = plgpu.async_load_tmem(self._sums(start), layout=self.tile.layout)
            x = jnp.where(self.tile.by_query(seen), x * self.tile.by_query(share), 0.0)  # nothing was written there
            buffer.at[:, pl.ds(start, PART)][...] = x.astype(self.out.dtype)
        s.lse.at[self.index][...] = jnp.where(seen, (top + jnp.log2(total)) / LOG2E, -jnp.inf)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffer, self.out.at[self.batch, span, self.head])
        plgpu.copy_smem_to_gmem(s.lse.at[self.index], self.lse.at[self.batch, self.head, span])
        plgpu.wait_smem_to_gmem(0)

    def _vector(self, x):
        return plgpu.layout_cast(jnp.full((QUERIES,), x, jnp.float32), self.tile.query_layout())


def stages(operands: Operands) -> int:
    """Slots of the ring: as many as fit into shared memory, up to 4."""
    o = operands
    width, value_width = o.query.shape[3], o.value.shape[3]
    tiles = BLOCK_Q * 2 * (width + (value_width if value_width != width else 0))
    left = pieces.SHARED_MEMORY - 4096 - tiles  # barriers, lse, and what Mosaic GPU keeps for itself
    return min(4, left // (KEYS * (2 * (width + value_width) + 4 * len(o.key_streams))))


def _scratch(o: Operands, streams: int) -> Scratch:
    (C, Cv), dtype, slots = (o.query.shape[3], o.value.shape[3]), o.query.dtype, stages(o)

    def ordered(number: int, arrivals: int = 1) -> Any:
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=number, orders_tensor_core=True)

    return Scratch(
        query=pieces.operand(dtype, TILES, QUERIES, C),
        key=pieces.operand(dtype, slots, KEYS, C),
        value=pieces.operand(dtype, slots, KEYS, Cv),
        streams=plgpu.SMEM((slots, streams, KEYS), jnp.int32) if streams else None,
        out=None if Cv == C else pieces.operand(dtype, TILES, QUERIES, Cv),
        lse=plgpu.SMEM((TILES, QUERIES), jnp.float32),
        memory=plgpu.RefUnion(
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
