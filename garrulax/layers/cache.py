"""The KV cache: keys, values and mask streams of the tokens so far, updated in place."""

import collections
import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from garrulax.core.einsum import on_mesh
from garrulax.core.records import Record
from garrulax.kernels.mask import PAD_KEY, Streams
from garrulax.layers import host_memory, quantised
from garrulax.layers.cache_kinds import FULL, OF_WINDOW, Kind, LayerWindows

KV = dict[str, jax.Array]  # "key", "value", and what the kind of the cache adds (`Kind.arrays`)
_STREAMS = ("rank", "segment", "position")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache(Record):
    """Keys, values and mask streams of the tokens so far.

    The tokens of a row are in the slots that the kind gives them: in a full cache, in its first `used` slots. What is
    in the others does not matter: no token attends to them, and the next tokens of the row overwrite them. So a row is
    shortened by a smaller `used`, and emptied by 0. `Kind.reusable` says how far caches that are not full can be.

    Attributes:
        layers: One dict {"key", "value"} of [L, B, K, S, C] for stacked parameters; for unstacked ones a tuple of one
            dict a layer: of [B·K, S, C], which is what attention multiplies by (with separate axes B and K, XLA:CPU
            copies the whole cache in every step where B is 1), or on a mesh of [B, K, S, C]. Where only some layers
            have a window, their arrays are named "window_key" and "window_value", and stacks have the layers of one
            kind only.
        streams: int32 [B, S] by name; the segment of an empty slot is PAD_KEY.
        used: int32 [B], number of tokens that each row has read.
        planned: int32 [B], the length that each row's whole text is to have, for rotary positions that depend on it.
            If they took the length so far, the keys already cached would have been rotated by other angles.
        kind: Which tokens are kept, and where.
        window_streams: Where only some layers have a window, the streams of the slots of these layers; else None.
    """

    layers: Any
    streams: Streams
    used: jax.Array
    planned: jax.Array
    kind: Kind = dataclasses.field(default=FULL, metadata={"static": True})
    window_streams: Streams | None = None

    @property
    def size(self) -> int:
        """Number of slots of a row."""
        return next(iter(self.streams.values())).shape[1]

    @property
    def has_room(self) -> jax.Array:
        """bool scalar, whether every row can read one more token."""
        return jnp.array(True) if self.kind.ring else self.used.max() < self.size


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
    kind: Kind = FULL,
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
        kind: Which tokens are kept; only full caches of the parameters' dtype are on meshes.
    """
    batch_axis = None if like is None else _first_axis(like)
    if batch_axis is not None and kind != FULL:
        raise ValueError(f"a cache of kind {kind.name!r} runs on one device: on a mesh, leave the kind out")

    def kv(before, axes, prefix, own):
        parts = own.arrays(size if own is kind else own.slots(size), head_dim, dtype)
        return {
            prefix + name: host_memory.zeros((*before, length, width), part)
            if name in own.on_host
            else _zeros((*before, length, width), part, axes)
            for name, (length, width, part) in parts.items()
        }

    def empty(slots):
        streams = {name: _zeros((batch, slots), jnp.int32, (batch_axis, None)) for name in _STREAMS}
        return {**streams, "segment": streams["segment"] + PAD_KEY}

    kinds = [kind.of_layer(layer) for layer in range(layers)]
    if stacked:
        arrays: Any = {}
        for one, count in collections.Counter(kinds).items():
            arrays |= kv((count, batch, kv_heads), (None, batch_axis, None, None, None), *one)
    elif like is None:
        arrays = tuple(kv((batch * kv_heads,), (None,), *one) for one in kinds)
    else:
        arrays = tuple(kv((batch, kv_heads), (batch_axis, None, None, None), *one) for one in kinds)
    rows = _zeros((batch,), jnp.int32, (batch_axis,))
    planned = rows + (size if kind.room is None else min(size, kind.room))
    of_window = empty(kind.window.slots(size)) if isinstance(kind, LayerWindows) else None
    return Cache(arrays, empty(size), rows, planned, kind, of_window)


def arrays_of_layer(kind: Kind, layer: int, names: Iterable[str]) -> tuple[list[str], int]:
    """The names of the stacked arrays that a layer has a part of, and its index in them.

    Args:
        kind: Of the cache.
        layer: Number of the layer.
        names: Names of all arrays of the cache.
    """
    windowed = bool(kind.of_layer(layer)[0])
    place = kind.places[layer] if isinstance(kind, LayerWindows) else layer
    return [name for name in names if name.startswith(OF_WINDOW) == windowed], place


def with_memory_kinds(cache: Cache) -> Cache:
    """The cache with its arrays in the memories that its kind says.

    Nothing moves: in a program that is compiled for abstract arguments their types do not say in which memory they are.
    """

    def one(kv: KV) -> KV:
        away = [name for name in kv if name in cache.kind.on_host and not host_memory.is_on_host(kv[name])]
        return {**kv, **{name: host_memory.to_host(kv[name]) for name in away}}

    if not cache.kind.on_host:
        return cache
    layers = cache.layers
    return dataclasses.replace(cache, layers=tuple(map(one, layers)) if isinstance(layers, tuple) else one(layers))


def on_host(tree: Any) -> Any:
    """For each leaf of a tree, whether it is an array that a cache keeps in the memory of the host."""

    def one(x: Any) -> Any:
        if not isinstance(x, Cache):
            return False
        kinds = x.kind.on_host
        mark = functools.partial(jax.tree_util.tree_map_with_path, lambda path, _: path[-1].key in kinds)
        rest = jax.tree.map(lambda _: False, dataclasses.replace(x, layers=None))
        return dataclasses.replace(rest, layers=mark(x.layers))

    return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, Cache))


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
        slot: int32 [B], the slot of each row's first token, or [B, T], the slot of each token.

    Returns:
        The arrays with the new slots, and those of this layer: [B, K, S, C], or [B·K, S, C] where the cache keeps them
        so.
    """
    new = new_entries(kv, key, value)
    kv = {**kv, **{name: write_layer(kv[name], layer, x, slot) for name, x in new.items()}}
    return kv, {name: layer_of(x, layer) for name, x in kv.items()}


