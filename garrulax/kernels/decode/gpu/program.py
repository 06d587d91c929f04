"""The first kernel of decoding attention: a program is one warpgroup for one split of one key/value head.

It walks through the split's blocks of keys with an online softmax, while the copy engine (TMA) fills a ring of slots
ahead of it. The warpgroup that computes also starts the copies, each as soon as a slot is free, since there is too
little to compute to keep another warpgroup for that.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from garrulax.kernels.call import Options
from garrulax.kernels.decode.gpu.registers import (
    COLUMN,
    MASKED,
    ROW,
    TILE,
    TensorCoreOps,
    broadcast,
    initial_softmax,
    normalised,
)
from garrulax.kernels.gpu import memory
from garrulax.kernels.gpu.products import ROWS
from garrulax.kernels.gpu.scores import LOG2E
from garrulax.kernels.mask import All


class DecodeSizes(NamedTuple):
    """The static sizes of a program.

    Attributes:
        block: Keys of a step.
        stages: Slots of the ring.
        heads: K, key/value heads.
        width: C, of queries and keys.
        value_width: Cv.
        tiles: Programs a split and head, for 64 rows of queries each.
        queries: G * T, rows of queries of a head.
        rows: How many of these 64 rows are read, and of a split written: all that are queries, in groups of 8.
        page: Slots of a page.
        copies: Pages of a block; 1 if a page is larger than a block.
        chunk: Columns of the output that are written at a time.
        quantised: Whether the cache has 8 bits an entry, and scales.
        split: Whether another kernel merges the results; otherwise a program has a whole sequence, and `tiles` is 1.
    """

    block: int
    stages: int
    heads: int
    width: int
    value_width: int
    tiles: int
    queries: int
    rows: int
    page: int
    copies: int
    chunk: int
    quantised: bool
    split: bool


def scratch_types(s: DecodeSizes, dtype: Any, cache: Any) -> dict[str, Any]:
    """Shared memory and barriers of a program, by name.

    Args:
        s: The static sizes.
        dtype: Of the queries.
        cache: Dtype of the cache.
    """
    # The rings take the names of the arrays that they hold a part of.
    types = {
        "query": memory.operand(dtype, ROWS, s.width),
        "key": memory.operand(cache, s.stages, s.block, s.width),
        "value": memory.operand(cache, s.stages, s.block, s.value_width),
        # A program of a whole sequence may write a single row, which the swizzled tiles of `operand` do not allow.
        "out": memory.operand(jnp.dtype(jnp.float32), ROWS, s.chunk) if s.split else plgpu.SMEM((ROWS, s.chunk), dtype),
        "lse": plgpu.SMEM((ROWS,), jnp.float32),
        "query ready": plgpu.Barrier(),
    }
    for name in ("key", "value"):
        arrivals = s.copies * (2 if s.quantised else 1)  # one a copy: of every page, its entries and scales
        types[f"{name} ready"] = plgpu.Barrier(num_arrivals=arrivals, num_barriers=s.stages)
    if s.quantised:
        # The tensor cores multiply two operands of one dtype: a block of 8 bits is converted into this buffer first.
        types["wide key"] = memory.operand(dtype, s.block, s.width)
        types["wide value"] = memory.operand(dtype, s.block, s.value_width)
        types["key scales"] = plgpu.SMEM((s.stages, s.block), jnp.float32)
        types["value scales"] = plgpu.SMEM((s.stages, s.block), jnp.float32)
    return types


def decode_split(
    s: DecodeSizes, options: Options, ops: type[TensorCoreOps], arrays: dict[str, Any], scratch: dict[str, Any]
) -> None:
    """The kernel: attends from 64 rows of queries to the keys of one split, and writes the result and its lse.

    Args:
        s: The static sizes.
        options: The static part of the request.
        ops: Operations of a warpgroup.
        arrays: References to operands and results in global memory, by name:
            query: [B * K, tiles * rows, C], the queries of all heads that share keys.
            key, value: [P * K, page, C] and [P * K, page, Cv], pages of the cache.
            key scales, value scales: float32 [P * K, page], of a quantised cache.
            blocks: int32 [B, N], the active blocks of each sequence, as `splits.active_blocks` gives them.
            pages: int32 [B, N, copies], the pages of each entry of `blocks`.
            lengths: int32 [B].
            sequence, start, stop: int32 [I], of each split, as in `splits.KeySplits`.
            queries' NAME: int32 [B, tiles * 64], a stream of the queries.
            keys' NAME: int32 [B, N * block], a stream of the keys.
            slopes: float32 [K, tiles * 64], of ALiBi, by row of queries.
            out, lse: float32 [I, R, Cv] and [I, R], the results, R at least K * tiles * rows; of whole sequences
                [B, K * G * T, Cv] in the query's dtype and float32 [B, K * 64].
        scratch: References to shared memory and barriers, as in `scratch_types`.
    """
    split, head, tile = (lax.axis_index(name) for name in ("split", "head", "tile"))
    start, stop = arrays["start"][split], arrays["stop"][split]

    def attend():
        sequence = arrays["sequence"][split]
        DecodeProgram(s, options, ops, arrays, scratch, split, head, tile, sequence, start, stop).run()

    if s.split:
        pl.when(start < stop)(attend)
    else:  # what attends to nothing is written, too
        attend()


@dataclasses.dataclass(frozen=True)
class DecodeProgram:
    """One program.

    Attributes:
        sizes: The static sizes.
        options: The static part of the request.
        ops: Operations of a warpgroup.
        arrays: As in `decode_split`.
        scratch: As in `decode_split`.
        split: Index of the split, int32 scalar.
        head: Index of the key/value head, int32 scalar.
        tile: Index of the 64 rows of queries, int32 scalar.
        sequence: Index of the sequence, int32 scalar.
        start: The split's first entry of the sequence's list of blocks, int32 scalar.
        stop: The entry behind its last one, int32 scalar.
    """

    sizes: DecodeSizes
    options: Options
    ops: type[TensorCoreOps]
    arrays: dict[str, Any]
    scratch: dict[str, Any]
    split: Any
    head: Any
    tile: Any
    sequence: Any
    start: Any
    stop: Any

    @property
    def rows(self) -> Any:
        """The slice of the program's rows of queries."""
        return pl.ds(self.tile * ROWS, ROWS)

    def run(self) -> None:
        """The whole program."""
        s, arrays, scratch = self.sizes, self.arrays, self.scratch
        source = arrays["query"].at[self.sequence * s.heads + self.head, pl.ds(self.tile * s.rows, s.rows)]
        # The rows behind these may hold anything: no row of a product depends on another.
        plgpu.copy_gmem_to_smem(source, scratch["query"].at[pl.ds(0, s.rows)], scratch["query ready"])

        @pl.loop(0, s.stages)
        def fill_ring(i):
            self.fetch("key", i)
            self.fetch("value", i)

        length = arrays["lengths"][self.sequence]
        alibi = None
        if "slopes" in arrays:
            slopes = self.ops.load(arrays["slopes"].at[self.head, self.rows], ROW) * LOG2E
            alibi = slopes, self.ops.load(arrays["queries' position"].at[self.sequence, self.rows], ROW)
        plgpu.barrier_wait(scratch["query ready"])
        step = functools.partial(self._step, length, alibi)
        sums, top, total = lax.fori_loop(0, self.stop - self.start, step, initial_softmax(self.ops, s.value_width))
        if s.split:
            self._write(*normalised(sums, top, total, MASKED))
        else:
            self._write_whole(*normalised(sums, top, total, -jnp.inf))

    def fetch(self, name: str, i: Any) -> None:
        """Starts the copies of keys or values of the i-th block, if there is one, into its slot, which must be free."""
        s, arrays, scratch = self.sizes, self.arrays, self.scratch

        @pl.when(self.start + i < self.stop)
        def copy():
            entry = self.start + i
            slot, index = lax.rem(i, jnp.int32(s.stages)), arrays["blocks"][self.sequence, entry] >> 1
            pages = [arrays["pages"][self.sequence, entry, j] * s.heads + self.head for j in range(s.copies)]
            for part in (name, f"{name} scales") if s.quantised else (name,):
                _copy(s, arrays[part], scratch[part].at[slot], scratch[f"{name} ready"].at[slot], index, pages)

    def _wait(self, name: str, slot: Any) -> Callable[[jax.Array], jax.Array]:
        """Waits for the copies into a slot. Returns a function that multiplies a tile's columns with their scales.

        A scale belongs to one key, a column of the tile. So key scales can be applied to scores and value scales to
        probabilities, which are in registers anyway, instead of to keys and values.
        """
        plgpu.barrier_wait(self.scratch[f"{name} ready"].at[slot])
        if not self.sizes.quantised:
            return lambda x: x
        scales = self.ops.load(self.scratch[f"{name} scales"].at[slot], COLUMN)
        return lambda x: x * broadcast(scales, x.shape, 1)

    def _product(
        self, name: str, i: Any, slot: Any, multiply: Callable[[Any], jax.Array], valid: Any = None
    ) -> jax.Array:
        """multiply(the i-th block of keys or values); the copy of the next block into the slot starts at once.

        `valid`, if given, is the number of leading rows of the block that may be read; the others count as 0.
        """
        block = self.scratch[name].at[slot]
        if not self.sizes.quantised:
            self._clear(block, valid)
            result = multiply(block)
            # All 128 threads must be done with the slot before the next copy overwrites it.
            plgpu.commit_smem()
            self.fetch(name, i + self.sizes.stages)
            return result
        wide = self.scratch[f"wide {name}"]
        for at in range(0, wide.shape[1], 64):  # there are no registers for more columns at once
            columns = pl.ds(at, min(64, wide.shape[1] - at))
            wide[:, columns] = self.ops.widened(block.at[:, columns], wide.dtype)
        self._clear(wide, valid)
        # The tensor cores, too, do not see plain writes to shared memory before this fence. It also has all threads be
        # done with the slot, so that the next copy starts before the product.
        plgpu.commit_smem()
        self.fetch(name, i + self.sizes.stages)
        return multiply(wide)

    def _clear(self, block: Any, valid: Any) -> None:
        """Sets the rows of a block in shared memory from `valid` on to 0: a probability of 0 times NaN would be NaN."""
        if valid is None:
            return

        @pl.when(valid < block.shape[0])
        def clear():
            for at in range(0, block.shape[1], 64):  # as many columns as there are registers for
                columns = pl.ds(at, min(64, block.shape[1] - at))
                x = self.ops.load(block.at[:, columns], TILE)
                row = self.ops.place(lax.broadcasted_iota(jnp.int32, x.shape, 0), TILE)
                block[:, columns] = jnp.where(row < valid, x, jnp.zeros_like(x))
            plgpu.commit_smem()  # the tensor cores do not see plain writes before this fence

    def _step(self, length: Any, alibi: Any, i: Any, carry: Any) -> Any:
        """The i-th block of the split.

        Args:
            length: Valid slots of the sequence, int32 scalar.
            alibi: Slopes and positions of the rows of queries, [64] each, or None.
            i: Index in the split.
            carry: float32, sums [64, Cv], maximum and sum of exponentials [64].
        """
        s, arrays, ops, options = self.sizes, self.arrays, self.ops, self.options
        sums, top, total = carry
        # A word is 2 * index of the block + whether all its pairs attend.
        slot, word = lax.rem(i, jnp.int32(s.stages)), arrays["blocks"][self.sequence, self.start + i]
        first = (word >> 1) * s.block
        keys = pl.ds(first - _overlap(s, word >> 1), s.block)
        # Loaded before the wait, so that both memory accesses are under way at the same time.
        if alibi is not None:
            there = ops.load(arrays["keys' position"].at[self.sequence, keys], COLUMN)
        scale = self._wait("key", slot)
        x = scale(self._product("key", i, slot, lambda k: ops.scores(self.scratch["query"], k)))  # [64, block]
        if options.softcap is None:
            x = x * (options.scale * LOG2E)
        else:
            x = jnp.tanh(x * (options.scale / options.softcap)) * (options.softcap * LOG2E)
        if alibi is not None:
            slopes, here = alibi
            distance = broadcast(there, x.shape, 1) - broadcast(here, x.shape, 0)
            x = x + broadcast(slopes, x.shape, 0) * distance.astype(jnp.float32)
        x = lax.cond((word & 1) == 0, functools.partial(self._masked, first, keys, length), lambda x: x, x)
        new = jnp.maximum(top, x.max(axis=1))
        decay, p = jnp.exp2(top - new), jnp.exp2(x - broadcast(new, x.shape, 0))
        sums, total = sums * broadcast(decay, sums.shape, 0), total * decay + p.sum(axis=1)
        scaled = self._wait("value", slot)(p)
        # Scales behind the length may be NaN, too.
        p = (jnp.where(p > 0, scaled, 0.0) if s.quantised else p).astype(self.scratch["query"].dtype)
        return self._product("value", i, slot, lambda v: ops.add(sums, p, v), length - keys.start), new, total

    def _masked(self, first: Any, keys: Any, length: Any, x: jax.Array) -> jax.Array:
        """Scores [64, block] with MASKED where a pair does not attend.

        The block's keys are `keys`. Those before `first` belong to the block before, and count there.
        """
        index = keys.start + self.ops.place(lax.broadcasted_iota(jnp.int32, x.shape, 1), TILE)
        attending = (index >= first) & (index < length)
        if not isinstance(self.options.rule, All):
            query = self._streams("queries' ", self.rows, ROW)
            key = self._streams("keys' ", keys, COLUMN)
            attending &= self.options.rule.evaluate(
                {name: broadcast(y, x.shape, 0) for name, y in query.items()},
                {name: broadcast(y, x.shape, 1) for name, y in key.items()},
            )
        return jnp.where(attending, x, MASKED)

    def _streams(self, prefix: str, span: Any, layout: Any) -> dict[str, jax.Array]:
        """Streams of a span of queries or keys, in registers."""
        return {
            name.removeprefix(prefix): self.ops.load(ref.at[self.sequence, span], layout)
            for name, ref in self.arrays.items()
            if name.startswith(prefix)
        }

    def _write_whole(self, sums: jax.Array, lse: jax.Array) -> None:
        """Writes the rows that are queries to the result, and 64 lse, in base e."""
        s, arrays, scratch = self.sizes, self.arrays, self.scratch
        here, rows = pl.ds(0, s.queries), pl.ds(self.head * s.queries, s.queries)
        scratch["lse"][...] = lse / LOG2E
        for at in range(0, s.value_width, s.chunk):
            scratch["out"][...] = sums[:, at : at + s.chunk].astype(scratch["out"].dtype)
            # The copy engine does not see plain writes to shared memory before this fence.
            plgpu.commit_smem()
            target = arrays["out"].at[self.split, rows, pl.ds(at, s.chunk)]
            plgpu.copy_smem_to_gmem(scratch["out"].at[here], target)
            if at == 0:
                target = arrays["lse"].at[self.split, pl.ds(self.head * ROWS, ROWS)]
                plgpu.copy_smem_to_gmem(scratch["lse"], target)
            # The next chunk overwrites the buffer.
            plgpu.wait_smem_to_gmem(0)

    def _write(self, sums: jax.Array, lse: jax.Array) -> None:
        """Writes those of the 64 rows that are queries: the output [64, Cv], a chunk of columns at a time, and lse."""
        s, arrays, scratch = self.sizes, self.arrays, self.scratch
        here, there = pl.ds(0, s.rows), pl.ds((self.head * s.tiles + self.tile) * s.rows, s.rows)
        scratch["lse"][...] = lse
        for at in range(0, s.value_width, s.chunk):
            scratch["out"][...] = sums[:, at : at + s.chunk]
            # The copy engine does not see plain writes to shared memory before this fence.
            plgpu.commit_smem()
            target = arrays["out"].at[self.split, there, pl.ds(at, s.chunk)]
            plgpu.copy_smem_to_gmem(scratch["out"].at[here], target)
            # The next chunk overwrites the buffer.
            plgpu.wait_smem_to_gmem(0)
        plgpu.copy_smem_to_gmem(scratch["lse"].at[here], arrays["lse"].at[self.split, there])
        plgpu.wait_smem_to_gmem(0)


def _copy(s: DecodeSizes, source: Any, ring: Any, ready: Any, index: Any, pages: list[Any]) -> None:
    """Starts the copy of a block into a slot of the ring.

    Args:
        s: The static sizes.
        source: Reference [P * K, page, ...].
        ring: Reference to the slot, [block, ...].
        ready: Barrier of the slot.
        index: Of the block in its sequence.
        pages: Indices of the block's pages in `source`.
    """
    for j, page in enumerate(pages):
        into, at = ring, 0
        if s.copies > 1:
            into = ring.at[pl.ds(j * s.page, s.page)]
        elif s.page > s.block:
            at = lax.rem(index, jnp.int32(-(-s.page // s.block))) * s.block - _overlap(s, index)
        plgpu.copy_gmem_to_smem(source.at[page, pl.ds(at, min(s.page, s.block))], into, ready)


def _overlap(s: DecodeSizes, index: Any) -> Any:
    """By how many slots a block begins before its place.

    Where a page is not a multiple of the block, its last block ends with the page, so that no copy reads beyond it.
    """
    per, over = -(-s.page // s.block), -s.page % s.block
    if s.copies > 1 or not over:
        return 0
    return jnp.where(lax.rem(index, jnp.int32(per)) == per - 1, over, 0)
