"""Dropout (Srivastava et al. 2014)."""

import jax
import jax.numpy as jnp


def dropout(x: jax.Array, rate: float, key: jax.Array | None, shape: tuple[int, ...] | None = None) -> jax.Array:
    """x with a share `rate` of its entries zeroed and the rest divided by 1 - rate; x itself where key is None.

    Args:
        x: Any array.
        rate: Share of the entries that are zeroed, 0 <= rate < 1.
        key: PRNG key; None for no dropout.
        shape: Shape of the random draws, which are broadcast to x: along an axis of size 1 all entries share one draw.
            None is the shape of x.
    """
    if key is None or rate == 0:
        return x
    # The rate's dtype is that of the random numbers: with x64 a Python float would draw others.
    keep = jax.random.bernoulli(key, jnp.float32(1 - rate), shape or x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def split(key: jax.Array | None, count: int) -> list[jax.Array | None]:
    """`count` keys from one, or that many None from None."""
    return [None] * count if key is None else list(jax.random.split(key, count))
