"""Decoding attention: a few new queries of each sequence over its cache, contiguous or in pages."""

import dataclasses
import functools
from typing import Protocol

import jax
import jax.numpy as jnp

from garrulax.kernels import arguments
from garrulax.kernels.call import LogSumExp, Options
from garrulax.kernels.decode.call import DecodeOperands
from garrulax.kernels.decode.xla import XlaDecode
from garrulax.kernels.mask import Mask
from garrulax.kernels.parts import with_sinks
from garrulax.kernels.picking import Registry
from garrulax.kernels.relative import Relative

IMPLEMENTATIONS = {
    "xla": "garrulax.kernels.decode.xla:XlaDecode",
    "pallas_tpu": "garrulax.kernels.experimental.tpu_decode:TpuDecode",
    "pallas_gpu": "garrulax.kernels.decode.gpu:HopperDecoding",
}
PREFERRED = {  # the fastest first; the last one supports every request
    "cpu": ("xla",),
    "tpu": ("pallas_tpu", "xla"),
    "gpu": ("xla",),
    "gpu sm_90": ("pallas_gpu", "xla"),
}


def _slower(name: str, options: Options, operands: DecodeOperands) -> bool:
    """Whether a request is known to take longer with the implementation of this name than with the next one.

    One query of a lone sequence over 32,768 slots: an H100 read 1.89 TB/s with the kernel, 2.14 with XLA.
    """
    o = operands
    contiguous = o.table is None and o.key_scales is None
    return name == "pallas_gpu" and contiguous and o.query.shape[:2] == (1, 1) and o.key.shape[2] >= 2**15


REGISTRY = Registry("decoding attention", IMPLEMENTATIONS, PREFERRED, slower=_slower)
QUANTISED = (jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2)  # dtypes of caches with scales
MAX_QUERIES = 64  # per sequence: one token or a tree of drafts; `attention` computes longer ones as a prompt


class DecodeImplementation(Protocol):
    """One way to compute decoding attention; hashable."""

    def unsupported_reason(self, options: Options, operands: DecodeOperands, /) -> str | None:
        """Why it cannot compute this request (the arrays may be abstract), or None where it can."""

    def __call__(self, options: Options, operands: DecodeOperands, /) -> tuple[jax.Array, jax.Array]:
        """Computes a request without sinks (`sinks` is None: they are added to its results).

        Returns:
            The output [B, T, H, Cv] in the query's dtype, and lse [B, H, T] in at least float32: the natural logarithm
            of the sum of exp(score) over the keys of each query. 0 and -inf for a query that attends to no key.
        """


def decode(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: Mask | None = None,
    table: jax.Array | None = None,
    lengths: jax.Array | None = None,
    key_scales: jax.Array | None = None,
    value_scales: jax.Array | None = None,
    alibi: jax.Array | None = None,
    relative: Relative | None = None,
    sinks: jax.Array | None = None,
    scale: float | jax.Array | None = None,
    softcap: float | None = None,
    implementation: str | DecodeImplementation | None = None,
) -> jax.Array:
    """softmax(scale * query key^T, masked) value over a cache, with the softmax in at least float32.

    Differentiable. A query that may attend to no key gets zeros.

    Args:
        query: [B, T, H, C]: the newest token of each sequence, or T draft tokens.
        key: [B, K, S, C] or folded [B·K, S, C]; with a table, pages [P, K, page, C]. The cache already contains the T
            newest tokens. H is a multiple of K: query head h reads key/value head h // (H / K).
        value: [B, K, S, Cv] or folded [B·K, S, Cv]; with a table, pages [P, K, page, Cv].
        mask: Which pairs attend, with int32 streams [B, T] of the queries and [B, S], or [P, page], of the keys; None
            is all within the lengths.
        table: int32 [B, N], the pages of each sequence in order. Entries beyond its length may hold any number.
        lengths: int32 [B], the number of valid slots of each sequence, its first ones; None is all. The other slots
            may hold anything, also NaN.
        key_scales: float32 [B, K, S] or [P, K, page], the factor of each slot's key; required for caches of int8,
            float8_e4m3fn or float8_e5m2, and not allowed for others.
        value_scales: Likewise for values.
        alibi: As in `kernels.attention`.
        relative: As in `kernels.attention`.
        sinks: As in `kernels.attention`.
        scale: As in `kernels.attention`.
        softcap: As in `kernels.attention`.
        implementation: A name in `IMPLEMENTATIONS` or an object like those; None is the fastest that supports the
            request.

    Returns:
        [B, T, H, Cv] in the dtype of the query.

    Raises:
        ValueError: For shapes that disagree, a stream that the mask reads and does not have, a quantised cache without
            scales, an unknown implementation, or a named one that does not support the request (with the reason).
        TypeError: For an unsupported dtype.
    """
    options, operands = request(
        query, key, value, mask, table, lengths, key_scales, value_scales, alibi, relative, sinks, scale, softcap
    )
    return compute(REGISTRY.pick(implementation, options, operands), options, operands)[0]


