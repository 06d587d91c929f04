"""Blocks of (query, key) pairs: padding a request to whole blocks, and classifying blocks by the mask."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from garrulax.kernels.call import Operands, Options
from garrulax.kernels.mask import KRange, Rule, StreamBounds, Streams

VALID_KEY = "valid_key"  # stream of padded keys: 1 for the keys of the request, 0 for padding


def block_bounds(stream: jax.Array, size: int) -> StreamBounds:
    """Bounds of an int32 stream [B, n·size] in each block of `size` tokens: four arrays [B, n]."""
    x = stream.reshape(stream.shape[0], -1, size)  # [B, n, size]
    return StreamBounds(
        x.min(axis=2),
        x.max(axis=2),
        jax.lax.reduce(x, np.int32(-1), jax.lax.bitwise_and, (2,)),
        jax.lax.reduce(x, np.int32(0), jax.lax.bitwise_or, (2,)),
    )


def block_map(
    rule: Rule, query: Streams, key: Streams, block_q: int, block_k: int, shape: tuple[int, int, int]
) -> tuple[jax.Array, jax.Array]:
    """Classifies all blocks of a request.

    Args:
        rule: The mask's rule.
        query: Streams int32 [B, rows·block_q].
        key: Streams int32 [B, columns·block_k].
        block_q: Queries of a block.
        block_k: Keys of a block.
        shape: (B, rows, columns).

    Returns:
        (any, all), bool of that shape. Where `any` is False no pair of the block attends; where `all` is True every
        pair does.
    """
    q = {name: StreamBounds(*(x[:, :, None] for x in block_bounds(s, block_q))) for name, s in query.items()}
    k = {name: StreamBounds(*(x[:, None, :] for x in block_bounds(s, block_k))) for name, s in key.items()}
    some, every = rule.classify(q, k)
    return jnp.broadcast_to(some, shape), jnp.broadcast_to(every, shape)


def pad_to_blocks(options: Options, operands: Operands, block_q: int, block_k: int) -> tuple[Options, Operands]:
    """Pads a request to lengths that are multiples of the blocks.

    Padding keys are masked for every query. Padding queries repeat the streams of the last query, which leaves the
    bounds of its block as they are; the caller cuts their output off.

    Args:
        options: Static part of the request.
        operands: Arrays of the request.
        block_q: Queries of a block.
        block_k: Keys of a block.

    Returns:
        The padded request.
    """
    more_q, more_k = -operands.query.shape[1] % block_q, -operands.key.shape[1] % block_k
    if not more_q and not more_k:
        return options, operands
    key_streams = {name: pad_axis(s, more_k, mode="edge") for name, s in operands.key_streams.items()}
    if more_k:
        key_streams[VALID_KEY] = pad_axis(jnp.ones(operands.key.shape[:2], jnp.int32), more_k)
        options = dataclasses.replace(options, rule=options.rule & KRange(VALID_KEY, 1, 1))
    bias = operands.bias
    if bias is not None:
        bias = pad_axis(pad_axis(bias, more_q if bias.shape[2] > 1 else 0, 2), more_k, 3)
    return options, dataclasses.replace(
        operands,
        query=pad_axis(operands.query, more_q),
        key=pad_axis(operands.key, more_k),
        value=pad_axis(operands.value, more_k),
        query_streams={name: pad_axis(s, more_q, mode="edge") for name, s in operands.query_streams.items()},
        key_streams=key_streams,
        bias=bias,
    )


def pad_axis(x: jax.Array, more: int, axis: int = 1, mode: str = "constant") -> jax.Array:
    """x with `more` entries after the last of an axis: zeros, or copies of the last one (mode "edge")."""
    return jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)], mode=mode) if more else x
