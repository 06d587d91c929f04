"""Sums over the last axis of a few rows, whose last bits do not depend on the number of rows.

XLA:CPU adds the numbers of a row in another order when there are many rows than when there are few (jax 0.10), but not
in a product of matrices with 2 to 16 rows. A text that is decoded alone then has other log-probabilities than the same
text in a batch, by about 1e-5, and seldom another token. So these sums are products with ones.
"""

import math

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
    rows = math.prod(x.shape[:-1])
    if rows > most_rows or jax.default_backend() != "cpu" or not jax.typeof(x).sharding.mesh.empty:
        return x.sum(-1, keepdims=True)
    ones = jnp.ones((x.shape[-1], _COLUMNS), x.dtype)
    if rows == 1:  # a product with one row has other last bits than one with several
        twice = jnp.broadcast_to(x.reshape(1, -1), (2, x.shape[-1]))
        return jnp.matmul(twice, ones, precision=jax.lax.Precision.HIGHEST)[:1, :1].reshape(*x.shape[:-1], 1)
    return jnp.matmul(x, ones, precision=jax.lax.Precision.HIGHEST)[..., :1]


def row_mean(x: jax.Array) -> jax.Array:
    """The mean over the last axis, which stays with size 1; see `row_sum`."""
    return row_sum(x) / x.shape[-1]
