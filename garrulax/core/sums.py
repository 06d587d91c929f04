"""Sums and products of a few rows, whose last bits do not depend on the number of rows.

XLA:CPU adds the numbers of a row in another order when there are many rows than when there are few (jax 0.10), and
multiplies a single row by other instructions than several. A text that is decoded alone would then have other
log-probabilities than the same text in a batch, by about 1e-5, and seldom another token. But products of 2 to 16 rows
agree. So sums are products with ones here, and a single row is multiplied as two equal rows.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

MOST_ROWS = 64  # beyond that, as in training and in reading a prompt, the plain sum is faster
_COLUMNS = 8  # of ones; XLA:CPU computes a product with one column as something else


def row_sum(x: jax.Array, most_rows: int = MOST_ROWS) -> jax.Array:
    """The sum over the last axis, which stays with size 1.

    Args:
        x: [..., n], float32 or float64.
        most_rows: With more rows than this the result may depend on their number.
    """
    if math.prod(x.shape[:-1]) > most_rows or not _on_one_cpu(x):
        return x.sum(-1, keepdims=True)
    ones = jnp.ones((x.shape[-1], _COLUMNS), x.dtype)
    dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    y = multiply_rows(lambda rows: dot(rows, ones), x.reshape(-1, x.shape[-1]))
    return y[:, :1].reshape(*x.shape[:-1], 1)


def row_mean(x: jax.Array) -> jax.Array:
    """The mean over the last axis, which stays with size 1; see `row_sum`."""
    return row_sum(x) / x.shape[-1]


def multiply_rows(multiply: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """multiply(x), on one CPU of a single row as two equal rows: these have the last bits of a row among several.

    Args:
        multiply: The product of a matrix [M, n] and a weight: [M, N].
        x: Activations [M, n], of any floating-point dtype.

    Returns:
        [M, N], as `multiply` returns it.
    """
    if len(x) != 1 or not _on_one_cpu(x):
        return multiply(x)
    return multiply(jnp.broadcast_to(x, (2, x.shape[1])))[:1]


def _on_one_cpu(x: jax.Array) -> bool:
    return jax.default_backend() == "cpu" and jax.typeof(x).sharding.mesh.empty
