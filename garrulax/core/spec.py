"""Declarations of parameters: one tree of `ParamSpec`s a family, from which everything else about them is derived.

From the tree come initial values, abstract shapes, shardings (`core.sharding`), counts, the weight-decay mask, Muon's
dimension numbers, and the names and layouts of the tensors in a Hugging Face checkpoint (`hub`). No fact is
repeated.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from garrulax.core import leaf
from garrulax.core.layout import Part, TensorLayout, bias_pattern, parse_layout

Tree = Any  # nested dicts (and tuples) of leaves
Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]  # (key, shape, dtype) -> array
Role = Literal["matrix", "embedding", "vector"]

#: The logical axis of a dimension, by its letter; `core.sharding` maps it to mesh axes. Other letters are not sharded.
AXES = {"D": "embed", "H": "heads", "K": "kv_heads", "C": "head", "F": "mlp", "V": "vocab", "P": "position"}


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter.

    Attributes:
        layout: Its shape, and its place in a checkpoint.
        layer_axes: Logical axis of every dimension of one layer's parameter; None is never sharded.
        init: Initial values of one layer's parameter.
        role: "matrix" (decayed; Muon), "embedding" (decayed; never Muon) or "vector" (norms and biases: never decayed).
        layers: Number of layers stacked on a leading axis; 0 where there is no such axis.
    """

    layout: TensorLayout
    layer_axes: tuple[str | None, ...]
    init: Initializer
    role: Role
    layers: int = 0

    @property
    def name(self) -> str:
        """Name of the stored tensor; `{}` stands for the number of the layer."""
        return self.layout.name

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the stored tensors: one, or one a layer."""
        return tuple(self.name.format(i) for i in range(self.layers)) if self.layers else (self.name,)

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """Shape of one layer's parameter."""
        return self.layout.shape

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape, with the axis of the layers first where there is one."""
        return (self.layers, *self.layout.shape) if self.layers else self.layout.shape

    @property
    def inputs(self) -> int:
        """Number of leading dimensions of `layer_shape` that are contracted with the activations."""
        return self.layout.inputs

    @property
    def axes(self) -> tuple[str | None, ...]:
        """Logical axis of every dimension of `shape`."""
        return ("layers", *self.layer_axes) if self.layers else self.layer_axes


def normal(std: float) -> Initializer:
    """Normal values with mean 0 and standard deviation `std`."""
    return lambda key, shape, dtype: std * jax.random.normal(key, shape, dtype)


def ones(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """All ones."""
    return jnp.ones(shape, dtype)


def zeros(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """All zeros."""
    return jnp.zeros(shape, dtype)


class Declare:
    """Declares the parameters of one model; used in a family's `parameters`.

    Dimensions are letters; the same letter has the same size and the same logical axis (`AXES`) everywhere.

        declare = Declare(normal(0.02), D=64, H=4, C=16, V=1000)
        declare.embedding("wte.weight")                                       # [V, D]
        declare.linear("query", "h.{}.q", "(H C) D -> D H C", bias=True)      # {"query": ..., "query_bias": ...}
    """

    def __init__(self, init: Initializer, **sizes: int):
        """Sets the initial values and the letter sizes of all parameters.

        Args:
            init: Initial values of matrices and embeddings.
            **sizes: Size of every letter.
        """
        self.init, self.sizes = init, sizes

    def param(
        self, name: str, pattern: str, role: Role, init: Initializer, parts: Mapping[str, Part] | None = None
    ) -> ParamSpec:
        """Any parameter.

        Args:
            name: Name of the stored tensor; `{}` stands for the number of the layer.
            pattern: Layout, as in `core.layout.parse_layout`.
            role: As in `ParamSpec`.
            init: Initial values.
            parts: Parts of letters that are taken, as in `core.layout.parse_layout`.

        Raises:
            ValueError: The pattern does not fit the sizes.
        """
        layout = parse_layout(name, pattern, self.sizes, parts or {})
        axes = tuple(AXES.get(letter) for letter in pattern.partition("->")[2].split())
        return ParamSpec(layout, axes, init, role)

    def linear(
        self, key: str, name: str, pattern: str, *, bias: bool = False, init: Initializer | None = None, **parts: Any
    ) -> dict[str, ParamSpec]:
        """The weight of a linear layer under `key`, and its bias under `{key}_bias` where it has one.

        `layers.mlp.linear` computes with both.

        Args:
            key: Name in the tree of parameters.
            name: Name in the checkpoint, without `.weight` and `.bias`.
            pattern: Layout of the weight, inputs first on the right side; that of the bias follows.
            bias: Whether there is a bias; it begins at zero.
            init: Initial values of the weight, if not the model's.
            **parts: Parts of letters that are taken, as in `core.layout.parse_layout`.
        """
        weight = {key: self.param(f"{name}.weight", pattern, "matrix", init or self.init, parts)}
        if not bias:
            return weight
        outputs = bias_pattern(pattern)
        return weight | {f"{key}_bias": self.param(f"{name}.bias", outputs, "vector", zeros, parts)}

    def embedding(self, name: str, pattern: str = "V D -> V D") -> ParamSpec:
        """A table with one row a token, position, ...; an output head too."""
        return self.param(name, pattern, "embedding", self.init)

    def layer_norm(self, name: str) -> dict[str, ParamSpec]:
        """Scale and bias of a LayerNorm over the width."""
        bias = self.param(f"{name}.bias", "D -> D", "vector", zeros)
        return self.rms_norm(name) | {"bias": bias}

    def rms_norm(self, name: str) -> dict[str, ParamSpec]:
        """Scale of an RMSNorm over the width."""
        return {"scale": self.param(f"{name}.weight", "D -> D", "vector", ones)}


def is_spec(x: Any) -> bool:
    """Whether `x` is a leaf of a ParamSpec tree."""
    return isinstance(x, ParamSpec)


def map_specs(f: Callable, specs: Tree, *rest: Tree) -> Tree:
    """`jax.tree.map` over the ParamSpecs of a tree."""
    return jax.tree.map(f, specs, *rest, is_leaf=is_spec)


def named_specs(specs: Tree) -> dict[str, ParamSpec]:
    """ParamSpecs by path, such as `blocks/attention/query`."""
    return named_leaves(specs, is_spec)


def stacked(layers: int, tree: Tree) -> Tree:
    """The ParamSpecs of one layer, for `layers` layers on a new leading axis."""
    return map_specs(lambda s: dataclasses.replace(s, layers=layers), tree)


def init(specs: Tree, key: jax.Array, dtype: Any = jnp.float32) -> Tree:
    """Initial parameters. A leaf's values depend on the key and its own path alone, so a new leaf changes no other."""

    def one(path, s):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        if not s.layers:
            return s.init(own, s.shape, dtype)
        return jax.vmap(lambda k: s.init(k, s.layer_shape, dtype))(jax.random.split(own, s.layers))

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


