"""Keys and values as int8, with a scale for each token and head."""

import jax
import jax.numpy as jnp

LARGEST = 127.0  # of int8, so that zero is in the middle


def store(name: str, x: jax.Array) -> dict[str, jax.Array]:
    """The arrays that keep x [B, K, T, C]: int8 of that shape, and float32 scales [B, K, T, 1].

    An entry is off by at most half a scale, which is the largest entry of its token and head divided by 127.
    """
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / LARGEST
    whole = jnp.round(x / jnp.where(scale == 0, 1, scale))
    return {name: whole.astype(jnp.int8), f"{name}_scale": scale}


def restore(x: jax.Array, scale: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    """The floating-point entries that were stored, in `dtype`; without scales, x itself was."""
    return x.astype(dtype) if scale is None else (x.astype(jnp.float32) * scale).astype(dtype)
