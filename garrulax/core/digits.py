"""Products of float32 activations with int8 and bfloat16 weights on CPUs that multiply such numbers.

These CPUs multiply int8 by int8 numbers, and bfloat16 by bfloat16 ones, many times faster than float32, and XLA:CPU
(by its library YNN) uses that. A float32 activation is neither, but it is a sum of three of them, its digits: the
product is the sum of three products, which are computed as one with three times as many rows. Nothing but the digits
is converted, and the weight is read once.

An int8 digit is one of base 256, of the activation as a fraction of the largest of its row. So activations are rounded
to 2^-24 of that, which is far less than what rounding the weight to int8 changed. Products of int8 numbers are summed
exactly in int32, whatever the other rows are. Bfloat16 digits are the parts of 8 bits of the 24 of a float32:
nothing is rounded but the sums.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

_DIGITS = 3
_MOST_INPUTS = (2**31 - 1) // (128 * 128)  # whose products of int8 numbers are summed in int32

#: Flags in /proc/cpuinfo of Linux, one of which a CPU has that multiplies these numbers.
_FLAGS = {"int8": {"avx512_vnni", "avx_vnni"}, "bfloat16": {"avx512_bf16"}}


@functools.cache
def has(dtype: str) -> bool:
    """Whether the CPU of this machine multiplies "int8" or "bfloat16" numbers; False where that is not known."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return not _FLAGS[dtype].isdisjoint(flags)


def can_be_summed(inputs: int) -> bool:
    """Whether sums of products of so many int8 numbers fit into int32."""
    return inputs <= _MOST_INPUTS


def times_int8(x: jax.Array, w: jax.Array, contracted: int) -> jax.Array:
    """The product in float32 of activations with an int8 matrix.

    Args:
        x: float32 [M, n], n of at most `can_be_summed`. A row with an infinity or NaN gives NaN.
        w: int8 [N, n], or [n, N].
        contracted: The axis of w that has n: 1 or 0.

    Returns:
        float32 [M, N].
    """
    top = jnp.max(jnp.abs(x), axis=1, keepdims=True)  # [M, 1]
    step = jnp.where(top == 0, np.float32(1), top) * np.float32(1 / (127 * 2**16))
    whole = jnp.round(x / step).astype(jnp.int32)  # of at most 127 * 2^16, so that no digit is greater than 127
    digits = []
    for _ in range(_DIGITS):
        digit = ((whole + 128) & 255) - 128  # -128 .. 127
        digits.append(digit)
        whole = (whole - digit) >> 8
    low, middle, high = _product(jnp.concatenate(digits).astype(jnp.int8), w, contracted, jnp.int32)
    return (high * np.float32(2**16) + middle * np.float32(2**8) + low) * step


def times_bfloat16(x: jax.Array, w: jax.Array, contracted: int) -> jax.Array:
    """The product in float32 of activations with a bfloat16 matrix.

    Args:
        x: float32 [M, n], or bfloat16, which has one digit.
        w: bfloat16 [N, n], or [n, N].
        contracted: The axis of w that has n: 1 or 0.

    Returns:
        float32 [M, N].
    """
    if x.dtype == jnp.bfloat16:
        return _dot(x, w, contracted, jnp.float32)
    digits = []
    for _ in range(_DIGITS):
        # Bits, since XLA takes a conversion to bfloat16 and back for one that changes nothing.
        upper = jax.lax.bitcast_convert_type(x, jnp.uint32) >> 16
        digits.append(jax.lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16))
        x = x - jax.lax.bitcast_convert_type(upper << 16, jnp.float32)
    high, middle, low = _product(jnp.concatenate(digits), w, contracted, jnp.float32)
    return high + (middle + low)


def _product(digits: jax.Array, w: jax.Array, contracted: int, dtype: type) -> jax.Array:
    """The product [3, M, N] in float32 of digits [3 M, n]."""
    y = _dot(digits, w, contracted, dtype).astype(jnp.float32)
    return y.reshape(_DIGITS, -1, y.shape[1])


def _dot(x: jax.Array, w: jax.Array, contracted: int, dtype: type) -> jax.Array:
    return jax.lax.dot_general(x, w, (((1,), (contracted,)), ((), ())), preferred_element_type=dtype)
