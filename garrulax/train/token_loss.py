"""The training loss of the tokens of a batch, without the logits of all of them.

The logits are computed for a chunk of tokens at a time. Where gradients are wanted, those for the hidden states and for
the head are computed at once, from the logits of the chunk; the backward pass multiplies them by one number. So no
product is computed twice, and neither the logits of a batch nor their gradient ever exist.

Letters: N tokens, C of a chunk, D width of the hidden states, V vocabulary, P the vocabulary with its padding.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from garrulax.core.dtypes import at_least_float32
from garrulax.core.einsum import einsum
from garrulax.core.leaf import Leaf
from garrulax.core.sharding import is_explicit
from garrulax.kernels import picking
from garrulax.train.regularizers import Regularizers

CHUNK_LOGITS = 1 << 28  # logits that exist at a time: 512 MiB in bfloat16, 1 GiB in float32
#: On GPUs a vocabulary is padded to a multiple of this. Rows of an odd length are not aligned in memory, and products
#: that read or write them take two to four times as long.
ALIGNED = 128
LEAST_PADDED = 8 * ALIGNED  # of a smaller vocabulary the padding would be a large part


def supported(x: jax.Array, head: Any) -> bool:
    """Whether `weighted_loss` is for these operands: a plain head, and no mesh of several devices.

    On such a mesh the logits are split over it, in the vocabulary too; chunks of tokens would be gathered.
    """
    mesh = jax.typeof(x).sharding.mesh
    return not isinstance(head, Leaf) and (mesh.empty or mesh.size == 1)


def weighted_loss(
    x: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, extra: Regularizers
) -> jax.Array:
    """The sum over tokens of weight times loss: negative log-likelihood (nats), z-loss and label smoothing.

    Args:
        x: Hidden states [B, T, D].
        head: [V, D]; the logits are the products of x with its rows.
        targets: int32 [B, T].
        weights: [B, T], in at least float32.
        extra: Terms of the loss.

    Returns:
        A scalar in the dtype of the weights.
    """

    def run(x, head, targets, weights):
        return _weighted_loss(x.reshape(-1, x.shape[-1]), head, targets.reshape(-1), weights.reshape(-1), extra)

    if is_explicit(jax.typeof(x).sharding.mesh):  # of one device
        run = jax.sharding.auto_axes(run, out_sharding=P())
    return run(x, head, targets, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _weighted_loss(x, head, targets, weights, extra):
    padded = _padded(x, head)

    def chunk(_, part):
        x, targets = part
        logits = einsum("ND,VD->NV", x, padded)
        return None, _losses(logits, _softmax(logits, len(head)), targets, len(head), extra)

    _, losses = _over_chunks(chunk, None, len(padded), (x, targets))
    return jnp.sum(losses * weights)


def _forward(x, head, targets, weights, extra):
    trained = head.perturbed
    x, head, targets, weights = (argument.value for argument in (x, head, targets, weights))
    padded, wide = _padded(x, head), at_least_float32(x.dtype)
    # Slopes are rounded to the dtype of x: with weights of at most 1 none is too large or too small for float16.
    scale = jnp.max(jnp.abs(weights), initial=jnp.finfo(weights.dtype).tiny)

    def chunk(total, part):
        x, targets, weights = part
        logits = einsum("ND,VD->NV", x, padded)
        softmax = _softmax(logits, len(head))
        losses = _losses(logits, softmax, targets, len(head), extra)
        slope = _slope(softmax, targets, weights / scale, len(head), extra).astype(x.dtype)
        dx = _product(slope, padded, 1)
        return (total + _product(slope, x, 0) if trained else None), (losses, dx)

    zero = jnp.zeros(padded.shape, wide) if trained else None
    dhead, (losses, dx) = _over_chunks(chunk, zero, len(padded), (x, targets, weights))
    return jnp.sum(losses * weights), (dx, dhead, losses, scale, jnp.zeros((), x.dtype), head)


def _backward(extra, residuals, cotangent):
    dx, dhead, losses, scale, like_x, head = residuals
    factor = cotangent * scale
    if dhead is not None:
        dhead = (factor * dhead[: len(head)]).astype(head.dtype)
    return (factor * dx).astype(like_x.dtype), dhead, None, cotangent * losses


_weighted_loss.defvjp(_forward, _backward, symbolic_zeros=True)


def _padded(x: jax.Array, head: jax.Array) -> jax.Array:
    """The head [P, D] in x's dtype; P is V but on GPUs."""
    rows = -len(head) % ALIGNED
    on_gpu = picking.platform(picking.target_device((x, head))) == "gpu"
    head = head.astype(x.dtype)
    if rows == 0 or len(head) < LEAST_PADDED or not on_gpu:
        return head
    return jnp.pad(head, ((0, rows), (0, 0)))


