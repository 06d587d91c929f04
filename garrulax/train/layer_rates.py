"""Layer-wise learning-rate decay: lower layers learn more slowly."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from garrulax.core.spec import ParamSpec, Tree, is_spec, map_specs, named_specs

#: Parameters below the first layer, by their name at the top of the tree.
_LOWEST = ("tokens", "positions", "span_positions", "project_in")


def layer_factors(specs: Tree, decay: float) -> Tree:
    """The factor of every parameter's learning rate, as in BEiT (Bao et al. 2022): decay ** (L + 1 - i).

    i is 0 for the embeddings, 1 to L for the blocks, and L + 1 for the last norm and the output head.

    Args:
        specs: ParamSpec tree of the parameters.
        decay: Above 0, at most 1.

    Returns:
        A tree of float32 arrays: scalars, and for stacked layers [L, 1, ...], which multiply the parameters.
    """
    layers = max((s.layers for s in named_specs(specs).values()), default=0)

    def factor(path: tuple, s: ParamSpec) -> np.ndarray:
        if s.layers:
            each = np.float32(decay) ** np.arange(layers, 0, -1, dtype=np.float32)
            return each.reshape(-1, *(1,) * len(s.layer_shape))
        return np.array(decay ** (layers + 1) if path[0].key in _LOWEST else 1, np.float32)

    return jax.tree_util.tree_map_with_path(factor, specs, is_leaf=is_spec)


def scaled_by_layer(optimizer: optax.GradientTransformation, specs: Tree, decay: float) -> optax.GradientTransformation:
    """The optimizer with its updates, weight decay included, multiplied by `layer_factors`. Its state is the same."""
    factors = layer_factors(specs, decay)

    def update(updates, state, params=None):
        updates, state = optimizer.update(updates, state, params)
        return map_specs(lambda _, u, f: u * jnp.asarray(f, u.dtype), specs, updates, factors), state

    return optax.GradientTransformation(optimizer.init, update)
