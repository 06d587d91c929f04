"""Attention in models of which only some layers have a window: each layer has the cache of its kind.

Letters: B rows, T tokens, K key/value heads, S slots, C width of a head.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from garrulax.kernels.mask import Mask
from garrulax.layers.cache import KV, extend, layer_of
from garrulax.layers.cache_kinds import OF_WINDOW, LayerWindows
from garrulax.layers.call import Call


def attend_by_layer(
    attend: Callable[[KV, Mask], jax.Array],
    key: jax.Array,
    value: jax.Array,
    call: Call,
    kv: KV,
    layer: jax.Array,
    mask: Mask,
) -> tuple[jax.Array, KV]:
    """Writes the keys and values of a pass into the cache of the layer's kind, and attends to it.

    Args:
        attend: Attention of the pass to the arrays of a layer, under a mask.
        key: [B, T, K, C].
        value: [B, T, K, C].
        call: The forward pass.
        kv: The cache's arrays: those of this layer, or the stacks of both kinds.
        layer: int32 scalar, number of the layer.
        mask: Mask of this layer over the slots of layers without a window.

    Returns:
        What `attend` returns, and the arrays with the new keys and values.
    """
    assert call.cache is not None
    assert call.slot is not None
    assert call.window_slot is not None
    kind = call.cache.kind
    assert isinstance(kind, LayerWindows)
    whole = {name: x for name, x in kv.items() if not name.startswith(OF_WINDOW)}
    window = {name.removeprefix(OF_WINDOW): x for name, x in kv.items() if name.startswith(OF_WINDOW)}
    window_mask = dataclasses.replace(mask, key=call.cache.window_streams)
    if not window:
        whole, stored = extend(whole, layer, key, value, call.slot)
        return attend(stored, mask), whole
    if not whole:
        window, stored = extend(window, layer, key, value, call.window_slot)
        return attend(stored, window_mask), _named(window)

    windowed, place = jnp.array(kind.windowed)[layer], jnp.array(kind.places, jnp.int32)[layer]
    tokens = jnp.arange(key.shape[1], dtype=jnp.int32)[None]
    slots = call.slot[:, None] + tokens  # [B, T]
    window_slots = call.window_slot if call.window_slot.ndim == 2 else call.window_slot[:, None]
    # Both stacks are written, one of them behind its end, which leaves it as it is: as results of a conditional they
    # would be copied.
    slots = jnp.where(windowed, whole["key"].shape[-2], slots)
    window_slots = jnp.where(windowed, window_slots, window["key"].shape[-2])
    whole, _ = extend(whole, place, key, value, slots)
    window, _ = extend(window, place, key, value, window_slots)

    def in_layer(kv: KV, mask: Mask) -> Callable[[], jax.Array]:
        return lambda: attend({name: layer_of(x, place) for name, x in kv.items()}, mask)

    out = jax.lax.cond(windowed, in_layer(window, window_mask), in_layer(whole, mask))
    return out, {**whole, **_named(window)}


def _named(window: KV) -> KV:
    return {OF_WINDOW + name: x for name, x in window.items()}
