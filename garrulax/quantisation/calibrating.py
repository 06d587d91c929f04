"""Quantises the matrices of a model one after another while the model reads the calibration texts.

Each matrix sees the inputs that it will have in the quantised model, since all matrices before it are quantised by then
(the "true sequential" order of GPTQ's authors). SmoothQuant's migration sees those of the plain model.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from garrulax.core import einsum as products
from garrulax.core.config import ModelConfig
from garrulax.core.leaf import Leaf
from garrulax.core.quantised import Quantised
from garrulax.core.spec import Tree
from garrulax.models import forward

WINDOW = 512  # tokens of a row

#: (name, weight [outputs, inputs], inputs [rows, inputs]) -> the weight with which the model goes on
Round = Callable[[str, np.ndarray, np.ndarray], Quantised | jax.Array]


class Calibrating(Leaf):
    """A matrix that is quantised when its first inputs arrive, and from then on multiplies as the quantised one."""

    kind = "a weight that is being quantised"

    def __init__(self, name: str, array: jax.Array, inputs: int, round_: Round):
        self.name, self.array, self.inputs, self.round = name, array, inputs, round_
        self.done: Quantised | jax.Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        """Of the weight."""
        return np.dtype(self.array.dtype)

    def einsum(self, spec: str, x: jax.Array) -> jax.Array:
        """The product with the quantised weight."""
        if self.done is None:
            count = int(np.prod(self.shape[: self.inputs]))
            matrix = np.asarray(self.array, np.float32).reshape(count, -1).T
            self.done = self.round(self.name, matrix, np.asarray(x, np.float32).reshape(-1, count))
        return products.einsum(spec, x, self.done)

    def lookup(self, ids: jax.Array) -> jax.Array:
        """Rows of the plain weight."""
        return products.lookup(self.array, ids)

    def dense(self, dtype: Any = None) -> jax.Array:
        """The plain weight."""
        return self.array if dtype is None else self.array.astype(dtype)

    def astype(self, dtype: Any) -> "Calibrating":
        """The same."""
        return self

    def shardings(self, place: Any) -> "Calibrating":
        """Not implemented: calibration runs on one device."""
        raise ValueError("a model is calibrated on one device, without a mesh")


# Its only array is the weight; it stays the same object, since it changes when its inputs arrive.
jax.tree_util.register_pytree_node(Calibrating, lambda leaf: ((leaf.array,), leaf), lambda leaf, _: leaf)


def windows(rows: Sequence[Sequence[int]], context: int) -> np.ndarray:
    """The tokens of all texts, joined and cut into rows: int32 [rows, tokens].

    Raises:
        ValueError: There are no tokens.
    """
    joined = np.concatenate([np.asarray(row, np.int32) for row in rows]) if rows else np.zeros(0, np.int32)
    if not len(joined):
        raise ValueError("calibrate has no tokens: give texts like those that the model will read")
    width = min(WINDOW, context, len(joined))
    return joined[: len(joined) // width * width].reshape(-1, width)


def calibrate(params: Tree, config: ModelConfig, tokens: np.ndarray, leaves: Mapping[str, Calibrating]) -> None:
    """Reads the tokens with parameters in which matrices are `Calibrating`; afterwards all that were read are done.

    Raises:
        ValueError: A matrix was not read.
    """
    forward(params, jnp.asarray(tokens), config)
    left = [name for name, leaf in leaves.items() if leaf.done is None]
    if left:
        raise ValueError(f"the calibration texts do not reach {', '.join(left[:4])}: use method='rtn'")
