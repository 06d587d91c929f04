"""Attention behind one function that picks the implementation."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from garrulax.kernels import asked, decode
from garrulax.kernels.call import Implementation, Operands, Options
from garrulax.kernels.mask import Mask
from garrulax.kernels.picking import Table
from garrulax.kernels.relative import Relative
from garrulax.kernels.sharded import Sharded

IMPLEMENTATIONS = {
    "pallas_tpu": "garrulax.kernels.tpu:Kernel",
    "pallas_gpu": "garrulax.kernels.gpu:GPUAttention",
    "cudnn": "garrulax.kernels.cudnn:Cudnn",
    "xla": "garrulax.kernels.xla:Chunked",
    "dense": "garrulax.kernels.dense:Dense",
}
PICKED = {  # the best first
    "cpu": ("xla",),
    "tpu": ("pallas_tpu", "xla"),
    "gpu": ("cudnn", "xla"),
    "gpu sm_90": ("cudnn", "pallas_gpu", "xla"),
    **{f"gpu sm_{older}": ("xla",) for older in (60, 61, 70, 75)},  # cuDNN's fused attention begins with sm_80
}


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: Mask | Sequence[Mask] | None = None,
    bias: jax.Array | None = None,
    alibi: jax.Array | None = None,
    relative: Relative | None = None,
    sinks: jax.Array | None = None,
    scale: float | jax.Array | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
    implementation: str | Implementation | None = None,
) -> jax.Array:
    """softmax(scale * query key^T + bias, where mask) value, with the softmax in at least float32.

    query: [B, T, H, C]. key, value: [B, S, K, C], or folded as [B·K, S, C], as the cache keeps them; H a multiple of K
    (grouped queries: query head h reads key/value head h // (H / K)). Values may have a width of their own.
    mask: which pairs attend; None is all. Several masks are for as many equal groups of consecutive heads.
    bias: broadcastable to [B, H, T, S], added after the scaling; a dimension of size 1 is never spread out in memory.
    alibi: slopes [H], constants; slope * (key position - query position) is added after the scaling, from the mask's
    stream `position` (Press et al. 2022, arXiv 2108.12409).
    relative: a learned bias in steps of that distance (`relative.t5`).
    sinks: [H], learned; exp(sink) is added to what a query's exponentials are divided by (gpt-oss).
    scale: default 1 / sqrt(C); an array is multiplied into the query, in its dtype.
    softcap: scores become softcap * tanh(scores / softcap), before anything is added.
    dropout: rate on the attention probabilities; used only where dropout_key is given.
    implementation: a name in `IMPLEMENTATIONS` or an object like theirs; None picks the fastest that can, which is one
    of `kernels.decode` for a few queries over more keys.

    Returns [B, T, H, Cv] in the dtype of the query. A query that may attend to nothing gets zeros, and zero gradients.
    Raises ValueError, naming the shapes, where they do not fit, for a stream that the mask reads and is not given, for
    an unknown implementation, and for one that cannot compute the request, with the reason; TypeError for integers and
    for queries, keys and values of different dtypes.
    """
    cache = key, value
    key, value = _unfolded(key, query), _unfolded(value, query)
    _check(query, key, value)
    plain = implementation is None and bias is None and dropout_key is None
    if plain and not isinstance(mask, Sequence) and decode.suits(query, key, value):
        return decode.decode(
            query,
            *(x if x.ndim == 3 else x.swapaxes(1, 2) for x in cache),
            mask=mask,
            alibi=alibi,
            relative=relative,
            sinks=sinks,
            scale=scale,
            softcap=softcap,
        )
    if isinstance(mask, Sequence):
        arrays = (query, key, value, mask, bias, alibi, relative, sinks, dropout_key)
        return _by_heads(*arrays, scale=scale, softcap=softcap, dropout=dropout, implementation=implementation)
    options, operands = request(
        query, key, value, mask, bias, alibi, relative, sinks, scale, softcap, dropout, dropout_key
    )
    return TABLE.pick(implementation, options, operands)(options, operands)


def request(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: Mask | None,
    bias: jax.Array | None,
    alibi: jax.Array | None,
    relative: Relative | None,
    sinks: jax.Array | None,
    scale: float | jax.Array | None,
    softcap: float | None,
    dropout: float,
    dropout_key: jax.Array | None,
) -> tuple[Options, Operands]:
    """The request in the form that implementations take; arguments as of `attention`, and checked."""
    B, T, H, _ = query.shape
    S = key.shape[1]
    reads = asked.streams(mask, (B, T), (B, S), alibi is not None or relative is not None)
    asked.check_heads(H, alibi, relative, sinks)
    if bias is not None and (
        bias.ndim != 4 or any(n not in (1, m) for n, m in zip(bias.shape, (B, H, T, S), strict=True))
    ):
        raise ValueError(f"bias {bias.shape} does not broadcast to {(B, H, T, S)}")
    if bias is not None and not jnp.issubdtype(bias.dtype, jnp.floating):
        raise TypeError(f"bias is {bias.dtype}: it is added to the scores; who attends to whom is the mask's to say")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is a rate in [0, 1), not {dropout}")
    seeds = jax.random.bits(dropout_key, (B, H), jnp.uint32) if dropout and dropout_key is not None else None
    query, options = asked.scaled(query, mask, relative, scale, softcap, 0.0 if seeds is None else dropout)
    if bias is not None and bias.shape[3] != S:
        bias = jnp.broadcast_to(bias, (*bias.shape[:3], S))
    return options, Operands(
        query=query,
        key=key,
        value=value,
        query_streams=reads[0],
        key_streams=reads[1],
        bias=bias,
        slopes=asked.slopes(alibi),
        steps=None if relative is None else relative.steps,
        seeds=seeds,
        sinks=sinks,
    )


def on_mesh(implementation: Implementation) -> Implementation:
    """The implementation, on every device of a mesh in Explicit mode where the operands are on one."""
    return implementation if isinstance(implementation, Sharded) else Sharded(implementation)


TABLE = Table("attention", IMPLEMENTATIONS, PICKED, on_mesh)


def _by_heads(query, key, value, masks, bias, alibi, relative, sinks, dropout_key, **options):
    """Each mask for its group of heads: as many calls, their outputs side by side."""
    H, K, n = query.shape[2], key.shape[2], len(masks)
    if not n or H % n or (K % n and n % K):
        raise ValueError(f"{n} masks do not divide {H} query heads over {K} key/value heads into equal groups")

    def part(x, i, axis=0, count=n):
        if x is None or x.shape[axis] == 1:
            return x
        size = x.shape[axis] // count
        return jax.lax.slice_in_dim(x, i * size, (i + 1) * size, axis=axis)

    outputs = [
        attention(
            part(query, i, 2),
            *(part(x, i * min(n, K) // n, 2, min(n, K)) for x in (key, value)),
            mask=mask,
            bias=part(bias, i, 1),
            alibi=part(alibi, i),
            relative=None if relative is None else dataclasses.replace(relative, steps=part(relative.steps, i, 1)),
            sinks=part(sinks, i),
            dropout_key=None if dropout_key is None else jax.random.fold_in(dropout_key, i),
            **options,
        )
        for i, mask in enumerate(masks)
    ]
    return jnp.concatenate(outputs, axis=2)


def _unfolded(x: jax.Array, query: jax.Array) -> jax.Array:
    """[B, S, K, C] of keys or values [B·K, S, C]; others as they are."""
    if x.ndim != 3 or x.shape[0] % query.shape[0]:
        return x
    return x.reshape(query.shape[0], -1, *x.shape[1:]).swapaxes(1, 2)


def _check(query: jax.Array, key: jax.Array, value: jax.Array) -> None:
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4:
            raise ValueError(f"attention takes [batch, length, heads, width]: {shapes}")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"attention takes floating-point arrays: {name} is {x.dtype}")
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(f"attention takes one dtype: query {query.dtype}, key {key.dtype}, value {value.dtype}")
    if 0 in query.shape or 0 in key.shape or 0 in value.shape:
        raise ValueError(f"attention over nothing: {shapes}")
    if key.shape[:-1] != value.shape[:-1] or query.shape[0] != key.shape[0] or query.shape[-1] != key.shape[-1]:
        raise ValueError(f"attention shapes disagree: {shapes}")
    if query.shape[2] % key.shape[2]:
        raise ValueError(f"{query.shape[2]} query heads are not a multiple of {key.shape[2]} key/value heads")
