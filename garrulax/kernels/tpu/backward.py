"""The backward pass: one kernel that computes every block's probabilities once, for all three gradients.

It walks the forward pass's rows. The gradients of a row's queries are carried along; those of the keys and values
stay in VMEM for a whole span of keys and are copied out at the end of a batch row. Tiles are keys by queries, so that
what belongs to a query lies along lanes.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from garrulax.kernels.call import Operands
from garrulax.kernels.tpu import plan as plans
from garrulax.kernels.tpu import scores
from garrulax.kernels.tpu.forward import each_group, either
from garrulax.kernels.tpu.plan import Arrays, Place, Plan
from garrulax.kernels.tpu.schedule import CLOSES, FIRST, LAST, OPENS, PARTIAL


def backward(
    plan: Plan, operands: Operands, rows: Arrays, first_key: Any, dtype: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of query [B, K, G, T, C] in dtype, and of key [B, K, S, C] and value [B, K, S, Cv] in float32.

    rows: `cotangent` [B, K, G, T, Cv], `lse` and `delta` [B, K, G, T].
    """
    x = plans.arrays(plan, operands) | rows
    scalars, count = plans.scheduled(plan, operands, plans.scalars(plan, operands, first_key))
    K, G = x["query"].shape[1:3]
    out = {
        "dquery": jax.ShapeDtypeStruct(x["query"].shape, dtype),
        "dkey": jax.ShapeDtypeStruct(x["key"].shape, jnp.float32),
        "dvalue": jax.ShapeDtypeStruct(x["value"].shape, jnp.float32),
    }
    anywhere = {name: pl.BlockSpec(memory_space=pl.ANY) for name in ("dkey", "dvalue")}
    scratch = {
        "dquery": pltpu.VMEM((G * plan.block_q, x["query"].shape[-1]), jnp.float32),
        "dkey": pltpu.VMEM(x["key"].shape[2:], jnp.float32),
        "dvalue": pltpu.VMEM(x["value"].shape[2:], jnp.float32),
    }
    if "steps" in scalars:
        scratch["steps"] = pltpu.VMEM((plan.chunk, plan.strip), jnp.float32)
    y = plans.launch(
        functools.partial(_kernel, plan),
        "attention_backward",
        plan,
        (K, count),
        1,
        (scalars, x, plans.specs(plan, x, plans.listed)),
        (out, plans.specs(plan, {"dquery": out["dquery"]}, plans.listed) | anywhere),
        scratch,
    )
    return y["dquery"], y["dkey"] * plan.options.scale, y["dvalue"] / (1 - plan.options.dropout)


def _kernel(plan: Plan, scalars: Arrays, x: Arrays, y: Arrays, carry: Arrays) -> None:
    head, step = pl.program_id(0), pl.program_id(1)
    word, place = scalars["words"][step], plans.listed(head, step, scalars)

    @pl.when((word & OPENS) != 0)
    def start_of_batch_row():
        carry["dkey"][...] = jnp.zeros_like(carry["dkey"])
        carry["dvalue"][...] = jnp.zeros_like(carry["dvalue"])

    @pl.when((word & FIRST) != 0)
    def start():
        carry["dquery"][...] = jnp.zeros_like(carry["dquery"])

    either(plan, (word & PARTIAL) != 0, functools.partial(_block, plan, scalars, x, carry, place))

    @pl.when((word & LAST) != 0)
    def finish():
        dquery = carry["dquery"][...] * plan.options.scale
        y["dquery"][0, 0] = dquery.reshape(y["dquery"].shape[2:]).astype(y["dquery"].dtype)

    @pl.when((word & CLOSES) != 0)
    def finish_batch_row():
        for name in ("dkey", "dvalue"):
            pltpu.sync_copy(carry[name], y[name].at[place.batch, place.head])


def _block(plan: Plan, scalars: Arrays, x: Arrays, carry: Arrays, place: Place, partial: bool) -> None:
    def group(j):
        rows = pl.ds(j * plan.group * plan.block_q, plan.group * plan.block_q)
        query, cotangent = (of_group(plan, x[name], j) for name in ("query", "cotangent"))
        for c in range(0, plan.block_k, plan.chunk):
            p, ds = tile(plan, scalars, x, place, j, c, partial, carry.get("steps"))
            ds = ds.astype(query.dtype)
            keys = pl.ds(place.column * plan.block_k + c, plan.chunk)
            carry["dvalue"][keys] += plan.dot(p.astype(query.dtype), cotangent, (1, 0))
            carry["dkey"][keys] += plan.dot(ds, query, (1, 0))
            carry["dquery"][rows] += plan.dot(ds, x["key"][0, 0, pl.ds(c, plan.chunk)], (0, 0))

    each_group(plan, group)


