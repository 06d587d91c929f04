"""Attention of one chunk of queries over one chunk of keys, and its gradients: the loop bodies of `kernels.xla`.

Letters besides the usual ones: b batch rows, t queries and s keys of the chunk, G = H / K query heads per key head.
Heads come before tokens here: query [b, H, t, C], key [b, K, s, C]. Every product is then one batched product of
matrices, [b·K, G·t, C] by [b·K, s, C]; XLA:CPU copies operands whose axes are in any other order.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from garrulax.core.dtypes import at_least_float32
from garrulax.kernels import dropout
from garrulax.kernels.call import Gradients, LogSumExp, Operands, Options

INDEX = "index of the token"  # int32 stream of queries and keys, there if the request has dropout, which hashes it


class PartialSoftmax(NamedTuple):
    """Attention over some of the keys, before the division: the state of an online softmax, in at least float32.

    Attributes:
        weighted: [b, H, t, Cv], the sum of exp(score - top) * value.
        total: [b, H, t], the sum of exp(score - top).
        top: [b, H, t], the greatest score; -inf for a query that attends to none of the keys.
    """

    weighted: jax.Array
    total: jax.Array
    top: jax.Array


class GradientInputs(NamedTuple):
    """Arrays of a chunk of queries that its backward pass reads for every chunk of keys.

    Attributes:
        lse: [b, H, t], with `top` = inf for a query that is to add no gradient.
        delta: [b, H, t], sum of output * cotangent over the width.
        cotangent: Of the output, [b, H, t, Cv].
        transposed: The queries [b·K, C, G·t] and the cotangent [b·K, Cv, G·t], for the gradients of keys and values.
    """

    lse: LogSumExp
    delta: jax.Array
    cotangent: jax.Array
    transposed: tuple[jax.Array, jax.Array]


def empty_softmax(operands: Operands) -> PartialSoftmax:
    """Attention over no keys."""
    shape = operands.query.shape[:3]
    dtype = at_least_float32(operands.query.dtype)
    weighted = jnp.zeros((*shape, operands.value.shape[-1]), dtype)
    return PartialSoftmax(weighted, jnp.zeros(shape, dtype), jnp.full(shape, -jnp.inf, dtype))


def mask_of(options: Options, operands: Operands) -> jax.Array:
    """The mask of the chunk: bool, broadcastable to [b, 1, t, s], True where the query may attend to the key."""
    query = {name: stream[:, None, :, None] for name, stream in operands.query_streams.items()}
    key = {name: stream[:, None, None, :] for name, stream in operands.key_streams.items()}
    return options.rule.evaluate(query, key)


def partial_softmax(options: Options, operands: Operands, mask: jax.Array | None) -> PartialSoftmax:
    """Attention over the chunk's keys. mask: of `mask_of`, or None if every query attends to every key."""
    o = operands
    x, _ = _scores(options, o, mask)  # [b, H, t, s]
    top = x.max(axis=-1)
    p = jnp.exp(x - _finite(top)[..., None])
    value = _clear_unseen(o.value, mask, o.query.shape[2])
    weighted = _product(_dropped(p, options, o).astype(value.dtype), value, 1)  # [b, H, t, Cv]
    return PartialSoftmax(weighted, p.sum(axis=-1), top)


def _clear_unseen(value: jax.Array, mask: jax.Array | None, queries: int) -> jax.Array:
    """The values [b, K, s, Cv] with 0 for keys that no query of the chunk attends to, such as padding.

    They may be NaN, and a probability of 0 times NaN is NaN. A few queries over many keys are left out: there the copy
    of the values would cost as much as the product, and a cache has no NaN in its empty slots.
    """
    if mask is None or mask.ndim < 4 or 4 * queries < value.shape[2]:
        return value
    return jnp.where(mask.any(axis=2)[..., None], value, jnp.zeros_like(value))


def merge(x: PartialSoftmax, y: PartialSoftmax) -> PartialSoftmax:
    """Attention over the keys of both: each is rescaled to the common maximum."""
    top = jnp.maximum(x.top, y.top)
    a, b = (jnp.exp(z.top - _finite(top)) for z in (x, y))
    return PartialSoftmax(x.weighted * a[..., None] + y.weighted * b[..., None], x.total * a + y.total * b, top)


def normalise(state: PartialSoftmax) -> tuple[jax.Array, LogSumExp]:
    """Output [b, H, t, Cv] and lse [b, H, t]; 0 and -inf for a query that attends to no key."""
    total = jnp.where(state.total == 0, 1, state.total)
    return state.weighted / total[..., None], LogSumExp(state.top, jnp.log(total))


def gradient_inputs(query: jax.Array, K: int, lse: LogSumExp, delta: jax.Array, cotangent: jax.Array) -> GradientInputs:
    """`GradientInputs` of queries [b, H, t, C] over K key heads."""
    # The barrier makes XLA transpose once for all chunks of keys instead of within each product.
    transposed = jax.lax.optimization_barrier(tuple(_by_key_head(x, K).swapaxes(1, 2) for x in (query, cotangent)))
    return GradientInputs(lse, delta, cotangent, transposed)


