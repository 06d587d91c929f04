"""Weights that are not one array: quantised ones, and pairs of low rank beside a frozen one.

Models multiply through `core.einsum.einsum` and read rows through `core.einsum.lookup`, which call the methods below.
So a parameter of any tree may be a `Leaf` where its ParamSpec says an array, and no model knows.

To JAX a leaf is a tree of arrays. Those of stacked layers have the layers on their leading axis, so that `lax.scan`,
`vmap` and `unstack` slice them as they slice a plain parameter. Code that walks over parameters uses `map_weights`
and `weights`, which treat a leaf as one parameter.
"""

import abc
import math
from collections.abc import Callable
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

Tree = Any  # nested dicts (and tuples) of arrays and leaves


class Leaf(abc.ABC):
    """A weight that knows how it is multiplied.

    A subclass is a frozen dataclass, registered with `jax.tree_util.register_dataclass`. Its properties follow from its
    arrays alone, which may be arrays, tracers, `jax.ShapeDtypeStruct`s or `NamedSharding`s; so its constructor checks
    nothing.
    """

    #: What the leaf is, for messages, such as "a LoRA weight".
    kind: ClassVar[str] = "a weight of several arrays"
    #: How to get a plain weight in its place, for messages, such as "make plain weights of it with gx.merge".
    advice: ClassVar[str] = "give plain weights"

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of the weight, with the axis of the layers first where they are stacked."""

    @property
    @abc.abstractmethod
    def dtype(self) -> np.dtype:
        """The floating-point dtype that a plain weight in its place would have."""

    @abc.abstractmethod
    def einsum(self, spec: str, x: jax.Array) -> jax.Array:
        """The product with activations, in x's dtype; see `core.einsum.einsum`. Of one layer."""

    @abc.abstractmethod
    def lookup(self, ids: jax.Array) -> jax.Array:
        """Rows of a table; see `core.einsum.lookup`."""

    @abc.abstractmethod
    def dense(self, dtype: Any = None) -> jax.Array:
        """The weight as one array; None is its `dtype`."""

    @abc.abstractmethod
    def astype(self, dtype: Any) -> "Leaf":
        """The leaf that computes in another dtype. What must keep its own dtype, such as codes, does."""

    @abc.abstractmethod
    def shardings(self, place: NamedSharding) -> "Leaf":
        """A leaf with the sharding of each array in its place.

        Args:
            place: Sharding of the plain weight, one entry of its PartitionSpec a dimension.

        Raises:
            ValueError: The leaf cannot be sharded so.
        """

    @property
    def ndim(self) -> int:
        """Number of dimensions of `shape`."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of entries of `shape`."""
        return math.prod(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, layer: Any) -> Self:
        """One layer of stacked ones."""
        return jax.tree.map(lambda x: x[layer], self)


def is_leaf(x: Any) -> bool:
    """Whether x is a `Leaf`; for `is_leaf=` of JAX's functions of trees."""
    return isinstance(x, Leaf)


def weights(tree: Tree) -> list[Any]:
    """The parameters of a tree, arrays and leaves."""
    return jax.tree.leaves(tree, is_leaf=is_leaf)


def map_weights(f: Callable, tree: Tree, *rest: Tree) -> Tree:
    """`jax.tree.map` over parameters: f gets arrays and whole leaves."""
    return jax.tree.map(f, tree, *rest, is_leaf=is_leaf)


def cast(tree: Tree, dtype: Any) -> Tree:
    """The parameters in another dtype of computation; arrays of integers are unchanged."""
    return map_weights(lambda w: w.astype(dtype) if jnp.issubdtype(w.dtype, jnp.floating) else w, tree)


def dtype_of(tree: Tree) -> np.dtype:
    """The dtype of the first parameter of a tree."""
    return np.dtype(weights(tree)[0].dtype)


def check_arrays(tree: Tree, purpose: str) -> None:
    """Checks that all parameters are plain arrays.

    Args:
        tree: The parameters.
        purpose: What needs arrays, for the message.

    Raises:
        ValueError: One is a leaf; the message says what kind, and what to do.
    """
    for w in weights(tree):
        if isinstance(w, Leaf):
            raise ValueError(f"{purpose} needs plain weights, but the model has {w.kind}: {w.advice}")
