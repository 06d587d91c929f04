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
    scale: float | jax.Array,
    softcap: float | None,
    dropout: float,
    dropout_key: jax.Array | None,
) -> jax.Array:
    """The contract of `kernels.attention`; heads are split as [K, G], G query heads to each key/value head."""
    B, T, H, C = query.shape
    S, K = key.shape[1], key.shape[2]
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    q = query.reshape(B, T, K, H // K, C)
    scores = jnp.einsum("BTKGC,BSKC->BKGTS", q, key, preferred_element_type=dtype) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        bias = jnp.broadcast_to(bias.astype(dtype), (B, H, T, S))
        scores += bias.reshape(B, K, H // K, T, S)
    if mask is None:
        weights = jax.nn.softmax(scores, axis=-1)
    else:
        weights = _masked_softmax(scores, mask.dense()[:, None, None])
    if dropout and dropout_key is not None:
        kept = jax.random.bernoulli(dropout_key, 1 - dropout, weights.shape)
        weights = jnp.where(kept, weights / (1 - dropout), 0)
    out = jnp.einsum("BKGTS,BSKC->BTKGC", weights.astype(value.dtype), value)
    return out.reshape(B, T, H, value.shape[-1])


def _masked_softmax(scores: jax.Array, seen: jax.Array) -> jax.Array:
    """Softmax over the seen keys; a row that sees none is all zeros (a plain softmax would give NaN)."""
    lowest = jnp.finfo(scores.dtype).min
    scores = jnp.where(seen, scores, lowest)
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.where(seen, jnp.exp(scores - top), 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total == 0, 1, total)
