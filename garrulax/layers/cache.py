"""The KV cache: keys, values and mask streams of the tokens so far, updated in place."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from garrulax.core.dtypes import int32_indices
from garrulax.kernels.mask import PAD_KEY, Streams

KV = dict[str, jax.Array]  # "key", "value"


@struct.dataclass
class Cache:
    """Keys, values and mask streams of the tokens so far.

    All rows of a batch fill the same slots; the segment of a slot that a shorter prompt leaves empty masks it, so that
    it costs memory only.

    Attributes:
        layers: One dict {"key", "value"} of [L, B, K, S, C] for stacked parameters; for unstacked ones a tuple of one
            dict a layer: of [B·K, S, C], which is what attention multiplies by (with separate axes B and K, XLA:CPU
            copies the whole cache in every step where B is 1), or on a mesh of [B, K, S, C].
        streams: int32 [B, S] by name; the segment of an empty slot is PAD_KEY.
        used: int32 scalar, number of slots filled.
        planned: int32 [B], the length that each row's whole text is to have, for rotary positions that depend on it.
            If they took the length so far, the keys already cached would have been rotated by other angles.
    """

    layers: Any
    streams: Streams
    used: jax.Array
    planned: jax.Array

    @property
    def size(self) -> int:
        """Number of slots."""
        return next(iter(self.streams.values())).shape[1]


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
    """An empty cache, whose text is planned to fill all slots.

    Args:
        layers: Number of layers.
        batch: B, number of rows.
        size: S, number of slots.
        kv_heads: K, key/value heads of a layer.
        head_dim: C, width of a head.
        dtype: Of keys and values.
        stacked: Whether the parameters are stacked; the cache must have the same form (`models.unstack`).
        like: On a mesh, tokens [B, T] whose batch sharding the cache takes.
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


def extend(kv: KV, layer: jax.Array | int, key: jax.Array, value: jax.Array, slot: jax.Array) -> tuple[KV, KV]:
    """Writes the keys and values of one layer into the cache.

    Only the new slots are written, so that XLA updates the buffer in place.

    Args:
        kv: The cache's arrays, of all layers or of this one.
        layer: Number of the layer.
        key: [B, T, K, C].
        value: [B, T, K, C].
        slot: int32 scalar, the slot of the first token.

    Returns:
        The arrays with the new slots, and this layer's keys and values: [B, S, K, C], or [B·K, S, C] where the cache
        keeps them so.
    """
    new = {"key": key.swapaxes(1, 2), "value": value.swapaxes(1, 2)}
    axes = kv["key"].ndim
    if axes == 3:
        new = {name: x.reshape(-1, *x.shape[2:]) for name, x in new.items()}
    if axes == 5:
        new = {name: x[None] for name, x in new.items()}
    start = int32_indices(*{3: (0, slot, 0), 4: (0, 0, slot, 0), 5: (layer, 0, 0, slot, 0)}[axes])
    kv = {name: jax.lax.dynamic_update_slice(kv[name], x.astype(kv[name].dtype), start) for name, x in new.items()}
    if axes == 3:
        return kv, kv
    here = kv if axes == 4 else {name: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for name, x in kv.items()}
    return kv, {name: x.swapaxes(1, 2) for name, x in here.items()}
