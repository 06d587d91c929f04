"""What `attention` and `decode` are asked for alike: checked once, in one place."""

import jax
import jax.numpy as jnp

from garrulax.kernels.call import Options
from garrulax.kernels.mask import All, Mask, Streams
from garrulax.kernels.relative import Relative


def streams(
    mask: Mask | None, query: tuple[int, int], key: tuple[int, int], distances: bool
) -> tuple[Streams, Streams]:
    """The streams that the mask's rule reads, of queries and of keys, and `position` where distances are asked for.

    query, key: the shapes that they must have. Raises TypeError for what is no mask and ValueError for a missing
    stream, or as `Mask.read`.
    """
    if mask is not None and not isinstance(mask, Mask):
        raise TypeError(f"mask is a kernels.Mask or a sequence of them, not {type(mask).__name__}")
    if distances and (mask is None or any("position" not in s for s in (mask.query, mask.key_streams()))):
        raise ValueError("alibi and relative need a mask with the stream 'position' of queries and keys")
    return ({}, {}) if mask is None else mask.read(*(("position",) if distances else ()), query=query, key=key)


def check_heads(heads: int, alibi: jax.Array | None, relative: Relative | None, sinks: jax.Array | None) -> None:
    """Raises ValueError where one of them is not for that many heads, TypeError where it is not floating-point."""
    steps = None if relative is None else relative.steps[0]
    for name, x in (("alibi", alibi), ("sinks", sinks), ("relative", steps)):
        if x is not None and x.shape != (heads,):
            raise ValueError(f"{name} has shape {x.shape} for {heads} heads")
        if x is not None and not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name} is {x.dtype}, not floating-point")


def scaled(
    query: jax.Array,
    mask: Mask | None,
    relative: Relative | None,
    scale: float | jax.Array | None,
    softcap: float | None,
    dropout: float = 0.0,
) -> tuple[jax.Array, Options]:
    """The query, with a scale that is an array in it, and the static part of the request.

    Raises ValueError for a softcap that is not positive.
    """
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be positive, not {softcap}")
    if isinstance(scale, jax.Array):
        query, scale = (query * scale).astype(query.dtype), 1.0
    return query, Options(
        rule=All() if mask is None else mask.rule,
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
        softcap=softcap,
        dropout=dropout,
        starts=() if relative is None else relative.starts,
        causal=mask is not None and mask.causal,
    )


def slopes(alibi: jax.Array | None) -> jax.Array | None:
    """ALiBi's slopes as constants, float32."""
    return None if alibi is None else jax.lax.stop_gradient(alibi.astype(jnp.float32))
