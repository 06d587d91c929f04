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

_SCORES = plgpu.Layout.WGMMA
_ROW, _COLUMN = _SCORES.reduce(1), _SCORES.reduce(0)


class Sizes(NamedTuple):
    """What is static in a program.

    block: keys a step. stages: blocks in the ring. heads: K. width, value_width: C, Cv.
    tiles: programs a piece and head, of ROWS queries each. rows: how many of these are written.
    page: slots of a page. copies: pages of a block, 1 if pages are larger. chunk: columns written at a time.
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


def scratch(s: Sizes, dtype: Any) -> dict[str, Any]:
    """Shared memory and barriers, by the names that `program` gives them."""
    return {
        "q": _operand((ROWS, s.width), dtype),
        "k": _operand((s.stages, s.block, s.width), dtype),
        "v": _operand((s.stages, s.block, s.value_width), dtype),
        "o": _operand((ROWS, s.chunk), jnp.dtype(jnp.float32)),
        "l": plgpu.SMEM((ROWS,), jnp.float32),
        "q_ready": plgpu.Barrier(),
        "k_ready": plgpu.Barrier(num_arrivals=s.copies, num_barriers=s.stages),
        "v_ready": plgpu.Barrier(num_arrivals=s.copies, num_barriers=s.stages),
    }


def _operand(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory in the widest layout that `wgmma` reads rows of this width in."""
    swizzle = next(n for n in (128, 64, 32) if shape[-1] * dtype.itemsize % n == 0)
    return plgpu.SMEM(
        shape,
        dtype,
        transforms=(plgpu.TilingTransform((8, swizzle // dtype.itemsize)), plgpu.SwizzleTransform(swizzle)),
    )


def program(s: Sizes, options: Options, interpret: bool, given: dict[str, Any], own: dict[str, Any]) -> None:
    """Attends from ROWS queries to the keys of one piece and writes the result and its lse.

    given: operands and results in global memory: query [B·K, tiles·ROWS, C]; key [P·K, page, C]; value; blocks
    [B, N]; pages [B, N, copies], of each block of the list; lengths [B]; sequence, start, stop [I]; each stream of
    queries [B, tiles·ROWS] and of keys [B, N·block]; slopes [K, tiles·ROWS] or none; out, lse [I·K·tiles, ...].
    own: as of `scratch`.
    """
    piece, head, tile = (lax.axis_index(name) for name in ("piece", "head", "tile"))
    start, stop = given["start"][piece], given["stop"][piece]

    @pl.when(start < stop)
    def _():
        sequence = given["sequence"][piece]
        rows = pl.ds(tile * ROWS, ROWS)
        plgpu.copy_gmem_to_smem(given["query"].at[sequence * s.heads + head, rows], own["q"], own["q_ready"])
        for i in range(s.stages):
            for name in ("key", "value"):
                _fetch(s, given, own, name, sequence, head, start, stop, jnp.int32(i))
        length = given["lengths"][sequence]
        queries = {name[6:]: _load(x.at[sequence, rows], _ROW) for name, x in given.items() if name[:6] == "query "}
        slopes = _load(given["slopes"].at[head, rows], _ROW) * LOG2E if "slopes" in given else None
        plgpu.barrier_wait(own["q_ready"])

        def step(i, carry):
            acc, top, total = carry
            slot, word = lax.rem(i, jnp.int32(s.stages)), given["blocks"][sequence, start + i]
            first = (word >> 1) * s.block
            begin = first - _overlap(s, word >> 1)
            keys = pl.ds(begin, s.block)

            def cut(x):
                index = begin + plgpu.broadcasted_iota(jnp.int32, x.shape, 1, layout=_SCORES)
                seen = (index >= first) & (index < length)
                if not isinstance(options.rule, All):
                    k = {n[4:]: _load(r.at[sequence, keys], _COLUMN) for n, r in given.items() if n[:4] == "key "}
                    seen &= options.rule.evaluate(
                        {name: _spread(q, x.shape, 0) for name, q in queries.items()},
                        {name: _spread(y, x.shape, 1) for name, y in k.items()},
                    )
                return jnp.where(seen, x, NEVER)

            if slopes is not None:
                position = _load(given["key position"].at[sequence, keys], _COLUMN)
            plgpu.barrier_wait(own["k_ready"].at[slot])
            x = _scores(own["q"], own["k"].at[slot], interpret)
            _fetch(s, given, own, "key", sequence, head, start, stop, i + s.stages)
            if options.softcap is None:
                x = x * (options.scale * LOG2E)
            else:
                x = jnp.tanh(x * (options.scale / options.softcap)) * (options.softcap * LOG2E)
            if slopes is not None:
                distance = _spread(position, x.shape, 1) - _spread(queries["position"], x.shape, 0)
                x = x + _spread(slopes, x.shape, 0) * distance.astype(jnp.float32)
            x = lax.cond((word & 1) == 0, cut, lambda x: x, x)
            above = jnp.maximum(top, x.max(axis=1))
            shrink, p = jnp.exp2(top - above), jnp.exp2(x - _spread(above, x.shape, 0))
            total, acc = total * shrink + p.sum(axis=1), acc * _spread(shrink, acc.shape, 0)
            plgpu.barrier_wait(own["v_ready"].at[slot])
            acc = _add_product(acc, p.astype(own["q"].dtype), own["v"].at[slot], interpret)
            _fetch(s, given, own, "value", sequence, head, start, stop, i + s.stages)
            return acc, above, total

        nothing = plgpu.layout_cast(jnp.zeros((ROWS, s.value_width), jnp.float32), _SCORES)
        lowest = plgpu.layout_cast(jnp.full((ROWS,), NEVER, jnp.float32), _ROW)
        none = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), _ROW)
        acc, top, total = lax.fori_loop(0, stop - start, step, (nothing, lowest, none))
        _write(s, given, own, (piece * s.heads + head) * s.tiles + tile, acc, top, total)


def _fetch(
    s: Sizes, given: dict[str, Any], own: dict[str, Any], name: str, sequence: Any, head: Any, start: Any, stop: Any, i: Any
) -> None:
    """Starts the copy of the i-th block of the piece into its slot of the ring, if there is one; what the slot held
    has been read by then."""
    plgpu.commit_smem()

    @pl.when(start + i < stop)
    def _():
        slot, source = lax.rem(i, jnp.int32(s.stages)), given[name]
        ring, ready = own[name[0]], own[name[0] + "_ready"]
        index = given["blocks"][sequence, start + i] >> 1
        for j in range(s.copies):
            page, into, at = given["pages"][sequence, start + i, j] * s.heads + head, ring.at[slot], 0
            if s.copies > 1:
                into = ring.at[slot, pl.ds(j * s.page, s.page)]
            elif s.page > s.block:
                at = lax.rem(index, jnp.int32(-(-s.page // s.block))) * s.block - _overlap(s, index)
            plgpu.copy_gmem_to_smem(source.at[page, pl.ds(at, min(s.page, s.block))], into, ready.at[slot])


def _overlap(s: Sizes, index: Any) -> Any:
    """How many slots the block begins before its place: a page's last block ends with the page."""
    per, over = -(-s.page // s.block), -s.page % s.block
    if s.copies > 1 or not over:
        return 0
    return jnp.where(lax.rem(index, jnp.int32(per)) == per - 1, over, 0)


def _load(x: Any, layout: Any) -> jax.Array:
    return plgpu.load(x, layout=layout, optimized=False)


def _spread(x: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    return lax.broadcast_in_dim(x, shape, [axis])


def _scores(q: Any, k: Any, interpret: bool) -> jax.Array:
    """q [ROWS, C] times k [block, C], transposed: float32 [ROWS, block]."""
    if interpret:
        return jnp.dot(q[...].astype(jnp.float32), k[...].astype(jnp.float32).T)

    def product(acc):
        plgpu.wgmma(acc, q, k.T)
        return acc[...]

    return pl.run_scoped(product, plgpu.ACC((ROWS, k.shape[0]), jnp.float32))


def _add_product(acc: jax.Array, p: jax.Array, v: Any, interpret: bool) -> jax.Array:
    """acc [ROWS, Cv] plus p [ROWS, block] times v [block, Cv]."""
    if interpret:
        return acc + jnp.dot(p.astype(jnp.float32), v[...].astype(jnp.float32))
    return pl.run_state(lambda ref: plgpu.wgmma(ref, p, v))(plgpu.ACC.init(acc))


def _write(
    s: Sizes, given: dict[str, Any], own: dict[str, Any], place: Any, acc: jax.Array, top: jax.Array, total: jax.Array
) -> None:
    """The piece's result and its lse, in natural logarithm."""
    empty = top <= NEVER / 2
    total = jnp.where(empty, 1.0, total)
    own["l"][...] = jnp.where(empty, -jnp.inf, (top + jnp.log2(total)) / LOG2E)
    acc = acc * _spread(jnp.where(empty, 0.0, 1.0 / total), acc.shape, 0)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(own["l"], given["lse"].at[place])
    for at in range(0, s.value_width, s.chunk):
        own["o"][...] = acc[:, at : at + s.chunk]
        plgpu.commit_smem()
        rows = pl.ds(0, s.rows)
        plgpu.copy_smem_to_gmem(own["o"].at[rows], given["out"].at[place, rows, pl.ds(at, s.chunk)])
        plgpu.wait_smem_to_gmem(0)
