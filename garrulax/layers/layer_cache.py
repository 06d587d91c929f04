"""The cache of one layer during a forward pass, with its keys and values on the device or in the memory of the host.

Letters: B rows, T tokens, K key/value heads, S slots, C width of a head.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from garrulax.layers import host_memory
from garrulax.layers.cache import KV, layer_of, new_entries, write_layer
from garrulax.layers.cache_kinds import ENTRIES


class LayerCache(NamedTuple):
    """The cache of one layer during a forward pass.

    Arrays in the memory of the host are read as they were before the pass, and the device adds the new tokens to what
    was read. They are written at the end of the pass (`write_back`): where one computation of the host reads what an
    earlier one has written, XLA:TPU moves the whole array to the device and back between the two.

    Attributes:
        kv: The cache's arrays, of all layers or of this one.
        layer: Number of the layer.
        stored: The arrays of this layer that are on the device, [B, K, S, C] each.
        new: [B, K, T, C], new tokens of the arrays in the memory of the host, which `kv` lacks until `write_back`;
            empty if all arrays are on the device.
        start: int32 [B], the slot of the first new token; if all arrays are on the device, the argument `slot`.
    """

    kv: KV
    layer: jax.Array
    stored: KV
    new: KV
    start: jax.Array


def extend_layer(kv: KV, layer: jax.Array, key: jax.Array, value: jax.Array, slot: jax.Array) -> LayerCache:
    """The cache of a layer with the keys and values of new tokens. Arguments as of `cache.extend`."""
    given = new_entries(kv, key, value)
    new = {name: x for name, x in given.items() if host_memory.is_on_host(kv[name])}
    kv = {**kv, **{name: write_layer(kv[name], layer, x, slot) for name, x in given.items() if name not in new}}
    stored = {name: layer_of(x, layer) for name, x in kv.items() if name not in new}
    stored = {name: x.reshape(len(key), -1, *x.shape[-2:]) for name, x in stored.items()}
    return LayerCache(kv, layer, stored, new, jnp.clip(slot, 0, kv["key"].shape[-2] - key.shape[1]) if new else slot)


def entries(layer_cache: LayerCache, slots: jax.Array, names: tuple[str, ...] = ENTRIES) -> KV:
    """Keys, values and scales [B, K, S', C] as they are stored, on the device.

    Args:
        layer_cache: The layer.
        slots: int32 [B, K, S']; one behind the end is taken as the last.
        names: Which of them.
    """
    slots = jnp.clip(slots, 0, layer_cache.kv["key"].shape[-2] - 1)
    index = slots[..., None]
    found = {
        name: jnp.take_along_axis(layer_cache.stored[name], index, axis=2)
        for name in names
        if name in layer_cache.stored
    }
    if not layer_cache.new:
        return found
    where = host_memory.indices(
        layer_cache.kv["key"], layer_cache.layer, jnp.arange(len(slots), dtype=jnp.int32), slots
    )
    read = {name: host_memory.read(layer_cache.kv[name], where) for name in names if name in layer_cache.new}
    return found | _with_new(layer_cache, read, slots)


def first_entries(layer_cache: LayerCache, count: int) -> KV:
    """`entries` of the first slots, `count` of them."""
    found = {name: layer_cache.stored[name][:, :, :count] for name in ENTRIES if name in layer_cache.stored}
    if not layer_cache.new:
        return found
    slots = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (*layer_cache.new["key"].shape[:2], count))
    where = _places(layer_cache, jnp.zeros_like(layer_cache.start))
    read = {
        name: host_memory.to_device(host_memory.read_slices(layer_cache.kv[name], where, count))
        for name in layer_cache.new
    }
    return found | _with_new(layer_cache, read, slots)


def _places(layer_cache: LayerCache, slot: jax.Array) -> jax.Array:
    """`host_memory.indices` of a slot [B] of each row, for all heads."""
    B, K = layer_cache.new["key"].shape[:2]
    slots = jnp.broadcast_to(slot[:, None, None], (B, K, 1))
    return host_memory.indices(layer_cache.kv["key"], layer_cache.layer, jnp.arange(B, dtype=jnp.int32), slots)


def _with_new(layer_cache: LayerCache, found: KV, slots: jax.Array) -> KV:
    """Entries [B, K, S', C] that the cache had before the pass in slots [B, K, S'], and in its place those of it."""
    index = slots - layer_cache.start[:, None, None]
    count = layer_cache.new["key"].shape[2]
    is_new = ((index >= 0) & (index < count))[..., None]
    index = jnp.clip(index, 0, count - 1)[..., None]
    return {
        name: jnp.where(is_new, jnp.take_along_axis(layer_cache.new[name], index, axis=2), x)
        for name, x in found.items()
    }


def write_back(layer_cache: LayerCache, output: jax.Array) -> KV:
    """The cache's arrays with the entries of the pass.

    Args:
        layer_cache: The layer.
        output: What was computed with all that was read, in floating point.
    """
    if not layer_cache.new:
        return layer_cache.kv
    # XLA writes in place only behind all reading. The slot depends on the output, by a sum with 0 that XLA does not
    # simplify; an optimization barrier is gone before XLA:CPU decides what is copied.
    bits = jax.lax.bitcast_convert_type(output.reshape(-1)[0].astype(jnp.float32), jnp.int32)
    where = _places(layer_cache, layer_cache.start + jnp.minimum(bits & jnp.int32(0x7FFFFFFF), 0))
    return {
        **layer_cache.kv,
        **{name: host_memory.write_slices(layer_cache.kv[name], where, x) for name, x in layer_cache.new.items()},
    }