def is_decoding(query: jax.Array, key: jax.Array, value: jax.Array) -> bool:
    """Whether `kernels.attention` should call `decode`: for few queries over more keys, on one device.

    Args:
        query: [B, T, H, C].
        key: [B, S, K, C].
        value: [B, S, K, Cv].
    """
    few = query.shape[1] <= MAX_QUERIES and query.shape[1] < key.shape[1]
    return few and key.dtype == value.dtype and jax.typeof(query).sharding.mesh.empty


def compute(
    implementation: DecodeImplementation, options: Options, operands: DecodeOperands
) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, H, Cv] and lse [B, H, T] with the sinks in both, differentiable."""
    sinks, operands = operands.sinks, dataclasses.replace(operands, sinks=None)
    if isinstance(implementation, XlaDecode):  # JAX differentiates it
        out, lse = implementation(options, operands)
    else:
        out, lse = _differentiable(implementation, options, operands)
    out, whole = with_sinks(out, LogSumExp.rounded(lse), sinks)
    return out, whole.value


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _differentiable(
    implementation: DecodeImplementation, options: Options, operands: DecodeOperands
) -> tuple[jax.Array, jax.Array]:
    """The implementation with the derivative of `XlaDecode`: kernels for decoding have no backward pass."""
    # JAX cannot batch a kernel whose list of steps is computed for one call, so `vmap` makes the calls one by one.
    return jax.custom_batching.sequential_vmap(lambda x: implementation(options, x))(operands)


def _forward(implementation, options, operands):
    return _differentiable(implementation, options, operands), operands


def _backward(implementation, options, operands, cotangents):
    return jax.vjp(lambda x: XlaDecode()(options, x), operands)[1](cotangents)


_differentiable.defvjp(_forward, _backward)


def request(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: Mask | None,
    table: jax.Array | None,
    lengths: jax.Array | None,
    key_scales: jax.Array | None,
    value_scales: jax.Array | None,
    alibi: jax.Array | None,
    relative: Relative | None,
    sinks: jax.Array | None,
    scale: float | jax.Array | None,
    softcap: float | None,
) -> tuple[Options, DecodeOperands]:
    """The checked arguments of `decode` as the two records that implementations take."""
    if table is None:
        key, value = (arguments.unfold(x, query.shape[0]) for x in (key, value))
    _check_arrays(query, key, value, table)
    B, (rows, K, S) = query.shape[0], key.shape[:3]
    for name, x, shape in (("table", table, (B, None)), ("lengths", lengths, (B,))):
        if x is not None and (x.ndim != len(shape) or x.shape[0] != B or 0 in x.shape):
            raise ValueError(f"{name} has shape {x.shape} for {B} sequences")
        if x is not None and x.dtype != jnp.int32:
            raise TypeError(f"{name} is {x.dtype}, not int32")
    for name, x in (("key_scales", key_scales), ("value_scales", value_scales)):
        if (x is None) == (key.dtype in QUANTISED):
            raise ValueError(f"a cache of {key.dtype} {'needs' if x is None else 'takes no'} {name}")
        if x is not None and (x.shape != (rows, K, S) or x.dtype != jnp.float32):
            raise ValueError(f"{name} is {x.dtype} {x.shape}, not float32 {(rows, K, S)}")
    options, fields = arguments.common(query, (rows, S), mask, alibi, relative, sinks, scale, softcap)
    return options, DecodeOperands(
        key=key,
        value=value,
        table=table,
        lengths=lengths,
        key_scales=key_scales,
        value_scales=value_scales,
        **fields,
    )


def _check_arrays(query: jax.Array, key: jax.Array, value: jax.Array, table: jax.Array | None) -> None:
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"
    if query.ndim != 4:
        raise ValueError(f"decoding attention takes queries [batch, length, heads, width]: {shapes}")
    if not jnp.issubdtype(query.dtype, jnp.floating) or query.dtype in QUANTISED:
        raise TypeError(f"decoding attention takes floating-point queries: query is {query.dtype}")
    if key.ndim != 4 or value.ndim != 4:
        form = "[batch, heads, slots, width]" if table is None else "pages [pages, heads, page, width]"
        raise ValueError(f"decoding attention takes keys and values {form}: {shapes}")
    if key.dtype != value.dtype or not (key.dtype in QUANTISED or jnp.issubdtype(key.dtype, jnp.floating)):
        raise TypeError(f"keys and values must have one floating or quantised dtype: {key.dtype}, {value.dtype}")
    if 0 in query.shape or 0 in key.shape or 0 in value.shape:
        raise ValueError(f"decoding attention takes no empty arrays: {shapes}")
    if key.shape[:-1] != value.shape[:-1] or query.shape[-1] != key.shape[-1]:
        raise ValueError(f"decoding attention shapes disagree: {shapes}")
    if table is None and query.shape[0] != key.shape[0]:
        raise ValueError(f"decoding attention shapes disagree: {shapes}")
    if query.shape[2] % key.shape[1]:
        raise ValueError(f"{query.shape[2]} query heads are not a multiple of {key.shape[1]} key/value heads")
