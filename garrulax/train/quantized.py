"""Training with products of int8 or fp8 numbers, which Qwix quantises and multiplies (an extra)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from garrulax.core.einsum import OwnProduct
from garrulax.core.spec import Tree, map_specs

#: Setting -> dtype of activations and weights, and dtype of gradients.
_DTYPES = {"int8": ("int8", "int8"), "fp8": ("float8_e4m3fn", "float8_e5m2")}


def check_quantized(kind: str, mesh: str) -> None:
    """Checks that a run can compute with such products.

    Raises:
        ImportError: If Qwix is not installed.
        ValueError: On a mesh, whose products these are not.
    """
    if kind == "none":
        return
    if mesh:
        raise ValueError(f"quantize={kind} works on one device only: leave out quantize or mesh={mesh}")
    _qwix()


def quantized(params: Tree, specs: Tree, kind: str) -> Tree:
    """The parameters, where the matrices of the layers multiply in low precision; head and embeddings do not.

    Args:
        params: Of the model, with stacked layers.
        specs: ParamSpec tree of the parameters.
        kind: "int8" or "fp8".
    """
    dot = quantized_dot(kind)
    blocks = map_specs(lambda s, p: OwnProduct(p, dot) if s.role == "matrix" else p, specs["blocks"], params["blocks"])
    return {**params, "blocks": blocks}


def quantized_dot(kind: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The product x @ w of quantised numbers.

    Every row of x and every column of w is divided by its greatest absolute value, and rounded. The gradient of x is
    such a product too, of the rows of the incoming gradient and the rows of w. That of w is the plain product: its sum
    over the tokens would lose small contributions. Rounding has the gradient of the identity (straight through, Bengio
    et al. 2013).

    Args:
        kind: "int8" or "fp8" (e4m3 forward, e5m2 for gradients).

    Returns:
        A function of x [M, n] and w [n, N], which returns [M, N] in x's dtype.
    """
    qwix: Any = _qwix()
    forward, backward = _DTYPES[kind]

    def product(x: jax.Array, w: jax.Array, x_dtype: str, contracted: int) -> jax.Array:
        left = qwix.quantize(x, x_dtype, channelwise_axes=(0,))
        right = qwix.quantize(w, forward, channelwise_axes=(1 - contracted,))
        return qwix.dot_general(left, right, (((1,), (contracted,)), ((), ()))).astype(x.dtype)

    @jax.custom_vjp
    def dot(x: jax.Array, w: jax.Array) -> jax.Array:
        return product(x, w, forward, 0)

    def dot_forward(x, w):
        return dot(x, w), (x, w)

    def dot_backward(kept, dy):
        x, w = kept
        return product(dy, w, backward, 1), jnp.einsum("mn,mk->nk", x, dy)

    dot.defvjp(dot_forward, dot_backward)
    return dot


def _qwix() -> Any:
    try:
        import qwix
    except ImportError:
        raise ImportError("quantize needs the package qwix: pip install 'garrulax[quantize]'") from None
    return qwix
