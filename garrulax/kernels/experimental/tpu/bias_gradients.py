"""Gradients of terms that are added to scores: dense biases, and T5's bias in steps of distance.

Each has a kernel that computes the blocks once more. A program that does not use the gradient, such as one with a
constant bias, drops the call and does not pay for it. Letters of shapes: see `layout`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from garrulax.kernels.call import Operands
from garrulax.kernels.experimental.tpu import layout, scores
from garrulax.kernels.experimental.tpu.backward import tile_gradients
from garrulax.kernels.experimental.tpu.forward import each_group, full_or_partial
from garrulax.kernels.experimental.tpu.layout import LANES, SUBLANES, BlockIndex, Named, TpuPlan
from garrulax.kernels.experimental.tpu.schedule import PARTIAL

_ACTIVE = 1  # flag of a block that has to be computed; the other is PARTIAL


def bias_gradient(plan: TpuPlan, operands: Operands, bias: jax.Array, rows: Named) -> jax.Array:
    """Gradient of a dense bias, float32 in its shape.

    The grid is all blocks (batch, part, row, column), since every block of the gradient has to be written. The axes
    along which the bias is broadcast are moved to the end: the steps that add to one block of the gradient then follow
    one another, and the pipeline keeps that block in VMEM until the sum is complete.

    Args:
        plan: Of the call.
        operands: Of a request of whole blocks.
        bias: The operands' bias.
        rows: As in `backward.backward`.
    """
    x = layout.kernel_arrays(plan, operands) | rows
    active, full = layout.block_activity(plan, operands)
    flags = jnp.where(active, jnp.where(full, _ACTIVE, _ACTIVE | PARTIAL), 0)  # [B, rows, columns]
    shape = x["bias"].shape
    B, N = x["query"].shape[:2]
    sizes = (B, N, flags.shape[1], flags.shape[2])
    # Sizes of the bias along the axes of the grid; 0 for the columns, along which it is never broadcast.
    own = [i for i, n in enumerate((*shape[:2], shape[3], 0)) if n != 1 or sizes[i] == 1]
    order = own + [i for i in range(4) if i not in own]

    def block(*grid):
        indices = dict(zip(order, grid[:4], strict=True))
        return BlockIndex(*(indices[i] for i in range(4)))

    scalars = {"work": flags, **layout.kernel_scalars(plan, operands)}
    out = {"dbias": jax.ShapeDtypeStruct(shape, jnp.float32)}
    y = layout.launch(
        functools.partial(_bias_kernel, plan, block, range(len(own), 4)),
        "attention_bias_gradient",
        plan,
        tuple(sizes[i] for i in order),
        len(own),
        (scalars, x, layout.block_specs(plan, x, block)),
        (out, layout.block_specs(plan, out, block)),
        {"step_bias": pltpu.VMEM((plan.chunk, plan.strip), jnp.float32)},
    )
    return y["dbias"].reshape(bias.shape)


def _bias_kernel(
    plan: TpuPlan,
    block: Callable[..., BlockIndex],
    summed: range,
    scalars: Named,
    x: Named,
    y: Named,
    carry: Named,
) -> None:
    """block: the block of the grid's indices. summed: axes of the grid along which the bias is broadcast."""
    at = block(*(pl.program_id(i) for i in range(4)))
    out = y["dbias"]
    first = jnp.asarray(True)
    for axis in summed:
        first &= pl.program_id(axis) == 0

    @pl.when(first)
    def start():
        out[...] = jnp.zeros_like(out)

    def body(partial):
        def group(j):
            for c in range(0, plan.block_k, plan.chunk):
                _, ds = tile_gradients(plan, scalars, x, at, j, c, partial, carry["step_bias"], products=False)
                for g in range(plan.group):
                    head = j * plan.group + g if out.shape[2] > 1 else 0
                    part = ds[:, g * plan.block_q : (g + 1) * plan.block_q].T  # [q, c], from [c, q]
                    if out.shape[3] == 1:
                        part = part.sum(axis=0, keepdims=True)
                    out[0, 0, head, :, pl.ds(c, plan.chunk)] += part

        each_group(plan, group)

    flags = scalars["work"][at.batch, at.row, at.column]
    pl.when(flags != 0)(lambda: full_or_partial(plan, flags != _ACTIVE, body))


