"""`attention`: one function for every mask and platform, which picks the implementation."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from garrulax.kernels import arguments, decode
from garrulax.kernels.call import Implementation, Operands, Options
from garrulax.kernels.mask import Mask
from garrulax.kernels.picking import Registry
from garrulax.kernels.relative import Relative
from garrulax.kernels.sequence import check_strategy
from garrulax.kernels.sharded import Sharded

IMPLEMENTATIONS = {
    "pallas_tpu": "garrulax.kernels.experimental.tpu:TpuAttention",
    "pallas_gpu": "garrulax.kernels.pallas_gpu:GPUAttention",
    "cudnn": "garrulax.kernels.cudnn:Cudnn",
    "xla": "garrulax.kernels.xla:Chunked",
    "dense": "garrulax.kernels.dense:Dense",
}
PREFERRED = {  # the fastest first
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
    context_parallel: str | None = None,
    implementation: str | Implementation | None = None,
) -> jax.Array:
    """softmax(scale * query key^T + bias, masked) value, with the softmax in at least float32.

    Differentiable in query, key, value, bias, relative, sinks and scale. A query that may attend to no key gets zeros,
    and zero gradients.

    Args:
        query: [B, T, H, C].
        key: [B, S, K, C], or [B·K, S, C] as the cache stores it. H is a multiple of K: query head h reads key/value
            head h // (H / K).
        value: [B, S, K, Cv] or [B·K, S, Cv].
        mask: Which pairs attend; None is all. N masks are for N equal groups of consecutive heads.
        bias: Broadcastable to [B, H, T, S], added after the scaling; a dimension of size 1 is not expanded in memory.
        alibi: Slopes [H], constants; slope * (key position - query position) is added after the scaling, with the
            positions from the mask's stream `position` (Press et al. 2022, arXiv 2108.12409).
        relative: A learned bias in steps of the same distance (`relative.t5`).
        sinks: [H], learned; exp(sink) is added to the denominator of the softmax (gpt-oss).
        scale: Factor on the scores; None is 1 / sqrt(C). An array is multiplied into the query, in the query's dtype.
        softcap: Scores become softcap * tanh(scores / softcap), before anything is added.
        dropout: Rate of dropout on the probabilities; used only with dropout_key.
        dropout_key: Random key.
        context_parallel: On a mesh that splits the sequence, how queries get the keys of other devices: "gather" or
            "ring"; None is the cheaper one (`kernels.sequence`).
        implementation: A name in `IMPLEMENTATIONS` or an object like those; None is the fastest that supports the
            request. For a few queries over more keys that is one of `kernels.decode`.

    Returns:
        [B, T, H, Cv] in the dtype of the query.

    Raises:
        ValueError: For shapes that disagree, a stream that the mask reads and does not have, an unknown implementation,
            or a named one that does not support the request (with the reason).
        TypeError: For integers, or queries, keys and values of different dtypes.

    Example:
        >>> import jax
        >>> from garrulax.kernels import attention, masks
        >>> query, key = jax.numpy.ones((1, 6, 4, 8)), jax.numpy.ones((1, 6, 2, 8))  # 4 heads over 2
        >>> segment = jax.numpy.array([[0, 0, 0, 1, 1, -1]])  # two documents and padding
        >>> attention(query, key, key, mask=masks.packed(segment)).shape
        (1, 6, 4, 8)
    """
    batch = query.shape[0] if query.ndim else 0
    stored = key, value
    key, value = _tokens_first(key, batch), _tokens_first(value, batch)
    _check(query, key, value)
    decodable = implementation is None and bias is None and dropout_key is None
    if decodable and not isinstance(mask, Sequence) and decode.is_decoding(query, key, value):
        return decode.decode(
            query,
            *(x if x.ndim == 3 else x.swapaxes(1, 2) for x in stored),  # [B·K, S, C] or [B, K, S, C]
            mask=mask,
            alibi=alibi,
            relative=relative,
            sinks=sinks,
            scale=scale,
            softcap=softcap,
        )
    if isinstance(mask, Sequence):
        arrays = (query, key, value, mask, bias, alibi, relative, sinks, dropout_key)
        static = {"scale": scale, "softcap": softcap, "dropout": dropout, "context_parallel": context_parallel}
        return _by_heads(*arrays, **static, implementation=implementation)
    options, operands = request(
        query, key, value, mask, bias, alibi, relative, sinks, scale, softcap, dropout, dropout_key
    )
    if context_parallel is not None:
        check_strategy(context_parallel, options)
        options = dataclasses.replace(options, context_parallel=context_parallel)
    return REGISTRY.pick(implementation, options, operands)(options, operands)


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
    """The checked arguments of `attention` as the two records that implementations take."""
    B, T, H, _ = query.shape
    S = key.shape[1]
    if bias is not None and (
        bias.ndim != 4 or any(n not in (1, m) for n, m in zip(bias.shape, (B, H, T, S), strict=True))
    ):
        raise ValueError(f"bias {bias.shape} does not broadcast to {(B, H, T, S)}")
    if bias is not None and not jnp.issubdtype(bias.dtype, jnp.floating):
        raise TypeError(f"bias is {bias.dtype}: it is added to the scores; to forbid pairs, use a mask")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is a rate in [0, 1), not {dropout}")
    seeds = jax.random.bits(dropout_key, (B, H), jnp.uint32) if dropout and dropout_key is not None else None
    rate = 0.0 if seeds is None else dropout
    options, fields = arguments.common(query, (B, S), mask, alibi, relative, sinks, scale, softcap, rate)
    if bias is not None and bias.shape[3] != S:
        bias = jnp.broadcast_to(bias, (*bias.shape[:3], S))
    return options, Operands(key=key, value=value, bias=bias, seeds=seeds, **fields)


def on_mesh(implementation: Implementation) -> Implementation:
    """The implementation, made to run on every device of a mesh if the operands are on one in Explicit mode."""
    return implementation if isinstance(implementation, Sharded) else Sharded(implementation)


REGISTRY = Registry("attention", IMPLEMENTATIONS, PREFERRED, on_mesh)


def _by_heads(query, key, value, masks, bias, alibi, relative, sinks, dropout_key, **options):
    """One call for each mask and its group of heads; their outputs [B, T, H / n, Cv] are concatenated."""
    H, K, n = query.shape[2], key.shape[2], len(masks)
    if not n or H % n or (K % n and n % K):
        raise ValueError(f"{n} masks do not divide {H} query heads over {K} key/value heads into equal groups")

    def part(x, i, axis=0, count=n):  # slice i of `count` equal ones
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


def _tokens_first(x: jax.Array, batch: int) -> jax.Array:
    """Keys or values [B·K, S, C] as [B, S, K, C]; any other array unchanged."""
    unfolded = arguments.unfold(x, batch)
    return x if unfolded is x else unfolded.swapaxes(1, 2)


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
        raise ValueError(f"attention takes no empty arrays: {shapes}")
    if key.shape[:-1] != value.shape[:-1] or query.shape[0] != key.shape[0] or query.shape[-1] != key.shape[-1]:
        raise ValueError(f"attention shapes disagree: {shapes}")
    if query.shape[2] % key.shape[2]:
        raise ValueError(f"{query.shape[2]} query heads are not a multiple of {key.shape[2]} key/value heads")
