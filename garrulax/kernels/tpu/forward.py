"""The forward pass: a row of blocks after another, with the softmax carried along in base 2."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from garrulax.kernels.call import Operands
from garrulax.kernels.mask import All
from garrulax.kernels.tpu import plan as plans
from garrulax.kernels.tpu import scores
from garrulax.kernels.tpu.plan import LANES, Arrays, Place, Plan
from garrulax.kernels.tpu.schedule import FIRST, LAST, PARTIAL

_LN_2 = 1 / scores.LOG2_E


def forward(plan: Plan, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """Output [B, K, G, T, Cv] and lse [B, K, G, T], both filled up."""
    x = plans.arrays(plan, operands)
    scalars, count = plans.scheduled(plan, operands, plans.scalars(plan, operands))
    B, K, G, T, _ = x["query"].shape
    width, rows = x["value"].shape[-1], G * plan.block_q
    out = {
        "output": jax.ShapeDtypeStruct((B, K, G, T, width), operands.query.dtype),
        "lse": jax.ShapeDtypeStruct((B, K, G, T), jnp.float32),
    }
    scratch = {
        "top": pltpu.VMEM((rows, LANES), jnp.float32),
        "total": pltpu.VMEM((rows, LANES), jnp.float32),
        "output": pltpu.VMEM((rows, width), jnp.float32),
    }
    if plan.query_names:
        scratch["query_streams"] = pltpu.VMEM((len(plan.query_names), plan.block_q, LANES), jnp.int32)
    if "steps" in scalars:
        scratch["steps"] = pltpu.VMEM((plan.strip, plan.chunk), jnp.float32)
    y = plans.launch(
        functools.partial(_kernel, plan),
        "attention_forward",
        plan,
        (K, count),
        1,
        (scalars, x, plans.specs(plan, x, plans.listed)),
        (out, plans.specs(plan, out, plans.listed)),
        scratch,
    )
    return y["output"], y["lse"]


def _kernel(plan: Plan, scalars: Arrays, x: Arrays, y: Arrays, carry: Arrays) -> None:
    head, step = pl.program_id(0), pl.program_id(1)
    word, place = scalars["words"][step], plans.listed(head, step, scalars)

    @pl.when((word & FIRST) != 0)
    def start():
        carry["top"][...] = jnp.full_like(carry["top"], scores.LOWEST)
        carry["total"][...] = jnp.zeros_like(carry["total"])
        carry["output"][...] = jnp.zeros_like(carry["output"])
        columns = x["query_streams"][0].T
        for i in range(len(plan.query_names)):
            carry["query_streams"][i] = jnp.broadcast_to(columns[:, i : i + 1], (plan.block_q, LANES))

    either(plan, (word & PARTIAL) != 0, functools.partial(_block, plan, scalars, x, carry, place))
    pl.when((word & LAST) != 0)(functools.partial(_finish, plan, scalars, x, y, carry, place))


def _block(plan: Plan, scalars: Arrays, x: Arrays, carry: Arrays, place: Place, partial: bool) -> None:
    """One block of pairs, a group of heads and a chunk of keys at a time."""

    def group(j):
        first = j * plan.group
        rows = pl.ds(first * plan.block_q, plan.group * plan.block_q)
        query = x["query"][0, 0, pl.ds(first, plan.group)].reshape(plan.group * plan.block_q, -1)
        for c in range(0, plan.block_k, plan.chunk):
            keys = pl.ds(c, plan.chunk)
            products = plan.dot(query, x["key"][0, 0, keys], (1, 1))
            s, kept = _scores(plan, scalars, x, carry, place, partial, first, c, products)
            top = carry["top"][rows]
            new = jnp.maximum(top, s.max(axis=1, keepdims=True))
            p = jnp.exp2(s - _spread(new, plan.chunk))
            faded = jnp.exp2(top - new)
            carry["top"][rows] = new
            carry["total"][rows] = faded * carry["total"][rows] + p.sum(axis=1, keepdims=True)
            if kept is not None:
                p = jnp.where(kept, p, 0.0)
            value = x["value"][0, 0, keys]
            output = carry["output"][rows]
            output = output * _spread(faded, output.shape[1]) + plan.dot(p.astype(value.dtype), value, (1, 0))
            carry["output"][rows] = output

    each_group(plan, group)


def _scores(
    plan: Plan, scalars: Arrays, x: Arrays, carry: Arrays, place: Place, partial: bool, first: Any, c: int,
    products: jax.Array,
) -> tuple[jax.Array, jax.Array | None]:  # fmt: skip
    """Scores of a group of heads from `first` on, and which of their probabilities dropout keeps."""
    k = {name: x["key_streams"][0, i : i + 1, pl.ds(c, plan.chunk)] for i, name in enumerate(plan.key_names)}
    shape = (plan.strip, plan.chunk)
    tiles, kept = {}, {}
    for r in range(0, plan.block_q, plan.strip):
        lines = pl.ds(r, plan.strip)
        q = {name: _spread(carry["query_streams"][i, lines], plan.chunk) for i, name in enumerate(plan.query_names)}
        masked = scores.masking(plan, q, k, shape) if partial else None
        for g in range(plan.group):
            head = place.head * plan.heads + first + g
            tile = products[g * plan.block_q + r : g * plan.block_q + r + plan.strip]
            bias = scores.bias_tile(plan, x.get("bias"), first + g, (r, c))
            tile, _ = scores.scored(plan, scalars, place, head, tile, q, k, bias, carry.get("steps"))
            tiles[g, r] = tile if masked is None else masked(tile)
            if "seeds" in scalars:
                kept[g, r] = scores.kept(plan, scalars, place, head, (r, c), shape, key_axis=1)
    return _joined(tiles), _joined(kept) if kept else None


def _joined(tiles: dict[tuple[int, int], jax.Array]) -> jax.Array:
    return jnp.concatenate([tiles[i] for i in sorted(tiles)])


def _finish(plan: Plan, scalars: Arrays, x: Arrays, y: Arrays, carry: Arrays, place: Place) -> None:
    """Writes a row of blocks: what its queries that saw nothing gathered is not theirs."""
    q = {name: x["query_streams"][0, i : i + 1, :] for i, name in enumerate(plan.query_names)}

    def one(g):
        rows = pl.ds(g * plan.block_q, plan.block_q)
        top, total, output = (carry[name][rows] for name in ("top", "total", "output"))
        empty = top <= scores.LOWEST / 2
        total = jnp.where(empty, 1.0, total)
        share = jnp.where(empty, 0.0, 1 / (total * (1 - plan.options.dropout)))
        y["output"][0, 0, g] = (output * _spread(share, output.shape[1])).astype(y["output"].dtype)
        lse = jnp.where(empty, -jnp.inf, top * _LN_2 + jnp.log(total)).T[:1]
        head = place.head * plan.heads + g
        y["lse"][0, 0, pl.ds(g, 1)] = lse - scores.tilt(scalars, place, head, q)

    each(plan.heads, one)


def either(plan: Plan, partial: jax.Array, body: Callable[[bool], None]) -> None:
    """body(False), or where the block is partial body(True); where everybody attends there is no such body."""
    if plan.options.rule == All():
        body(False)
    else:
        pl.when(~partial)(functools.partial(body, False))
        pl.when(partial)(functools.partial(body, True))


def each_group(plan: Plan, body: Any) -> None:
    """body(0), body(1), ...: the groups of a key/value head's query heads."""
    each(plan.heads // plan.group, body)


def each(count: int, body: Any) -> None:
    """body(0), ..., body(count - 1), as a loop of the kernel's where they are many."""
    if count <= 4:
        for i in range(count):
            body(i)
    else:
        jax.lax.fori_loop(0, count, lambda i, _: body(i), None)


def _spread(x: jax.Array, width: int) -> jax.Array:
    """[rows, width] of x [rows, 128], whose lanes are all the same."""
    return jnp.tile(x, (1, width // LANES))
