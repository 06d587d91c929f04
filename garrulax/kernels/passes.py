"""Differentiable attention from a forward and a backward pass: everything that kernels share around their loops.

Written once here: the derivative (`jax.custom_vjp`), learned sinks, `vmap`, and the names by which remat policies can
save the output.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from garrulax.kernels.call import EMPTY_ROW_LSE, Gradients, LogSumExp, Operands, Options
from garrulax.kernels.parts import with_sinks


class ForwardBackward(abc.ABC):
    """An implementation of attention given by its forward and its backward pass.

    The passes never get sinks (`operands.sinks` is None): sinks are added to their results.
    The residuals are the operands, the output, lse and `lists`. The last three carry the checkpoint names
    `attention_out`, `attention_lse` and `attention_lists`, so that remat policies can save them.

    Attributes:
        auto_partitionable: Whether XLA can split it over a mesh in Auto mode. It cannot split a Pallas kernel.
    """

    auto_partitionable = False

    @abc.abstractmethod
    def unsupported_reason(self, options: Options, operands: Operands) -> str | None:
        """Why it cannot compute this request (the operands may be abstract), or None where it can."""

    @abc.abstractmethod
    def forward(self, options: Options, operands: Operands) -> tuple[jax.Array, LogSumExp]:
        """The forward pass.

        Returns:
            The output [B, T, H, Cv] in the query's dtype, and lse [B, H, T] in at least float32: the natural logarithm
            of the sum of exp(score) over the keys of each query. A query that attends to no key gets output 0 and lse
            -inf.
        """

    @abc.abstractmethod
    def backward(
        self, options: Options, operands: Operands, lse: LogSumExp, delta: jax.Array, cotangent: jax.Array
    ) -> Gradients:
        """The backward pass.

        With p = exp(score - lse), the gradient of a score is p * (cotangent·value - delta).

        Args:
            options: Static part of the request.
            operands: Arrays of the request.
            lse: [B, H, T], with `EMPTY_ROW_LSE` as `top` for queries that attend to no key.
            delta: Sum of output * cotangent over the width, [B, H, T] in the dtype of lse.
            cotangent: Of the output, [B, T, H, Cv].

        Returns:
            The gradients of the operands.
        """

    def lists(self, options: Options, operands: Operands) -> Any:
        """Arrays that the implementation computes from the mask streams alone, such as lists of blocks to visit.

        It is called where gradients are wanted. Both passes then find its result in `operands.lists`. The result has
        the checkpoint name `attention_lists`: if a remat policy saves it, XLA computes it once for all layers that have
        the same streams. What the backward pass computes again, XLA does not share between layers, because
        `jax.checkpoint` puts optimization barriers around it.

        Returns:
            A tree of arrays whose first axis is the batch; None where the implementation needs nothing.
        """
        return None

    def __call__(self, options: Options, operands: Operands) -> jax.Array:
        """Output [B, T, H, Cv] in the query's dtype, differentiable; 0 for a query that attends to no key."""
        return _attention(self, options, operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(passes: ForwardBackward, options: Options, operands: Operands) -> jax.Array:
    return forward(passes, options, operands)[0]


def forward(passes: ForwardBackward, options: Options, operands: Operands) -> tuple[jax.Array, LogSumExp]:
    """Output and lse of `ForwardBackward.forward`, with the sinks in both."""
    sinks, operands = operands.sinks, dataclasses.replace(operands, sinks=None)
    out, lse = _vmap_as_batch(lambda x: passes.forward(options, x))(operands)
    return with_sinks(out, lse, sinks)


def backward(
    passes: ForwardBackward,
    options: Options,
    operands: Operands,
    out: jax.Array,
    lse: LogSumExp,
    cotangent: jax.Array,
) -> Operands:
    """Cotangents of all operands.

    Args:
        passes: The implementation.
        options: Static part of the request.
        operands: Arrays of the request.
        out: Output of `forward`, [B, T, H, Cv].
        lse: Of `forward`, [B, H, T].
        cotangent: Of the output, [B, T, H, Cv].

    Returns:
        Operands that hold the cotangent of each operand; zeros for operands that are not learned.
    """
    delta = jnp.einsum("BTHC,BTHC->BHT", out, cotangent, preferred_element_type=lse.top.dtype)  # [B, H, T]
    sinks = operands.sinks
    without_sinks = dataclasses.replace(operands, sinks=None)

    def run(operands, lse, delta, cotangent):
        return passes.backward(options, operands, lse, delta, cotangent)

    finite_lse = lse._replace(top=jnp.where(jnp.isneginf(lse.top), EMPTY_ROW_LSE, lse.top))
    gradients = _vmap_as_batch(run)(without_sinks, finite_lse, delta, cotangent)
    result = jax.tree.map(zero_cotangent, dataclasses.replace(operands, lists=None))
    if sinks is not None:
        # A sink is a key with value 0: of p * (cotangent·value - delta) only -p * delta is left.
        p = jnp.exp(sinks.astype(delta.dtype)[:, None] - finite_lse.top - finite_lse.rest)  # [B, H, T]
        result = dataclasses.replace(result, sinks=-jnp.sum(p * delta, axis=(0, 2)).astype(sinks.dtype))
    return dataclasses.replace(result, **{name: x for name, x in gradients._asdict().items() if x is not None})


@jax.custom_jvp
def _differentiated_once(operands: Operands) -> Operands:
    """The operands. Only a second derivative differentiates this; JAX's own error for it does not name attention."""
    return operands


@_differentiated_once.defjvp
def _refuse(primals, tangents):
    raise NotImplementedError(
        "attention has first derivatives only: for second ones (grad of grad, Hessians) give "
        'attention(..., implementation="dense"), the formula with all scores in memory'
    )


def _attention_forward(passes, options, operands):
    operands = _differentiated_once(operands)
    lists = checkpoint_name(passes.lists(options, operands), "attention_lists")
    operands = dataclasses.replace(operands, lists=lists)
    out, lse = forward(passes, options, operands)
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return out, (operands, out, lse)


def _attention_backward(passes, options, residuals, cotangent):
    operands, out, lse = residuals
    return (backward(passes, options, operands, out, lse, cotangent),)


_attention.defvjp(_attention_forward, _attention_backward)


def zero_cotangent(x: jax.Array) -> Any:
    """The zero cotangent of x: zeros of its dtype, or `float0`, which JAX requires for integers."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.zeros_like(x)
    return np.zeros(x.shape, jax.dtypes.float0)


def _vmap_as_batch(f: Callable) -> Callable:
    """f(operands, *arrays), with a rule for `jax.vmap`: N mapped calls of batch B become one call of batch N·B.

    JAX's own rule would add a grid axis to the Pallas kernels in `f`, which does not work: their block schedule is
    computed for the batch rows of one call. Every operand has a batch axis, with three exceptions:

    - `slopes` [H] and `steps` [n, H] belong to all rows of a call. Slopes that are not mapped are passed on. For mapped
      slopes, and for any steps (their gradient is a sum over the rows of one call), the calls are made one by one.
    - `bias` may have a batch axis of size 1. It is expanded to N·B rows, and its gradient summed over B again.
    """
    batched_f = jax.custom_batching.custom_vmap(f)

    @batched_f.def_vmap
    def rule(size, mapped, operands, *arrays):
        arguments, mapped = (operands, *arrays), tuple(mapped)
        of = mapped[0]  # for every operand whether it is mapped: its shape is then [N, ...]
        if operands.steps is not None or of.slopes:
            result = jax.lax.map(
                lambda i: batched_f(*_example(arguments, mapped, i)), jnp.arange(size, dtype=jnp.int32)
            )
            return result, jax.tree.map(lambda _: True, result)
        batch = operands.query.shape[1 if of.query else 0]
        folded = jax.tree.map(lambda x, is_mapped: _fold(x, is_mapped, size), arguments, mapped)
        if operands.bias is not None:
            bias = _fold_bias(operands.bias, of.bias, size, batch)
            folded = (dataclasses.replace(folded[0], bias=bias), *folded[1:])
        if operands.slopes is not None:
            folded = (dataclasses.replace(folded[0], slopes=operands.slopes), *folded[1:])
        result = batched_f(*folded)  # every array [N·B, ...]
        result = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), result)  # [N, B, ...]
        shared_bias = operands.bias is not None and operands.bias.shape[1 if of.bias else 0] == 1
        if isinstance(result, Gradients) and result.bias is not None and shared_bias:
            result = result._replace(bias=result.bias.sum(axis=1, keepdims=True))  # [N, 1, ...]
        return result, jax.tree.map(lambda _: True, result)

    return batched_f


def _example(tree: Any, mapped: Any, i: jax.Array) -> Any:
    """The arguments of mapped call i."""
    return jax.tree.map(lambda x, is_mapped: x[i] if is_mapped else x, tree, mapped)


def _fold(x: jax.Array, mapped: bool, size: int) -> jax.Array:
    """[N·B, ...] from x [N, B, ...], or from x [B, ...], which is then repeated N times."""
    x = x if mapped else jnp.broadcast_to(x, (size, *x.shape))
    return x.reshape(-1, *x.shape[2:])


def _fold_bias(bias: jax.Array, mapped: bool, size: int, batch: int) -> jax.Array:
    """[N·B, ...] from a bias [N, B or 1, ...] or [B or 1, ...]."""
    bias = bias if mapped else jnp.broadcast_to(bias, (size, *bias.shape))
    return jnp.broadcast_to(bias, (size, batch, *bias.shape[2:])).reshape(-1, *bias.shape[2:])
