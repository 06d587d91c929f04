"""The forward pass on Hopper (sm_90a).

A program computes rows of blocks, each of one head, one after another: every warpgroup but the last computes the output
of 64 queries, and the last one fetches queries, and keys and values into a ring of slots in shared memory. There is one
program a multiprocessor, and the ring goes on from row to row: while the last blocks of a row are computed and its
output is written, queries and keys of the next row arrive. Where rows are short (packed documents, windows, short
texts), that start and end would take as long as the blocks.

The warpgroups that compute take turns at the tensor cores (Shah et al. 2024, FlashAttention-3, arXiv 2407.08608,
section 3.1). Products and exponentials run in different units of the multiprocessor, and of one warpgroup the
exponentials must wait for the products. Without turns both warpgroups would start their products together, then
compute their exponentials together while the tensor cores are idle. With turns, one warpgroup's products hide the
other's exponentials. A warpgroup starts probabilities·value of one block together with query·key of the next one, so
that it needs one turn a block, not two.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from garrulax.kernels.call import Operands, Options
from garrulax.kernels.gpu import memory, products, scores
from garrulax.kernels.gpu.block_lists import BlockLists
from garrulax.kernels.gpu.forward_program import LOWEST, ForwardProgram, Row, launch
from garrulax.kernels.gpu.forward_sizes import HopperForwardSizes
from garrulax.kernels.gpu.products import ROWS
from garrulax.kernels.gpu.scores import Tile
from garrulax.kernels.mask import All

# Registers of a thread that computes and of one that fetches, by the number of warpgroups that compute. A
# multiprocessor has 512 for each of the 128 threads of a warpgroup: 2 * 232 + 40, or 3 * 160 + 32, at most 512.
REGISTERS = {2: (232, 40), 3: (160, 32)}


class HopperForwardScratch(NamedTuple):
    """Shared memory and barriers of a program.

    Attributes:
        query: [warpgroups, 64, C].
        key: [stages, block_k, C], a ring.
        value: [stages, block_k, Cv], a ring.
        streams: int32 [stages, streams, block_k], a ring; None without key streams.
        out: [warpgroups, 64, Cv], the output on its way to global memory; None where it takes the place of the query.
        lse: float32 [warpgroups, 64], on its way to global memory.
        ready_query: By warpgroup: its query has arrived.
        ready_key: By slot: the keys, and the key streams, have arrived.
        ready_value: By slot: the values have arrived.
        free_query: By warpgroup: the next query may overwrite its query.
        free_key: By slot: all warpgroups have read the keys and the key streams; the next copy may overwrite them.
        free_value: By slot: likewise for the values.
        turn: By warpgroup: it may use the tensor cores.
    """

    query: Any
    key: Any
    value: Any
    streams: Any
    out: Any
    lse: Any
    ready_query: Any
    ready_key: Any
    ready_value: Any
    free_query: Any
    free_key: Any
    free_value: Any
    turn: Any


def forward(
    options: Options, operands: Operands, lists: BlockLists, sizes: HopperForwardSizes, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """Attention of all heads.

    Args:
        options: The static part of the request.
        operands: Lengths are multiples of the blocks, widths of 16.
        lists: The blocks to visit, of `sizes.block_q` queries and `sizes.block_k` keys.
        sizes: How the work is divided.
        interpret: Whether the kernel is interpreted.

    Returns:
        Output [B, T, H, Cv] and lse [B, H, T], float32, natural logarithm.
    """
    program = functools.partial(
        HopperForwardProgram,
        options=options,
        tile=Tile((ROWS, sizes.block_k)),
        block_q=sizes.block_q,
        block_k=sizes.block_k,
        stages=sizes.stages,
        warpgroups=sizes.warpgroups,
        interpret=interpret,
    )
    scratch = _scratch(sizes, operands)
    return launch(program, operands, lists, sizes.block_q, sizes.warpgroups + 1, scratch, sizes.programs)


@dataclasses.dataclass(frozen=True)
class HopperForwardProgram(ForwardProgram):
    """One warpgroup of a program.

    The softmax is online: each block's scores change the running maximum `top` of every query, and the sums so
    far, `out` and `total`, are multiplied by exp2(old maximum - new maximum). The carry of the loop over blocks is
    (x, out, top, total), with x float32 [64, block_k] the products query·key of the next block, out float32 [64, Cv],
    and top and total float32 [64].

    Attributes:
        warpgroups: That compute.
        interpret: Whether the kernel is interpreted.
    """

    warpgroups: int
    interpret: bool

    def run(self) -> None:
        """Computes, or, in the last warpgroup, fetches."""
        computing, fetching = REGISTERS[self.warpgroups]

        # All threads start with equally many registers. Those that fetch give most of theirs away.
        @pl.when(self.index < self.warpgroups)
        def compute():
            plgpu.set_max_registers(computing, action="increase")
            self.compute()

        @pl.when(self.index == self.warpgroups)
        def fetch():
            plgpu.set_max_registers(fetching, action="decrease")
            self.fetch()

    def fetch(self) -> None:
        """Copies what all rows of the program need, in order, each as soon as its slot is free."""
        s, end = self.scratch, self.each_row(HopperForwardProgram.fetch_row)
        for barrier in (s.free_key, s.free_value):
            memory.drain(barrier, end.before, self.stages)
        for warpgroup in range(self.warpgroups):
            plgpu.barrier_wait(s.free_query.at[warpgroup])

    def fetch_row(self) -> Row:
        """Copies the queries, and keys, values and key streams of every block of a row; returns the next row."""
        s, kv_head, before, following = self.scratch, self.kv_head, self.row.before, self.following()
        for warpgroup in range(self.warpgroups):
            ready = s.ready_query.at[warpgroup]

            @pl.when(self.row.number > 0)
            def wait(warpgroup=warpgroup):
                plgpu.barrier_wait(s.free_query.at[warpgroup])

            source = self.inputs.query.at[self.batch, self.queries_of(warpgroup), self.head]  # [64, C]
            plgpu.copy_gmem_to_smem(source, s.query.at[warpgroup], ready)

        @pl.loop(0, self.row.count)
        def load(i):
            keys, slot = pl.ds(self.key_start(i), self.block_k), self.slot(i)
            memory.wait_until_free(s.free_key, before + i, self.stages)
            source = self.inputs.key.at[self.batch, keys, kv_head]  # [block_k, C]
            plgpu.copy_gmem_to_smem(source, s.key.at[slot], s.ready_key.at[slot])
            if self.names:
                source = self.inputs.key_streams.at[self.batch, :, keys]  # [streams, block_k]
                plgpu.copy_gmem_to_smem(source, s.streams.at[slot], s.ready_key.at[slot])
            memory.wait_until_free(s.free_value, before + i, self.stages)
            source = self.inputs.value.at[self.batch, keys, kv_head]  # [block_k, Cv]
            plgpu.copy_gmem_to_smem(source, s.value.at[slot], s.ready_value.at[slot])

        return following

    def compute(self) -> None:
        """Output and lse of the warpgroup's queries in all rows of the program."""

        # The first turn is the first warpgroup's, and somebody must give it.
        @pl.when(self.index == self.warpgroups - 1)
        def first_turn():
            plgpu.barrier_arrive(self.scratch.turn.at[0])

        self.each_row(HopperForwardProgram.compute_row)

        # The last warpgroup's last turn has given the first warpgroup one turn more than it needs. A program must have
        # awaited every completion of its barriers when it ends.
        @pl.when(self.index == 0)
        def turn_left_over():
            plgpu.barrier_wait(self.scratch.turn.at[0])

        # Shared memory must live until the last copies have read it.
        plgpu.wait_smem_to_gmem(0)

    def compute_row(self) -> Row:
        """Output and lse of the warpgroup's queries in a row; returns the next row."""
        s, (full, count) = self.scratch, self.counts
        plgpu.barrier_wait(s.ready_query.at[self.index])
        query = self.load_query_streams()
        carry = self._first_products(query), products.zeros(ROWS, s.value.shape[2]), *map(self.vector, (LOWEST, 0.0))
        # A step multiplies the probabilities of block i and the keys of block i + 1: the last block has no step.
        last, without_mask = count - 1, jnp.maximum(full - 1, 0)
        carry = jax.lax.fori_loop(0, without_mask, self._step(query, False), carry)
        carry = jax.lax.fori_loop(without_mask, last, self._step(query, True), carry)
        if s.out is not None:  # all products have read the query, and the output does not need its place
            plgpu.barrier_arrive(s.free_query.at[self.index])
        p, out, top, total = self._softmax(last, query, carry)
        out = self._last_products(last, p, out)
        following = self.following()
        self._finish(out, top, total)
        return following

    def _first_products(self, query):
        """Mask, bias and query·key of block 0, float32 [64, block_k]."""
        s, first = self.scratch, jnp.int32(0)
        slot = self.slot(first)
        plgpu.barrier_wait(s.ready_key.at[slot])

        def body(x):
            products.multiply(x, s.query.at[self.index], s.key.at[slot], transposed=True)
            self._pass_turn()

        unmasked, masked = (functools.partial(self._initial, first, query, masked) for masked in (False, True))
        initial = jax.lax.cond(self.row.full > 0, unmasked, masked)
        self._await_turn()
        (x,) = products.accumulate(body, initial, interpret=self.interpret)
        self._keys_are_read(slot)
        return x

    def _step(self, query, masked):
        """The loop's body: softmax of block i, then its product with the values and query·key of block i + 1.

        `masked` says of block i + 1 that not every pair attends.
        """

        def step(i, carry):
            p, out, top, total = self._softmax(i, query, carry)
            s, slot, following = self.scratch, self.slot(i), self.slot(i + 1)
            plgpu.barrier_wait(s.ready_key.at[following])

            def body(x, out):
                products.multiply(x, s.query.at[self.index], s.key.at[following], transposed=True)
                products.multiply(out, p, s.value.at[slot])
                # Passed when the products are started, not when they are done: the tensor cores queue them.
                self._pass_turn()

            initial = self._initial(i + 1, query, masked)
            self._await_turn()
            x, out = products.accumulate(body, initial, out, interpret=self.interpret)
            self._keys_are_read(following)
            plgpu.barrier_arrive(s.free_value.at[slot])
            return x, out, top, total

        return step

    def _last_products(self, i, p, out):
        """The output, float32 [64, Cv], with the last block's probabilities [64, block_k] times values."""
        s, slot = self.scratch, self.slot(i)

        def body(out):
            products.multiply(out, p, s.value.at[slot])
            self._pass_turn()

        self._await_turn()
        (out,) = products.accumulate(body, out, interpret=self.interpret)
        plgpu.barrier_arrive(s.free_value.at[slot])
        return out

    @property
    def _begins_at_bias(self):
        """Whether the bias is added before the products: not with a softcap, which applies to the products alone."""
        return self.options.softcap is None and self.options.scale > 0

    @property
    def _streams_after_products(self):
        """Whether scores need key streams after the products."""
        extra = self.inputs.extra
        return not self._begins_at_bias and (extra.slopes is not None or extra.steps is not None)

    def _keys_are_read(self, slot):
        if not self._streams_after_products:
            plgpu.barrier_arrive(self.scratch.free_key.at[slot])

    def _initial(self, i, query, masked):
        """The accumulator to which query·key of block i is added, float32 [64, block_k]; -inf where masked."""
        masked = masked and not isinstance(self.options.rule, All)
        options, extra, start = self.options, self.inputs.extra, None
        block = self.block(i, query, masked)
        if self._begins_at_bias:
            start = scores.bias(options, block, extra, 1 / options.scale)
        start = products.zeros(*self.tile.shape) if start is None else start
        if masked:
            start = jnp.where(scores.attending(options, block), start, -jnp.inf)
        return plgpu.layout_cast(start, plgpu.Layout.WGMMA)

    def _softmax(self, i, query, carry):
        """Probabilities of block i relative to the maximum so far, and the carry rescaled to that maximum.

        When it returns, the values of the block are in shared memory.
        """
        x, out, top, total = carry
        options, extra, unit = self.options, self.inputs.extra, scores.base2_scale(self.options)
        block = self.block(i, query, False)
        if not self._begins_at_bias:
            raw = x
            x, unit = scores.unscaled(options, block, extra, raw)  # [64, block_k]
            if not isinstance(options.rule, All):
                x = jnp.where(raw == -jnp.inf, -jnp.inf, x)
        if self._streams_after_products:
            plgpu.barrier_arrive(self.scratch.free_key.at[self.slot(i)])
        new = jnp.maximum(top, x.max(axis=1) * unit)  # [64]
        decay = jnp.exp2(top - new)  # [64]
        p = jnp.exp2(x * unit - self.tile.by_query(new))  # [64, block_k]
        total = total * decay + p.sum(axis=1)
        # Dropout comes after the sum: it drops normalised probabilities, and changes no normaliser.
        if extra.seeds is not None:
            p = jnp.where(scores.dropout_mask(options, block, extra), p, 0.0)
        out = out * jax.lax.broadcast_in_dim(decay, out.shape, [0])
        plgpu.barrier_wait(self.scratch.ready_value.at[self.slot(i)])
        return p.astype(self.inputs.value.dtype), out, new, total

    def _finish(self, out, top, total):
        """Normalises the output, float32 [64, Cv], and writes it and the lse."""
        attended = total > 0
        total = jnp.where(attended, total, 1.0)
        share = 1.0 / (total * (1.0 - self.options.dropout))
        s = self.scratch
        buffer = (s.query if s.out is None else s.out).at[self.index + memory.opaque_zero(self.row.number)]
        # The copies of the row before must have read the buffer.
        plgpu.wait_smem_to_gmem(0)
        buffer[...] = (out * jax.lax.broadcast_in_dim(share, out.shape, [0])).astype(self.out.dtype)
        self.write(buffer, attended, top, total)
        if s.out is None:
            plgpu.wait_smem_to_gmem(0)
            plgpu.barrier_arrive(s.free_query.at[self.index])

    def _await_turn(self):
        plgpu.barrier_wait(self.scratch.turn.at[self.index])

    def _pass_turn(self):
        plgpu.barrier_arrive(self.scratch.turn.at[memory.ring_slot(self.index + 1, self.warpgroups)])


