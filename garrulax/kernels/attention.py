"""Attention behind one function that picks the implementation."""

import jax
import jax.numpy as jnp

from garrulax.kernels import xla
from garrulax.kernels.mask import Mask

IMPLEMENTATIONS = {"xla": xla.attention}


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: Mask | None = None,
    bias: jax.Array | None = None,
    alibi: jax.Array | None = None,
    scale: float | jax.Array | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """softmax(scale * query key^T + bias, where mask) value, with the softmax in at least float32.

    query: [B, T, H, C]. key, value: [B, S, K, C], or folded as [B·K, S, C], as the cache keeps them; H a multiple of K
    (grouped queries: query head h reads key/value head h // (H / K)). mask: which pairs attend; None is all.
    bias: broadcastable to [B, H, T, S], added after the scaling. alibi: slopes [H]; slope * (key position - query
    position) is added after the scaling, from the mask's stream `position` (Press et al. 2022, arXiv 2108.12409).
    scale: default 1 / sqrt(C). softcap: scores become softcap * tanh(scores / softcap), before bias and alibi.
    dropout: rate on the attention probabilities; used only where dropout_key is given.
    implementation: "xla"; None picks.

    Returns [B, T, H, C] in the dtype of the query. A query that may attend to nothing gets zeros, and zero gradients.
    Raises ValueError, naming the shapes, where they do not fit, and for an unknown implementation; TypeError for
    integer inputs.
    """
    _check(query, key, value, mask)
    if alibi is not None:
        _check_alibi(alibi, query, mask)
    name = implementation or "xla"
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"unknown attention implementation {name!r}: choose from {', '.join(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[name](
        query,
        key,
        value,
        mask=mask,
        bias=bias,
        alibi=alibi,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        softcap=softcap,
        dropout=dropout,
        dropout_key=dropout_key,
    )


def _check_alibi(slopes: jax.Array, query: jax.Array, mask: Mask | None) -> None:
    if slopes.shape != (query.shape[2],):
        raise ValueError(f"alibi has slopes {slopes.shape} for {query.shape[2]} heads")
    if mask is None or "position" not in mask.query or "position" not in mask.key_streams():
        raise ValueError("alibi needs a mask with the stream 'position' of queries and keys")


def _check(query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask | None) -> None:
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4 and (x is query or x.ndim != 3):
            raise ValueError(f"attention takes [batch, length, heads, width]: {shapes}")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"attention takes floating-point arrays: {name} is {x.dtype}")
    if 0 in query.shape or 0 in key.shape:
        raise ValueError(f"attention over nothing: {shapes}")
    folded = key.ndim == 3
    rows = key.shape[0] % query.shape[0] if folded else key.shape[0] - query.shape[0]
    if key.shape[:-1] != value.shape[:-1] or rows or query.shape[-1] != key.shape[-1]:
        raise ValueError(f"attention shapes disagree: {shapes}")
    heads = key.shape[0] // query.shape[0] if folded else key.shape[2]
    if query.shape[2] % heads:
        raise ValueError(f"{query.shape[2]} query heads are not a multiple of {heads} key/value heads")
    if mask is None:
        return
    for side, streams, length in (("query", mask.query, query.shape[1]), ("key", mask.key_streams(), key.shape[1])):
        for name, s in streams.items():
            if s.shape != (query.shape[0], length):
                raise ValueError(f"{side} stream {name!r} has shape {s.shape}, not {(query.shape[0], length)}")
