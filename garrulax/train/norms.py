"""Norms of gradients: of the whole, and of each part of the model."""

from typing import Any

import jax
import jax.numpy as jnp

from garrulax.core.spec import Tree


def gradient_norms(grads: Tree) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The Euclidean norm of a gradient, and those of its parts.

    Args:
        grads: A tree like the parameters, with stacked layers under `blocks` if it has layers.

    Returns:
        The norm of all, a scalar; and by the names at the top of the tree the norms of their parameters, scalars, but
        [L] for `blocks`.
    """
    parts = grads if isinstance(grads, dict) else {"params": grads}
    squares = {name: _squares(part, stacked=name == "blocks") for name, part in parts.items()}
    total = sum((jnp.sum(s) for s in squares.values()), start=jnp.zeros((), jnp.float32))
    return jnp.sqrt(total), {name: jnp.sqrt(s) for name, s in squares.items()}


def _squares(part: Tree, stacked: bool) -> Any:
    def each(g: jax.Array) -> jax.Array:
        g = g.astype(jnp.promote_types(g.dtype, jnp.float32))
        return jnp.sum(jnp.square(g), axis=tuple(range(1, g.ndim)) if stacked else None)

    return sum((each(g) for g in jax.tree.leaves(part)), start=jnp.zeros((), jnp.float32))


def named_norms(norms: dict[str, Any]) -> dict[str, float]:
    """Norms as numbers by name, for the log: "grad_norm/tokens", and "grad_norm/blocks/0" for each layer."""
    named: dict[str, float] = {}
    for name, value in norms.items():
        if value.ndim:
            named |= {f"grad_norm/{name}/{layer}": float(v) for layer, v in enumerate(value)}
        else:
            named[f"grad_norm/{name}"] = float(value)
    return named
