"""Attention by the plain formula, with all scores in memory: the reference for the kernels."""

import dataclasses

import jax
import jax.numpy as jnp

from garrulax.core.dtypes import at_least_float32
from garrulax.kernels import dropout
from garrulax.kernels.call import Operands, Options


@dataclasses.dataclass(frozen=True)
class Dense:
    """The dense formula, for any platform and request; JAX differentiates it, also in forward mode.

    Its memory grows with T x S, so it is used only where it is named.
    """

    def unsupported_reason(self, options: Options, operands: Operands) -> str | None:
        """None: every request is supported."""
        return None

    def __call__(self, options: Options, operands: Operands) -> jax.Array:
        """Output [B, T, H, Cv] in the query's dtype; 0 for a query that attends to no key."""
        o = operands
        (B, T, H, C), (S, K) = o.query.shape, o.key.shape[1:3]
        dtype = at_least_float32(o.query.dtype)
        mask = options.rule.evaluate(
            {name: s[:, :, None] for name, s in o.query_streams.items()},
            {name: s[:, None, :] for name, s in o.key_streams.items()},
        )
        mask = jnp.broadcast_to(mask, (B, T, S))
        seen = mask.any(axis=1)[:, :, None, None]  # [B, S, 1, 1]; keys for no query may be NaN, and 0 times NaN is NaN
        key, value = (jnp.where(seen, x, jnp.zeros_like(x)) for x in (o.key, o.value))
        q = o.query.reshape(B, T, K, H // K, C)
        x = jnp.einsum("BTKGC,BSKC->BKGTS", q, key, preferred_element_type=dtype).reshape(B, H, T, S)
        x = scores(x * options.scale, options, o)
        weights, total = _exponentials(x, mask[:, None], o.sinks)
        if o.seeds is not None:
            index = (
                jnp.arange(T, dtype=jnp.int32)[None, None, :, None],
                jnp.arange(S, dtype=jnp.int32)[None, None, None],
            )
            keep = dropout.keep_mask(o.seeds[:, :, None, None], *index, options.dropout)
            weights = jnp.where(keep, weights / (1 - options.dropout), 0)
        weights = weights.astype(o.value.dtype).reshape(B, K, H // K, T, S)
        out = jnp.einsum("BKGTS,BSKC->BTKGC", weights, value, preferred_element_type=dtype).reshape(B, T, H, -1)
        return (out / total.swapaxes(1, 2)[..., None]).astype(o.query.dtype)


def scores(x: jax.Array, options: Options, operands: Operands) -> jax.Array:
    """Scores [B, H, T, S] from the scaled products x: soft-capped, plus bias, ALiBi and relative bias."""
    o = operands
    if options.softcap is not None:
        x = options.softcap * jnp.tanh(x / options.softcap)
    if o.bias is not None:
        x += o.bias.astype(x.dtype)
    if o.slopes is not None or o.steps is not None:
        distance = o.key_streams["position"][:, None, :] - o.query_streams["position"][:, :, None]
        distance = distance[:, None]  # [B, 1, T, S]
    if o.slopes is not None:
        x += o.slopes.astype(x.dtype)[None, :, None, None] * distance.astype(x.dtype)
    if o.steps is not None:
        step = jnp.searchsorted(jnp.array(options.starts, jnp.int32), distance, side="right")
        x += jnp.moveaxis(o.steps.astype(x.dtype)[step[:, 0]], 3, 1)  # [B, T, S, H] to [B, H, T, S]
    return x


def _exponentials(x: jax.Array, mask: jax.Array, sinks: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Numerators and denominators of the softmax.

    Args:
        x: Scores [B, H, T, S].
        mask: bool, broadcastable to them.
        sinks: [H] or None.

    Returns:
        exp(score - maximum of its row), 0 where masked; and the sum of each row and its sink, [B, H, T], with 1 for 0.
    """
    top = jnp.where(mask, x, -jnp.inf).max(axis=-1, keepdims=True)
    if sinks is not None:
        top = jnp.maximum(top, sinks.astype(x.dtype)[None, :, None, None])
    top = jax.lax.stop_gradient(jnp.where(jnp.isneginf(top), 0, top))  # the maximum of a row without keys is -inf
    # The inner `where` keeps exp of masked scores finite: 0 times an infinite derivative would be NaN.
    weights = jnp.where(mask, jnp.exp(jnp.where(mask, x - top, 0)), 0)
    total = weights.sum(axis=-1)
    if sinks is not None:
        total += jnp.exp(sinks.astype(x.dtype)[None, :, None] - top[..., 0])
    return weights, jnp.where(total == 0, 1, total)
