"""Attention as XLA compiles it from the dense formula: any platform, any mask; memory grows with T x S."""

import jax
import jax.numpy as jnp

from garrulax.kernels.mask import Mask


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: Mask | None,
    bias: jax.Array | None,
    alibi: jax.Array | None,
    scale: float | jax.Array,
    softcap: float | None,
    dropout: float,
    dropout_key: jax.Array | None,
) -> jax.Array:
    """The contract of `kernels.attention`; heads are split as [K, G], G query heads to each key/value head."""
    B, T, H, C = query.shape
    S, K = key.shape[1], key.shape[2] if key.ndim == 4 else key.shape[0] // B
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    q = query.reshape(B, T, K, H // K, C)
    scores = _scores(q, key, dtype) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        bias = jnp.broadcast_to(bias.astype(dtype), (B, H, T, S))
        scores += bias.reshape(B, K, H // K, T, S)
    if alibi is not None and mask is not None:
        distance = mask.key_streams()["position"][:, None, :] - mask.query["position"][:, :, None]
        scores += alibi.astype(dtype).reshape(K, H // K, 1, 1) * distance[:, None, None].astype(dtype)
    weights = _exponentials(scores, None if mask is None else mask.dense()[:, None, None])
    total = jnp.sum(weights, axis=-1)
    if dropout and dropout_key is not None:
        kept = jax.random.bernoulli(dropout_key, 1 - dropout, weights.shape)
        weights = jnp.where(kept, weights / (1 - dropout), 0)
    out = _weighted(weights.astype(value.dtype), value, dtype)
    total = jnp.where(total == 0, 1, total)  # a query that sees nothing gets zeros
    out = out / total.transpose(0, 3, 1, 2)[..., None]
    return out.reshape(B, T, H, value.shape[-1]).astype(query.dtype)


def _scores(q: jax.Array, key: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """[B, K, G, T, S] of q [B, T, K, G, C] and key [B, S, K, C] or [B·K, S, C]."""
    if key.ndim == 4:
        return jnp.einsum("BTKGC,BSKC->BKGTS", q, key, preferred_element_type=dtype)
    B, T, K, G, C = q.shape
    q = q.transpose(0, 2, 3, 1, 4).reshape(B * K, G * T, C)
    return jnp.einsum("NMC,NSC->NMS", q, key, preferred_element_type=dtype).reshape(B, K, G, T, -1)


def _weighted(weights: jax.Array, value: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """[B, T, K, G, C] of weights [B, K, G, T, S] and value [B, S, K, C] or [B·K, S, C]."""
    if value.ndim == 4:
        return jnp.einsum("BKGTS,BSKC->BTKGC", weights, value, preferred_element_type=dtype)
    B, K, G, T, S = weights.shape
    out = jnp.einsum("NMS,NSC->NMC", weights.reshape(B * K, G * T, S), value, preferred_element_type=dtype)
    return out.reshape(B, K, G, T, -1).transpose(0, 3, 1, 2, 4)


def _exponentials(scores: jax.Array, seen: jax.Array | None) -> jax.Array:
    """exp(scores - their row's maximum), 0 where not seen.

    Dividing by their sum only after the product with the values leaves the backward pass without a reduction over
    T x S: half of attention's time on XLA:CPU.
    """
    if seen is None:
        return jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    lowest = jnp.finfo(scores.dtype).min
    scores = jnp.where(seen, scores, lowest)
    top = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    return jnp.exp(scores - jnp.where(top == lowest, 0, top))
