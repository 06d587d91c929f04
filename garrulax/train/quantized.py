"""Training with products of int8 or fp8 numbers, which Qwix quantises and multiplies (an extra)."""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from garrulax.core.einsum import lookup, product
from garrulax.core.leaf import Leaf
from garrulax.core.spec import Tree, map_specs

#: Setting -> dtype of activations and weights, and dtype of gradients.
_DTYPES = {"int8": ("int8", "int8"), "fp8": ("float8_e4m3fn", "float8_e5m2")}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OwnProduct(Leaf):
    """A weight that is multiplied by a function of its own, on one device.

    Attributes:
        array: The weight, contracted letters first.
        dot: The product of x [M, n] and the weight as a matrix [n, N]: [M, N].
    """

    array: jax.Array
    dot: Callable[[jax.Array, jax.Array], jax.Array] = dataclasses.field(metadata={"static": True})

    kind = "weights that are multiplied in low precision"
    advice = "leave out quantize"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        """Of the weight."""
        return np.dtype(self.array.dtype)

    def einsum(self, spec: str, x: jax.Array) -> jax.Array:
        """The product by `dot`."""
        return product(spec, x, self.array, self.dot)

    def lookup(self, ids: jax.Array) -> jax.Array:
        """Rows of the weight."""
        return lookup(self.array, ids)

    def dense(self, dtype: Any = None) -> jax.Array:
        """The weight."""
        return self.array if dtype is None else self.array.astype(dtype)

    def astype(self, dtype: Any) -> "OwnProduct":
        """The weight in another dtype, with the same `dot`."""
        return dataclasses.replace(self, array=self.array.astype(dtype))

    def shardings(self, place: NamedSharding) -> "OwnProduct":
        """The sharding of the weight."""
        return OwnProduct(cast(Any, place), self.dot)


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
