"""Gradients of requests with a bias in which scores are large, for kernels that keep lse as one float32 number.

The backward passes compute probabilities again, as exp(score - lse). A bias of -1e9 over a whole row, as in additive
masks, leaves no digits of such an lse for the logarithm of the number of keys. These rows are rare: only if a batch has
one, XLA computes the lse again, in two parts (`LogSumExp`).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from garrulax.kernels.call import EMPTY_ROW_LSE, Gradients, LogSumExp, Operands, Options
from garrulax.kernels.xla import Chunked

LARGE = 2.0**10  # rounding an lse of this size changes probabilities by a factor of at most 1 + 2**-14


def backward_by_xla(
    options: Options, operands: Operands, lse: LogSumExp, delta: jax.Array, cotangent: jax.Array
) -> Gradients:
    """The gradients of XLA's implementation, for the rounded lse of a kernel; as `passes.ForwardBackward.backward`."""
    large = _large(lse)

    def again():
        return jax.tree.map(lambda x, y: jnp.where(large, x, y), Chunked().forward(options, operands)[1], lse)

    lse = jax.lax.cond(large.any(), again, lambda: lse)
    return Chunked().backward(options, operands, lse, delta, cotangent)


def backward_or_xla(
    backward: Callable[..., Gradients],
    options: Options,
    operands: Operands,
    lse: LogSumExp,
    delta: jax.Array,
    cotangent: jax.Array,
) -> Gradients:
    """The gradients of a kernel's backward pass, or those of XLA where the lse of a query is large.

    Args:
        backward: The kernel's backward pass; it takes the following arguments.
        options: Static part of the request.
        operands: Arrays of the request.
        lse: [B, H, T], rounded.
        delta: [B, H, T].
        cotangent: Of the output, [B, T, H, Cv].
    """
    arguments = options, operands, lse, delta, cotangent
    return jax.lax.cond(_large(lse).any(), lambda: backward_by_xla(*arguments), lambda: backward(*arguments))


def _large(lse: LogSumExp) -> jax.Array:
    """Of which queries lse is large; False for queries that attend to no key."""
    return (jnp.abs(lse.top) > LARGE) & (lse.top != EMPTY_ROW_LSE)
