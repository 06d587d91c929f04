"""The backward pass on Hopper (sm_90a): one kernel for keys and values, one for queries.

No two programs add to the same gradient, so that results are the same bits in every run. The price: both kernels
compute the products query·key and cotangent·value. That makes seven products a pair of blocks, where five would do if
programs added up the gradients of queries in global memory, in an order that changes from run to run.
"""

import math

import jax
import jax.numpy as jnp

from garrulax.kernels.blocks import pad_axis, pad_to_blocks
from garrulax.kernels.call import EMPTY_ROW_LSE, Gradients, Operands, Options
from garrulax.kernels.gpu import backward_keys, backward_queries
from garrulax.kernels.gpu.block_lists import BlockLists, lists_of
from garrulax.kernels.gpu.products import pad_widths
from garrulax.kernels.gpu.scores import LOG2E

_KERNELS = backward_keys, backward_queries
_Plan = backward_keys.KeysPlan | backward_queries.QueriesPlan


def backward_lists(options: Options, operands: Operands) -> tuple[BlockLists, ...]:
    """The blocks that each of the two kernels visits. The arguments are those of `backward`."""
    return _lists(*_plan(options, operands))


def _plan(options: Options, operands: Operands) -> tuple[list[_Plan], Options, Operands]:
    """The plans of the two kernels, and the request padded to whole blocks of both."""
    wide = pad_widths(operands)
    plans = [module.plan(options, wide.query.shape[3], wide.value.shape[3]) for module in _KERNELS]
    sizes = (math.lcm(*(getattr(p, side) for p in plans)) for side in ("queries", "keys"))
    return plans, *pad_to_blocks(options, wide, *sizes)


def _lists(plans: list[_Plan], options: Options, full: Operands) -> tuple[BlockLists, ...]:
    return tuple(
        lists_of(options, full, plan.queries, plan.keys, by_key=module is backward_keys)
        for module, plan in zip(_KERNELS, plans, strict=True)
    )


def backward(
    options: Options,
    operands: Operands,
    lse: jax.Array,
    delta: jax.Array,
    cotangent: jax.Array,
    interpret: bool,
) -> Gradients:
    """The gradients of queries, keys and values, for operands in bfloat16 or float16.

    Args:
        options: The static part of the request.
        operands: Of any lengths and widths, without a bias and steps.
        lse: float32 [B, H, T], natural logarithm.
        delta: float32 [B, H, T].
        cotangent: [B, T, H, Cv], of the output.
        interpret: Whether the kernels are interpreted.
    """
    (T, C), (S, Cv) = operands.query.shape[1::2], operands.value.shape[1::2]
    plans, options, full = _plan(options, operands)
    more = full.query.shape[1] - T
    # The queries added get an lse so large that their probabilities are 0.
    lse = jnp.pad(lse, ((0, 0), (0, 0), (0, more)), constant_values=EMPTY_ROW_LSE) * LOG2E
    delta = pad_axis(delta, more, 2)
    cotangent = pad_axis(pad_axis(cotangent.astype(operands.query.dtype), -Cv % 16, 3), more)
    results = []
    known = _lists(plans, options, full) if operands.lists is None else operands.lists.backward
    for module, plan, lists in zip(_KERNELS, plans, known, strict=True):
        results.append(module.gradients(options, full, lists, lse, delta, cotangent, plan, interpret))
    (dk, dv), dq = results
    return Gradients(dq[:, :T, :, :C], dk[:, :S, :, :C], dv[:, :S, :, :Cv])
