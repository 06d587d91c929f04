"""Self-attention over the tokens of a forward pass and those in its cache."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from garrulax.kernels import attention, decode
from garrulax.kernels.mask import Mask
from garrulax.layers import quantised
from garrulax.layers.cache import KV, extend
from garrulax.layers.call import Call
from garrulax.layers.kept_attention import attend_to_kept
from garrulax.layers.layer_windows import attend_by_layer
from garrulax.layers.rope import Rotary
from garrulax.layers.shifted_attention import shifted_attention


def cached_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    call: Call,
    kv: KV | None,
    layer: jax.Array,
    *,
    mask: Mask | None = None,
    rotary: Rotary | None = None,
    bias: Callable[[Mask], jax.Array] | None = None,
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
        rotary: Rotation of queries and keys by their positions, if the model has one.
        bias: What is added to the scores, [B, H, T or 1, S], as a function of the mask, whose stream `position` it may
            read.
        **options: Further arguments of `kernels.attention` (scale, softcap, alibi, dropout, ...).

    Returns:
        [B, T, H, C], and the cache's arrays with the new keys and values in them.
    """
    mask = mask or call.mask
    if kv is not None and call.room is not None:
        return attend_to_kept(query, key, value, call, kv, layer, mask, rotary, bias, options)
    if rotary is not None:
        query, key = rotary(query), rotary(key)
    if call.context_parallel is not None:
        options["context_parallel"] = call.context_parallel
    if call.group:
        if kv is not None:
            raise ValueError("shifted attention (group) is for training: leave the cache out")
        return shifted_attention(query, key, value, mask, call.group, _with_bias(options, bias, mask)), None
    if kv is None or call.slot is None:
        return attention(query, key, value, mask=mask, **_with_bias(options, bias, mask)), kv

    def attend(stored: KV, mask: Mask) -> jax.Array:
        return _attend(query, stored, mask, _with_bias(options, bias, mask))

    if call.window_slot is not None:
        return attend_by_layer(attend, key, value, call, kv, layer, mask)
    kv, stored = extend(kv, layer, key, value, call.slot)
    return attend(stored, mask), kv


def _with_bias(options: dict[str, Any], bias: Callable[[Mask], jax.Array] | None, mask: Mask) -> dict[str, Any]:
    return options if bias is None else {**options, "bias": bias(mask)}


def _attend(query: jax.Array, stored: KV, mask: Mask, options: dict[str, Any]) -> jax.Array:
    """Attention [B, T, H, C] of a pass to the cache's arrays of its layer."""
    if "key_scale" in stored and _few(query, options):
        few = {name: x for name, x in options.items() if not name.startswith(("dropout", "context_parallel"))}
        few |= {f"{name}_scales": _by_head(stored[f"{name}_scale"], len(query)) for name in ("key", "value")}
        return decode.decode(query, stored["key"], stored["value"], mask=mask, **few)
    # A few queries take what is stored as it is; for many, a cache of a wider dtype is converted once.
    dtype = stored["key"].dtype if "key_scale" not in stored and _few(query, options) else query.dtype
    key, value = (_tokens_first(stored, name, dtype) for name in ("key", "value"))
    return attention(query.astype(dtype), key, value, mask=mask, **options).astype(query.dtype)


def _few(query: jax.Array, options: dict[str, Any]) -> bool:
    """Whether `kernels.decode` computes this request, which reads int8 as it is."""
    without = options.get("bias") is None and options.get("dropout_key") is None
    return without and query.shape[1] <= decode.MAX_QUERIES


def _by_head(scale: jax.Array, batch: int) -> jax.Array:
    """Scales [B, K, S] of [B, K, S, 1] or [B·K, S, 1]."""
    return scale.reshape(batch, -1, scale.shape[-2])


def _tokens_first(stored: KV, name: str, dtype: Any) -> jax.Array:
    """Keys or values of the cache in `dtype`: [B, S, K, C], or [B·K, S, C] where the cache keeps them so."""
    x = quantised.restore(stored[name], stored.get(f"{name}_scale"), dtype)
    return x if x.ndim == 3 else x.swapaxes(1, 2)


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
