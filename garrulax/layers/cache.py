"""The KV cache: keys, values and mask streams of the tokens so far, updated in place."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from garrulax.kernels.mask import PAD_KEY, Streams

KV = dict[str, jax.Array]  # "key", "value"


@struct.dataclass
class Cache:
    """Keys, values and mask streams of the tokens so far.

    The tokens of a row are in its first `used` slots. What is in the others does not matter: no token attends to them,
    and the next tokens of the row overwrite them. So a row is shortened by a smaller `used`, and emptied by 0.

    Attributes:
        layers: One dict {"key", "value"} of [L, B, K, S, C] for stacked parameters; for unstacked ones a tuple of one
            dict a layer: of [B·K, S, C], which is what attention multiplies by (with separate axes B and K, XLA:CPU
            copies the whole cache in every step where B is 1), or on a mesh of [B, K, S, C].
        streams: int32 [B, S] by name; the segment of an empty slot is PAD_KEY.
        used: int32 [B], number of slots filled in each row.
        planned: int32 [B], the length that each row's whole text is to have, for rotary positions that depend on it.
            If they took the length so far, the keys already cached would have been rotated by other angles.
    """

    layers: Any
    streams: Streams
    used: jax.Array
    planned: jax.Array

    @property
    def size(self) -> int:
        """Number of slots of a row."""
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
    rows = _zeros((batch,), jnp.int32, (batch_axis,))
    return Cache(arrays, empty, rows, rows + size)


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
        slot: int32 [B], the slot of each row's first token.

    Returns:
        The arrays with the new slots, and this layer's keys and values: [B, S, K, C], or [B·K, S, C] where the cache
        keeps them so.
    """
    new = {"key": key.swapaxes(1, 2), "value": value.swapaxes(1, 2)}  # [B, K, T, C]
    kv = {name: _write_layer(kv[name], layer, x, slot) for name, x in new.items()}
    axes = kv["key"].ndim
    if axes == 3:
        return kv, kv
    here = kv if axes == 4 else {name: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for name, x in kv.items()}
    return kv, {name: x.swapaxes(1, 2) for name, x in here.items()}


def _write_layer(x: jax.Array, layer: jax.Array | int, new: jax.Array, slot: jax.Array) -> jax.Array:
    """The cache's array with `new` [B, K, T, C] from slot [B] on."""
    if x.ndim == 3 and len(new) == 1:  # through a reshape, XLA:CPU would copy the cache of a single row in every step
        return jax.lax.dynamic_update_slice(x, new[0].astype(x.dtype), [jnp.zeros_like(slot[0]), slot[0], 0 * slot[0]])
    if x.ndim == 3:
        return write(x.reshape(*new.shape[:2], *x.shape[1:]), new, slot, axis=2).reshape(x.shape)
    return write(x, new, slot, axis=2) if x.ndim == 4 else write(x, new, slot, axis=2, layer=layer)


def write(x: jax.Array, new: jax.Array, start: jax.Array, axis: int, layer: jax.Array | int | None = None) -> jax.Array:
    """x with new entries on one axis, from another index on in each row.

    Args:
        x: [B, ...], or [L, B, ...] if `layer` is given.
        new: [B, ...], of any size on `axis` and the sizes of x on the others.
        start: int32 [B], index on `axis` of the first new entry of each row. Entries must fit.
        axis: Axis of `new`, after that of the rows.
        layer: int32 scalar, the index on the leading axis of x that is written.
    """
    number = jnp.asarray(0 if layer is None else layer, jnp.int32)
    local = functools.partial(_write_on_one_device, axis=axis, leading=layer is not None)
    mesh = jax.typeof(x).sharding.mesh
    if mesh.empty:
        return local(x, new, start, number)
    # Rows do not depend on one another: each device writes those it has.
    spec = jax.typeof(x).sharding.spec
    row_axes = spec[0 if layer is None else 1]
    specs = (spec, jax.P(row_axes, *(None,) * (new.ndim - 1)), jax.P(row_axes), jax.P())
    operands = [jax.reshard(y, jax.NamedSharding(mesh, s)) for y, s in zip((x, new, start, number), specs, strict=True)]
    return jax.shard_map(local, in_specs=specs, out_specs=spec)(*operands)


def _write_on_one_device(
    x: jax.Array, new: jax.Array, start: jax.Array, layer: jax.Array, axis: int, leading: bool
) -> jax.Array:
    """`write`; `leading`: whether x has a leading axis of layers."""
    rows = jnp.arange(len(new), dtype=jnp.int32)
    before = (jnp.full_like(rows, layer),) if leading else ()
    indexed = len(before) + 1
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(1, new.ndim)),
        inserted_window_dims=tuple(range(indexed)),
        scatter_dims_to_operand_dims=(*range(indexed), axis + leading),
    )
    indices = jnp.stack([*before, rows, start.astype(jnp.int32)], axis=1)
    mode = jax.lax.GatherScatterMode.CLIP
    return jax.lax.scatter(
        x, indices, new.astype(x.dtype), numbers, indices_are_sorted=True, unique_indices=True, mode=mode
    )
