"""Attention made differentiable from two passes: what all kernels share around the loops over blocks."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from garrulax.kernels.call import NOTHING, Gradients, Operands, Options
from garrulax.kernels.parts import with_sinks


class TwoPasses:
    """An implementation of a forward and a backward pass, which see no sinks: those are put on afterwards.

    Residuals are the operands, the output and lse; the last two carry the checkpoint names `attention_out` and
    `attention_lse`, for remat policies that save them.

    partitioned: whether XLA can split it over a mesh in Auto mode, which it can no Pallas kernel.
    """

    partitioned = False

    def unsupported_reason(self, options: Options, operands: Operands) -> str | None:
        """Why it cannot compute this request (operands may be abstract), or None where it can."""
        raise TypeError(f"{type(self).__name__} must define unsupported_reason()")

    def forward(self, options: Options, operands: Operands) -> tuple[jax.Array, jax.Array]:
        """Output [B, T, H, Cv] in the query's dtype, and lse, the natural logarithm of the sum of the exponentials of
        each row's scores, [B, H, T] in at least float32. A query that sees nothing gets output 0 and lse -inf."""
        raise TypeError(f"{type(self).__name__} must define forward()")

    def backward(
        self, options: Options, operands: Operands, lse: jax.Array, delta: jax.Array, cotangent: jax.Array
    ) -> Gradients:
        """Gradients for the cotangent [B, T, H, Cv] of the output.

        lse: [B, H, T], `NOTHING` for queries that see nothing.
        delta: sum of output * cotangent over the width, [B, H, T] in lse's dtype.
        With p = exp(score - lse), the gradient of the scores is p * (cotangent·value - delta).
        """
        raise TypeError(f"{type(self).__name__} must define backward()")

    def __call__(self, options: Options, operands: Operands) -> jax.Array:
        """Output [B, T, H, Cv] in the query's dtype, differentiable; 0 where a query sees nothing."""
        return _attention(self, options, operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(passes: TwoPasses, options: Options, operands: Operands) -> jax.Array:
    return forward(passes, options, operands)[0]


def forward(passes: TwoPasses, options: Options, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """Output and lse as of `TwoPasses.forward`, with the sinks in both."""
    sinks, operands = operands.sinks, dataclasses.replace(operands, sinks=None)
    out, lse = _folding(lambda x: passes.forward(options, x))(operands)
    return with_sinks(out, lse, sinks)


def backward(
    passes: TwoPasses, options: Options, operands: Operands, out: jax.Array, lse: jax.Array, cotangent: jax.Array
) -> Operands:
    """Cotangents of the operands for that of the output; out and lse as of `forward`."""
    delta = jnp.einsum("BTHC,BTHC->BHT", out, cotangent, preferred_element_type=lse.dtype)
    sinks = operands.sinks
    bare = dataclasses.replace(operands, sinks=None)

    def run(bare, lse, delta, cotangent):
        return passes.backward(options, bare, lse, delta, cotangent)

    known = jnp.where(jnp.isneginf(lse), NOTHING, lse)
    gradients = _folding(run)(bare, known, delta, cotangent)
    result = jax.tree.map(no_gradient, operands)
    if sinks is not None:
        share = jnp.exp(sinks.astype(lse.dtype)[:, None] - known)
        result = dataclasses.replace(result, sinks=-jnp.sum(share * delta, axis=(0, 2)).astype(sinks.dtype))
    return dataclasses.replace(result, **{name: x for name, x in gradients._asdict().items() if x is not None})


def _attention_forward(passes, options, operands):
    out, lse = forward(passes, options, operands)
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return out, (operands, out, lse)


def _attention_backward(passes, options, residuals, cotangent):
    operands, out, lse = residuals
    return (backward(passes, options, operands, out, lse, cotangent),)


_attention.defvjp(_attention_forward, _attention_backward)


def no_gradient(x: jax.Array) -> Any:
    """The cotangent of what no gradient is taken of."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.zeros_like(x)
    return np.zeros(x.shape, jax.dtypes.float0)


def _folding(f: Any) -> Any:
    """f(operands, *arrays with a batch axis), for which `vmap` puts its axis into the batch axis: kernels have a
    schedule a batch row, which JAX's own rule for them cannot batch."""
    g = jax.custom_batching.custom_vmap(f)

    @g.def_vmap
    def rule(size, batched, *arguments):
        operands, batched = arguments[0], tuple(batched)
        if operands.steps is not None or batched[0].slopes:  # one table for all rows of a call
            result = jax.lax.map(lambda i: g(*_taken(arguments, batched, i)), jnp.arange(size))
            return result, jax.tree.map(lambda _: True, result)
        batch = operands.query.shape[1] if batched[0].query else operands.query.shape[0]
        folded = jax.tree.map(lambda x, b: _fold(x, b, size), arguments, batched)
        if operands.bias is not None:
            bias = operands.bias if batched[0].bias else jnp.broadcast_to(operands.bias, (size, *operands.bias.shape))
            bias = jnp.broadcast_to(bias, (size, batch, *bias.shape[2:])).reshape(-1, *bias.shape[2:])
            folded = (dataclasses.replace(folded[0], bias=bias), *folded[1:])
        if operands.slopes is not None:
            folded = (dataclasses.replace(folded[0], slopes=operands.slopes), *folded[1:])
        result = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), g(*folded))
        rows = operands.bias is not None and operands.bias.shape[1 if batched[0].bias else 0]
        if isinstance(result, Gradients) and result.bias is not None and rows == 1:
            result = result._replace(bias=result.bias.sum(axis=1, keepdims=True))
        return result, jax.tree.map(lambda _: True, result)

    return g


def _taken(tree, batched, i):
    return jax.tree.map(lambda x, b: x[i] if b else x, tree, batched)


def _fold(x, batched, size):
    """[N·B, ...] of x [N, B, ...], or of [B, ...], which is then the same for all."""
    x = x if batched else jnp.broadcast_to(x, (size, *x.shape))
    return x.reshape(-1, *x.shape[2:])