def steps_gradient(plan: TpuPlan, operands: Operands, steps: jax.Array, rows: Named) -> jax.Array:
    """Gradient of T5's bias in steps of distance, float32 [N, H].

    The sums of a step stay apart for each of the 128 lanes and are added up by XLA: a sum across lanes in every tile
    would cost more.

    Args:
        plan: Of the call.
        operands: Of a request of whole blocks.
        steps: The operands' steps [N, H].
        rows: As in `backward.backward`.
    """
    x = layout.kernel_arrays(plan, operands) | rows
    scalars, count = layout.with_schedule(plan, operands, layout.kernel_scalars(plan, operands))
    N, H = steps.shape
    parts = x["query"].shape[1]
    shape = (parts, plan.heads, N + -N % SUBLANES, LANES)
    y = layout.launch(
        functools.partial(_steps_kernel, plan),
        "attention_steps_gradient",
        plan,
        (parts, count),
        1,
        (scalars, x, layout.block_specs(plan, x, layout.scheduled_block)),
        (
            {"dsteps": jax.ShapeDtypeStruct(shape, jnp.float32)},
            {"dsteps": pl.BlockSpec((1, *shape[1:]), lambda head, step, s: (head, 0, 0, 0))},
        ),
        {"step_bias": pltpu.VMEM((plan.chunk, plan.strip), jnp.float32)},
    )
    return y["dsteps"].sum(axis=3).reshape(H, -1)[:, :N].T


def _steps_kernel(plan: TpuPlan, scalars: Named, x: Named, y: Named, carry: Named) -> None:
    head, step = pl.program_id(0), pl.program_id(1)
    block = layout.scheduled_block(head, step, scalars)
    low, high = scores.step_range(scalars, block)
    out, starts, buffer = y["dsteps"], scalars["starts"], carry["step_bias"]

    @pl.when(step == 0)
    def start():
        out[...] = jnp.zeros_like(out)

    def add(head, i, ds):
        """Adds a tile [c, s] to step i of a head, [1, 128]."""
        sums = ds.sum(axis=0, keepdims=True)
        parts = [sums[:, n : n + LANES] for n in range(0, plan.strip, LANES)]
        out[0, head, pl.ds(i, 1)] += sum(parts[1:], parts[0])

    def body(partial):
        def group(j):
            for c in range(0, plan.block_k, plan.chunk):
                _, ds = tile_gradients(plan, scalars, x, block, j, c, partial, buffer, products=False)
                key = x["key_streams"][0, :, pl.ds(c, plan.chunk)].T[:, plan.key_names.index("position")][:, None]
                for r in range(0, plan.group * plan.block_q, plan.strip):
                    buffer[...] = ds[:, r : r + plan.strip]  # [c, s]
                    g, line = divmod(r, plan.block_q)
                    query = x["query_streams"][0, pl.ds(plan.query_names.index("position"), 1), pl.ds(line, plan.strip)]
                    distance = key - query

                    # Pairs whose distance lies in step i; every distance of the block is in one from low to high.
                    def one(i, _, g=g, distance=distance):
                        above = (i == low) | (distance >= starts[jnp.maximum(i - 1, 0)])
                        below = (i == high) | (distance < starts[jnp.minimum(i, starts.shape[0] - 1)])
                        add(j * plan.group + g, i, jnp.where(above & below, buffer[...], 0.0))

                    jax.lax.fori_loop(low, high + 1, one, None)

        each_group(plan, group)

    full_or_partial(plan, (scalars["words"][step] & PARTIAL) != 0, body)
