"""The forward pass on Hopper (sm_90a).

A group of threads computes one row of blocks of one head: every warpgroup but the last has 64 of its queries, the last
one fetches keys and values into a ring of slots. Warpgroups take turns at the tensor cores: while one's products run,
another computes its exponentials (Shah et al. 2024, FlashAttention-3, arXiv 2407.08608, section 3.1).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from garrulax.kernels.call import Operands, Options
from garrulax.kernels.gpu import pieces, products, scores
from garrulax.kernels.gpu.rows import Rows
from garrulax.kernels.gpu.scores import LOG2E, Added, Block, Tile
from garrulax.kernels.mask import All

LOW = -(2.0**100)  # maximum of a row before its first key: finite, so that exp2(-inf - LOW) is 0
QUERIES = pieces.ROWS  # of a warpgroup
REGISTERS = {2: (232, 40), 3: (160, 32)}  # of a thread that computes and of one that fetches, by warpgroups


class Sizes(NamedTuple):
    """block_k: keys of a block. stages: slots of the ring. warpgroups: those that compute."""

    block_k: int
    stages: int
    warpgroups: int = 2

    @property
    def block_q(self) -> int:
        """Queries of a row of blocks."""
        return self.warpgroups * QUERIES


class Inputs(NamedTuple):
    """References to the operands. key_streams: int32 [B, streams, S], None where there are none."""

    query: Any
    key: Any
    value: Any
    query_streams: dict[str, Any]
    key_streams: Any
    rows: Rows
    extra: Added


class Scratch(NamedTuple):
    """Shared memory, and barriers: `ready_*` when a slot is filled, `free_*` when all have read it, `turn` when a
    warpgroup may use the tensor cores. out: None where it fits into the query's place."""

    query: Any
    key: Any
    value: Any
    streams: Any
    out: Any
    lse: Any
    ready_query: Any
    ready_key: Any
    ready_value: Any
    free_key: Any
    free_value: Any
    turn: Any


