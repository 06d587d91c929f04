"""Decoding attention: a few new queries of each sequence over its cache, contiguous or in pages."""

import dataclasses
import functools
from typing import Protocol

import jax
import jax.numpy as jnp

from garrulax.kernels import asked
from garrulax.kernels.call import Options
from garrulax.kernels.decode.call import Cached
from garrulax.kernels.decode.xla import Gathered
from garrulax.kernels.mask import Mask
from garrulax.kernels.parts import with_sinks
from garrulax.kernels.picking import Table
from garrulax.kernels.relative import Relative

IMPLEMENTATIONS = {
    "xla": "garrulax.kernels.decode.xla:Gathered",
    "pallas_tpu": "garrulax.kernels.decode.tpu:Kernel",
    "pallas_gpu": "garrulax.kernels.decode.gpu:HopperDecoding",
}
PICKED = {  # the best first; the last computes everything
    "cpu": ("xla",),
    "tpu": ("pallas_tpu", "xla"),
    "gpu": ("xla",),
    "gpu sm_90": ("pallas_gpu", "xla"),
}
TABLE = Table("decoding attention", IMPLEMENTATIONS, PICKED)
QUANTISED = (jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2)


FEW = 64  # queries of a sequence: a token, a tree of drafts; more are a text to be read


class Implementation(Protocol):
    """One way to compute decoding attention; hashable."""

    def refusal(self, options: Options, cached: Cached) -> str | None:
        """Why it cannot compute this request (arrays may be abstract), or None where it can."""

    def __call__(self, options: Options, cached: Cached) -> tuple[jax.Array, jax.Array]:
        """Output [B, T, H, Cv] in the query's dtype, and lse, the natural logarithm of the sum of the exponentials of
        each row's scores, [B, H, T] in at least float32; 0 and -inf where a query sees nothing. `cached.sinks` is
        None: sinks are put on afterwards."""


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
    implementation: str | Implementation | None = None,
) -> jax.Array:
    """softmax(scale * query key^T, where mask) value over a cache, with the softmax in at least float32.

    query: [B, T, H, C], the newest token of each sequence, or T drafts of it. key, value: [B, K, S, C] and
    [B, K, S, Cv], or folded, [B·K, S, C]; with a table, pages [P, K, page, C]. They hold the T newest tokens too.
    H is a multiple of K: query head h reads key/value head h // (H / K).
    mask: which pairs attend, with int32 streams [B, T] of the queries and [B, S], or [P, page], of the keys; None is
    all that the lengths leave.
    table: int32 [B, N], the pages of each sequence in order. Entries behind its length are not read as pages.
    lengths: int32 [B], how many slots of each sequence count, in order; None is all. What lies behind must be finite.
    key_scales, value_scales: float32 [B, K, S] or [P, K, page], for caches of int8, float8_e4m3fn or float8_e5m2:
    what a slot's entries are multiplied by.
    alibi, relative, sinks, scale, softcap: as of `kernels.attention`.
    implementation: a name in `IMPLEMENTATIONS` or an object like theirs; None picks the fastest that can.

    Returns [B, T, H, Cv] in the dtype of the query; zeros where a query sees nothing. Differentiable.
    Raises ValueError, naming the shapes, where they do not fit, for a stream that the mask reads and is not given, for
    a quantised cache without scales, for an unknown implementation, and for one that cannot compute the request, with
    the reason; TypeError for dtypes that are none of these.
    """
    options, cached = request(
        query, key, value, mask, table, lengths, key_scales, value_scales, alibi, relative, sinks, scale, softcap
    )
    return computed(TABLE.pick(implementation, options, cached), options, cached)[0]


def suits(query: jax.Array, key: jax.Array, value: jax.Array) -> bool:
    """Whether this is for query [B, T, H, C] over key and value [B, S, K, C] of `kernels.attention`: few queries over
    more keys, on one device."""
    few = query.shape[1] <= FEW and query.shape[1] < key.shape[1]
    return few and key.dtype == value.dtype and jax.typeof(query).sharding.mesh.empty


def computed(implementation: Implementation, options: Options, cached: Cached) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, H, Cv] and lse [B, H, T] with the sinks in both, differentiable."""
    sinks, cached = cached.sinks, dataclasses.replace(cached, sinks=None)
    if isinstance(implementation, Gathered):  # whose derivative is the others'
        out, lse = implementation(options, cached)
    else:
        out, lse = _differentiable(implementation, options, cached)
    return with_sinks(out, lse, sinks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _differentiable(implementation: Implementation, options: Options, cached: Cached) -> tuple[jax.Array, jax.Array]:
    # A kernel has a list of steps a call, which JAX's own rule for `vmap` cannot batch: one call after another.
    return jax.custom_batching.sequential_vmap(lambda x: implementation(options, x))(cached)


def _forward(implementation, options, cached):
    return _differentiable(implementation, options, cached), cached


def _backward(implementation, options, cached, cotangents):
    return jax.vjp(lambda x: Gathered()(options, x), cached)[1](cotangents)


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
) -> tuple[Options, Cached]:
    """The request in the form that implementations take; arguments as of `decode`, and checked."""
    if table is None:
        key, value = _unfolded(key, query), _unfolded(value, query)
    _check_arrays(query, key, value, table)
    (B, T, H, _), (rows, K, S) = query.shape, key.shape[:3]
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
    reads = asked.streams(mask, (B, T), (rows, S), alibi is not None or relative is not None)
    asked.check_heads(H, alibi, relative, sinks)
    query, options = asked.scaled(query, mask, relative, scale, softcap)
    return options, Cached(
        query=query,
        key=key,
        value=value,
        query_streams=reads[0],
        key_streams=reads[1],
        table=table,
        lengths=lengths,
        key_scales=key_scales,
        value_scales=value_scales,
        slopes=asked.slopes(alibi),
        steps=None if relative is None else relative.steps,
        sinks=sinks,
    )


def _unfolded(x: jax.Array, query: jax.Array) -> jax.Array:
    """[B, K, S, C] of keys or values [B·K, S, C]; others as they are."""
    if x.ndim != 3 or not query.shape[0] or x.shape[0] % query.shape[0]:
        return x
    return x.reshape(query.shape[0], -1, *x.shape[1:])


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
        raise ValueError(f"decoding attention over nothing: {shapes}")
    if key.shape[:-1] != value.shape[:-1] or query.shape[-1] != key.shape[-1]:
        raise ValueError(f"decoding attention shapes disagree: {shapes}")
    if table is None and query.shape[0] != key.shape[0]:
        raise ValueError(f"decoding attention shapes disagree: {shapes}")
    if query.shape[2] % key.shape[1]:
        raise ValueError(f"{query.shape[2]} query heads are not a multiple of {key.shape[1]} key/value heads")