def _scratch(sizes: HopperForwardSizes, o: Operands) -> HopperForwardScratch:
    (C, Cv), dtype, streams = (o.query.shape[3], o.value.shape[3]), o.query.dtype, len(o.key_streams)
    groups, stages, block_k = sizes.warpgroups, sizes.stages, sizes.block_k
    return HopperForwardScratch(
        query=memory.operand(dtype, groups, ROWS, C),
        key=memory.operand(dtype, stages, block_k, C),
        value=memory.operand(dtype, stages, block_k, Cv),
        streams=plgpu.SMEM((stages, streams, block_k), jnp.int32) if streams else None,
        out=memory.operand(dtype, groups, ROWS, Cv) if sizes.own_output or Cv != C else None,
        lse=plgpu.SMEM((groups, ROWS), jnp.float32),
        # A `ready` barrier counts copies: keys and streams are two. A `free` barrier counts warpgroups that read.
        ready_query=plgpu.Barrier(num_barriers=groups),
        ready_key=plgpu.Barrier(num_arrivals=2 if streams else 1, num_barriers=stages),
        ready_value=plgpu.Barrier(num_barriers=stages),
        free_query=plgpu.Barrier(num_barriers=groups),
        free_key=plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
        free_value=plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
        turn=plgpu.Barrier(num_barriers=groups),
    )
