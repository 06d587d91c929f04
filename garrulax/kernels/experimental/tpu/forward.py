"""The forward kernel: softmax over the blocks of a row as they come (Dao et al. 2022, arXiv 2205.14135), in base 2.

The grid is (parts of query heads, active blocks), the blocks fastest: all blocks with the same queries follow one
another, so that the running softmax of these queries stays in VMEM and each output is written once. All query heads of
a part are computed in one step, so that keys and values are read once for them. Letters of shapes: see `layout`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from garrulax.kernels.call import Operands
from garrulax.kernels.experimental.tpu import layout, scores
from garrulax.kernels.experimental.tpu.layout import LANES, BlockIndex, Named, TpuPlan
from garrulax.kernels.experimental.tpu.schedule import FIRST_OF_ROW, LAST_OF_ROW, PARTIAL
from garrulax.kernels.mask import All

_LN_2 = 1 / scores.LOG2_E


def forward(plan: TpuPlan, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """Output [B, N, G, T, Cv] and lse float32 [B, N, G, T] of a request of whole blocks."""
    x = layout.kernel_arrays(plan, operands)
    scalars, count = layout.with_schedule(plan, operands, layout.kernel_scalars(plan, operands))
    B, N, G, T, _ = x["query"].shape
    width, rows = x["value"].shape[-1], G * plan.block_q
    out = {
        "output": jax.ShapeDtypeStruct((B, N, G, T, width), operands.query.dtype),
        "lse": jax.ShapeDtypeStruct((B, N, G, T), jnp.float32),
    }
    # A number of a query fills all 128 lanes of its row, so that it multiplies a tile without a broadcast across lanes.
    scratch = {
        "top": pltpu.VMEM((rows, LANES), jnp.float32),  # the greatest score so far
        "total": pltpu.VMEM((rows, LANES), jnp.float32),  # the sum of exp2(score - top) so far
        "output": pltpu.VMEM((rows, width), jnp.float32),  # the sum of exp2(score - top) * value so far
    }
    if plan.query_names:
        scratch["query_streams"] = pltpu.VMEM((len(plan.query_names), plan.block_q, LANES), jnp.int32)
    if "steps" in scalars:
        scratch["step_bias"] = pltpu.VMEM((plan.strip, plan.chunk), jnp.float32)
    y = layout.launch(
        functools.partial(_kernel, plan),
        "attention_forward",
        plan,
        (N, count),
        1,
        (scalars, x, layout.block_specs(plan, x, layout.scheduled_block)),
        (out, layout.block_specs(plan, out, layout.scheduled_block)),
        scratch,
    )
    return y["output"], y["lse"]


def _kernel(plan: TpuPlan, scalars: Named, x: Named, y: Named, carry: Named) -> None:
    head, step = pl.program_id(0), pl.program_id(1)
    word, block = scalars["words"][step], layout.scheduled_block(head, step, scalars)
    pl.when((word & FIRST_OF_ROW) != 0)(functools.partial(_start_row, plan, x, carry))
    full_or_partial(plan, (word & PARTIAL) != 0, functools.partial(_block, plan, scalars, x, carry, block))
    pl.when((word & LAST_OF_ROW) != 0)(functools.partial(_finish_row, plan, scalars, x, y, carry, block))


def _start_row(plan: TpuPlan, x: Named, carry: Named) -> None:
    """Resets the softmax, and turns the query streams from rows into columns, once for all blocks of the row."""
    carry["top"][...] = jnp.full_like(carry["top"], scores.LOWEST)
    carry["total"][...] = jnp.zeros_like(carry["total"])
    carry["output"][...] = jnp.zeros_like(carry["output"])
    columns = x["query_streams"][0].T  # [q, rows of streams]
    for i in range(len(plan.query_names)):
        carry["query_streams"][i] = jnp.broadcast_to(columns[:, i : i + 1], (plan.block_q, LANES))


def _block(plan: TpuPlan, scalars: Named, x: Named, carry: Named, block: BlockIndex, partial: bool) -> None:
    """Adds one block of pairs, a group of heads and a chunk of keys at a time."""

    def group(j):
        first = j * plan.group
        rows = pl.ds(first * plan.block_q, plan.group * plan.block_q)
        query = x["query"][0, 0, pl.ds(first, plan.group)].reshape(plan.group * plan.block_q, -1)  # [g·q, C]
        for c in range(0, plan.block_k, plan.chunk):
            keys = pl.ds(c, plan.chunk)
            products = plan.dot(query, x["key"][0, 0, keys], (1, 1))  # [g·q, c]
            s, dropout = _group_scores(plan, scalars, x, carry, block, partial, first, c, products)
            # The softmax so far is relative to the greatest score so far: `fade` makes it relative to the new one.
            top = carry["top"][rows]
            new = jnp.maximum(top, s.max(axis=1, keepdims=True))  # [g·q, 128]
            p = jnp.exp2(s - _widen(new, plan.chunk))  # [g·q, c]
            fade = jnp.exp2(top - new)
            carry["top"][rows] = new
            carry["total"][rows] = fade * carry["total"][rows] + p.sum(axis=1, keepdims=True)
            if dropout is not None:
                p = jnp.where(dropout, p, 0.0)
            value = x["value"][0, 0, keys]  # [c, Cv]
            output = carry["output"][rows]
            output = output * _widen(fade, output.shape[1]) + plan.dot(p.astype(value.dtype), value, (1, 0))
            carry["output"][rows] = output  # [g·q, Cv]

    each_group(plan, group)


def _group_scores(
    plan: TpuPlan,
    scalars: Named,
    x: Named,
    carry: Named,
    block: BlockIndex,
    partial: bool,
    first: Any,
    c: int,
    products: jax.Array,
) -> tuple[jax.Array, jax.Array | None]:
    """Scores [g·q, c] of the group of heads that begins with `first`, and which probabilities survive dropout."""
    k = {name: x["key_streams"][0, i : i + 1, pl.ds(c, plan.chunk)] for i, name in enumerate(plan.key_names)}  # [1, c]
    shape = (plan.strip, plan.chunk)
    tiles, dropout = {}, {}
    # The mask of a strip of queries is computed once and applied to all heads of the group.
    for r in range(0, plan.block_q, plan.strip):
        strip = pl.ds(r, plan.strip)
        q = {name: _widen(carry["query_streams"][i, strip], plan.chunk) for i, name in enumerate(plan.query_names)}
        mask = scores.score_mask(plan, q, k, shape) if partial else None
        for g in range(plan.group):
            head = query_head(plan, block, first) + g
            tile = products[g * plan.block_q + r : g * plan.block_q + r + plan.strip]  # [s, c]
            bias = scores.bias_tile(plan, x.get("bias"), first + g, (r, c))
            tile, _ = scores.tile_scores(plan, scalars, block, head, tile, q, k, bias, carry.get("step_bias"))
            tiles[g, r] = tile if mask is None else mask(tile)
            if "seeds" in scalars:
                dropout[g, r] = scores.dropout_mask(plan, scalars, block, head, (r, c), shape, key_axis=1)
    return _join(tiles), _join(dropout) if dropout else None


def _join(tiles: dict[tuple[int, int], jax.Array]) -> jax.Array:
    """Tiles [s, c] by (head, first query), as [g·q, c]."""
    return jnp.concatenate([tiles[i] for i in sorted(tiles)])


def _finish_row(plan: TpuPlan, scalars: Named, x: Named, y: Named, carry: Named, block: BlockIndex) -> None:
    """Writes output and lse of a row of blocks.

    A query that attends to nothing has `top` at LOWEST, and in its sums exp2(LOWEST - LOWEST) = 1 for each masked pair:
    they are discarded.
    """
    q = {name: x["query_streams"][0, i : i + 1, :] for i, name in enumerate(plan.query_names)}  # [1, q]

    def one(g):
        rows = pl.ds(g * plan.block_q, plan.block_q)
        top, total, output = (carry[name][rows] for name in ("top", "total", "output"))
        empty = top <= scores.LOWEST / 2
        total = jnp.where(empty, 1.0, total)
        share = jnp.where(empty, 0.0, 1 / (total * (1 - plan.options.dropout)))
        y["output"][0, 0, g] = (output * _widen(share, output.shape[1])).astype(y["output"].dtype)
        lse = jnp.where(empty, -jnp.inf, top * _LN_2 + jnp.log(total)).T[:1]  # [1, q], from [q, 128]
        y["lse"][0, 0, pl.ds(g, 1)] = lse - scores.alibi_offset(scalars, block, query_head(plan, block, g), q)

    each(plan.heads, one)


def query_head(plan: TpuPlan, block: BlockIndex, g: Any) -> Any:
    """Index among all query heads of the g-th query head of the block's part."""
    return block.part * plan.heads + g


def full_or_partial(plan: TpuPlan, partial: jax.Array, body: Callable[[bool], None]) -> None:
    """Runs body(True), which evaluates the mask, if the block is partial, else body(False), which does not.

    The kernel contains both bodies, or only the one without the mask where the rule lets every pair attend.
    """
    if plan.options.rule == All():
        body(False)
    else:
        pl.when(~partial)(functools.partial(body, False))
        pl.when(partial)(functools.partial(body, True))


def each_group(plan: TpuPlan, body: Any) -> None:
    """Runs body(j) for each group j of the query heads of a part."""
    each(plan.heads // plan.group, body)


def each(count: int, body: Any) -> None:
    """Runs body(0), ..., body(count - 1): unrolled if they are few, so that the compiler can overlap them; else as a
    loop, which keeps the program small."""
    if count <= 4:
        for i in range(count):
            body(i)
    else:
        jax.lax.fori_loop(0, count, lambda i, _: body(i), None)


def _widen(x: jax.Array, width: int) -> jax.Array:
    """x [rows, 128], which is the same in every lane, as [rows, width]."""
    return jnp.tile(x, (1, width // LANES))
