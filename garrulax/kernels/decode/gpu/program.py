"""The program of `decode.gpu`: one warpgroup, one piece of a sequence's blocks, one key/value head."""

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
    LOG2E,
    NEVER,
    ROW,
    ROWS,
    TILE,
    Tensor,
    empty_rows,
    finished,
    operand,
    spread,
)
from garrulax.kernels.mask import All


class Sizes(NamedTuple):
    """What is static in a program.

    block: keys a step. stages: blocks in the ring. heads: K. width, value_width: C, Cv.
    tiles: programs a piece and head, of ROWS queries each. rows: how many of these are written.
    page: slots of a page. copies: pages of a block, 1 if pages are larger. chunk: columns written at a time.
    quantised: whether the cache has 8 bits an entry, and scales.
    """

    block: int
    stages: int
    heads: int
    width: int
    value_width: int
    tiles: int
    rows: int
    page: int
    copies: int
    chunk: int
    quantised: bool


def scratch(s: Sizes, dtype: Any, cache: Any) -> dict[str, Any]:
    """Shared memory and barriers, by the names that `program` gives them: tiles of the queries' dtype, rings of the
    cache's."""
    memory = {
        "query": operand((ROWS, s.width), dtype),
        "key": operand((s.stages, s.block, s.width), cache),
        "value": operand((s.stages, s.block, s.value_width), cache),
        "out": operand((ROWS, s.chunk), jnp.dtype(jnp.float32)),
        "lse": plgpu.SMEM((ROWS,), jnp.float32),
        "query ready": plgpu.Barrier(),
    }
    for name in ("key", "value"):
        arrivals = s.copies * (2 if s.quantised else 1)
        memory[f"{name} ready"] = plgpu.Barrier(num_arrivals=arrivals, num_barriers=s.stages)
    if s.quantised:
        memory["wide key"] = operand((s.block, s.width), dtype)
        memory["wide value"] = operand((s.block, s.value_width), dtype)
        memory["key scales"] = plgpu.SMEM((s.stages, s.block), jnp.float32)
        memory["value scales"] = plgpu.SMEM((s.stages, s.block), jnp.float32)
    return memory


class _Ring(NamedTuple):
    """The blocks of one piece of one head, on their way through shared memory.

    s, on, given, own: as of `program`. sequence, head: whose. start, stop: which of its list of blocks.
    """

    s: Sizes
    on: type[Tensor]
    given: dict[str, Any]
    own: dict[str, Any]
    sequence: Any
    head: Any
    start: Any
    stop: Any

    def fetch(self, name: str, i: Any) -> None:
        """Starts the copies of keys or values of the i-th block, if there is one, into its slot, which must be free."""
        s, given, own = self.s, self.given, self.own

        @pl.when(self.start + i < self.stop)
        def _():
            slot, index = lax.rem(i, jnp.int32(s.stages)), given["blocks"][self.sequence, self.start + i] >> 1
            heads = [given["pages"][self.sequence, self.start + i, j] * s.heads + self.head for j in range(s.copies)]
            for part in (name, f"{name} scales") if s.quantised else (name,):
                _copy(s, given[part], own[part].at[slot], own[f"{name} ready"].at[slot], index, heads)

    def wait(self, name: str, slot: Any) -> Callable[[jax.Array], jax.Array]:
        """Waits for the copies into a slot. Returns what multiplies a tile with the scales of its columns."""
        plgpu.barrier_wait(self.own[f"{name} ready"].at[slot])
        if not self.s.quantised:
            return lambda x: x
        scales = self.on.load(self.own[f"{name} scales"].at[slot], COLUMN)
        return lambda x: x * spread(scales, x.shape, 1)

    def product(self, name: str, i: Any, slot: Any, multiply: Callable[[Any], jax.Array]) -> jax.Array:
        """What `multiply` makes of the i-th block; its slot gets the next one as soon as it is free."""
        block = self.own[name].at[slot]
        if not self.s.quantised:
            result = multiply(block)
            plgpu.commit_smem()
            self.fetch(name, i + self.s.stages)
            return result
        wide = self.own[f"wide {name}"]
        for at in range(0, wide.shape[1], 64):  # there are no registers for more
            columns = pl.ds(at, min(64, wide.shape[1] - at))
            wide[:, columns] = self.on.widened(block.at[:, columns], wide.dtype)
        plgpu.commit_smem()
        self.fetch(name, i + self.s.stages)
        return multiply(wide)


