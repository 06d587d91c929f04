"""The program of `decode.gpu`: one warpgroup, one piece of a sequence's blocks, one key/value head."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from garrulax.kernels.call import Options
from garrulax.kernels.mask import All

ROWS = 64  # of the products of a warpgroup
NEVER = -1e30  # score of what is not seen: finite, so that the difference of two is 0
LOG2E = math.log2(math.e)

TILE = plgpu.Layout.WGMMA
ROW, COLUMN = TILE.reduce(1), TILE.reduce(0)


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


def operand(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory in the widest layout that `wgmma` reads rows of this width in."""
    swizzle = next(n for n in (128, 64, 32) if shape[-1] * dtype.itemsize % n == 0)
    return plgpu.SMEM(
        shape,
        dtype,
        transforms=(plgpu.TilingTransform((8, swizzle // dtype.itemsize)), plgpu.SwizzleTransform(swizzle)),
    )


class Tensor:
    """What a warpgroup does with registers and tensor cores."""

    @staticmethod
    def place(x: jax.Array, layout: Any) -> jax.Array:
        """x in that layout of registers."""
        return plgpu.layout_cast(x, layout)

    @staticmethod
    def load(ref: Any, layout: Any) -> jax.Array:
        """A vector of global memory."""
        return plgpu.load(ref, layout=layout, optimized=False)

    @staticmethod
    def widened(ref: Any, dtype: Any) -> jax.Array:
        """Entries of 8 bits in shared memory in a wider dtype, exactly."""
        x = plgpu.load(ref, layout=plgpu.Layout.WGMMA_UPCAST_2X)
        if x.dtype != jnp.int8:  # there is no instruction from 8 bits of floating point to bfloat16
            x = x.astype(jnp.float32)
        return x.astype(dtype)

    @staticmethod
    def scores(q: Any, k: Any) -> jax.Array:
        """q [ROWS, C] times k [block, C], transposed: float32 [ROWS, block]."""

        def product(acc):
            plgpu.wgmma(acc, q, k.T)
            return acc[...]

        return pl.run_scoped(product, plgpu.ACC((ROWS, k.shape[0]), jnp.float32))

    @staticmethod
    def add(acc: jax.Array, p: jax.Array, v: Any) -> jax.Array:
        """acc [ROWS, Cv] plus p [ROWS, block] times v [block, Cv]."""
        return pl.run_state(lambda ref: plgpu.wgmma(ref, p, v))(plgpu.ACC.init(acc))


class Plain(Tensor):
    """The same for the interpreter, which knows no layouts and no `run_state`."""

    @staticmethod
    def place(x: jax.Array, layout: Any) -> jax.Array:
        """x."""
        return x

    @staticmethod
    def load(ref: Any, layout: Any) -> jax.Array:
        """A vector."""
        return ref[...]

    @staticmethod
    def widened(ref: Any, dtype: Any) -> jax.Array:
        """As `Tensor.widened`."""
        return ref[...].astype(dtype)

    @staticmethod
    def scores(q: Any, k: Any) -> jax.Array:
        """As `Tensor.scores`."""
        return jnp.dot(q[...].astype(jnp.float32), k[...].astype(jnp.float32).T)

    @staticmethod
    def add(acc: jax.Array, p: jax.Array, v: Any) -> jax.Array:
        """As `Tensor.add`."""
        return acc + jnp.dot(p.astype(jnp.float32), v[...].astype(jnp.float32))


def program(s: Sizes, options: Options, on: type[Tensor], given: dict[str, Any], own: dict[str, Any]) -> None:
    """Attends from ROWS queries to the keys of one piece and writes the result and its lse.

    given: operands and results in global memory: query [B·K, tiles·ROWS, C]; key [P·K, page, C]; value; blocks
    [B, N]; pages [B, N, copies], of each block of the list; lengths [B]; sequence, start, stop [I]; each stream of
    queries [B, tiles·ROWS] and of keys [B, N·block]; slopes [K, tiles·ROWS] or none; out, lse
    [I, at least K·tiles·rows, ...].
    own: as of `scratch`.
    """
    piece, head, tile = (lax.axis_index(name) for name in ("piece", "head", "tile"))
    start, stop = given["start"][piece], given["stop"][piece]

    @pl.when(start < stop)
    def _():
        sequence = given["sequence"][piece]
        rows = pl.ds(tile * ROWS, ROWS)
        plgpu.copy_gmem_to_smem(given["query"].at[sequence * s.heads + head, rows], own["query"], own["query ready"])

        def fetch(name, i):
            @pl.when(start + i < stop)
            def _():
                slot, index = lax.rem(i, jnp.int32(s.stages)), given["blocks"][sequence, start + i] >> 1
                heads = [given["pages"][sequence, start + i, j] * s.heads + head for j in range(s.copies)]
                for part in (name, f"{name} scales") if s.quantised else (name,):
                    _copy(s, given[part], own[part].at[slot], own[f"{name} ready"].at[slot], index, heads)

        def ready(name, i, slot):
            """The block in that slot as an operand, and its scales."""
            plgpu.barrier_wait(own[f"{name} ready"].at[slot])
            if not s.quantised:
                return own[name].at[slot], None
            scales = on.load(own[f"{name} scales"].at[slot], COLUMN)
            wide = own[f"wide {name}"]
            for at in range(0, wide.shape[1], 128):  # so many as there are registers for
                columns = pl.ds(at, min(128, wide.shape[1] - at))
                wide[:, columns] = on.widened(own[name].at[slot, :, columns], wide.dtype)
            plgpu.commit_smem()
            fetch(name, i + s.stages)
            return wide, scales

        def used(name, i):
            """The block's slot is free, but where it has been copied already."""
            if not s.quantised:
                plgpu.commit_smem()
                fetch(name, i + s.stages)

        @pl.loop(0, s.stages)
        def _(i):
            fetch("key", i)
            fetch("value", i)

        length = given["lengths"][sequence]
        queries = {name: on.load(x.at[sequence, rows], ROW) for name, x in _streams(given, "queries' ").items()}
        slopes = on.load(given["slopes"].at[head, rows], ROW) * LOG2E if "slopes" in given else None
        plgpu.barrier_wait(own["query ready"])

        def step(i, carry):
            acc, top, total = carry
            slot, word = lax.rem(i, jnp.int32(s.stages)), given["blocks"][sequence, start + i]
            first = (word >> 1) * s.block
            begin = first - _overlap(s, word >> 1)
            keys = pl.ds(begin, s.block)

            def cut(x):
                index = begin + on.place(lax.broadcasted_iota(jnp.int32, x.shape, 1), TILE)
                seen = (index >= first) & (index < length)
                if not isinstance(options.rule, All):
                    columns = {n: on.load(k.at[sequence, keys], COLUMN) for n, k in _streams(given, "keys' ").items()}
                    seen &= options.rule.evaluate(
                        {name: spread(q, x.shape, 0) for name, q in queries.items()},
                        {name: spread(y, x.shape, 1) for name, y in columns.items()},
                    )
                return jnp.where(seen, x, NEVER)

            if slopes is not None:
                position = on.load(given["keys' position"].at[sequence, keys], COLUMN)
            key, scales = ready("key", i, slot)
            x = on.scores(own["query"], key)
            used("key", i)
            if scales is not None:
                x = x * spread(scales, x.shape, 1)
            if options.softcap is None:
                x = x * (options.scale * LOG2E)
            else:
                x = jnp.tanh(x * (options.scale / options.softcap)) * (options.softcap * LOG2E)
            if slopes is not None:
                distance = spread(position, x.shape, 1) - spread(queries["position"], x.shape, 0)
                x = x + spread(slopes, x.shape, 0) * distance.astype(jnp.float32)
            x = lax.cond((word & 1) == 0, cut, lambda x: x, x)
            above = jnp.maximum(top, x.max(axis=1))
            shrink, p = jnp.exp2(top - above), jnp.exp2(x - spread(above, x.shape, 0))
            total, acc = total * shrink + p.sum(axis=1), acc * spread(shrink, acc.shape, 0)
            value, scales = ready("value", i, slot)
            if scales is not None:
                p = p * spread(scales, p.shape, 1)
            acc = on.add(acc, p.astype(own["query"].dtype), value)
            used("value", i)
            return acc, above, total

        sums, lse = finished(*lax.fori_loop(0, stop - start, step, empty_rows(on, s.value_width)), NEVER)
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


def spread(x: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    """A vector along that axis of a tile."""
    return lax.broadcast_in_dim(x, shape, [axis])


def empty_rows(on: type[Tensor], columns: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What a softmax begins with: sums [ROWS, columns], scores' greatest and exponentials' sum [ROWS]."""
    sums = on.place(jnp.zeros((ROWS, columns), jnp.float32), TILE)
    return sums, on.place(jnp.full((ROWS,), NEVER, jnp.float32), ROW), on.place(jnp.zeros((ROWS,), jnp.float32), ROW)


def finished(sums: jax.Array, top: jax.Array, total: jax.Array, nothing: float) -> tuple[jax.Array, jax.Array]:
    """Averages and lse in base 2; 0 and `nothing` where a row saw nothing."""
    empty = top <= NEVER / 2
    total = jnp.where(empty, 1.0, total)
    share = jnp.where(empty, 0.0, 1.0 / total)
    return sums * spread(share, sums.shape, 0), jnp.where(empty, nothing, top + jnp.log2(total))


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