def new_entries(kv: KV, key: jax.Array, value: jax.Array) -> KV:
    """Keys and values of new tokens in the form in which the cache stores them.

    Args:
        kv: The cache's arrays.
        key: [B, T, K, C].
        value: [B, T, K, C].

    Returns:
        [B, K, T, C] in the dtypes of `kv`, by name; for int8 their scales [B, K, T, 1] too.
    """
    new = {"key": key.swapaxes(1, 2), "value": value.swapaxes(1, 2)}
    if "key_scale" in kv:
        new = {name: x for part in new for name, x in quantised.store(part, new[part]).items()}
    return {name: x.astype(kv[name].dtype) for name, x in new.items()}


def layer_of(x: jax.Array, layer: jax.Array | int) -> jax.Array:
    """One layer of a cache's array: [B, K, S, C], or [B·K, S, C] where the cache keeps it so."""
    return x if x.ndim < 5 else jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)


def write_layer(x: jax.Array, layer: jax.Array | int, new: jax.Array, slot: jax.Array) -> jax.Array:
    """The cache's array with `new` [B, K, T, C] from slot [B] on, or in the slots [B, T]."""
    # Through a reshape, XLA:CPU would copy the cache of a single row in every step.
    if x.ndim == 3 and len(new) == 1 and slot.ndim == 1:
        return jax.lax.dynamic_update_slice(x, new[0].astype(x.dtype), [jnp.zeros_like(slot[0]), slot[0], 0 * slot[0]])
    if x.ndim == 3:
        return write(x.reshape(*new.shape[:2], *x.shape[1:]), new, slot, axis=2).reshape(x.shape)
    return write(x, new, slot, axis=2) if x.ndim == 4 else write(x, new, slot, axis=2, layer=layer)


def write(x: jax.Array, new: jax.Array, start: jax.Array, axis: int, layer: jax.Array | int | None = None) -> jax.Array:
    """x with new entries on one axis, from another index on in each row.

    Args:
        x: [B, ...], or [L, B, ...] if `layer` is given.
        new: [B, ...], of any size on `axis` and the sizes of x on the others.
        start: int32 [B], index on `axis` of the first new entry of each row; or [B, T], that of each entry. They must
            fit; only those given one by one may lie behind the end, and are left out.
        axis: Axis of `new`, after that of the rows.
        layer: int32 scalar, the index on the leading axis of x that is written.
    """
    number = jnp.asarray(0 if layer is None else layer, jnp.int32)
    if start.ndim == 2:
        return _write_each(x, new, start, number, axis, layer is not None)
    local = functools.partial(_write_on_one_device, axis=axis, leading=layer is not None)
    mesh = jax.typeof(x).sharding.mesh
    if not on_mesh(x):
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


def _write_each(
    x: jax.Array, new: jax.Array, slots: jax.Array, layer: jax.Array, axis: int, leading: bool
) -> jax.Array:
    """`write` of entries that need not be beside each other; on one device."""
    rows = jnp.arange(len(new), dtype=jnp.int32)[:, None]
    before = (layer,) if leading else ()
    # Where indices are apart, their axes come first: [B, T, ...].
    return x.at[(*before, rows, *(slice(None),) * (axis - 1), slots)].set(
        jnp.moveaxis(new.astype(x.dtype), axis, 1), mode="drop"
    )