def _over_chunks(chunk: Callable, carry: Any, width: int, arrays: tuple[jax.Array, ...]) -> tuple[Any, Any]:
    """`lax.scan` of a function over chunks of tokens; its results again have an axis of all tokens.

    A batch is cut into as few chunks of equal size as `CHUNK_LOGITS` allows, up to twice as many if these need no
    padding.
    """
    tokens = len(arrays[0])
    least = max(1, -(-tokens * width // CHUNK_LOGITS))
    count = next((n for n in range(least, 2 * least) if tokens % n == 0), least)
    if count == 1:
        return chunk(carry, arrays)
    size = -(-tokens // count)

    def cut(x):
        x = jnp.pad(x, ((0, count * size - tokens), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(count, size, *x.shape[1:])

    carry, results = jax.lax.scan(chunk, carry, jax.tree.map(cut, arrays))
    return carry, jax.tree.map(lambda x: x.reshape(count * size, *x.shape[2:])[:tokens], results)


class _Softmax(NamedTuple):
    """The softmax of a chunk: exponentials [C, P] of the logits less their maximum, sums [C] and log-sum-exps [C]."""

    exponentials: jax.Array
    sums: jax.Array
    lse: jax.Array


def _softmax(logits: jax.Array, vocab: int) -> _Softmax:
    wide = _without_padding(logits.astype(at_least_float32(logits.dtype)), vocab, -jnp.inf)
    top = jnp.max(wide, axis=-1)
    top = jnp.where(jnp.isfinite(top), top, 0)
    exponentials = jnp.exp(wide - top[:, None])
    sums = jnp.sum(exponentials, axis=-1)
    return _Softmax(exponentials, sums, jnp.log(sums) + top)


def _losses(logits: jax.Array, softmax: _Softmax, targets: jax.Array, vocab: int, extra: Regularizers) -> jax.Array:
    """The loss [C] of each token."""
    smoothing, lse = extra.label_smoothing, softmax.lse
    known = (targets >= 0) & (targets < vocab)
    chosen = jnp.take_along_axis(logits, jnp.where(known, targets, 0)[:, None], axis=1)[:, 0]
    losses = lse - (1 - smoothing) * jnp.where(known, chosen, 0).astype(lse.dtype)
    if smoothing:
        real = _without_padding(logits.astype(lse.dtype), vocab, 0)
        losses = losses - smoothing / vocab * jnp.sum(real, axis=-1)
    if extra.z_loss:
        losses = losses + extra.z_loss * jnp.square(lse)
    return losses


def _slope(softmax: _Softmax, targets: jax.Array, weights: jax.Array, vocab: int, extra: Regularizers) -> jax.Array:
    """The derivative [C, P] of the weighted loss by the logits; 0 at the padding."""
    smoothing, (exponentials, sums, lse) = extra.label_smoothing, softmax
    is_target = _ids(exponentials, targets.dtype) == targets[:, None]
    labels = jnp.where(is_target, 1 - smoothing, jnp.zeros_like(exponentials))
    if smoothing:
        labels = labels + _without_padding(jnp.full_like(exponentials, smoothing / vocab), vocab, 0)
    factor = weights * (1 + 2 * extra.z_loss * lse) / sums
    return factor[:, None] * exponentials - weights[:, None] * labels


def _without_padding(x: jax.Array, vocab: int, fill: float) -> jax.Array:
    """x [C, P] with `fill` at the padding."""
    return x if x.shape[1] == vocab else jnp.where(_ids(x, jnp.int32) < vocab, x, fill)


def _ids(x: jax.Array, dtype: Any) -> jax.Array:
    return jax.lax.broadcasted_iota(dtype, (1, x.shape[1]), 1)


def _product(slope: jax.Array, other: jax.Array, contracted: int) -> jax.Array:
    """The sum over the vocabulary (1) or the tokens (0), in at least float32."""
    dimensions = (((contracted,), (0,)), ((), ()))
    return jax.lax.dot_general(slope, other, dimensions, preferred_element_type=at_least_float32(slope.dtype))
