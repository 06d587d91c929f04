"""Checks and conversions of the arguments that `attention` and `decode` have in common."""

from typing import Any

import jax
import jax.numpy as jnp

from garrulax.core.dtypes import at_least_float32
from garrulax.kernels.call import Options
from garrulax.kernels.mask import All, Mask, Streams
from garrulax.kernels.relative import Relative


def common(
    query: jax.Array,
    key_shape: tuple[int, int],
    mask: Mask | None,
    alibi: jax.Array | None,
    relative: Relative | None,
    sinks: jax.Array | None,
    scale: float | jax.Array | None,
    softcap: float | None,
    dropout: float = 0.0,
) -> tuple[Options, dict[str, Any]]:
    """The static part of a request, and the arrays that `Operands` and `DecodeOperands` both have.

    Args:
        query: [B, T, H, C].
        key_shape: Shape that the streams of the keys must have: (B, S), or (pages, page size).
        mask: Which pairs attend; None is all.
        alibi: Slopes [H].
        relative: Bias in steps of the distance.
        sinks: [H].
        scale: Factor on the scores; None is 1 / sqrt(C). An array is multiplied into the query.
        softcap: Positive, or None.
        dropout: Rate of dropout; 0.0 is none.

    Returns:
        The options, and by field name: query, query_streams, key_streams, slopes, steps and sinks.

    Raises:
        TypeError: For a mask of another type, or for alibi, relative or sinks that are not floating-point.
        ValueError: For a missing stream or one of the wrong shape, alibi, relative or sinks for another number of
            heads, or a softcap that is not positive.
    """
    query_streams, key_streams = _streams(mask, query.shape[:2], key_shape, alibi is not None or relative is not None)
    steps = None if relative is None else relative.steps
    _check_heads(query.shape[2], alibi, steps, sinks)
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be positive, not {softcap}")
    if isinstance(scale, jax.Array):  # options are static: an array cannot be one
        wide = at_least_float32(query.dtype)
        query, scale = (query.astype(wide) * scale.astype(wide)).astype(query.dtype), 1.0
    options = Options(
        rule=All() if mask is None else mask.rule,
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
        softcap=softcap,
        dropout=dropout,
        starts=() if relative is None else relative.starts,
        causal=mask is not None and mask.causal,
    )
    return options, {
        "query": query,
        "query_streams": query_streams,
        "key_streams": key_streams,
        "slopes": None if alibi is None else jax.lax.stop_gradient(alibi.astype(jnp.float32)),
        "steps": steps,
        "sinks": sinks,
    }


def unfold(x: jax.Array, batch: int) -> jax.Array:
    """Keys or values [B·K, S, C] as [B, K, S, C]; any other array unchanged, for the checks that follow."""
    if x.ndim != 3 or not batch or x.shape[0] % batch:
        return x
    return x.reshape(batch, -1, *x.shape[1:])


def _streams(
    mask: Mask | None, query: tuple[int, ...], key: tuple[int, ...], distances: bool
) -> tuple[Streams, Streams]:
    """The streams that the rule reads, and `position` where the request needs distances."""
    if mask is not None and not isinstance(mask, Mask):
        hint = "kernels.masks builds them, such as padded(valid) from a boolean array [B, T]"
        raise TypeError(f"mask is a kernels.Mask or a sequence of them, not {type(mask).__name__}: {hint}")
    if distances and (mask is None or any("position" not in s for s in (mask.query, mask.key_streams()))):
        raise ValueError("alibi and relative need a mask with the stream 'position' of queries and keys")
    if mask is None:
        return {}, {}
    return mask.read(*(("position",) if distances else ()), query=query, key=key)


def _check_heads(heads: int, alibi: jax.Array | None, steps: jax.Array | None, sinks: jax.Array | None) -> None:
    for name, x in (("alibi", alibi), ("sinks", sinks), ("relative", None if steps is None else steps[0])):
        if x is not None and x.shape != (heads,):
            raise ValueError(f"{name} has shape {x.shape} for {heads} heads")
        if x is not None and not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name} is {x.dtype}, not floating-point")