def tile(
    plan: Plan, scalars: Arrays, x: Arrays, place: Place, j: Any, c: int, partial: bool, buffer: Any,
    products: bool = True,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Probabilities after dropout, times 1 - its rate, and the gradient of the scores (of the scaled products, if
    `products`, else of what is added to them), float32 [chunk, group * block_q], of group j of heads and the chunk of
    keys from c on."""
    keys = pl.ds(c, plan.chunk)
    columns = x["key_streams"][0, :, keys].T
    k = {name: columns[:, i : i + 1] for i, name in enumerate(plan.key_names)}
    shape = (plan.chunk, plan.strip)
    raw = plan.dot(x["key"][0, 0, keys], of_group(plan, x["query"], j), (1, 1))
    dp = plan.dot(x["value"][0, 0, keys], of_group(plan, x["cotangent"], j), (1, 1))
    tiles: dict[tuple[int, int], tuple[jax.Array, jax.Array]] = {}
    for r in range(0, plan.block_q, plan.strip):
        strip = pl.ds(r, plan.strip)
        q = {name: x["query_streams"][0, i : i + 1, strip] for i, name in enumerate(plan.query_names)}
        masked = scores.masking(plan, q, k, shape) if partial else None
        for g in range(plan.group):
            first = j * plan.group + g
            head = place.head * plan.heads + first
            part = slice(g * plan.block_q + r, g * plan.block_q + r + plan.strip)
            bias = scores.bias_tile(plan, x.get("bias"), first, (r, c))
            bias = None if bias is None else bias.astype(jnp.float32).T
            s, slope = scores.scored(plan, scalars, place, head, raw[:, part], q, k, bias, buffer)
            s = s if masked is None else masked(s)
            lse, delta = (x[name][0, 0, pl.ds(first, 1), strip] for name in ("lse", "delta"))
            p = jnp.exp2(s - (lse + scores.tilt(scalars, place, head, q)) * scores.LOG2_E)
            d, dropped = dp[:, part], p
            if "seeds" in scalars:
                kept = scores.kept(plan, scalars, place, head, (r, c), shape, key_axis=0)
                dropped, d = jnp.where(kept, p, 0.0), jnp.where(kept, d * (1 / (1 - plan.options.dropout)), 0.0)
            ds = p * (d - delta)
            tiles[g, r] = dropped, ds if slope is None or not products else ds * slope
    both = zip(*(tiles[i] for i in sorted(tiles)), strict=True)
    dropped, ds = (jnp.concatenate(parts, axis=1) for parts in both)
    return dropped, ds


def of_group(plan: Plan, x: Any, j: Any) -> jax.Array:
    """[group * block_q, width] of a reference to a block [1, 1, heads, block_q, width]."""
    return x[0, 0, pl.ds(j * plan.group, plan.group)].reshape(plan.group * plan.block_q, -1)


def by_spans(plan: Plan, operands: Operands, rows: Arrays, span: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `backward`, `span` keys at a time: gradients of all keys would not fit into VMEM."""
    S = operands.key.shape[1]
    if span >= S:
        return backward(plan, operands, rows, 0, operands.query.dtype)

    def part(x, first):
        return jax.lax.dynamic_slice_in_dim(x, first, span, axis=1)

    def one(dquery, first):
        o = dataclasses.replace(
            operands,
            key=part(operands.key, first),
            value=part(operands.value, first),
            key_streams={name: part(s, first) for name, s in operands.key_streams.items()},
            bias=None if operands.bias is None else jax.lax.dynamic_slice_in_dim(operands.bias, first, span, axis=3),
        )
        more, dkey, dvalue = backward(plan, o, rows, first, jnp.float32)
        return dquery + more, (dkey, dvalue)

    none = jnp.zeros(plans.by_head(operands.query, operands.key.shape[2]).shape, jnp.float32)
    dquery, parts = jax.lax.scan(one, none, jnp.arange(0, S, span))
    dkey, dvalue = (jnp.moveaxis(x, 0, 2).reshape(*x.shape[1:3], S, -1) for x in parts)
    return dquery, dkey, dvalue
