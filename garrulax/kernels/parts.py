"""Merges attention over parts of the keys into attention over all of them, and adds learned sinks."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from garrulax.kernels.call import LogSumExp


def merge(outs: jax.Array | Sequence[jax.Array], lses: jax.Array | Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Attention over all keys, from attention over each of N parts of them.

    Differentiable. Sources: Dao et al. 2023, Flash-Decoding; Liu et al. 2023, arXiv 2310.01889.

    Args:
        outs: N arrays [B, T, H, Cv], or one array with N first; each normalised over its own part.
        lses: N arrays [B, H, T], or one: log of the sum of exp(score) over the part, -inf where a query attends to no
            key of it.

    Returns:
        out [B, T, H, Cv] in the dtype of outs and lse [B, H, T] in that of lses; 0 and -inf for a query that attends
        to no key of any part.
    """
    lses = jnp.stack(list(lses))
    out, lse = merge_parts(jnp.stack(list(outs)), LogSumExp.rounded(lses))
    return out, lse.value


def merge_parts(outs: jax.Array, lses: LogSumExp) -> tuple[jax.Array, LogSumExp]:
    """As `merge`, for outs [N, B, T, H, Cv] and lses whose two parts are [N, B, H, T] each."""
    top = jax.lax.stop_gradient(lses.top.max(axis=0))  # any number near it is right; the maximum avoids overflow
    empty = jnp.isneginf(top)
    weights = jnp.exp(lses.top - jnp.where(empty, 0, top) + lses.rest)  # [N, B, H, T]
    total = jnp.where(empty, 1, weights.sum(axis=0))
    shares = (weights / total).swapaxes(2, 3)[..., None]  # [N, B, T, H, 1]
    out = jnp.sum(outs * shares, axis=0).astype(outs.dtype)
    return out, LogSumExp(top, jnp.log(total))


def with_sinks(out: jax.Array, lse: LogSumExp, sinks: jax.Array | None) -> tuple[jax.Array, LogSumExp]:
    """Adds sinks to a finished attention. Differentiable.

    A sink is one more key, with its logit as score and a value of 0.

    Args:
        out: [B, T, H, Cv].
        lse: [B, H, T].
        sinks: Logits [H], or None, which changes nothing.

    Returns:
        Output and lse over the keys and the sink.
    """
    if sinks is None:
        return out, lse
    sinks = sinks.astype(lse.top.dtype)[:, None]  # [H, 1]
    top = jax.lax.stop_gradient(jnp.maximum(lse.top, sinks))
    empty = jnp.isneginf(top)
    shift = jnp.where(empty, 0, top)
    keys = jnp.exp(lse.top - shift + lse.rest)  # exp(lse), divided by exp(top)
    total = jnp.where(empty, 1, keys + jnp.exp(sinks - shift))
    share = (keys / total).swapaxes(1, 2)[..., None]
    return (out * share).astype(out.dtype), LogSumExp(top, jnp.log(total))
