"""Merges attention over parts of the keys into attention over all of them, and adds learned sinks."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


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
    outs, lses = jnp.stack(list(outs)), jnp.stack(list(lses))  # [N, B, T, H, Cv], [N, B, H, T]
    top = jax.lax.stop_gradient(lses.max(axis=0))  # any finite value is right; the maximum avoids overflow
    top = jnp.where(jnp.isneginf(top), 0, top)
    weights = jnp.exp(lses - top)  # [N, B, H, T]
    total = weights.sum(axis=0)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    shares = (weights / total).swapaxes(2, 3)[..., None]  # [N, B, T, H, 1]
    out = jnp.sum(outs * shares, axis=0).astype(outs.dtype)
    return out, jnp.where(empty, -jnp.inf, top + jnp.log(total))


def with_sinks(out: jax.Array, lse: jax.Array, sinks: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Adds sinks to a finished attention.

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
    sinks = sinks.astype(lse.dtype)[:, None]  # [H, 1]
    share_of_keys = jax.nn.sigmoid(lse - sinks).swapaxes(1, 2)[..., None]  # exp(lse) / (exp(lse) + exp(sink))
    return (out * share_of_keys).astype(out.dtype), jnp.logaddexp(lse, sinks)
