"""Attention of a chunk of queries over a chunk of keys, and its gradients: what the loops of `xla` are made of.

Letters beside the usual ones: b batch rows, t queries and s keys of the chunk. Heads stand before tokens here, query
[b, H, t, C] and key [b, K, s, C], so that every product is one batched product of matrices, [b·K, G·t, C] with
[b·K, s, C]: XLA:CPU copies the operands of any other form.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from garrulax.kernels import dropout
from garrulax.kernels.call import Gradients, Operands, Options

INDEX = "index of the token"  # int32 stream of both sides where there is dropout, which depends on it


class State(NamedTuple):
    """Attention over some of the keys, in at least float32.

    out: [b, H, t, Cv], values weighted with exp(score - top). total: [b, H, t], the sum of the weights.
    top: [b, H, t], the greatest score; -inf for a query that has seen nothing.
    """

    out: jax.Array
    total: jax.Array
    top: jax.Array


class Pull(NamedTuple):
    """What the backward pass knows of the queries: lse and delta [b, H, t], cotangent of the output [b, H, t, Cv];
    and the queries and the cotangent turned, [b·K, C, G·t], as the gradients of the keys and values need them."""

    lse: jax.Array
    delta: jax.Array
    cotangent: jax.Array
    turned: tuple[jax.Array, jax.Array]


def nothing(operands: Operands) -> State:
    """Attention over no keys."""
    shape = operands.query.shape[:3]
    dtype = jnp.promote_types(operands.query.dtype, jnp.float32)
    out = jnp.zeros((*shape, operands.value.shape[-1]), dtype)
    return State(out, jnp.zeros(shape, dtype), jnp.full(shape, -jnp.inf, dtype))


def seen(options: Options, operands: Operands) -> jax.Array:
    """Which query sees which key: bool, broadcastable to [b, 1, t, s]."""
    query = {name: stream[:, None, :, None] for name, stream in operands.query_streams.items()}
    key = {name: stream[:, None, None, :] for name, stream in operands.key_streams.items()}
    return options.rule.evaluate(query, key)


def attend(options: Options, operands: Operands, seen: jax.Array | None) -> State:
    """Attention over the chunk's keys. seen: as of `seen`; None where every query sees every key."""
    o = operands
    x, _ = _scores(options, o, seen)
    top = x.max(axis=-1)
    p = jnp.exp(x - _finite(top)[..., None])
    out = _product(_dropped(p, options, o).astype(o.value.dtype), o.value, 1)
    return State(out, p.sum(axis=-1), top)


def join(x: State, y: State) -> State:
    """Attention over the keys of both."""
    top = jnp.maximum(x.top, y.top)
    a, b = (jnp.exp(z.top - _finite(top)) for z in (x, y))
    return State(x.out * a[..., None] + y.out * b[..., None], x.total * a + y.total * b, top)


def finish(state: State) -> tuple[jax.Array, jax.Array]:
    """Output [b, H, t, Cv], 0 for a query that has seen nothing, and lse [b, H, t], which is then -inf."""
    return state.out / jnp.where(state.total == 0, 1, state.total)[..., None], state.top + jnp.log(state.total)


def pull(query: jax.Array, K: int, lse: jax.Array, delta: jax.Array, cotangent: jax.Array) -> Pull:
    """What the backward pass knows of queries [b, H, t, C], for K heads of keys."""
    turned = jax.lax.optimization_barrier(tuple(_merged(x, K).swapaxes(1, 2) for x in (query, cotangent)))
    return Pull(lse, delta, cotangent, turned)


def pull_back(options: Options, operands: Operands, pull: Pull, seen: jax.Array | None) -> Gradients:
    """What the chunk adds to the gradients of its operands, in at least float32 and in their shapes, but turned for
    key and value: [b, K, C, s].

    The product of a turned array of scores is several times slower on XLA:CPU than that of a turned query.
    """
    o, cotangent = operands, pull.cotangent
    x, slope = _scores(options, o, seen)
    p = jnp.exp(jnp.minimum(x - pull.lse[..., None], 0))  # where scores are huge, their rounding is, too
    dp = _dropped(_product(cotangent, o.value, 2), options, o)
    ds = p * (dp - pull.delta[..., None])
    raw = (ds * (slope * options.scale)).astype(o.query.dtype)
    dropped = _dropped(p, options, o).astype(cotangent.dtype)
    K = o.key.shape[1]
    key, value = (
        _batched(x, _merged(y, K), 1).reshape(len(y), K, -1, y.shape[-1])
        for x, y in zip(pull.turned, (raw, dropped), strict=True)
    )
    return Gradients(
        _product(raw, o.key, 1),
        key,
        value,
        None if o.bias is None else _reduced(ds, o.bias.shape),
        None if o.steps is None else _of_steps(ds, options.starts, o),
    )


