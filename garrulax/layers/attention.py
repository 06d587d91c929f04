"""Self-attention over the tokens of this call and those in the cache."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from garrulax.kernels import attention, masks
from garrulax.layers.cache import KV, Cache, View, extend


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    view: View,
    kv: KV | None,
    layer: jax.Array,
    **options: Any,
) -> tuple[jax.Array, KV | None]:
    """Attention of query [B, T, H, C] over key and value [B, T, K, C] of these tokens and everything cached.

    options go to `kernels.attention` (scale, softcap, bias, dropout, ...). Returns [B, T, H, C] and the cache arrays
    with this layer's new keys and values in them.
    """
    if kv is not None and view.at is not None:
        kv, past = extend(kv, layer, key, value, view.at)
        key, value = past["key"].astype(query.dtype), past["value"].astype(query.dtype)
    key, value = _spread(key, query), _spread(value, query)
    return attention(query, key, value, mask=view.mask, **options), kv


def _spread(x: jax.Array, query: jax.Array) -> jax.Array:
    """Keys or values [B, S, K, C], heads repeated where a mesh splits the query heads more ways than it can K: every
    device then holds those that its queries read."""
    sharding = jax.typeof(query).sharding
    if sharding.mesh.empty or not sharding.mesh.are_all_axes_explicit or x.ndim != 4:
        return x
    (batch, _, axes, _), (_, _, own, _) = sharding.spec, jax.typeof(x).sharding.spec
    if axes == own or x.shape[2] == 1:
        return x
    names = axes if isinstance(axes, tuple) else () if axes is None else (axes,)
    ways = math.prod(sharding.mesh.shape[name] for name in names)
    B, S, K, C = x.shape
    heads = math.lcm(K, ways)
    x = jnp.broadcast_to(x[:, :, :, None], (B, S, K, heads // K, C)).reshape(B, S, heads, C)
    return jax.sharding.reshard(x, jax.P(batch, None, axes, None))


def within(view: View, reach: jax.Array | int, stride: int = 0) -> View:
    """The view with its mask narrowed to a window, by `kernels.masks.within`."""
    return dataclasses.replace(view, mask=masks.within(view.mask, reach, stride))


def alibi_slopes(heads: int) -> np.ndarray:
    """Slopes of ALiBi, float64 [heads]: 2^(-8i/n) for i = 1 .. n, n the power of two below; beyond n heads, every other
    slope of twice as many heads (Press et al. 2022, arXiv 2108.12409; ofirpress/attention_with_linear_biases)."""
    n = 1 << (heads.bit_length() - 1)
    more = 2.0 ** (-4 / n * np.arange(1, 2 * n, 2))
    return np.concatenate([2.0 ** (-8 / n * np.arange(1, n + 1)), more[: heads - n]])


def default_positions(tokens: jax.Array, cache: Cache | None) -> jax.Array:
    """0, 1, 2, ... for tokens [B, T], counted on from what is in the cache: int32 [B, T]."""
    start = 0 if cache is None else cache.used
    return jnp.zeros_like(tokens, jnp.int32) + jnp.arange(tokens.shape[1], dtype=jnp.int32) + start
