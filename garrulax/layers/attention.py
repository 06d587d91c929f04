"""Self-attention over the tokens of this call and those in the cache."""

import dataclasses
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
    return attention(query, key, value, mask=view.mask, **options), kv


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