def program(s: Sizes, options: Options, on: type[Tensor], given: dict[str, Any], own: dict[str, Any]) -> None:
    """Attends from ROWS queries to the keys of one piece and writes the result and its lse.

    given: operands and results in global memory: query [B·K, tiles·ROWS, C]; key [P·K, page, C]; value; their scales
    [P·K, page] or none; blocks [B, N]; pages [B, N, copies], of each block of the list; lengths [B]; sequence, start,
    stop [I]; each stream of queries [B, tiles·ROWS] and of keys [B, N·block]; slopes [K, tiles·ROWS] or none; out
    [I, R, Cv] and lse [I, R] with R of K·tiles·rows or more.
    own: as of `scratch`.
    """
    piece, head, tile = (lax.axis_index(name) for name in ("piece", "head", "tile"))
    start, stop = given["start"][piece], given["stop"][piece]

    @pl.when(start < stop)
    def _():
        sequence, rows = given["sequence"][piece], pl.ds(tile * ROWS, ROWS)
        plgpu.copy_gmem_to_smem(given["query"].at[sequence * s.heads + head, rows], own["query"], own["query ready"])
        ring = _Ring(s, on, given, own, sequence, head, start, stop)

        @pl.loop(0, s.stages)
        def _(i):
            ring.fetch("key", i)
            ring.fetch("value", i)

        length = given["lengths"][sequence]
        if "slopes" in given:
            slopes = on.load(given["slopes"].at[head, rows], ROW) * LOG2E
            here = on.load(given["queries' position"].at[sequence, rows], ROW)
        plgpu.barrier_wait(own["query ready"])

        def step(i, carry):
            sums, top, total = carry
            slot, word = lax.rem(i, jnp.int32(s.stages)), given["blocks"][sequence, start + i]
            first = (word >> 1) * s.block
            keys = pl.ds(first - _overlap(s, word >> 1), s.block)

            def cut(x):
                index = keys.start + on.place(lax.broadcasted_iota(jnp.int32, x.shape, 1), TILE)
                seen = (index >= first) & (index < length)
                if not isinstance(options.rule, All):
                    queries = {n: on.load(y.at[sequence, rows], ROW) for n, y in _streams(given, "queries' ").items()}
                    columns = {n: on.load(y.at[sequence, keys], COLUMN) for n, y in _streams(given, "keys' ").items()}
                    seen &= options.rule.evaluate(
                        {name: spread(y, x.shape, 0) for name, y in queries.items()},
                        {name: spread(y, x.shape, 1) for name, y in columns.items()},
                    )
                return jnp.where(seen, x, NEVER)

            if "slopes" in given:
                there = on.load(given["keys' position"].at[sequence, keys], COLUMN)
            scaled = ring.wait("key", slot)
            x = scaled(ring.product("key", i, slot, lambda k: on.scores(own["query"], k)))
            if options.softcap is None:
                x = x * (options.scale * LOG2E)
            else:
                x = jnp.tanh(x * (options.scale / options.softcap)) * (options.softcap * LOG2E)
            if "slopes" in given:
                distance = spread(there, x.shape, 1) - spread(here, x.shape, 0)
                x = x + spread(slopes, x.shape, 0) * distance.astype(jnp.float32)
            x = lax.cond((word & 1) == 0, cut, lambda x: x, x)
            above = jnp.maximum(top, x.max(axis=1))
            shrink, p = jnp.exp2(top - above), jnp.exp2(x - spread(above, x.shape, 0))
            sums, total = sums * spread(shrink, sums.shape, 0), total * shrink + p.sum(axis=1)
            p = ring.wait("value", slot)(p).astype(own["query"].dtype)
            return ring.product("value", i, slot, lambda v: on.add(sums, p, v)), above, total

        sums, top, total = lax.fori_loop(0, stop - start, step, empty_rows(on, s.value_width))
        sums, lse = finished(sums, top, total, NEVER)
        _write(s, given, own, (piece, (head * s.tiles + tile) * s.rows), sums, lse)


def _copy(s: Sizes, source: Any, ring: Any, ready: Any, index: Any, heads: list[Any]) -> None:
    """Starts the copy of block `index` of a sequence into a slot of the ring; heads: where its pages are in `source`
    [P·K, page, ...]."""
    for j, head in enumerate(heads):
        into, at = ring, 0
        if s.copies > 1:
            into = ring.at[pl.ds(j * s.page, s.page)]
        elif s.page > s.block:
            at = lax.rem(index, jnp.int32(-(-s.page // s.block))) * s.block - _overlap(s, index)
        plgpu.copy_gmem_to_smem(source.at[head, pl.ds(at, min(s.page, s.block))], into, ready)


def _overlap(s: Sizes, index: Any) -> Any:
    """How many slots the block begins before its place: a page's last block ends with the page."""
    per, over = -(-s.page // s.block), -s.page % s.block
    if s.copies > 1 or not over:
        return 0
    return jnp.where(lax.rem(index, jnp.int32(per)) == per - 1, over, 0)


def _streams(given: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): x for name, x in given.items() if name.startswith(prefix)}


def _write(s: Sizes, given: dict[str, Any], own: dict[str, Any], place: Any, sums: jax.Array, lse: jax.Array) -> None:
    """The rows that are queries, and their lse, from row place[1] on of piece place[0]."""
    here = pl.ds(0, s.rows)
    own["lse"][...] = lse
    for at in range(0, s.value_width, s.chunk):
        own["out"][...] = sums[:, at : at + s.chunk]
        plgpu.commit_smem()
        there = given["out"].at[place[0], pl.ds(place[1], s.rows), pl.ds(at, s.chunk)]
        plgpu.copy_smem_to_gmem(own["out"].at[here], there)
        plgpu.wait_smem_to_gmem(0)
    plgpu.copy_smem_to_gmem(own["lse"].at[here], given["lse"].at[place[0], pl.ds(place[1], s.rows)])
    plgpu.wait_smem_to_gmem(0)
