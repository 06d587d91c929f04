"""The KV cache: keys, values and mask streams of the tokens seen so far, updated in place."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from garrulax.kernels.mask import PAD_KEY, Mask, Streams, as_keys
from garrulax.kernels.masks import causal_from

KV = dict[str, jax.Array]  # "key", "value"


@struct.dataclass
class Cache:
    """What attention keeps of the past. All rows of a batch use the same slots; a gap left by a shorter prompt is
    masked by its segment and costs memory only.

    layers: one dict {"key", "value"} of [L, B, K, S, C], or a tuple of one a layer: of [B·K, S, C], which is what
    attention multiplies by (with axes B and K apart, XLA:CPU copies the whole cache in every step where B is 1), or on
    a mesh of [B, K, S, C].
    streams: int32 [B, S] by name; the segment of an empty slot is PAD_KEY.
    used: int32 scalar, slots filled.
    planned: int32 [B], tokens that each row's whole text is to have, for positions that depend on it (dynamic RoPE):
    were the length so far taken instead, every step would change what the cached keys should have been.
    """

    layers: Any
    streams: Streams
    used: jax.Array
    planned: jax.Array

    @property
    def size(self) -> int:
        """Slots there are."""
        return next(iter(self.streams.values())).shape[1]


@struct.dataclass
class View:
    """How the tokens of one call see one another and the cache.

    mask: with the streams of these tokens as queries and of everything cached as keys.
    at: int32 scalar, the slot of the first token; None without a cache.
    """

    mask: Mask
    at: jax.Array | None = None


def make_cache(
    layers: int,
    batch: int,
    size: int,
    kv_heads: int,
    head_dim: int,
    dtype: Any = jnp.float32,
    *,
    stacked: bool = True,
    like: jax.Array | None = None,
) -> Cache:
    """An empty cache of `size` slots, all of which the text is planned to fill. stacked must agree with the form of
    the parameters (`models.unstack`).

    like: on a mesh, a [B, T] array of tokens whose batch sharding the cache takes.
    """
    batch_axis = None if like is None else _first_axis(like)
    shape = (batch, kv_heads, size, head_dim)

    def kv(shape, axes):
        return {name: _zeros(shape, dtype, axes) for name in ("key", "value")}

    if stacked:
        arrays = kv((layers, *shape), (None, batch_axis, None, None, None))
    elif like is None:
        arrays = tuple(kv((batch * kv_heads, size, head_dim), (None,)) for _ in range(layers))
    else:
        arrays = tuple(kv(shape, (batch_axis, None, None, None)) for _ in range(layers))
    empty = {name: _zeros((batch, size), jnp.int32, (batch_axis, None)) for name in ("rank", "segment", "position")}
    empty["segment"] = empty["segment"] + PAD_KEY
    return Cache(arrays, empty, jnp.zeros((), jnp.int32), _zeros((batch,), jnp.int32, (batch_axis,)) + size)


def _first_axis(x: jax.Array) -> Any:
    spec = jax.typeof(x).sharding.spec
    return spec[0] if len(spec) else None


def _zeros(shape: tuple[int, ...], dtype: Any, axes: tuple) -> jax.Array:
    return jnp.zeros(shape, dtype) if not any(axes) else jnp.zeros(shape, dtype, out_sharding=jax.P(*axes))


def admit(tokens: jax.Array, positions: jax.Array, mask: Mask | None, cache: Cache | None) -> tuple[View, Cache | None]:
    """The view of a call with tokens [B, T], and the cache with their streams in it.

    positions: int32 [B, T], where each token stands in its own text; they become the stream `position`.
    mask: who attends to whom; None is causal, counted on from the cache.
    Raises ValueError where the cache is too small, as far as its fill is known (not under jit).
    """
    if mask is None:
        mask = causal_from(tokens, 0 if cache is None else cache.used)
    query = {**mask.query, "position": jnp.zeros_like(tokens, jnp.int32) + positions.astype(jnp.int32)}
    if cache is None:
        return View(dataclasses.replace(mask, query=query)), None
    count = tokens.shape[1]
    if not isinstance(cache.used, jax.core.Tracer) and int(cache.used) + count > cache.size:
        raise ValueError(f"the cache has {cache.size} slots: {int(cache.used)} used, no room for {count} more")
    if mask.key is not None:
        raise ValueError("with a cache, give the mask streams of the new tokens only: the cache holds the keys'")
    new = as_keys(query)
    missing = sorted(cache.streams.keys() - new.keys())
    if missing:
        raise ValueError(f"the cache keeps streams {missing}, which the mask does not give")
    at = (0, cache.used)
    streams = {name: jax.lax.dynamic_update_slice(s, new[name], at) for name, s in cache.streams.items()}
    view = View(Mask(query, streams, mask.rule), cache.used)
    return view, dataclasses.replace(cache, streams=streams, used=cache.used + count)


def whole_length(positions: jax.Array, cache: Cache | None) -> jax.Array:
    """How many tokens the whole text of each row has, int32 [B]: what its cache plans, or up to the last of positions
    [B, T] where there is none. What rotary positions that depend on the length go by."""
    return positions.max(axis=1) + 1 if cache is None else cache.planned


def extend(kv: KV, layer: jax.Array | int, key: jax.Array, value: jax.Array, at: jax.Array) -> tuple[KV, KV]:
    """Writes key and value [B, T, K, C] of one layer at slot `at`.

    Returns the arrays with them in, and this layer's keys and values so far, [B, S, K, C] or folded as they are kept,
    [B·K, S, C]. Only the new slots are written, so that XLA updates the buffer in place.
    """
    new = {"key": key.swapaxes(1, 2), "value": value.swapaxes(1, 2)}
    axes = kv["key"].ndim
    if axes == 3:
        new = {name: x.reshape(-1, *x.shape[2:]) for name, x in new.items()}
    if axes == 5:
        new = {name: x[None] for name, x in new.items()}
    place = {3: (0, at, 0), 4: (0, 0, at, 0), 5: (layer, 0, 0, at, 0)}[axes]
    kv = {name: jax.lax.dynamic_update_slice(kv[name], x.astype(kv[name].dtype), place) for name, x in new.items()}
    if axes == 3:
        return kv, kv
    here = kv if axes == 4 else {name: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for name, x in kv.items()}
    return kv, {name: x.swapaxes(1, 2) for name, x in here.items()}
