"""The backward kernel: one pass over the active blocks gives the gradients of queries, keys and values.

Scores and probabilities of a block are computed once for all three gradients: 5 matrix products a block, where two
kernels, one for queries and one for keys and values, need 7. The grid is that of the forward pass. The gradient of the
queries of a row of blocks is summed in VMEM and written at the end of the row. Keys and values are met again in every
row, so their gradients stay in VMEM for all keys of a sequence and are copied out at its end; where that is too much,
`by_spans` divides the keys. Tiles are keys by queries, so that numbers of a query (lse, delta) lie along lanes and need
no transposition. Letters of shapes: see `layout`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from garrulax.kernels.call import Operands
from garrulax.kernels.experimental.tpu import layout, scores
from garrulax.kernels.experimental.tpu.forward import each_group, full_or_partial, query_head
from garrulax.kernels.experimental.tpu.layout import BlockIndex, Named, TpuPlan
from garrulax.kernels.experimental.tpu.schedule import (
    FIRST_OF_BATCH,
    FIRST_OF_ROW,
    LAST_OF_BATCH,
    LAST_OF_ROW,
    PARTIAL,
)


def backward(
    plan: TpuPlan, operands: Operands, rows: Named, first_key: Any, dtype: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of queries, keys and values.

    Args:
        plan: Of the call.
        operands: Of a request of whole blocks; its keys may be a span of those of the request.
        rows: `cotangent` [B, N, G, T, Cv], `lse` and `delta` float32 [B, N, G, T].
        first_key: Index of the first key of the operands among all keys of the request.
        dtype: Of the queries' gradient.

    Returns:
        Gradients of the query [B, N, G, T, C] in `dtype`, of the key [B, K, S, C] and of the value [B, K, S, Cv] in
        float32.
    """
    x = layout.kernel_arrays(plan, operands) | rows
    scalars, count = layout.with_schedule(plan, operands, layout.kernel_scalars(plan, operands, first_key))
    B, N, G = x["query"].shape[:3]
    out = {
        "dquery": jax.ShapeDtypeStruct(x["query"].shape, dtype),
        **{
            f"d{name}": jax.ShapeDtypeStruct((B, N, *x[name].shape[2:]), jnp.float32)  # a sum for each part
            for name in ("key", "value")
        },
    }
    # Outputs in HBM, which the kernel copies itself: as blocks of the pipeline they would have two buffers in VMEM.
    in_hbm = {name: pl.BlockSpec(memory_space=pl.ANY) for name in ("dkey", "dvalue")}
    scratch = {
        "dquery": pltpu.VMEM((G * plan.block_q, x["query"].shape[-1]), jnp.float32),
        "dkey": pltpu.VMEM(x["key"].shape[2:], jnp.float32),  # [S, C]
        "dvalue": pltpu.VMEM(x["value"].shape[2:], jnp.float32),  # [S, Cv]
    }
    if "steps" in scalars:
        scratch["step_bias"] = pltpu.VMEM((plan.chunk, plan.strip), jnp.float32)
    y = layout.launch(
        functools.partial(_kernel, plan),
        "attention_backward",
        plan,
        (N, count),
        1,
        (scalars, x, layout.block_specs(plan, x, layout.scheduled_block)),
        (out, layout.block_specs(plan, {"dquery": out["dquery"]}, layout.scheduled_block) | in_hbm),
        scratch,
    )
    dkey, dvalue = (y[name].reshape(B, -1, plan.parts, *y[name].shape[2:]).sum(axis=2) for name in ("dkey", "dvalue"))
    return y["dquery"], dkey * plan.options.scale, dvalue / (1 - plan.options.dropout)


def _kernel(plan: TpuPlan, scalars: Named, x: Named, y: Named, carry: Named) -> None:
    head, step = pl.program_id(0), pl.program_id(1)
    word, block = scalars["words"][step], layout.scheduled_block(head, step, scalars)

    @pl.when((word & FIRST_OF_BATCH) != 0)
    def start_sequence():
        carry["dkey"][...] = jnp.zeros_like(carry["dkey"])
        carry["dvalue"][...] = jnp.zeros_like(carry["dvalue"])

    @pl.when((word & FIRST_OF_ROW) != 0)
    def start_row():
        carry["dquery"][...] = jnp.zeros_like(carry["dquery"])

    full_or_partial(plan, (word & PARTIAL) != 0, functools.partial(_block, plan, scalars, x, carry, block))

    @pl.when((word & LAST_OF_ROW) != 0)
    def finish_row():
        dquery = carry["dquery"][...] * plan.options.scale
        y["dquery"][0, 0] = dquery.reshape(y["dquery"].shape[2:]).astype(y["dquery"].dtype)

    @pl.when((word & LAST_OF_BATCH) != 0)
    def finish_sequence():
        # Each copy waits for its own semaphore before the next step may set the buffers to 0.
        for name in ("dkey", "dvalue"):
            pltpu.sync_copy(carry[name], y[name].at[block.batch, block.part])


def _block(plan: TpuPlan, scalars: Named, x: Named, carry: Named, block: BlockIndex, partial: bool) -> None:
    """Adds the gradients of one block of pairs, a group of heads and a chunk of keys at a time."""

    def group(j):
        rows = pl.ds(j * plan.group * plan.block_q, plan.group * plan.block_q)
        query, cotangent = (of_group(plan, x[name], j) for name in ("query", "cotangent"))  # [g·q, C], [g·q, Cv]
        for c in range(0, plan.block_k, plan.chunk):
            p, ds = tile_gradients(plan, scalars, x, block, j, c, partial, carry.get("step_bias"))  # [c, g·q] each
            ds = ds.astype(query.dtype)
            keys = pl.ds(block.column * plan.block_k + c, plan.chunk)
            carry["dvalue"][keys] += plan.dot(p.astype(query.dtype), cotangent, (1, 0))  # [c, Cv]
            carry["dkey"][keys] += plan.dot(ds, query, (1, 0))  # [c, C]
            carry["dquery"][rows] += plan.dot(ds, x["key"][0, 0, pl.ds(c, plan.chunk)], (0, 0))  # [g·q, C]

    each_group(plan, group)


