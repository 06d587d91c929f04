"""One tree of `ParamSpec`s describes the parameters of a family; everything else about them is derived from it.

From the tree come initial values, abstract shapes, shardings (`core.sharding`), counts, the weight-decay and Muon
masks, and the names and layouts of the tensors in a Hugging Face checkpoint (`hub`). Nothing is described twice.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Tree = Any  # nested dicts (and tuples) of leaves
Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]  # (key, shape, dtype) -> array

ROLES = ("matrix", "embedding", "vector")


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a parameter lies in a checkpoint and how it is laid out there.

    parameter = stored.reshape(split)[take].transpose(order).reshape(spec.shape); each step may be None (nothing to do).
    A `{}` in the name is the layer number. take: for each dimension of `split` all of it (None), a part (start, stop)
    or one entry (an int, which drops the dimension): for tensors that hold several parameters, such as query, key and
    value fused.
    """

    name: str
    split: tuple[int, ...] | None = None
    order: tuple[int, ...] | None = None
    take: tuple[int | tuple[int, int] | None, ...] | None = None

    @property
    def index(self) -> tuple[int | slice, ...]:
        """`take` as numpy indexes by it."""
        return tuple(i if isinstance(i, int) else slice(*(i or (None,))) for i in self.take or ())

    def read(self, stored: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The parameter of `shape` from the stored tensor (a view where numpy allows)."""
        x = (stored.reshape(self.split) if self.split else stored)[self.index]
        return (x.transpose(self.order) if self.order else x).reshape(shape)

    def write(self, x: np.ndarray, target: np.ndarray) -> None:
        """The inverse of `read`: puts the parameter x where it belongs in the tensor to store."""
        place = target.reshape(self.split or target.shape)[self.index]
        order = self.order or tuple(range(place.ndim))
        place[...] = x.reshape([place.shape[i] for i in order]).transpose(np.argsort(order))


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter: shape, logical axis of every dimension, initial values, place in a checkpoint, role.

    axes: names that a rule table of `core.sharding` maps to mesh axes; None is never sharded.
    inputs: how many leading dimensions (after `layers`) are contracted with the activations.
    role: "matrix" (decayed; Muon), "embedding" (decayed; never Muon), "vector" (norms and biases: never decayed).
    stored_shape: shape in the checkpoint of one layer's tensor; None means the parameter's own.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Initializer
    stored: Stored
    stored_shape: tuple[int, ...] | None = None
    role: str = "matrix"
    inputs: int = 1
    layers: int = 0

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(f"{self.stored.name}: shape {self.shape} and axes {self.axes} differ in length")
        if self.role not in ROLES:
            raise ValueError(f"{self.stored.name}: role {self.role!r} is none of {ROLES}")

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """Shape of one layer's parameter: `shape` without the stacked axis."""
        return self.shape[1:] if self.layers else self.shape

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the stored tensors: one, or one a layer."""
        return tuple(self.stored.name.format(i) for i in range(self.layers)) if self.layers else (self.stored.name,)


def normal(std: float) -> Initializer:
    """Normal values with mean 0 and standard deviation `std`."""
    return lambda key, shape, dtype: std * jax.random.normal(key, shape, dtype)


def ones(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """All ones."""
    return jnp.ones(shape, dtype)


def zeros(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """All zeros."""
    return jnp.zeros(shape, dtype)


def is_spec(x: Any) -> bool:
    """Whether `x` is a leaf of a ParamSpec tree."""
    return isinstance(x, ParamSpec)


def map_specs(f: Callable, specs: Tree, *rest: Tree) -> Tree:
    """`jax.tree.map` over the ParamSpecs of a tree."""
    return jax.tree.map(f, specs, *rest, is_leaf=is_spec)


def named_specs(specs: Tree) -> dict[str, ParamSpec]:
    """ParamSpecs by path, such as `blocks/attention/query`."""
    leaves = jax.tree_util.tree_leaves_with_path(specs, is_leaf=is_spec)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): spec for path, spec in leaves}


def stacked(layers: int, tree: Tree) -> Tree:
    """The ParamSpecs of one layer, for `layers` layers on a new leading axis."""

    def lift(s: ParamSpec) -> ParamSpec:
        def init(key, shape, dtype):
            return jax.vmap(lambda k: s.init(k, s.shape, dtype))(jax.random.split(key, layers))

        return dataclasses.replace(s, shape=(layers, *s.shape), axes=("layers", *s.axes), init=init, layers=layers)

    return map_specs(lift, tree)


def init(specs: Tree, key: jax.Array, dtype: Any = jnp.float32) -> Tree:
    """Initial parameters. A leaf's values depend on the key and its own path alone, so a new leaf moves no other."""

    def one(path, s):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return s.init(jax.random.fold_in(key, zlib.crc32(name.encode())), s.shape, dtype)

    return jax.tree_util.tree_map_with_path(one, specs, is_leaf=is_spec)


def abstract(specs: Tree, dtype: Any = jnp.float32, shardings: Tree | None = None) -> Tree:
    """`jax.ShapeDtypeStruct`s of the parameters: nothing is allocated."""
    if shardings is None:
        return map_specs(lambda s: jax.ShapeDtypeStruct(s.shape, dtype), specs)
    return map_specs(lambda s, p: jax.ShapeDtypeStruct(s.shape, dtype, sharding=p), specs, shardings)


def count(specs: Tree) -> int:
    """Number of parameters; a tied tensor stands in the tree once and counts once."""
    return sum(math.prod(s.shape) for s in jax.tree.leaves(specs, is_leaf=is_spec))


def decay_mask(specs: Tree) -> Tree:
    """True where decoupled weight decay applies: matrices and embeddings, not norms and biases."""
    return map_specs(lambda s: s.role != "vector", specs)


def check_parts(specs: Tree, params: Tree) -> None:
    """Raises ValueError naming the top-level parts that only one of the ParamSpec tree and `params` has."""
    odd = {"missing": specs.keys() - params.keys(), "unknown": params.keys() - specs.keys()}
    if any(odd.values()):
        named = "; ".join(f"{', '.join(sorted(names))} {what}" for what, names in odd.items() if names)
        raise ValueError(f"the parameters do not fit the config: {named}")


def named_leaves(tree: Tree, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """The leaves of any tree by path, such as `blocks/attention/query`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
