"""Keys and values of some rows of a cache: they are put in, copied out, and made longer. On the device or on the host.

Letters: L layers, B rows, K key/value heads, S slots, P slots of a context, C width of a head.
"""

import collections
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from garrulax.core.auto_mesh import split
from garrulax.layers import host_memory
from garrulax.layers.cache import KV, Cache, arrays_of_layer
from garrulax.layers.cache_kinds import Kind


def insert_layers(layers: Any, new: Any, rows: jax.Array | np.ndarray | None, batch: int, kind: Kind) -> Any:
    """The arrays of a cache (`Cache.layers`) with those of contexts in some rows.

    Args:
        layers: Of B rows. They are donated.
        new: Of n rows or of one, which all get; stacked or not.
        rows: int32 [n]; None is all rows in their order.
        batch: B.
        kind: Of the cache.
    """
    if not isinstance(layers, tuple):
        return _insert_stacked(layers, new, rows)
    heads = _heads(layers, batch)
    places = [arrays_of_layer(kind, i, layer)[1] for i, layer in enumerate(layers)]
    return tuple(  # one small program for all layers compiles faster than one with all of them
        _insert_layer(layer, new[i] if isinstance(new, tuple) else new, np.int32(places[i]), rows, heads)
        for i, layer in enumerate(layers)
    )


def extract_layers(layers: Any, row: int, batch: int, kind: Kind, stacked: bool) -> Any:
    """Copies of the arrays of one row.

    Args:
        layers: Of B rows.
        row: The row.
        batch: B.
        kind: Of the cache.
        stacked: Whether the result is stacked, [L, 1, K, S, C], or [K, S, C] of each layer.
    """
    place = np.int32(row)
    if isinstance(layers, tuple):
        heads = _heads(layers, batch)
        layers = tuple(_extract_layer(layer, place, heads) for layer in layers)
        return _stack(layers, kind) if stacked else layers
    layers = _extract_stacked(layers, place)
    return layers if stacked else _unstack(layers, kind)