def tile_gradients(
    plan: TpuPlan,
    scalars: Named,
    x: Named,
    block: BlockIndex,
    j: Any,
    c: int,
    partial: bool,
    buffer: Any,
    products: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Probabilities of a chunk of keys, and gradients of their scores, computed again from lse.

    Args:
        plan: Of the call.
        scalars: References to scalar memory.
        x: References to the blocks of the arrays.
        block: The block of pairs.
        j: Index of the group of heads.
        c: First key of the chunk, counted from the start of the block.
        partial: Whether to evaluate the mask.
        buffer: Reference to float32 scratch [c, s] for T5's bias; None without it.
        products: Whether the gradient is that of the scaled products of queries and keys; else that of the terms added
            to them, which a softcap does not touch.

    Returns:
        float32 [c, g·q] each: probabilities after dropout, without the factor 1 / (1 - rate), and gradients.
    """
    keys = pl.ds(c, plan.chunk)
    columns = x["key_streams"][0, :, keys].T  # [c, rows of streams]
    k = {name: columns[:, i : i + 1] for i, name in enumerate(plan.key_names)}  # [c, 1]
    raw = plan.dot(x["key"][0, 0, keys], of_group(plan, x["query"], j), (1, 1))  # [c, g·q]
    dp = plan.dot(x["value"][0, 0, keys], of_group(plan, x["cotangent"], j), (1, 1))  # [c, g·q]
    shape = (plan.chunk, plan.strip)
    tiles: dict[tuple[int, int], tuple[jax.Array, jax.Array]] = {}
    # The mask of a strip of queries is computed once and applied to all heads of the group.
    for r in range(0, plan.block_q, plan.strip):
        strip = pl.ds(r, plan.strip)
        q = {name: x["query_streams"][0, i : i + 1, strip] for i, name in enumerate(plan.query_names)}  # [1, s]
        mask = scores.score_mask(plan, q, k, shape) if partial else None
        for g in range(plan.group):
            first = j * plan.group + g
            head = query_head(plan, block, first)
            part = slice(g * plan.block_q + r, g * plan.block_q + r + plan.strip)
            bias = scores.bias_tile(plan, x.get("bias"), first, (r, c))
            bias = None if bias is None else bias.astype(jnp.float32).T
            s, slope = scores.tile_scores(plan, scalars, block, head, raw[:, part], q, k, bias, buffer)  # [c, s]
            s = s if mask is None else mask(s)
            lse, delta = (x[name][0, 0, pl.ds(first, 1), strip] for name in ("lse", "delta"))  # [1, s]
            p = jnp.exp2(s - (lse + scores.alibi_offset(scalars, block, head, q)) * scores.LOG2_E)
            d, dropped = dp[:, part], p
            if "seeds" in scalars:
                survives = scores.dropout_mask(plan, scalars, block, head, (r, c), shape, key_axis=0)
                dropped = jnp.where(survives, p, 0.0)
                d = jnp.where(survives, d * (1 / (1 - plan.options.dropout)), 0.0)
            ds = p * (d - delta)
            tiles[g, r] = dropped, ds if slope is None or not products else ds * slope
    both = zip(*(tiles[i] for i in sorted(tiles)), strict=True)
    dropped, ds = (jnp.concatenate(parts, axis=1) for parts in both)
    return dropped, ds


def of_group(plan: TpuPlan, x: Any, j: Any) -> jax.Array:
    """The rows of the j-th group of heads, [g·q, width], of a reference to a block [1, 1, G, q, width]."""
    return x[0, 0, pl.ds(j * plan.group, plan.group)].reshape(plan.group * plan.block_q, -1)


def by_spans(plan: TpuPlan, operands: Operands, rows: Named, span: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `backward`, for `span` keys at a time, so that their gradients fit into VMEM. The spans' gradients of the
    queries are summed in float32."""
    S = operands.key.shape[1]
    if span >= S:
        return backward(plan, operands, rows, 0, operands.query.dtype)

    def part(x, first):
        return jax.lax.dynamic_slice_in_dim(x, first, span, axis=1)

    def add_span(dquery, first):
        o = dataclasses.replace(
            operands,
            key=part(operands.key, first),
            value=part(operands.value, first),
            key_streams={name: part(s, first) for name, s in operands.key_streams.items()},
            bias=None if operands.bias is None else jax.lax.dynamic_slice_in_dim(operands.bias, first, span, axis=3),
        )
        # Without the barrier XLA lets the kernel copy these gradients into those of all spans: VMEM then holds them
        # twice.
        more, dkey, dvalue = jax.lax.optimization_barrier(backward(plan, o, rows, first, jnp.float32))
        return dquery + more, (dkey, dvalue)

    zeros = jnp.zeros(layout.by_head(operands.query, plan.heads).shape, jnp.float32)
    dquery, parts = jax.lax.scan(add_span, zeros, jnp.arange(0, S, span))
    dkey, dvalue = (jnp.moveaxis(x, 0, 2).reshape(*x.shape[1:3], S, -1) for x in parts)  # from [spans, B, K, span, C]
    return dquery, dkey, dvalue
