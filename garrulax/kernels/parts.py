"""Attention over parts of the keys, put together; learned sinks are such a part, with values of 0."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def merge(outs: jax.Array | Sequence[jax.Array], lses: jax.Array | Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Attention over all keys, from that over N parts of them.

    outs: N of [B, T, H, Cv], each normalised over its own part. lses: N of [B, H, T], the natural logarithm of each
    part's sum of exponentials, -inf where a query sees nothing of a part. Either a sequence or one array.

    Returns out [B, T, H, Cv] in the dtype of outs and lse [B, H, T] in that of lses; 0 and -inf where a query sees
    nothing of any part. Differentiable (Dao et al. 2023, Flash-Decoding; Liu et al. 2023, arXiv 2310.01889).
    """
    outs, lses = jnp.stack(list(outs)), jnp.stack(list(lses))
    top = jax.lax.stop_gradient(lses.max(axis=0))
    top = jnp.where(jnp.isneginf(top), 0, top)
    weights = jnp.exp(lses - top)
    total = weights.sum(axis=0)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    shares = (weights / total).swapaxes(2, 3)[..., None]
    out = jnp.sum(outs * shares, axis=0).astype(outs.dtype)
    return out, jnp.where(empty, -jnp.inf, top + jnp.log(total))


def with_sinks(out: jax.Array, lse: jax.Array, sinks: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, H, Cv] and lse [B, H, T] once exp(sinks), [H], is in what each query's exponentials are divided by;
    as they are where sinks is None."""
    if sinks is None:
        return out, lse
    sinks = sinks.astype(lse.dtype)[:, None]
    kept = jax.nn.sigmoid(lse - sinks).swapaxes(1, 2)[..., None]
    return (out * kept).astype(out.dtype), jnp.logaddexp(lse, sinks)
