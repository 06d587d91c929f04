"""Reading a context: its keys and values go into the cache, at once or in passes."""

import dataclasses
from typing import cast

import jax
import jax.numpy as jnp

from garrulax import models
from garrulax.core.config import ModelConfig
from garrulax.core.spec import Tree
from garrulax.kernels.mask import PAD, Mask
from garrulax.layers.cache import Cache, with_memory_kinds


def cache_context(
    params: Tree,
    cache: Cache,
    context: jax.Array,
    segment: jax.Array,
    rank: jax.Array,
    positions: jax.Array,
    config: ModelConfig,
) -> Cache:
    """The cache after the model has read contexts, in passes that are as long as the kind of the cache allows.

    Args:
        params: The parameters.
        cache: The cache before.
        context: int32 [B, P], like the next two (`state.Requests`).
        segment: PAD for padding, which is behind the tokens.
        rank: Attention order.
        positions: int32 [B, P] or [B, 2, P].
        config: The family's Config.
    """

    def read(cache: Cache, *arrays: jax.Array) -> Cache:  # under jit without the logits, since nothing uses them
        tokens, segment, rank, positions = arrays
        mask = Mask({"rank": rank, "segment": segment})
        return cast(Cache, models.forward(params, tokens, config, positions=positions, mask=mask, cache=cache)[1])

    given = context, segment, rank, positions
    P, most = context.shape[1], cache.kind.longest_pass
    if most is None or most >= P:
        return read(cache, *given)
    arrays = [
        jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -P % most)], constant_values=fill)
        for x, fill in zip(given, (0, PAD, 0, 0), strict=True)
    ]

    def one(i: jax.Array, cache: Cache) -> Cache:
        parts = [jax.lax.dynamic_slice_in_dim(x, i * most, most, axis=x.ndim - 1) for x in arrays]
        used = cache.used + jnp.sum(parts[1] != PAD, axis=1, dtype=jnp.int32)
        return dataclasses.replace(read(cache, *parts), used=used)

    longest = jnp.max(jnp.sum(segment != PAD, axis=1, dtype=jnp.int32))
    return jax.lax.fori_loop(jnp.int32(0), -(-longest // most), one, with_memory_kinds(cache))
