"""An exponential moving average of the parameters, which is evaluated and saved in their place."""

import jax
import jax.numpy as jnp

from garrulax.core.spec import Tree


def next_average(average: Tree, params: Tree, updates: jax.Array, decay: float) -> Tree:
    """d * average + (1 - d) * params, where d = min(decay, (1 + n) / (10 + n)).

    n is the number of updates: so the average forgets the initial parameters soon.

    Args:
        average: Before the step.
        params: After the step, in float32 or more.
        updates: int32 scalar, number of updates before the step.
        decay: At least 0, below 1.
    """
    n = updates.astype(jnp.float32)
    rate = jnp.minimum(decay, (1 + n) / (10 + n))
    return jax.tree.map(lambda a, p: a + (1 - rate).astype(a.dtype) * (p.astype(a.dtype) - a), average, params)
