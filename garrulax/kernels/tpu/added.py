"""Gradients of what is added to scores: dense biases and T5's steps. Kernels of their own, which compute the blocks
once more: a program that does not ask for these gradients drops them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from garrulax.kernels.call import Operands
from garrulax.kernels.tpu import plan as plans
from garrulax.kernels.tpu import scores
from garrulax.kernels.tpu.backward import tile
from garrulax.kernels.tpu.forward import each_group, either
from garrulax.kernels.tpu.plan import LANES, SUBLANES, Arrays, Place, Plan
from garrulax.kernels.tpu.schedule import PARTIAL


def bias_gradient(plan: Plan, operands: Operands, bias: jax.Array, rows: Arrays) -> jax.Array:
    """Gradient of the operands' bias, float32 in its shape. rows: as of `backward.backward`.

    The grid has all blocks, those that share a block of the bias one after another: it is summed up in VMEM.
    """
    x = plans.arrays(plan, operands) | rows
    some, every = plans.activity(plan, operands)
    work = jnp.where(some, jnp.where(every, 1, 1 | PARTIAL), 0)
    shape = x["bias"].shape
    B, K = x["query"].shape[:2]
    sizes = (B, K, work.shape[1], work.shape[2])
    kept = [i for i, n in enumerate((*shape[:2], shape[3], 0)) if n != 1 or sizes[i] == 1]
    order = kept + [i for i in range(4) if i not in kept]

    def place(*grid):
        indices = dict(zip(order, grid[:4], strict=True))
        return Place(*(indices[i] for i in range(4)))

    scalars = {"work": work, **plans.scalars(plan, operands)}
    out = {"dbias": jax.ShapeDtypeStruct(shape, jnp.float32)}
    scratch = {"steps": pltpu.VMEM((plan.chunk, plan.strip), jnp.float32)}
    y = plans.launch(
        functools.partial(_bias_kernel, plan, place, range(len(kept), 4)),
        "attention_bias_gradient",
        plan,
        tuple(sizes[i] for i in order),
        len(kept),
        (scalars, x, plans.specs(plan, x, place)),
        (out, plans.specs(plan, out, place)),
        scratch,
    )
    return y["dbias"].reshape(bias.shape)


def _bias_kernel(plan: Plan, place: Any, summed: range, scalars: Arrays, x: Arrays, y: Arrays, carry: Arrays) -> None:
    p = place(*(pl.program_id(i) for i in range(4)))
    out = y["dbias"]
    fresh = jnp.asarray(True)
    for axis in summed:
        fresh &= pl.program_id(axis) == 0

    @pl.when(fresh)
    def start():
        out[...] = jnp.zeros_like(out)

    def body(partial):
        def group(j):
            for c in range(0, plan.block_k, plan.chunk):
                _, ds = tile(plan, scalars, x, p, j, c, partial, carry["steps"], products=False)
                for g in range(plan.group):
                    head = j * plan.group + g if out.shape[2] > 1 else 0
                    part = ds[:, g * plan.block_q : (g + 1) * plan.block_q].T
                    if out.shape[3] == 1:
                        part = part.sum(axis=0, keepdims=True)
                    out[0, 0, head, :, pl.ds(c, plan.chunk)] += part

        each_group(plan, group)

    work = scalars["work"][p.batch, p.row, p.column]
    pl.when(work != 0)(lambda: either(plan, work != 1, body))


def steps_gradient(plan: Plan, operands: Operands, steps: jax.Array, rows: Arrays) -> jax.Array:
    """Gradient of the operands' steps [N, H], float32. rows: as of `backward.backward`."""
    x = plans.arrays(plan, operands) | rows
    scalars, count = plans.scheduled(plan, operands, plans.scalars(plan, operands))
    N, H = steps.shape
    K = x["query"].shape[1]
    shape = (K, plan.heads, N + -N % SUBLANES, LANES)
    y = plans.launch(
        functools.partial(_steps_kernel, plan),
        "attention_steps_gradient",
        plan,
        (K, count),
        1,
        (scalars, x, plans.specs(plan, x, plans.listed)),
        (
            {"dsteps": jax.ShapeDtypeStruct(shape, jnp.float32)},
            {"dsteps": pl.BlockSpec((1, *shape[1:]), lambda head, step, s: (head, 0, 0, 0))},
        ),
        {"steps": pltpu.VMEM((plan.chunk, plan.strip), jnp.float32)},
    )
    return y["dsteps"].sum(axis=3).reshape(H, -1)[:, :N].T


def _steps_kernel(plan: Plan, scalars: Arrays, x: Arrays, y: Arrays, carry: Arrays) -> None:
    head, step = pl.program_id(0), pl.program_id(1)
    place = plans.listed(head, step, scalars)
    low, high = scores.steps_met(scalars, place)
    out, starts = y["dsteps"], scalars["starts"]

    @pl.when(step == 0)
    def start():
        out[...] = jnp.zeros_like(out)

    def add(head, i, ds):
        lanes = ds.sum(axis=0, keepdims=True)
        parts = [lanes[:, n : n + LANES] for n in range(0, plan.strip, LANES)]
        out[0, head, pl.ds(i, 1)] += sum(parts[1:], parts[0])

    def body(partial):
        def group(j):
            for c in range(0, plan.block_k, plan.chunk):
                _, ds = tile(plan, scalars, x, place, j, c, partial, carry["steps"], products=False)
                key = x["key_streams"][0, :, pl.ds(c, plan.chunk)].T[:, plan.key_names.index("position")][:, None]
                for r in range(0, plan.group * plan.block_q, plan.strip):
                    carry["steps"][...] = ds[:, r : r + plan.strip]
                    g, line = divmod(r, plan.block_q)
                    query = x["query_streams"][0, pl.ds(plan.query_names.index("position"), 1), pl.ds(line, plan.strip)]
                    distance = key - query

                    def one(i, _, g=g, distance=distance):
                        above = (i == low) | (distance >= starts[jnp.maximum(i - 1, 0)])
                        below = (i == high) | (distance < starts[jnp.minimum(i, starts.shape[0] - 1)])
                        add(j * plan.group + g, i, jnp.where(above & below, carry["steps"][...], 0.0))

                    jax.lax.fori_loop(low, high + 1, one, None)

        each_group(plan, group)

    either(plan, (scalars["words"][step] & PARTIAL) != 0, body)
