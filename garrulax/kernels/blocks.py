"""Blocks of pairs: cutting a request into whole blocks, and finding those in which anybody attends."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from garrulax.kernels.call import Operands, Options
from garrulax.kernels.mask import Bounds, KRange, Rule, Streams

LIVE = "live"  # key stream of requests that were filled up: 1 for tokens, 0 behind them


def bounds(stream: jax.Array, size: int) -> Bounds:
    """What is known of int32 [B, n·size] in each block of `size` tokens: four arrays [B, n]."""
    x = stream.reshape(stream.shape[0], -1, size)
    return Bounds(
        x.min(axis=2),
        x.max(axis=2),
        jax.lax.reduce(x, np.int32(-1), jax.lax.bitwise_and, (2,)),
        jax.lax.reduce(x, np.int32(0), jax.lax.bitwise_or, (2,)),
    )


def block_map(
    rule: Rule, query: Streams, key: Streams, block_q: int, block_k: int, shape: tuple[int, int, int]
) -> tuple[jax.Array, jax.Array]:
    """(any, all) of every block, bool of `shape` = (batch, rows, columns) of blocks. `any` False: no pair of it
    attends; `all` True: every one does. The streams have rows·block_q and columns·block_k tokens."""
    q = {name: Bounds(*(x[:, :, None] for x in bounds(s, block_q))) for name, s in query.items()}
    k = {name: Bounds(*(x[:, None, :] for x in bounds(s, block_k))) for name, s in key.items()}
    some, every = rule.classify(q, k)
    return jnp.broadcast_to(some, shape), jnp.broadcast_to(every, shape)


def fill_up(options: Options, operands: Operands, block_q: int, block_k: int) -> tuple[Options, Operands]:
    """The request with lengths that are multiples of the blocks. Keys behind the end are seen by nobody; queries
    behind the end see what the last query sees, so that the bounds of blocks stay tight: cut them off."""
    more_q, more_k = -operands.query.shape[1] % block_q, -operands.key.shape[1] % block_k
    if not more_q and not more_k:
        return options, operands
    key_streams = {name: fill(s, more_k, mode="edge") for name, s in operands.key_streams.items()}
    if more_k:
        key_streams[LIVE] = fill(jnp.ones(operands.key.shape[:2], jnp.int32), more_k)
        options = dataclasses.replace(options, rule=options.rule & KRange(LIVE, 1, 1))
    bias = operands.bias
    if bias is not None:
        bias = fill(fill(bias, more_q if bias.shape[2] > 1 else 0, 2), more_k, 3)
    return options, dataclasses.replace(
        operands,
        query=fill(operands.query, more_q),
        key=fill(operands.key, more_k),
        value=fill(operands.value, more_k),
        query_streams={name: fill(s, more_q, mode="edge") for name, s in operands.query_streams.items()},
        key_streams=key_streams,
        bias=bias,
    )


def fill(x: jax.Array, more: int, axis: int = 1, mode: str = "constant") -> jax.Array:
    """x with `more` entries behind its axis: zeros, or copies of the last (mode "edge")."""
    return jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)], mode=mode) if more else x
