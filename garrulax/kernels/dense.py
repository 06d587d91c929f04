"""Attention as the formula says it, with every score in memory: what the kernels are compared with."""

import dataclasses

import jax
import jax.numpy as jnp

from garrulax.kernels import dropout
from garrulax.kernels.call import Operands, Options


@dataclasses.dataclass(frozen=True)
class Dense:
    """The dense formula, for any platform and request; differentiated by JAX, forward mode too. Memory grows with
    T x S, so that it is picked only by name."""

    def unsupported_reason(self, options: Options, operands: Operands) -> str | None:
        """It computes everything."""
        return None

    def __call__(self, options: Options, operands: Operands) -> jax.Array:
        """Output [B, T, H, Cv] in the query's dtype; 0 where a query sees nothing."""
        o = operands
        (B, T, H, C), (S, K) = o.query.shape, o.key.shape[1:3]
        dtype = jnp.promote_types(o.query.dtype, jnp.float32)
        q = o.query.reshape(B, T, K, H // K, C)
        x = jnp.einsum("BTKGC,BSKC->BKGTS", q, o.key, preferred_element_type=dtype).reshape(B, H, T, S)
        x = scores(x * options.scale, options, o)
        seen = options.rule.evaluate(
            {name: s[:, :, None] for name, s in o.query_streams.items()},
            {name: s[:, None, :] for name, s in o.key_streams.items()},
        )
        weights, total = _exponentials(x, jnp.broadcast_to(seen, (B, T, S))[:, None], o.sinks)
        if o.seeds is not None:
            index = jnp.arange(T, dtype=jnp.int32)[:, None], jnp.arange(S, dtype=jnp.int32)
            kept = dropout.kept(o.seeds[:, :, None, None], *index, options.dropout)
            weights = jnp.where(kept, weights / (1 - options.dropout), 0)
        weights = weights.astype(o.value.dtype).reshape(B, K, H // K, T, S)
        out = jnp.einsum("BKGTS,BSKC->BTKGC", weights, o.value, preferred_element_type=dtype).reshape(B, T, H, -1)
        return (out / total.swapaxes(1, 2)[..., None]).astype(o.query.dtype)


def scores(x: jax.Array, options: Options, operands: Operands) -> jax.Array:
    """Scores [B, H, T, S] of the scaled products x: capped, and with what is added to them."""
    o = operands
    if options.softcap is not None:
        x = options.softcap * jnp.tanh(x / options.softcap)
    if o.bias is not None:
        x += o.bias.astype(x.dtype)
    if o.slopes is not None or o.steps is not None:
        distance = (o.key_streams["position"][:, None, :] - o.query_streams["position"][:, :, None])[:, None]
    if o.slopes is not None:
        x += o.slopes.astype(x.dtype)[:, None, None] * distance.astype(x.dtype)
    if o.steps is not None:
        step = jnp.searchsorted(jnp.array(options.starts, jnp.int32), distance, side="right")
        x += jnp.moveaxis(o.steps.astype(x.dtype)[step[:, 0]], 3, 1)
    return x


def _exponentials(x: jax.Array, seen: jax.Array, sinks: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """exp(scores - their row's maximum), 0 where not seen, and the sum of each row [B, H, T], never 0."""
    lowest = jnp.finfo(x.dtype).min
    x = jnp.where(seen, x, lowest)
    top = x.max(axis=-1, keepdims=True)
    if sinks is not None:
        top = jnp.maximum(top, sinks.astype(x.dtype)[:, None, None])
    top = jax.lax.stop_gradient(jnp.where(top == lowest, 0, top))
    weights = jnp.where(seen, jnp.exp(x - top), 0)
    total = weights.sum(axis=-1)
    if sinks is not None:
        total += jnp.exp(sinks.astype(x.dtype)[:, None] - top[..., 0])
    return weights, jnp.where(total == 0, 1, total)
