"""Keeping what a model knows while it learns something else: elastic weight consolidation.

Source: Kirkpatrick et al. 2017, arXiv 1612.00796, eq. 3. Replay of old data is `mixed` with `causal_lm` on these;
learning without forgetting is `distillation` with the old parameters as the teacher, on the new data.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from garrulax.core.spec import Tree


def fisher(loglikelihood: Callable[[Tree, Tree], jax.Array], params: Tree, examples: Tree, *, parts: int = 1) -> Tree:
    """The diagonal of the empirical Fisher information: the mean over examples of the squared gradient of each.

    It is not the square of the mean gradient, which tends to 0 with the number of examples.

    Args:
        loglikelihood: Maps the parameters and one example to the log-likelihood of it, a scalar. What one example is, a
            sequence or a token, sets the size of the result.
        params: At which it is taken.
        examples: A tree of arrays with a leading axis of N examples.
        parts: The gradients of N / parts examples are in memory at once.

    Returns:
        A tree like the parameters, float32 or wider.

    Raises:
        ValueError: If the parts do not divide the examples.
    """
    number = jax.tree.leaves(examples)[0].shape[0]
    if number % parts:
        raise ValueError(f"{number} examples cannot be taken in {parts} equal parts")
    split = jax.tree.map(lambda x: x.reshape(parts, number // parts, *x.shape[1:]), examples)
    gradients = jax.vmap(jax.grad(loglikelihood), in_axes=(None, 0))

    def add(total: Tree, part: Tree) -> tuple[Tree, None]:
        squares = jax.tree.map(lambda g: jnp.sum(g.astype(g.dtype) ** 2, axis=0), gradients(params, part))
        return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, squares), None

    zero = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), params)
    total, _ = jax.lax.scan(add, zero, split)
    return jax.tree.map(lambda x: x / number, total)


def ewc_penalty(params: Tree, old: Tree, information: Tree | None = None, *, weight: float = 1.0) -> jax.Array:
    """weight / 2 * sum of information * (params - old)^2.

    Args:
        params: That are trained.
        old: After the task that is to be remembered.
        information: From `fisher` at the old parameters; None is 1 everywhere (L2-SP, the baseline to compare with).
        weight: lambda.

    Returns:
        A scalar.
    """
    squares = jax.tree.map(lambda p, o: (p - jax.lax.stop_gradient(o)) ** 2, params, old)
    if information is not None:
        squares = jax.tree.map(lambda s, f: s * f.astype(s.dtype), squares, information)
    return weight / 2 * jnp.sum(jnp.stack([jnp.sum(s) for s in jax.tree.leaves(squares)]))