def forward(
    options: Options, operands: Operands, rows: Rows, sizes: Sizes, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, H, Cv] and lse [B, H, T] float32, natural.

    Lengths are multiples of the blocks and widths of 16. rows: those of blocks of `sizes`.
    """
    o = operands
    B, T, H, _ = o.query.shape
    names = tuple(sorted(o.key_streams))
    streams = pieces.stacked(o.key_streams)
    inputs = Inputs(o.query, o.key, o.value, dict(o.query_streams), streams, rows, scores.added(o))
    leaves, tree = jax.tree.flatten(inputs)
    call = functools.partial(Warpgroup, options=options, sizes=sizes, names=names, interpret=interpret)

    def attention_forward(*refs):
        inputs, (out, lse, scratch) = jax.tree.unflatten(tree, refs[: len(leaves)]), refs[len(leaves) :]
        index = jax.lax.axis_index("warpgroup")
        head, batch = jax.lax.axis_index("head"), jax.lax.axis_index("batch")
        row = inputs.rows.order[batch, jax.lax.axis_index("row")]
        group = call(inputs=inputs, out=out, lse=lse, scratch=scratch, index=index, head=head, batch=batch, row=row)
        computing, fetching = REGISTERS[sizes.warpgroups]

        @pl.when(index < sizes.warpgroups)
        def compute():
            plgpu.set_max_registers(computing, action="increase")
            group.compute()

        @pl.when(index == sizes.warpgroups)
        def fetch():
            plgpu.set_max_registers(fetching, action="decrease")
            group.fetch()

    kernel = plgpu.kernel(
        attention_forward,
        out_type=(
            jax.ShapeDtypeStruct((B, T, H, o.value.shape[3]), o.query.dtype),
            jax.ShapeDtypeStruct((B, H, T), jnp.float32),
        ),
        grid=(T // sizes.block_q, B, H),  # longest rows first; heads that share keys next to one another
        grid_names=("row", "batch", "head"),
        num_threads=sizes.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        scratch_types=[_scratch(sizes, o, len(names))],
    )
    return kernel(*leaves)


@dataclasses.dataclass(frozen=True)
class Warpgroup:
    """One warpgroup at work on one row of blocks: what is static, the references, and where it is."""

    options: Options
    sizes: Sizes
    names: tuple[str, ...]
    interpret: bool
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
        """Of scores: rows are queries."""
        return Tile((QUERIES, self.sizes.block_k))

    @property
    def start(self) -> Any:
        """Index of the warpgroup's first query."""
        return self.row * self.sizes.block_q + self.index * QUERIES

    @property
    def counts(self) -> tuple[Any, Any]:
        """How many blocks of the row are whole, and how many there are."""
        counts = self.inputs.rows.counts
        return counts[self.batch, self.row, 0], counts[self.batch, self.row, 1]

    def slot(self, i: Any) -> Any:
        """Where block i of the row lies in the ring."""
        return pieces.at(i, self.sizes.stages)

    def key_start(self, i: Any) -> Any:
        """Index of the first key of block i of the row."""
        return self.inputs.rows.columns[self.batch, self.row, i] * self.sizes.block_k

    def fetch(self) -> None:
        """Keys, values and key streams of every block, in order, each as soon as its slot is free."""
        s, (_, count), stages = self.scratch, self.counts, self.sizes.stages
        group = self.inputs.query.shape[2] // self.inputs.key.shape[2]
        kv_head = jax.lax.div(self.head, jnp.int32(group))

        @pl.loop(0, count)
        def load(i):
            keys, slot = pl.ds(self.key_start(i), self.sizes.block_k), self.slot(i)
            pieces.wait_again(s.free_key, i, stages)
            source = self.inputs.key.at[self.batch, keys, kv_head]
            plgpu.copy_gmem_to_smem(source, s.key.at[slot], s.ready_key.at[slot])
            pieces.wait_again(s.free_value, i, stages)
            source = self.inputs.value.at[self.batch, keys, kv_head]
            plgpu.copy_gmem_to_smem(source, s.value.at[slot], s.ready_value.at[slot])
            if self.names:
                source = self.inputs.key_streams.at[self.batch, :, keys]
                plgpu.copy_gmem_to_smem(source, s.streams.at[slot], s.ready_value.at[slot])

        for barrier in (s.free_key, s.free_value):
            pieces.drain(barrier, count, stages)

    def compute(self) -> None:
        """Output and lse of the warpgroup's queries."""
        s, (whole, count) = self.scratch, self.counts
        source = self.inputs.query.at[self.batch, pl.ds(self.start, QUERIES), self.head]
        plgpu.copy_gmem_to_smem(source, s.query.at[self.index], s.ready_query.at[self.index])
        plgpu.barrier_wait(s.ready_query.at[self.index])
        low, nothing = (self._vector(x) for x in (LOW, 0.0))
        empty = products.zeros(QUERIES, s.value.shape[2])

        @pl.when(count == 0)
        def unseen():
            self._finish(empty, low, nothing)

        @pl.when(count > 0)
        def attend():
            @pl.when(self.index == self.sizes.warpgroups - 1)
            def first():
                plgpu.barrier_arrive(s.turn.at[0])

            query = {
                name: self.tile.load_queries(ref.at[self.batch, pl.ds(self.start, QUERIES)])
                for name, ref in self.inputs.query_streams.items()
            }
            carry = self._products(jnp.int32(0)), empty, low, nothing
            last = count - 1
            carry = jax.lax.fori_loop(0, jnp.minimum(whole, last), self._step(query, False), carry)
            carry = jax.lax.fori_loop(jnp.minimum(whole, last), last, self._step(query, True), carry)
            # The last block is always masked: one that is whole comes last so seldom that it is not worth its own code.
            p, out, top, total = self._softmax(last, query, carry, True)
            self._finish(self._last(last, p, out), top, total)

            @pl.when(self.index == 0)
            def after_last():
                plgpu.barrier_wait(s.turn.at[0])

    def _products(self, i):
        """query·key of block i."""
        s, slot = self.scratch, self.slot(i)
        plgpu.barrier_wait(s.ready_key.at[slot])

        def body(x):
            products.multiply(x, s.query.at[self.index], s.key.at[slot], transposed=True)
            self._pass_turn()

        self._await_turn()
        (x,) = products.accumulate(body, products.zeros(*self.tile.shape), interpret=self.interpret)
        plgpu.barrier_arrive(s.free_key.at[slot])
        return x

    def _step(self, query, masked):
        def step(i, carry):
            p, out, top, total = self._softmax(i, query, carry, masked)
            s, slot, following = self.scratch, self.slot(i), self.slot(i + 1)
            plgpu.barrier_wait(s.ready_key.at[following])

            def body(x, out):
                products.multiply(x, s.query.at[self.index], s.key.at[following], transposed=True)
                products.multiply(out, p, s.value.at[slot])
                self._pass_turn()

            self._await_turn()
            x, out = products.accumulate(body, products.zeros(*self.tile.shape), out, interpret=self.interpret)
            plgpu.barrier_arrive(s.free_key.at[following])
            plgpu.barrier_arrive(s.free_value.at[slot])
            return x, out, top, total

        return step

    def _last(self, i, p, out):
        s, slot = self.scratch, self.slot(i)

        def body(out):
            products.multiply(out, p, s.value.at[slot])
            self._pass_turn()

        self._await_turn()
        (out,) = products.accumulate(body, out, interpret=self.interpret)
        plgpu.barrier_arrive(s.free_value.at[slot])
        return out

    def _softmax(self, i, query, carry, masked):
        """Probabilities of block i, relative to the maximum so far, and the carry brought to that maximum. Values of
        the block have come when it returns."""
        x, out, top, total = carry
        masked = masked and not isinstance(self.options.rule, All)
        extra = self.inputs.extra
        early = masked or any(x is not None for x in extra)  # key streams come with the values
        if early:
            plgpu.barrier_wait(self.scratch.ready_value.at[self.slot(i)])
        block = self._block(i, query, masked)
        x, unit = scores.unscaled(self.options, block, extra, x)
        if masked:
            x = jnp.where(scores.seen(self.options, block), x, -jnp.inf)
        new = jnp.maximum(top, x.max(axis=1) * unit)
        decay = jnp.exp2(top - new)
        p = jnp.exp2(x * unit - self.tile.by_query(new))
        total = total * decay + p.sum(axis=1)
        if extra.seeds is not None:
            p = jnp.where(scores.kept(self.options, block, extra), p, 0.0)
        out = out * jax.lax.broadcast_in_dim(decay, out.shape, [0])
        if not early:
            plgpu.barrier_wait(self.scratch.ready_value.at[self.slot(i)])
        return p.astype(self.inputs.value.dtype), out, new, total

    def _block(self, i, query, masked):
        wanted = pieces.needed(self.options, self.inputs.extra, masked).key
        places = {name: self.scratch.streams.at[self.slot(i), self.names.index(name)] for name in wanted}
        key = {name: self.tile.load_keys(place) for name, place in places.items()}
        return Block(self.tile, self.batch, self.head, self.start, self.key_start(i), query, key)

    def _finish(self, out, top, total):
        seen = total > 0
        total = jnp.where(seen, total, 1.0)
        share = 1.0 / (total * (1.0 - self.options.dropout))
        s, span = self.scratch, pl.ds(self.start, QUERIES)
        buffer = (s.query if s.out is None else s.out).at[self.index]
        buffer[...] = (out * jax.lax.broadcast_in_dim(share, out.shape, [0])).astype(self.out.dtype)
        s.lse.at[self.index][...] = jnp.where(seen, (top + jnp.log2(total)) / LOG2E, -jnp.inf)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffer, self.out.at[self.batch, span, self.head])
        plgpu.copy_smem_to_gmem(s.lse.at[self.index], self.lse.at[self.batch, self.head, span])
        plgpu.wait_smem_to_gmem(0)

    def _await_turn(self):
        plgpu.barrier_wait(self.scratch.turn.at[self.index])

    def _pass_turn(self):
        plgpu.barrier_arrive(self.scratch.turn.at[pieces.at(self.index + 1, self.sizes.warpgroups)])

    def _vector(self, x):
        return plgpu.layout_cast(jnp.full((QUERIES,), x, jnp.float32), self.tile.query_layout())