def check_params(specs: Tree, params: Tree) -> None:
    """Checks that parameters have the names and shapes of their ParamSpec tree.

    Args:
        specs: The ParamSpec tree.
        params: Parameters, stacked or unstacked (`models.unstack`). Leaves may be of any kind; those with a shape are
            compared.

    Raises:
        ValueError: Names are missing or unknown, or shapes or the number of layers differ.
    """
    misfits = list(_misfits(specs, params, ""))
    if misfits:
        more = f", and {len(misfits) - 8} more" if len(misfits) > 8 else ""
        raise ValueError(f"the parameters do not fit the config: {', '.join(misfits[:8])}{more}")


def _misfits(specs: Tree, params: Tree, path: str, unstacked: bool = False) -> Iterator[str]:
    if is_spec(specs):
        wanted = specs.layer_shape if unstacked else specs.shape
        if tuple(getattr(params, "shape", wanted)) != wanted:
            yield f"{path} is {tuple(params.shape)}, not {wanted}"
    elif isinstance(params, tuple) and path == "blocks":
        layers = jax.tree.leaves(specs, is_leaf=is_spec)[0].layers
        if len(params) != layers:
            yield f"blocks has {len(params)} layers, not {layers}"
        for i, layer in enumerate(params):
            yield from _misfits(specs, layer, f"blocks/{i}", unstacked=True)
    elif not isinstance(params, Mapping):
        kinds = "a dict (stacked) or a tuple of dicts (unstacked)" if path == "blocks" else "a dict"
        yield f"{path or 'the tree'} must be {kinds}, not {type(params).__name__}"
    else:
        below = f"{path}/" if path else ""
        yield from (f"{below}{name} missing" for name in sorted(specs.keys() - params.keys()))
        yield from (f"{below}{name} unknown" for name in sorted(params.keys() - specs.keys()))
        for name in sorted(specs.keys() & params.keys()):
            yield from _misfits(specs[name], params[name], f"{below}{name}", unstacked)


def named_leaves(tree: Tree, is_leaf: Callable[[Any], bool] = leaf.is_leaf) -> dict[str, Any]:
    """The leaves of any tree by path, such as `blocks/attention/query`; a `core.leaf.Leaf` is one of them."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
