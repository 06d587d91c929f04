"""Transforms that allow, forbid or favour tokens by their ids. Letters: B rows, V vocabulary."""

import functools

import jax.numpy as jnp
import numpy as np

from garrulax.sampling.transforms.base import Transform


@functools.cache
def only(size: int, others: tuple[int, ...] = ()) -> Transform:
    """Keeps the ids below `size`, and `others`."""

    def update(logits, state):
        ids = np.arange(logits.shape[-1])[None]  # [1, V]
        return jnp.where((ids < size) | np.isin(ids, others), logits, -jnp.inf), state

    return Transform(lambda knobs: (), update)