def _scores(options: Options, o: Operands, seen: jax.Array | None) -> tuple[jax.Array, jax.Array | float]:
    """Scores [b, H, t, s], -inf where the mask says no, and the derivative of the soft-cap at each."""
    x = _product(o.query, o.key, 2) * options.scale
    slope: jax.Array | float = 1.0
    if options.softcap is not None:
        x = jnp.tanh(x / options.softcap)
        x, slope = options.softcap * x, 1 - x * x
    if o.bias is not None:
        x += o.bias.astype(x.dtype)
    if o.slopes is not None:
        x += o.slopes.astype(x.dtype)[:, None, None] * _distance(o).astype(x.dtype)
    if o.steps is not None:
        x += _step(o.steps.astype(x.dtype), options.starts, _distance(o))
    return x if seen is None else jnp.where(seen, x, -jnp.inf), slope


def _distance(o: Operands) -> jax.Array:
    """Position of the key - position of the query, int32 [b, 1, t, s]."""
    return o.key_streams["position"][:, None, None, :] - o.query_streams["position"][:, None, :, None]


def _step(steps: jax.Array, starts: tuple[int, ...], distance: jax.Array) -> jax.Array:
    """The step of each distance, [b, H, t, s]: comparisons are vectorised, where a gather is not."""
    x = steps[0][:, None, None]
    for start, step in zip(starts, steps[1:], strict=True):
        x = jnp.where(distance >= start, step[:, None, None], x)
    return x


def _of_steps(ds: jax.Array, starts: tuple[int, ...], o: Operands) -> jax.Array:
    """Gradient of the steps, [len(starts) + 1, H]: one after the other, so that no array has all of them by pair."""
    distance, limits = _distance(o), jnp.array(starts, jnp.int32)
    least = jnp.iinfo(jnp.int32)
    low = jnp.concatenate([jnp.array([least.min], jnp.int32), limits])
    high = jnp.concatenate([limits - 1, jnp.array([least.max], jnp.int32)])

    def of(limits):
        return jnp.where((distance >= limits[0]) & (distance <= limits[1]), ds, 0).sum(axis=(0, 2, 3))

    return jax.lax.map(of, (low, high))


def _dropped(x: jax.Array, options: Options, o: Operands) -> jax.Array:
    """x [b, H, t, s] as dropout leaves it."""
    if o.seeds is None:
        return x
    index = o.query_streams[INDEX][:, None, :, None], o.key_streams[INDEX][:, None, None, :]
    kept = dropout.kept(o.seeds[:, :, None, None], *index, options.dropout)
    return jnp.where(kept, x / (1 - options.dropout), 0)


def _product(x: jax.Array, y: jax.Array, axis: int) -> jax.Array:
    """[b, H, t, .] of x [b, H, t, .], its last axis summed with an axis of y [b, K, s, .]: 1 or 2 of its matrices."""
    out = _batched(_merged(x, y.shape[1]), y.reshape(-1, *y.shape[2:]), axis)
    return out.reshape(*x.shape[:3], out.shape[-1])


def _batched(x: jax.Array, y: jax.Array, axis: int) -> jax.Array:
    """Products of matrices, in at least float32: the last axis of x with an axis of y."""
    dtype = jnp.promote_types(jnp.promote_types(x.dtype, y.dtype), jnp.float32)
    return jax.lax.dot_general(x, y, (((2,), (axis,)), ((0,), (0,))), preferred_element_type=dtype)


def _merged(x: jax.Array, K: int) -> jax.Array:
    """[b·K, G·t, C] of x [b, H, t, C]."""
    return x.reshape(x.shape[0] * K, -1, x.shape[-1])


def _reduced(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    axes = tuple(i for i in range(4) if shape[i] == 1 != x.shape[i])
    return x.sum(axis=axes, keepdims=True)


def _finite(top: jax.Array) -> jax.Array:
    """What to take off the scores: exp(-inf - top) shall be 0 where all of them are -inf."""
    return jnp.where(jnp.isneginf(top), 0, top)
