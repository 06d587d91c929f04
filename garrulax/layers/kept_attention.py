"""Attention to what a cache keeps of a text, with positions counted in the cache: attention sinks and blocks.

Keys are stored before the rotary embedding and rotated when they are read, by the position at which the query finds
them. Queries of one pass find the same key at different positions, so they are computed one after another, unless the
text is still so short that all of it is kept.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from garrulax.kernels import attention
from garrulax.kernels.mask import INF, PAD_KEY, Mask, Streams
from garrulax.layers import block_memory, quantised
from garrulax.layers.cache import KV
from garrulax.layers.cache_kinds import Blocks, Sinks, View
from garrulax.layers.call import Call
from garrulax.layers.layer_cache import extend_layer, first_entries, write_back
from garrulax.layers.rope import Rotary


def attend_to_kept(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    call: Call,
    kv: KV,
    layer: jax.Array,
    mask: Mask,
    rotary: Rotary | None,
    bias: Callable[[Mask], jax.Array] | None,
    options: dict[str, Any],
) -> tuple[jax.Array, KV]:
    """`layers.attention.cached_attention` for kinds of cache with `room`. Arguments and result as there."""
    assert call.cache is not None
    assert call.slot is not None
    assert mask.key is not None
    kind, streams, all_keys = call.cache.kind, call.cache.streams, mask.key
    assert isinstance(kind, Sinks | Blocks)
    layer_cache = extend_layer(kv, layer, key, value, call.slot)
    if isinstance(kind, Blocks):
        layer_cache = block_memory.remember(kind, layer_cache, query, call)
    options = {name: x for name, x in options.items() if not name.startswith("dropout")}

    def finder() -> Callable[[jax.Array, jax.Array], tuple[View, KV]]:
        """A function of a query of each row [B, H, C] and their numbers [B], which returns what they attend to."""
        if isinstance(kind, Sinks):
            return lambda q, number: (kind.view(number, streams), layer_cache.stored)
        fetch = block_memory.fetch_for(kind, layer_cache, call.number)
        return lambda q, number: block_memory.look_up(kind, layer_cache, q, number, fetch)

    def one(find: Callable, args: tuple[jax.Array, jax.Array, Streams]) -> jax.Array:
        """The output [B, 1, H, C] of one query of each row: itself [B, H, C], its number [B] and its streams [B]."""
        q, number, own = args
        view, found = find(q, number)
        k, v = (_restored(found, name, q.dtype) for name in ("key", "value"))
        q = q[:, None]  # [B, 1, H, C]
        if rotary is not None:
            q, k = rotary.at(q, view.query[:, None]), rotary.at(k, view.key)
        here = _mask_of(view, own, mask)
        return attention(q, k, v, mask=here, bias=None if bias is None else bias(here), **options)

    def together() -> jax.Array:
        """The output [B, T, H, C] of all queries, of a text whose tokens have the positions that they have in it."""
        kept, keys = layer_cache.stored, all_keys
        if isinstance(kind, Blocks):  # token t is in slot t, and there are no more tokens than positions
            count = min(kind.room, streams["rank"].shape[1])
            kept = first_entries(layer_cache, count)
            keys = {name: x[:, :count] for name, x in keys.items()}
        k, v = (_restored(kept, name, query.dtype) for name in ("key", "value"))
        q, here = query, dataclasses.replace(mask, key=keys)
        if rotary is not None:
            q, k = rotary.at(q, call.number), rotary.at(k, keys["rank"])
        return attention(q, k, v, mask=here, bias=None if bias is None else bias(here), **options)

    def one_by_one() -> jax.Array:
        """The output [B, T, H, C] of all queries."""
        return jax.lax.map(functools.partial(one, finder()), args)[:, :, 0].swapaxes(0, 1)

    queries = {name: stream.T for name, stream in mask.query.items()}  # [T, B]
    args = query.swapaxes(0, 1), call.number.T, queries
    if query.shape[1] == 1:
        out = one(finder(), jax.tree.map(lambda x: x[0], args))
    else:
        out = jax.lax.cond(kind.keeps_whole(call.number[:, -1]).all(), together, one_by_one)
    return out, write_back(layer_cache, out)


def _restored(found: KV, name: str, dtype: Any) -> jax.Array:
    """Keys or values [B, S', K, C] in `dtype`, of those in the cache."""
    return quantised.restore(found[name], found.get(f"{name}_scale"), dtype).swapaxes(1, 2)


def _mask_of(view: View, own: Streams, mask: Mask) -> Mask:
    """The mask of one query of each row over what it finds, in positions of the cache."""
    place = view.query[:, None]
    query = {**{name: stream[:, None] for name, stream in own.items()}, "rank": place, "position": place}
    kept = view.key >= 0
    key = jnp.where(kept, view.key, INF)
    segment = jnp.where(kept, query["segment"], PAD_KEY)
    position = jnp.maximum(view.key, 0)  # finite also where it does not count: a bias is computed of it
    return Mask(query, {"rank": key, "segment": segment, "position": position}, mask.rule)
