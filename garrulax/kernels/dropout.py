"""Dropout of attention probabilities: a number a pair, made of a seed and the pair's place, so that every
implementation, and the backward pass of each, drops the same ones without storing which."""

import jax
import jax.numpy as jnp


def kept(seed: jax.Array, query: jax.Array, key: jax.Array, rate: float) -> jax.Array:
    """Which probabilities stay: bool of the broadcast shape.

    seed: uint32, of a batch row and head. query, key: int32 indices of the two tokens. rate: the share to drop.
    """
    return kept_in(row(seed, query), key, rate)


def row(seed: jax.Array, query: jax.Array) -> jax.Array:
    """What `kept` needs of a query: uint32. Arguments as of `kept`."""
    return mixed(moved(seed, query))


def kept_in(row: jax.Array, key: jax.Array, rate: float) -> jax.Array:
    """`kept` of what `row` gave for the queries."""
    return mixed(row ^ (key.astype(jnp.uint32) * jnp.uint32(0x85EBCA77))) >= jnp.uint32(round(rate * 2**32))


def moved(seed: jax.Array, start: jax.Array) -> jax.Array:
    """The seed with which a part of the queries that begins at `start` drops what the whole drops with `seed`."""
    return seed + start.astype(jnp.uint32) * jnp.uint32(0x9E3779B1)


def mixed(x: jax.Array) -> jax.Array:
    """x, uint32, with every bit depending on every other (the finalizer of MurmurHash3, A. Appleby, public domain)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
