"""Decoding attention that XLA compiles, on any platform."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from garrulax.core.dtypes import at_least_float32
from garrulax.core.sums import row_sum
from garrulax.kernels import dense
from garrulax.kernels.call import Operands, Options
from garrulax.kernels.decode.call import DecodeOperands


@dataclasses.dataclass(frozen=True)
class XlaDecode:
    """Decoding attention for any platform and request; JAX differentiates it.

    A contiguous cache of the query's dtype is read where it is. Pages are gathered through the table, and quantised
    entries are converted to the query's dtype, both into new arrays. All scores [B, H, T, S] are in memory.
    """

    def unsupported_reason(self, options: Options, operands: DecodeOperands) -> str | None:
        """None: every request is supported."""
        return None

    def __call__(self, options: Options, operands: DecodeOperands) -> tuple[jax.Array, jax.Array]:
        """Output and lse; see `decode.DecodeImplementation`."""
        c = gather_pages(operands)
        return _attend(options, c) if c.lengths is None else _attend_within_lengths(options, c)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend_within_lengths(options: Options, operands: DecodeOperands) -> tuple[jax.Array, jax.Array]:
    """`_attend` of a contiguous cache whose slots behind the lengths may hold anything, NaN and infinity included.

    A probability of 0 times NaN is NaN. To set those slots to 0 beforehand would copy the cache in every step, so it is
    done only if the output is not finite, or if the request is differentiated.
    """
    out, lse = _attend(options, operands)
    return jax.lax.cond(
        jnp.isfinite(out).all(), lambda: (out, lse), lambda: _attend(options, _clear_behind_lengths(operands))
    )


@_attend_within_lengths.defjvp
def _derivative(options, primals, tangents):
    return jax.jvp(lambda x: _attend(options, _clear_behind_lengths(x)), primals, tangents)


def _clear_behind_lengths(operands: DecodeOperands) -> DecodeOperands:
    """The request with 0 in the slots behind the lengths."""
    o = operands
    assert o.lengths is not None
    inside = jnp.arange(o.key.shape[2], dtype=jnp.int32)[None] < o.lengths[:, None]  # [B, S]

    def cleared(x: jax.Array) -> jax.Array:  # [B, K, S] or [B, K, S, C]
        return jnp.where(inside.reshape(len(x), 1, -1, *(1,) * (x.ndim - 3)), x, jnp.zeros_like(x))

    return dataclasses.replace(
        o,
        key=cleared(o.key),
        value=cleared(o.value),
        key_scales=None if o.key_scales is None else cleared(o.key_scales),
        value_scales=None if o.value_scales is None else cleared(o.value_scales),
    )


def _attend(options: Options, c: DecodeOperands) -> tuple[jax.Array, jax.Array]:
    """Output and lse of a request with a contiguous cache."""
    (B, T, H, _), (K, S) = c.query.shape, c.key.shape[1:3]
    dtype = at_least_float32(c.query.dtype)
    q = c.query.reshape(B, T, K, H // K, -1).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, C]
    x = _product(q, c.key.astype(q.dtype), "C", dtype).reshape(B, H, T, S)
    if c.key_scales is not None:
        # Each slot has one scale, so it is applied to the scores [B, H, T, S] instead of the keys.
        x = x * _for_query_heads(c.key_scales, H).astype(dtype)
    added = Operands(c.query, c.key, c.value, c.query_streams, c.key_streams, slopes=c.slopes, steps=c.steps)
    x = dense.scores(x * options.scale, options, added)
    mask = options.rule.evaluate(
        {name: s[:, :, None] for name, s in c.query_streams.items()},
        {name: s[:, None, :] for name, s in c.key_streams.items()},
    )
    if c.lengths is not None:
        mask = mask & (jnp.arange(S, dtype=jnp.int32)[None] < c.lengths[:, None])[:, None]
    p, lse = _softmax(x, jnp.broadcast_to(mask, (B, T, S))[:, None])
    if c.value_scales is not None:
        p = p * _for_query_heads(c.value_scales, H).astype(dtype)
    p = p.astype(q.dtype).reshape(B, K, H // K, T, S)
    out = _product(p, c.value.astype(q.dtype), "S", dtype)  # [B, K, G, T, Cv]
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, H, -1).astype(q.dtype), lse


def gather_pages(operands: DecodeOperands) -> DecodeOperands:
    """The request with a contiguous cache: the pages of each sequence concatenated in the order of its table."""
    table = operands.table
    if table is None:
        return operands

    def slots(x: jax.Array, axis: int) -> jax.Array:  # axis: that of the slots of a page
        # [P, ..., page, ...] to [B, N, ..., page, ...] to [B, ..., N, page, ...] to [B, ..., N·page, ...]
        x = jnp.moveaxis(jnp.take(x, table, axis=0, mode="clip"), 1, axis)
        return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

    return dataclasses.replace(
        operands,
        key=slots(operands.key, 2),
        value=slots(operands.value, 2),
        key_streams={name: slots(s, 1) for name, s in operands.key_streams.items()},
        table=None,
        key_scales=None if operands.key_scales is None else slots(operands.key_scales, 2),
        value_scales=None if operands.value_scales is None else slots(operands.value_scales, 2),
    )


def _product(x: jax.Array, cache: jax.Array, contracted: str, dtype: Any) -> jax.Array:
    """x [B, K, G, T, C] or [B, K, G, T, S] times the cache [B, K, S, C], over C or S."""
    rows = x.shape[2:4]  # (G, T)
    remaining = "S" if contracted == "C" else "C"
    if jax.typeof(cache).sharding.mesh.empty:
        # With B and K as two axes, XLA:CPU copies the whole cache in every step if B is 1: fold them into one, N.
        x, folded = x.reshape(-1, rows[0] * rows[1], x.shape[-1]), cache.reshape(-1, *cache.shape[2:])
        spec = f"NM{contracted},NSC->NM{remaining}"
        return jnp.einsum(spec, x, folded, preferred_element_type=dtype).reshape(*cache.shape[:2], *rows, -1)
    return jnp.einsum(f"BKGT{contracted},BKSC->BKGT{remaining}", x, cache, preferred_element_type=dtype)


def _for_query_heads(scales: jax.Array, heads: int) -> jax.Array:
    """Scales [B, K, S] repeated for the query heads that share a key head: [B, H, 1, S]."""
    return jnp.repeat(scales, heads // scales.shape[1], axis=1)[:, :, None]


def _softmax(x: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Probabilities of scores [B, H, T, S], 0 where masked, and lse [B, H, T], -inf for a row without keys."""
    top = jax.lax.stop_gradient(jnp.where(mask, x, -jnp.inf).max(axis=-1))
    top = jnp.where(jnp.isneginf(top), 0, top)
    # The inner `where` keeps exp of masked scores finite: 0 times an infinite derivative would be NaN.
    weights = jnp.where(mask, jnp.exp(jnp.where(mask, x - top[..., None], 0)), 0)
    total = row_sum(weights, weights.size)[..., 0]
    empty = total == 0
    total = jnp.where(empty, 1, total)
    return weights / total[..., None], jnp.where(empty, -jnp.inf, top + jnp.log(total))
