"""The keys and values of one layer during a pass, those of the pass among them, on the device or on the host.

Letters: B rows, T tokens, K key/value heads, S slots, C width of a head.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from garrulax.layers import host_memory
from garrulax.layers.cache import KV, layer_of, new_entries, write_layer
from garrulax.layers.cache_kinds import ENTRIES


class Held(NamedTuple):
    """What a layer holds during a pass.

    What is in the memory of the host is read as it was before the pass, and the device puts the entries of the pass
    into what was read. It is written at the end (`written`): XLA:TPU would move the whole cache to the device and back
    between two computations of the host, if the second read what the first has written.

    Attributes:
        kv: The cache's arrays, of all layers or of this one.
        layer: Number of the layer.
        stored: The arrays of this layer that are on the device, [B, K, S, C] each.
        new: [B, K, T, C], entries of the pass that `kv` does not have yet; empty if all arrays are on the device.
        start: int32 [B], the slot of the first of them; where there are none, the slots of the pass.
    """

    kv: KV
    layer: jax.Array
    stored: KV
    new: KV
    start: jax.Array


def hold(kv: KV, layer: jax.Array, key: jax.Array, value: jax.Array, slot: jax.Array) -> Held:
    """Adds keys and values of a pass. Arguments as of `cache.extend`."""
    given = new_entries(kv, key, value)
    new = {name: x for name, x in given.items() if host_memory.is_on_host(kv[name])}
    kv = {**kv, **{name: write_layer(kv[name], layer, x, slot) for name, x in given.items() if name not in new}}
    stored = {name: layer_of(x, layer) for name, x in kv.items() if name not in new}
    stored = {name: x.reshape(len(key), -1, *x.shape[-2:]) for name, x in stored.items()}
    return Held(kv, layer, stored, new, jnp.clip(slot, 0, kv["key"].shape[-2] - key.shape[1]) if new else slot)


def entries(held: Held, slots: jax.Array, names: tuple[str, ...] = ENTRIES) -> KV:
    """Keys, values and scales [B, K, S', C] as they are stored, on the device.

    Args:
        held: The layer.
        slots: int32 [B, K, S']; one behind the end is taken as the last.
        names: Which of them.
    """
    slots = jnp.clip(slots, 0, held.kv["key"].shape[-2] - 1)
    index = slots[..., None]
    found = {name: jnp.take_along_axis(held.stored[name], index, axis=2) for name in names if name in held.stored}
    if not held.new:
        return found
    where = host_memory.places(held.kv["key"], held.layer, jnp.arange(len(slots), dtype=jnp.int32), slots)
    read = {name: host_memory.read(held.kv[name], where) for name in names if name in held.new}
    return found | _with_new(held, read, slots)


def first_entries(held: Held, count: int) -> KV:
    """`entries` of the first slots, `count` of them."""
    found = {name: held.stored[name][:, :, :count] for name in ENTRIES if name in held.stored}
    if not held.new:
        return found
    slots = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (*held.new["key"].shape[:2], count))
    where = _places(held, jnp.zeros_like(held.start))
    read = {name: host_memory.fetched(host_memory.read_on(held.kv[name], where, count)) for name in held.new}
    return found | _with_new(held, read, slots)


def _places(held: Held, slot: jax.Array) -> jax.Array:
    """`host_memory.places` of a slot [B] of each row, for all heads."""
    B, K = held.new["key"].shape[:2]
    slots = jnp.broadcast_to(slot[:, None, None], (B, K, 1))
    return host_memory.places(held.kv["key"], held.layer, jnp.arange(B, dtype=jnp.int32), slots)


def _with_new(held: Held, found: KV, slots: jax.Array) -> KV:
    """Entries [B, K, S', C] that the cache had before the pass in slots [B, K, S'], and in its place those of it."""
    index = slots - held.start[:, None, None]
    count = held.new["key"].shape[2]
    is_new = ((index >= 0) & (index < count))[..., None]
    index = jnp.clip(index, 0, count - 1)[..., None]
    return {name: jnp.where(is_new, jnp.take_along_axis(held.new[name], index, axis=2), x) for name, x in found.items()}


def written(held: Held, output: jax.Array) -> KV:
    """The cache's arrays with the entries of the pass.

    Args:
        held: The layer.
        output: What was computed with all that was read, in floating point.
    """
    if not held.new:
        return held.kv
    # XLA writes in place only behind all reading. The slot depends on the output, by a sum with 0 that XLA does not
    # simplify; an optimization barrier is gone before XLA:CPU decides what is copied.
    bits = jax.lax.bitcast_convert_type(output.reshape(-1)[0].astype(jnp.float32), jnp.int32)
    where = _places(held, held.start + jnp.minimum(bits & jnp.int32(0x7FFFFFFF), 0))
    return {**held.kv, **{name: host_memory.write_on(held.kv[name], where, x) for name, x in held.new.items()}}
