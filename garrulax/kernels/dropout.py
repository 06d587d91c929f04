"""Dropout of attention probabilities by hashing.

Whether a pair is dropped is a hash of a seed and the places of query and key. So every implementation, and its
backward pass, drops the same pairs, without storing which.
"""

import jax
import jax.numpy as jnp


def keep_mask(seed: jax.Array, query: jax.Array, key: jax.Array, rate: float) -> jax.Array:
    """Which probabilities are kept.

    Args:
        seed: uint32, of a batch row and head.
        query: int32 indices of the queries.
        key: int32 indices of the keys.
        rate: Share of the probabilities to drop.

    Returns:
        bool, of the shape to which the arguments broadcast.
    """
    return keep_mask_from_hash(hash_query(seed, query), key, rate)


def hash_query(seed: jax.Array, query: jax.Array) -> jax.Array:
    """The part of `keep_mask` that depends on the query alone: uint32. A kernel computes it once a row."""
    return mix(shift_seed(seed, query))


def keep_mask_from_hash(hashed: jax.Array, key: jax.Array, rate: float) -> jax.Array:
    """`keep_mask` from the result of `hash_query`."""
    return mix(hashed ^ (key.astype(jnp.uint32) * jnp.uint32(0x85EBCA77))) >= jnp.uint32(round(rate * 2**32))


def shift_seed(seed: jax.Array, start: jax.Array) -> jax.Array:
    """The seed for a slice of the queries that begins at index `start`: it drops the same pairs there as `seed` does
    for the whole sequence."""
    return seed + start.astype(jnp.uint32) * jnp.uint32(0x9E3779B1)


def mix(x: jax.Array) -> jax.Array:
    """A hash of uint32 x in which every output bit depends on every input bit.

    The finalizer of MurmurHash3 (A. Appleby, public domain).
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
