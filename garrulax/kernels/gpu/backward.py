"""The backward pass on Hopper (sm_90a): two kernels, deterministic because no two programs add to the same gradient.
Both compute the products of queries and keys, and of cotangents and values, anew: seven products a pair of blocks,
where five would do if gradients of queries were added up in global memory."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from garrulax.kernels.blocks import pad_axis, pad_to_blocks
from garrulax.kernels.call import EMPTY_ROW_LSE, Gradients, Operands, Options
from garrulax.kernels.gpu import backward_keys, backward_queries
from garrulax.kernels.gpu.rows import rows
from garrulax.kernels.gpu.scores import LOG2E


def backward(
    kernel: Any, options: Options, operands: Operands, lse: jax.Array, delta: jax.Array, cotangent: jax.Array
) -> Gradients:
    """As `passes.ForwardBackward.backward`, for bfloat16 or float16 operands; the kernel says only whether it is
    interpreted."""
    (T, C), (S, Cv) = operands.query.shape[1::2], operands.value.shape[1::2]
    wide = _padded(operands, -C % 16, -Cv % 16)
    widths = wide.query.shape[3], wide.value.shape[3]
    plans = [module.plan(options, *widths) for module in (backward_keys, backward_queries)]
    options, full = pad_to_blocks(
        options, wide, *(math.lcm(*(getattr(p, side) for p in plans)) for side in ("queries", "keys"))
    )
    more = full.query.shape[1] - T
    lse = jnp.pad(lse, ((0, 0), (0, 0), (0, more)), constant_values=EMPTY_ROW_LSE) * LOG2E
    delta = pad_axis(delta, more, 2)
    cotangent = pad_axis(pad_axis(cotangent.astype(operands.query.dtype), -Cv % 16, 3), more)
    results = []
    for module, plan in zip((backward_keys, backward_queries), plans, strict=True):
        shape = (full.query.shape[0], full.query.shape[1] // plan.queries, full.key.shape[1] // plan.keys)
        lists = rows(
            options.rule,
            full.query_streams,
            full.key_streams,
            plan.queries,
            plan.keys,
            shape,
            by_key=module is backward_keys,
        )
        results.append(module.gradients(options, full, lists, lse, delta, cotangent, plan, kernel.interpret))
    (dk, dv), dq = results
    return Gradients(dq[:, :T, :, :C], dk[:, :S, :, :C], dv[:, :S, :, :Cv])


def _padded(operands: Operands, width: int, value_width: int) -> Operands:
    """The request with so much wider heads: zeros change no product."""
    return dataclasses.replace(
        operands,
        query=pad_axis(operands.query, width, 3),
        key=pad_axis(operands.key, width, 3),
        value=pad_axis(operands.value, value_width, 3),
    )
