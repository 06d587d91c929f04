"""Selection of entries of each row by thresholds, without a sort. Letters: B rows, V vocabulary.

A threshold is found by bisection of its bits, with one sum over the row for each bit. This is exact and on every
platform far cheaper than a sort. The bits of a positive float order as the float does. A sum should read one array: of
two, XLA:CPU divides the loop among threads, which takes five times as long as the sum.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

DIGIT = 4  # bits that are decided at a time on GPUs
MOST_BY_DIGITS = 1 << 19  # numbers of all rows; with more, a GPU takes longer for 15 sums than for 4


def least(
    predicate: Callable[..., jax.Array], operands: Sequence[jax.Array], bits: int, dtype: Any = np.uint32
) -> jax.Array:
    """Returns for each row the smallest number of `bits` bits with a property that all greater numbers have too.

    Args:
        predicate: Function from (numbers [B], *operands) to bool [B], row by row. The greatest number is not tried: it
            has the property.
        operands: Arrays whose first axis is B.
        bits: Number of bits.
        dtype: uint32 or uint64, the dtype of the numbers.
    """

    def search(*operands):
        def decide_bit(i, low):  # low: [B], the answer's bits above bit bits - 1 - i; the others are 0
            half = jnp.asarray(1, dtype) << (bits - 1 - i).astype(dtype)
            return jnp.where(predicate(low + (half - 1), *operands), low, low + half)

        return jax.lax.fori_loop(0, bits, decide_bit, jnp.zeros(operands[0].shape[0], dtype))

    def by_rows(*operands):  # on CPUs: a row stays in the cache, and no thread waits for another one
        return jax.lax.map(lambda row: search(*(x[None] for x in row))[0], operands)

    if jax.default_backend() == "gpu" and operands[0].size <= MOST_BY_DIGITS:
        return least_by_digits(predicate, operands, bits, dtype)
    if operands[0].shape[0] == 1:
        return search(*operands)
    return jax.lax.platform_dependent(*operands, cpu=by_rows, default=search)


def least_by_digits(
    predicate: Callable[..., jax.Array], operands: Sequence[jax.Array], bits: int, dtype: Any = np.uint32
) -> jax.Array:
    """`least` in a quarter of the passes: a GPU takes about as long for 15 sums of short rows as for one."""
    passes, greatest = -(-bits // DIGIT), jnp.asarray((1 << bits) - 1, dtype)
    digits = jnp.arange(1, 1 << DIGIT, dtype=dtype)[:, None]  # [15, 1]

    def decide_digit(i, low):  # low: [B], the digits above digit passes - 1 - i; the others are 0
        shift = (DIGIT * (passes - 1 - i)).astype(dtype)
        tried = low[None] + (digits << shift) - 1  # [15, B], and behind the greatest number in the first pass
        reached = jax.vmap(lambda x: predicate(jnp.minimum(x, greatest), *operands))(tried) | (tried >= greatest)
        return low + (jnp.sum(~reached, axis=0).astype(dtype) << shift)

    return jax.lax.fori_loop(0, passes, decide_digit, jnp.zeros(operands[0].shape[0], dtype))


def least_float(predicate: Callable[..., jax.Array], operands: Sequence[jax.Array], dtype: Any) -> jax.Array:
    """`least` for floats that are not negative: float `dtype` [B]."""
    unsigned = _unsigned(dtype)

    def of_bits(bits, *operands):
        return predicate(jax.lax.bitcast_convert_type(bits, dtype), *operands)

    return jax.lax.bitcast_convert_type(least(of_bits, operands, 8 * unsigned.itemsize - 1, unsigned), dtype)


def sum_where(condition: jax.Array, weights: jax.Array) -> jax.Array:
    """Sums the weights of each row for which the condition holds: [B, V] and [B, V] to [B]."""
    return jnp.sum(jnp.where(condition, weights, 0), axis=-1)


def count(condition: jax.Array) -> jax.Array:
    """Number of True in each row of bool [B, V]: float32 [B], exact up to 2 ** 24."""
    return jnp.sum(condition.astype(jnp.float32), axis=-1)


def top_mask(values: jax.Array, weights: jax.Array | None, limit: jax.Array) -> jax.Array:
    """Selects the greatest values of each row until their weights reach a limit.

    Args:
        values: float32 or float64 [B, V]; narrower floats become float32.
        weights: [B, V], not negative; None is 1 for each.
        limit: [B], in the dtype of the weights; float32 without weights.

    Returns:
        bool [B, V], True where the weights of all greater values of the row sum to less than its limit.
    """
    order = _ordered(values)

    def reached(threshold, order, limit, *weights):
        greater = order > threshold[:, None]
        return (sum_where(greater, *weights) if weights else count(greater)) < limit

    operands = (order, limit) if weights is None else (order, limit, weights)
    return order >= least(reached, operands, 8 * order.dtype.itemsize, order.dtype)[:, None]


def nucleus(probabilities: jax.Array, limit: jax.Array) -> jax.Array:
    """Selects the greatest probabilities of each row until they sum to a limit, and as few of them as possible.

    Of equal probabilities at the threshold, those of the greatest ids are selected.

    Args:
        probabilities: [B, V].
        limit: [B], above 0, in the same dtype.

    Returns:
        bool [B, V].
    """
    size = probabilities.shape[1]

    def reached(threshold, probabilities, limit):
        return sum_where(probabilities > threshold[:, None], probabilities) < limit

    threshold = least_float(reached, (probabilities, limit), probabilities.dtype)[:, None]  # [B, 1]
    missing = limit - sum_where(probabilities > threshold, probabilities)  # [B], what those at the threshold must add
    wanted = jnp.ceil(missing / threshold[:, 0]).astype(jnp.float32)  # [B], how many of them are needed

    def last_ones(tied):
        ids = jnp.arange(size, dtype=jnp.uint32)[None]

        def few_after(i, tied, wanted):
            return count(tied & (ids > i[:, None])) < wanted

        return tied & (ids >= least(few_after, (tied, wanted), size.bit_length())[:, None])

    tied = probabilities == threshold
    tied = jax.lax.cond(jnp.any(count(tied) > wanted), last_ones, lambda x: x, tied)
    return (probabilities > threshold) | tied


def _ordered(values: jax.Array) -> jax.Array:
    """Unsigned integers in the order of the values."""
    if values.dtype != np.float64:
        values = values.astype(jnp.float32)
    unsigned = _unsigned(values.dtype)
    bits = jax.lax.bitcast_convert_type(jnp.where(values == 0, 0.0, values), unsigned)  # -0 becomes 0
    sign = jnp.asarray(1, unsigned) << jnp.asarray(8 * unsigned.itemsize - 1, unsigned)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _unsigned(dtype: Any) -> np.dtype:
    return np.dtype(f"uint{8 * np.dtype(dtype).itemsize}")
