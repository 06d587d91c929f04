"""Dtypes that do not depend on JAX's settings: jax_enable_x64, and strict promotion (which refuses `promote_types`)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

#: Dtypes of parameters; others that JAX has, such as float8_e4m3fn, are taken too.
NAMES = ("float32", "bfloat16", "float16", "float64")


def parameter_dtype(dtype: Any) -> np.dtype:
    """The dtype that parameters are asked to have.

    Args:
        dtype: Its name, such as "bfloat16", or a dtype of numpy or JAX.

    Raises:
        ValueError: It is no dtype, or none of floating-point numbers.
    """
    try:
        found = jnp.dtype(dtype)
    except (TypeError, ValueError):
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        kind = "no dtype" if found is None else "no dtype of floating-point numbers"
        raise ValueError(f"dtype={str(dtype)[:40]!r} is {kind}: parameters can have {', '.join(NAMES)}")
    return found


def at_least_float32(*dtypes: Any) -> np.dtype:
    """The dtype of sums and norms: float64 if one of the floating dtypes is float64, otherwise float32."""
    return np.dtype(jnp.float64 if any(jnp.dtype(dtype) == np.float64 for dtype in dtypes) else jnp.float32)


def int32_indices(*start: jax.Array | int) -> tuple[jax.Array, ...]:
    """Indices of a slice as int32: slicing wants one dtype, and Python integers are int64 where x64 is enabled."""
    return tuple(jnp.asarray(i, jnp.int32) for i in start)


def as_int32(x: jax.Array) -> jax.Array:
    """An array of JAX's default integers, which are int64 where x64 is enabled, as int32; any other array unchanged."""
    return x.astype(jnp.int32) if x.dtype == np.int64 else x
