"""Decoding attention that XLA compiles, on any platform."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from garrulax.kernels import dense
from garrulax.kernels.call import Operands, Options
from garrulax.kernels.decode.call import Cached


@dataclasses.dataclass(frozen=True)
class Gathered:
    """For any platform and request, exact and differentiated by JAX. A contiguous cache of the query's dtype is
    multiplied where it lies; pages are gathered through the table, and quantised entries get the query's dtype.
    The scores of all slots are in memory, T rows a head."""

    def unsupported_reason(self, options: Options, cached: Cached) -> str | None:
        """It computes everything."""
        return None

    def __call__(self, options: Options, cached: Cached) -> tuple[jax.Array, jax.Array]:
        """As `decode.Implementation`."""
        c = gathered(cached)
        (B, T, H, _), (K, S) = c.query.shape, c.key.shape[1:3]
        dtype = jnp.promote_types(c.query.dtype, jnp.float32)
        q = c.query.reshape(B, T, K, H // K, -1).transpose(0, 2, 3, 1, 4)
        x = _product(q, c.key.astype(q.dtype), "C", dtype).reshape(B, H, T, S)
        if c.key_scales is not None:
            x = x * _by_head(c.key_scales, H).astype(dtype)
        added = Operands(c.query, c.key, c.value, c.query_streams, c.key_streams, slopes=c.slopes, steps=c.steps)
        x = dense.scores(x * options.scale, options, added)
        seen = options.rule.evaluate(
            {name: s[:, :, None] for name, s in c.query_streams.items()},
            {name: s[:, None, :] for name, s in c.key_streams.items()},
        )
        if c.lengths is not None:
            seen = seen & (jnp.arange(S) < c.lengths[:, None])[:, None]
        p, lse = _softmax(x, jnp.broadcast_to(seen, (B, T, S))[:, None])
        if c.value_scales is not None:
            p = p * _by_head(c.value_scales, H).astype(dtype)
        p = p.astype(q.dtype).reshape(B, K, H // K, T, S)
        out = _product(p, c.value.astype(q.dtype), "S", dtype)
        return out.transpose(0, 3, 1, 2, 4).reshape(B, T, H, -1).astype(q.dtype), lse


def gathered(cached: Cached) -> Cached:
    """The request with a contiguous cache: pages put side by side, in the order of the table."""
    table = cached.table
    if table is None:
        return cached

    def slots(x: jax.Array, axis: int) -> jax.Array:
        x = jnp.moveaxis(jnp.take(x, table, axis=0, mode="clip"), 1, axis)
        return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

    return dataclasses.replace(
        cached,
        key=slots(cached.key, 2),
        value=slots(cached.value, 2),
        key_streams={name: slots(s, 1) for name, s in cached.key_streams.items()},
        table=None,
        key_scales=None if cached.key_scales is None else slots(cached.key_scales, 2),
        value_scales=None if cached.value_scales is None else slots(cached.value_scales, 2),
    )


def _product(x: jax.Array, cache: jax.Array, contracted: str, dtype: Any) -> jax.Array:
    """x [B, K, G, T, C] or [B, K, G, T, S] times the cache [B, K, S, C], over C or S."""
    rows = x.shape[2:4]
    kept = "S" if contracted == "C" else "C"
    if jax.typeof(cache).sharding.mesh.empty:
        # With the axes B and K apart XLA:CPU copies the whole cache in every step where B is 1.
        x, folded = x.reshape(-1, rows[0] * rows[1], x.shape[-1]), cache.reshape(-1, *cache.shape[2:])
        spec = f"NM{contracted},NSC->NM{kept}"
        return jnp.einsum(spec, x, folded, preferred_element_type=dtype).reshape(*cache.shape[:2], *rows, -1)
    return jnp.einsum(f"BKGT{contracted},BKSC->BKGT{kept}", x, cache, preferred_element_type=dtype)


def _by_head(scales: jax.Array, heads: int) -> jax.Array:
    """Scales [B, K, S] of the keys that each query head reads: [B, H, 1, S]."""
    return jnp.repeat(scales, heads // scales.shape[1], axis=1)[:, :, None]


def _softmax(x: jax.Array, seen: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Probabilities of scores [B, H, T, S], 0 where not seen, and lse [B, H, T], -inf where a row sees nothing."""
    lowest = jnp.finfo(x.dtype).min
    top = jax.lax.stop_gradient(jnp.where(seen, x, lowest).max(axis=-1))
    top = jnp.where(top == lowest, 0, top)
    weights = jnp.where(seen, jnp.exp(jnp.where(seen, x - top[..., None], 0)), 0)
    total = weights.sum(axis=-1)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    return weights / total[..., None], jnp.where(empty, -jnp.inf, top + jnp.log(total))