def gradients(options: Options, operands: Operands, inputs: GradientInputs, mask: jax.Array | None) -> Gradients:
    """The chunk's contributions to the gradients, in at least float32.

    The gradients of key and value are transposed, [b, K, C, s] and [b, K, Cv, s]: they are products of the transposed
    queries [C, t] and the scores' gradients [t, s]. The usual order would transpose the scores' gradients instead,
    which are the larger array and make the product several times slower on XLA:CPU.

    Args:
        options: Static part of the request.
        operands: The chunk's queries and keys.
        inputs: Further arrays of the queries.
        mask: Of `mask_of`, or None if every query attends to every key.
    """
    o, cotangent = operands, inputs.cotangent
    x, slope = _scores(options, o, mask)  # [b, H, t, s]
    # A score exceeds lse only by rounding, which is large where scores are: the minimum keeps p at most 1.
    p = jnp.exp(jnp.minimum(x - inputs.lse.top[..., None] - inputs.lse.rest[..., None], 0))
    dp = _dropped(_product(cotangent, o.value, 2), options, o)
    ds = p * (dp - inputs.delta[..., None])  # of the scores, after the soft-cap
    d_product = (ds * (slope * options.scale)).astype(o.query.dtype)  # of query·key
    dropped = _dropped(p, options, o).astype(cotangent.dtype)
    K = o.key.shape[1]
    key, value = (
        _dot(x, _by_key_head(y, K), 1).reshape(len(y), K, -1, y.shape[-1])  # [b, K, C, s], [b, K, Cv, s]
        for x, y in zip(inputs.transposed, (d_product, dropped), strict=True)
    )
    return Gradients(
        _product(d_product, o.key, 1),  # [b, H, t, C]
        key,
        value,
        None if o.bias is None else _sum_to(ds, o.bias.shape),
        None if o.steps is None else _steps_gradient(ds, options.starts, o),
    )


def _scores(options: Options, o: Operands, mask: jax.Array | None) -> tuple[jax.Array, jax.Array | float]:
    """Scores [b, H, t, s], -inf where masked, and the derivative of the soft-cap at each."""
    x = _product(o.query, o.key, 2) * options.scale
    slope: jax.Array | float = 1.0
    if options.softcap is not None:
        x = jnp.tanh(x / options.softcap)
        x, slope = options.softcap * x, 1 - x * x
    if o.bias is not None:
        x += o.bias.astype(x.dtype)
    if o.slopes is not None:
        x += o.slopes.astype(x.dtype)[None, :, None, None] * _distance(o).astype(x.dtype)
    if o.steps is not None:
        x += _step(o.steps.astype(x.dtype), options.starts, _distance(o))
    return x if mask is None else jnp.where(mask, x, -jnp.inf), slope


def _distance(o: Operands) -> jax.Array:
    """Key position - query position, int32 [b, 1, t, s]."""
    return o.key_streams["position"][:, None, None, :] - o.query_streams["position"][:, None, :, None]


def _step(steps: jax.Array, starts: tuple[int, ...], distance: jax.Array) -> jax.Array:
    """The step of each distance, [b, H, t, s]. XLA:CPU vectorises these comparisons; it does not vectorise a gather."""
    x = steps[0][None, :, None, None]
    for start, step in zip(starts, steps[1:], strict=True):
        x = jnp.where(distance >= start, step[None, :, None, None], x)
    return x


def _steps_gradient(ds: jax.Array, starts: tuple[int, ...], o: Operands) -> jax.Array:
    """Gradient of the steps, [len(starts) + 1, H]: the sum of ds over the pairs of each step.

    One step after the other: all at once would need an array of [steps, b, H, t, s].
    """
    distance, limits = _distance(o), jnp.array(starts, jnp.int32)
    int32 = jnp.iinfo(jnp.int32)
    low = jnp.concatenate([jnp.array([int32.min], jnp.int32), limits])
    high = jnp.concatenate([limits - 1, jnp.array([int32.max], jnp.int32)])

    def one_step(limits):
        return jnp.where((distance >= limits[0]) & (distance <= limits[1]), ds, 0).sum(axis=(0, 2, 3))

    return jax.lax.map(one_step, (low, high))


def _dropped(x: jax.Array, options: Options, o: Operands) -> jax.Array:
    """x [b, H, t, s] after dropout."""
    if o.seeds is None:
        return x
    index = o.query_streams[INDEX][:, None, :, None], o.key_streams[INDEX][:, None, None, :]
    keep = dropout.keep_mask(o.seeds[:, :, None, None], *index, options.dropout)
    return jnp.where(keep, x / (1 - options.dropout), 0)


def _product(x: jax.Array, y: jax.Array, axis: int) -> jax.Array:
    """[b, H, t, n]: the last axis of x [b, H, t, m] contracted with one of y [b, K, s, C]: s (axis 1) or C (axis 2)."""
    out = _dot(_by_key_head(x, y.shape[1]), y.reshape(-1, *y.shape[2:]), axis)
    return out.reshape(*x.shape[:3], out.shape[-1])


def _dot(x: jax.Array, y: jax.Array, axis: int) -> jax.Array:
    """Batched matrix product in at least float32: axis 2 of x [n, ., .] contracted with an axis of y [n, ., .]."""
    dtype = at_least_float32(x.dtype, y.dtype)
    return jax.lax.dot_general(x, y, (((2,), (axis,)), ((0,), (0,))), preferred_element_type=dtype)


def _by_key_head(x: jax.Array, K: int) -> jax.Array:
    """[b·K, G·t, C] from x [b, H, t, C]: the queries of all heads that read one key head become rows of one matrix."""
    return x.reshape(x.shape[0] * K, -1, x.shape[-1])


def _sum_to(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """x summed over the axes that have size 1 in `shape`."""
    axes = tuple(i for i in range(4) if shape[i] == 1 != x.shape[i])
    return x.sum(axis=axes, keepdims=True)


def _finite(top: jax.Array) -> jax.Array:
    """The maximum to subtract from scores: 0 instead of -inf, so that a masked row gives exp(-inf) = 0, not NaN."""
    return jnp.where(jnp.isneginf(top), 0, top)