def _heads(layers: tuple[KV, ...], batch: int) -> int:
    """K, of unstacked layers."""
    x = next(iter(layers[0].values()))
    return int(x.shape[0] // batch if x.ndim == 3 else x.shape[1])


def split_layer(x: jax.Array) -> jax.Array:
    """Keys or values as they lie on a mesh: [L, B, K, S, C] or [B, K, S, C] by rows and heads, [B·K, S, C] whole."""
    return split(x) if x.ndim == 3 else split(x, rows=x.ndim - 4, heads=x.ndim - 3)


def put_rows(x: jax.Array, part: jax.Array, rows: jax.Array | None) -> jax.Array:
    """x [B, ...] with `part` [n or 1, ...], from 0 on all other axes on, in some of its rows; None is all, in order."""
    if rows is None:
        return jax.lax.dynamic_update_slice(x, part.astype(x.dtype), (0,) * x.ndim)
    part = jnp.broadcast_to(part, (len(rows), *part.shape[1:])).astype(x.dtype)
    return x.at[(rows, *(slice(0, n) for n in part.shape[1:]))].set(part)


@functools.partial(jax.jit, static_argnames="heads", donate_argnames="layer")
def _insert_layer(layer: KV, new: KV, i: jax.Array, rows: jax.Array | None, heads: int) -> KV:
    """[B·K, S, C] or [B, K, S, C] with [b·K, P, C], or with layer i of a stack [L, b, K, P, C], in it; b is n or 1.

    K is `heads`.
    """

    def put(x: jax.Array, part: jax.Array) -> jax.Array:
        if host_memory.is_on_host(x):
            return _put_on_host(x, part, rows, heads, i)
        if part.ndim == 5:
            part = jax.lax.dynamic_index_in_dim(part, i, keepdims=False)
        part = part.reshape(-1, heads, *part.shape[-2:])
        return split_layer(put_rows(x.reshape(-1, heads, *x.shape[-2:]), part, rows).reshape(x.shape))

    return {name: put(x, new[name]) for name, x in layer.items()}


@functools.partial(jax.jit, donate_argnames="layers")
def _insert_stacked(layers: KV, new: KV | tuple[KV, ...], rows: jax.Array | None) -> KV:
    """[L, B, K, S, C] with [L, b, K, P, C], or with a tuple of [b·K, P, C], in it."""
    heads = layers["key"].shape[2]

    def put(name: str, x: jax.Array) -> jax.Array:
        if host_memory.is_on_host(x):
            for i in range(len(x)):
                x = _put_on_host(x, new[i][name] if isinstance(new, tuple) else new[name], rows, heads, i)
            return x
        if isinstance(new, tuple):
            part = jnp.stack([layer[name].reshape(-1, heads, *layer[name].shape[1:]) for layer in new if name in layer])
        else:
            part = new[name]
        return split_layer(jax.vmap(put_rows, in_axes=(0, 0, None))(x, part, rows))

    return {name: put(name, x) for name, x in layers.items()}


def _put_on_host(
    x: jax.Array, part: jax.Array, rows: jax.Array | None, heads: int, layer: jax.Array | int
) -> jax.Array:
    """`put_rows` of one layer of arrays in the memory of the host, which are stacked or not."""
    B, b = (y.shape[1] if y.ndim == 5 else len(y) // heads for y in (x, part))
    places = jnp.arange(B, dtype=jnp.int32) if rows is None else jnp.asarray(rows)
    sources = jnp.minimum(jnp.arange(len(places), dtype=jnp.int32), b - 1)
    return host_memory.copy_rows(x, places, part, sources, heads, layer)


@functools.partial(jax.jit, static_argnames="heads")
def _extract_layer(layer: KV, row: jax.Array, heads: int) -> KV:
    """[K, S, C] of [B·K, S, C] or [B, K, S, C]."""

    def take(x: jax.Array) -> jax.Array:
        if host_memory.is_on_host(x):
            return _copied(host_memory.zeros((heads, *x.shape[-2:]), x.dtype), x, row, heads)
        return jax.lax.dynamic_slice_in_dim(x.reshape(-1, *x.shape[-2:]), row * heads, heads)

    return {name: take(x) for name, x in layer.items()}


def _copied(x: jax.Array, part: jax.Array, row: jax.Array | int, heads: int, layer: jax.Array | int = 0) -> jax.Array:
    """x of one row with a row of a layer of `part` in it, in the memory of the host."""
    return host_memory.copy_rows(x, jnp.zeros(1, jnp.int32), part, jnp.full(1, row, jnp.int32), heads, layer)


def _stack(layers: tuple[KV, ...], kind: Kind) -> KV:
    """[L, 1, K, S, C] of [K, S, C] of each layer, by one small program that puts a layer into its place."""
    counts = collections.Counter(name for layer in layers for name in layer)
    one = {name: x for layer in layers for name, x in layer.items()}

    def empty(x: jax.Array, count: int) -> jax.Array:
        zeros = host_memory.zeros if host_memory.is_on_host(x) else jnp.zeros
        return zeros((count, 1, *x.shape), x.dtype)

    stack = {name: empty(x, counts[name]) for name, x in one.items()}
    for i, layer in enumerate(layers):
        names, place = arrays_of_layer(kind, i, stack)
        stack |= _put_layer({name: stack[name] for name in names}, layer, np.int32(place))
    return stack


def _unstack(stack: KV, kind: Kind) -> tuple[KV, ...]:
    """[K, S, C] of each layer of [L, 1, K, S, C]."""
    count = sum(len(x) for name, x in stack.items() if name.endswith("key"))  # "key", and "window_key"
    places = (arrays_of_layer(kind, i, stack) for i in range(count))
    return tuple(_of_stack({name: stack[name] for name in names}, np.int32(place)) for names, place in places)


@functools.partial(jax.jit, donate_argnames="stack")
def _put_layer(stack: KV, layer: KV, i: jax.Array) -> KV:
    def put(x: jax.Array, part: jax.Array) -> jax.Array:
        return _copied(x, part, 0, x.shape[2], i) if host_memory.is_on_host(x) else x.at[i, 0].set(part)

    return {name: put(x, layer[name]) for name, x in stack.items()}


@jax.jit
def _extract_stacked(layers: KV, row: jax.Array) -> KV:
    """[L, 1, K, S, C] of [L, B, K, S, C]."""

    def take(x: jax.Array) -> jax.Array:
        if not host_memory.is_on_host(x):
            return jax.lax.dynamic_slice_in_dim(x, row, 1, axis=1)
        out = host_memory.zeros((len(x), 1, *x.shape[2:]), x.dtype)
        for i in range(len(x)):
            out = _copied(out, x, row, x.shape[2], i)
        return out

    return {name: take(x) for name, x in layers.items()}


@jax.jit
def _of_stack(stack: KV, i: jax.Array) -> KV:
    """[K, S, C] of layer i of [L, 1, K, S, C]."""

    def take(x: jax.Array) -> jax.Array:
        if host_memory.is_on_host(x):
            return _copied(host_memory.zeros(x.shape[2:], x.dtype), x, 0, x.shape[2], i)
        return jax.lax.dynamic_index_in_dim(x[:, 0], i, keepdims=False)

    return {name: take(x) for name, x in stack.items()}


@functools.partial(jax.jit, static_argnames="slots")
def grow_cache(cache: Cache, slots: int) -> Cache:
    """The same cache with more slots a row, `slots` in all."""

    def longer(x: jax.Array, axis: int, size: int) -> jax.Array:
        return jnp.pad(x, [(0, size - x.shape[axis] if i == axis else 0) for i in range(x.ndim)])

    def longer_array(x: jax.Array, size: int) -> jax.Array:
        return host_memory.grow(x, size) if host_memory.is_on_host(x) else longer(x, x.ndim - 2, size)

    def longer_layer(layer: KV) -> KV:
        sizes = cache.kind.arrays(slots, 1, jnp.float32)  # those of windows do not grow
        grown = {name: x for name, x in layer.items() if name in sizes}
        return layer | {name: longer_array(x, sizes[name][0]) for name, x in grown.items()}

    layers = cache.layers
    layers = tuple(map(longer_layer, layers)) if isinstance(layers, tuple) else longer_layer(layers)
    streams = {name: longer(x, 1, slots) for name, x in cache.streams.items()}
    return dataclasses.replace(cache, layers=layers, streams=streams)