def sizes(operands: Operands) -> Sizes:
    """Of a request whose heads have widths that are multiples of 16.

    Blocks of 128 keys where two of them fit into shared memory, and what is added to scores into registers; else of 64.
    Exponentials take as long as the products of narrow heads: a third warpgroup has work while two wait, but its rows
    of 192 queries must be worth filling up.
    """
    o = operands
    length, width, value_width = o.query.shape[1], o.query.shape[3], o.value.shape[3]
    groups = 3 if max(width, value_width) <= 64 and (length % (3 * QUERIES) == 0 or length >= 2**14) else 2
    tiles = groups * QUERIES * 2 * (width + (value_width if value_width != width else 0))
    left = pieces.SHARED_MEMORY - 4096 - tiles  # barriers, lse, and what Mosaic GPU keeps for itself
    slot = 2 * (width + value_width) + 4 * (
        len(o.key_streams) + 1
    )  # of a key; one stream more where lengths are ragged
    light = o.bias is None and o.steps is None and o.seeds is None
    wanted = [Sizes(k, min(4, left // (k * slot)), groups) for k in (128, 64)]
    return next(s for s in wanted if s.block_k == 64 or (light and s.stages >= 2))


def _scratch(sizes: Sizes, o: Operands, streams: int) -> Scratch:
    (C, Cv), dtype = (o.query.shape[3], o.value.shape[3]), o.query.dtype
    groups, stages, block_k = sizes.warpgroups, sizes.stages, sizes.block_k
    return Scratch(
        query=pieces.operand(dtype, groups, QUERIES, C),
        key=pieces.operand(dtype, stages, block_k, C),
        value=pieces.operand(dtype, stages, block_k, Cv),
        streams=plgpu.SMEM((stages, streams, block_k), jnp.int32) if streams else None,
        out=None if Cv == C else pieces.operand(dtype, groups, QUERIES, Cv),
        lse=plgpu.SMEM((groups, QUERIES), jnp.float32),
        ready_query=plgpu.Barrier(num_barriers=groups),
        ready_key=plgpu.Barrier(num_barriers=stages),
        ready_value=plgpu.Barrier(num_arrivals=2 if streams else 1, num_barriers=stages),
        free_key=plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
        free_value=plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
        turn=plgpu.Barrier(num_barriers=groups),
    )
