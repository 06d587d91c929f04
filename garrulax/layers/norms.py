"""Normalisation over the last axis, computed in at least float32 and returned in the input's dtype."""

import jax
import jax.numpy as jnp

from garrulax.core.dtypes import at_least_float32
from garrulax.core.einsum import gather
from garrulax.core.leaf import Leaf
from garrulax.core.sums import row_mean, row_sum


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """(x - mean) / sqrt(variance + eps) * scale + bias (Ba et al. 2016). x: [..., D]; scale, bias: [D]."""
    dtype = at_least_float32(x.dtype)
    y = x.astype(dtype)
    y = y - row_mean(y)
    y = y * jax.lax.rsqrt(row_mean(y * y) + eps)
    return (y * gather(scale, y) + gather(bias, y)).astype(x.dtype)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps), rounded to x's dtype, then times scale as LLaMA does (Zhang & Sennrich 2019).

    x: [..., D]; scale: [D].
    """
    y = x.astype(at_least_float32(x.dtype))
    y = y * jax.lax.rsqrt(row_mean(y * y) + eps)
    return y.astype(x.dtype) * gather(scale, x)


def unit_norm(x: jax.Array | Leaf, eps: float) -> jax.Array:
    """x / max(|x|, eps), |x| the length of each row. x: [..., D]. A row of zeros stays, with finite gradients."""
    x = x.dense() if isinstance(x, Leaf) else x
    y = x.astype(at_least_float32(x.dtype))
    return (y * jax.lax.rsqrt(jnp.maximum(row_sum(y * y), eps**2))).astype(x.dtype)
