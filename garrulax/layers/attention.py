"""Self-attention over the tokens of a forward pass and those in its cache."""

from typing import Any

import jax
import numpy as np

from garrulax.kernels import attention
from garrulax.kernels.mask import Mask
from garrulax.layers.cache import KV, extend
from garrulax.layers.call import Call


def cached_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    call: Call,
    kv: KV | None,
    layer: jax.Array,
    *,
    mask: Mask | None = None,
    **options: Any,
) -> tuple[jax.Array, KV | None]:
    """Attention over these tokens and everything cached.

    Args:
        query: [B, T, H, C].
        key: [B, T, K, C], of these tokens.
        value: [B, T, K, C], of these tokens.
        call: The forward pass.
        kv: The cache's arrays; None without a cache.
        layer: int32 scalar, number of the layer.
        mask: Mask of this layer; None is that of the call.
        **options: Further arguments of `kernels.attention` (scale, softcap, bias, dropout, ...).

    Returns:
        [B, T, H, C], and the cache's arrays with the new keys and values in them.
    """
    if kv is not None and call.slot is not None:
        kv, stored = extend(kv, layer, key, value, call.slot)
        key, value = stored["key"].astype(query.dtype), stored["value"].astype(query.dtype)
    return attention(query, key, value, mask=mask or call.mask, **options), kv


def alibi_slopes(heads: int) -> np.ndarray:
    """Slopes of ALiBi, one a head: 2^(-8i/n) for i = 1 .. n, where n is the greatest power of two up to `heads`.

    The other heads have every second slope of twice as many heads (Press et al. 2022, arXiv 2108.12409;
    ofirpress/attention_with_linear_biases).

    Returns:
        float64 [heads].
    """
    n = 1 << (heads.bit_length() - 1)
    more = 2.0 ** (-4 / n * np.arange(1, 2 * n, 2))
    return np.concatenate([2.0 ** (-8 / n * np.arange(1, n + 1)), more[: heads - n]])
