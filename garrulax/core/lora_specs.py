"""Which parameters get adapters, and the ParamSpecs of these adapters: shapes, shardings, names in files."""

import dataclasses
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from garrulax.core import lora, spec
from garrulax.core.layout import TensorLayout, parse_layout, parse_pattern
from garrulax.core.leaf import Leaf, Tree
from garrulax.core.lora import Lora, check_size, make_pair, scale_of
from garrulax.core.names import nearest

#: What `attach` takes: "all" matrices; names; or a function (path, ParamSpec) -> whether the parameter gets a pair.
Rule = str | Iterable[str] | Callable[[str, spec.ParamSpec], bool]


def module_of(s: spec.ParamSpec) -> str:
    """The name in a checkpoint of the module whose weight a parameter is; `{}` stands for the number of the layer."""
    return s.name.removesuffix(".weight").removesuffix(".bias")


def is_head(path: str) -> bool:
    """Whether the parameter at this path is an output head: a table that activations are multiplied with."""
    return path.rpartition("/")[2] == "head"


def chosen(specs: Tree, rule: Rule) -> dict[str, spec.ParamSpec]:
    """The parameters that a rule chooses, by path.

    Args:
        specs: ParamSpec tree of the model.
        rule: "all" is every matrix, without embeddings and output head. A name is the end of a path in the tree
            ("query", "mlp/up", "tokens") or of a module's name in the checkpoint ("q_proj").

    Raises:
        ValueError: A name or the rule matches nothing.
    """
    fitting = {path: s for path, s in spec.named_specs(specs).items() if s.role != "vector"}
    if callable(rule):
        found = {path: s for path, s in fitting.items() if rule(path, s)}
        if not found:
            raise ValueError("the rule chooses no weight of this model: nothing would be trained")
        return found
    names = [rule] if isinstance(rule, str) else list(rule)
    found = {}
    for name in names:
        matched = {path: s for path, s in fitting.items() if _matches(name, path, s)}
        if not matched:
            known = sorted({path.rpartition("/")[2] for path in fitting} | {_last(s) for s in fitting.values()})
            meant = nearest(name, known)
            hint = f"did you mean {meant}? " if meant else ""
            raise ValueError(f"{name!r} matches no weight of this model: {hint}there are {', '.join(known)}")
        found |= matched
    if not found:
        raise ValueError("targets is empty: name the weights that get adapters, such as 'all'")
    return {path: s for path, s in fitting.items() if path in found}


def _matches(name: str, path: str, s: spec.ParamSpec) -> bool:
    if name == "all":
        return s.role == "matrix"
    return f"/{path}".endswith(f"/{name}") or f".{module_of(s)}".endswith(f".{name}")


def _last(s: spec.ParamSpec) -> str:
    return module_of(s).rpartition(".")[2]


def map_parameters(f: Callable[[str, spec.ParamSpec, Any, int | None], Any], specs: Tree, params: Tree) -> Tree:
    """The tree of f(path, ParamSpec, parameter, layer) of every parameter.

    The layer is None where layers are stacked, and for parameters that belong to none. Of an unstacked layer the
    ParamSpec is that of the layer (`layers` is 0).
    """
    return _map(f, specs, params, "", None)


def _map(f: Callable, specs: Tree, params: Any, path: str, layer: int | None) -> Any:
    if spec.is_spec(specs):
        return f(path, specs if layer is None else dataclasses.replace(specs, layers=0), params, layer)
    if isinstance(params, tuple):
        return tuple(_map(f, specs, one, path, i) for i, one in enumerate(params))
    return {k: _map(f, specs[k], v, f"{path}/{k}".lstrip("/"), layer) for k, v in params.items()}


def attach(
    params: Tree,
    specs: Tree,
    rule: Rule,
    rank: int,
    alpha: float,
    key: jax.Array,
    *,
    rslora: bool = False,
    dora: bool = False,
) -> Tree:
    """Parameters with a new pair beside each chosen weight. They compute the same logits.

    Args:
        params: Arrays or leaves such as quantised weights, stacked or unstacked, on one device or sharded.
        specs: Their ParamSpec tree.
        rule: Which weights, see `chosen`. A table that is embedding and output head at once is changed for both uses.
        rank: r.
        alpha: The product of a pair is multiplied by alpha / rank.
        key: PRNG key. The values of a pair depend on it and on the path of the weight alone.
        rslora: Whether to multiply by alpha / sqrt(rank) instead.
        dora: Whether the lengths of the columns are trained too; of matrices only.

    Raises:
        ValueError: The rank or alpha is not above 0, the rule matches nothing, the parameters have adapters, or `dora`
            with a table.
    """
    check_size(rank, alpha)
    if lora.has_pairs(params):
        raise ValueError("the model has adapters already: merge them first (gx.merge)")
    paths = chosen(specs, rule)
    if tables := [path for path, s in paths.items() if dora and s.role != "matrix"]:
        raise ValueError(f"dora is for matrices: leave {', '.join(tables)} out of the targets")
    scale = scale_of(rank, alpha, rslora)

    def one(path: str, s: spec.ParamSpec, w: Any, layer: int | None) -> Any:
        if path not in paths:
            return w
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        if layer is not None:
            own = jax.random.split(own, paths[path].layers)[layer]
        zero = "b" if s.role == "matrix" else "a"
        return placed(make_pair(w, s.inputs, s.layers, zero, rank, scale, own, dora))

    return map_parameters(one, specs, params)


def placed(pair: Lora) -> Lora:
    """The pair on the mesh of its weight, if that is on one."""
    first = jax.tree.leaves(pair.base)[0]
    if not isinstance(first, jax.Array) or isinstance(first, jax.core.Tracer):
        return pair
    where = first.sharding
    if not isinstance(where, NamedSharding):
        return pair
    spec_ = P() if isinstance(pair.base, Leaf) else where.spec
    wanted = pair.shardings(NamedSharding(where.mesh, spec_))
    names = [name for name in ("scale", *lora.TRAINED) if getattr(pair, name) is not None]
    return dataclasses.replace(pair, **{n: jax.device_put(getattr(pair, n), getattr(wanted, n)) for n in names})


def pair_layouts(path: str, s: spec.ParamSpec, rank: int) -> dict[str, TensorLayout]:
    """The layouts of a pair's arrays in the tensors of PEFT, by their names in `lora.TRAINED`.

    PEFT stores A as [r, inputs] and B as [outputs, r]. The layout of the weight says how the inputs and outputs lie in
    a stored tensor; parts of a fused one share A, and have their own rows of B.
    """
    groups, target = parse_pattern(s.layout.pattern, ValueError)
    letters = [letter for group in groups for letter in group]
    sizes = dict(zip(letters, s.layout.split, strict=True)) | dict(zip(target, s.layer_shape, strict=True))
    sizes["rank"] = rank
    parts = {k: part for k, part in zip(letters, s.layout.index, strict=True) if part != slice(None)}
    inputs = next(group for group in groups if target[0] in group)
    outputs = next((group for group in groups if group is not inputs), [])
    first, others = " ".join(target[: s.inputs]), " ".join(target[s.inputs :])
    table = s.role != "matrix" and not is_head(path)
    names = ("lora_B.weight", "lora_A.weight") if is_head(path) else ("lora_A.weight", "lora_B.weight")
    names = ("lora_embedding_A", "lora_embedding_B") if table else names
    of_inputs, of_outputs = f"({' '.join(inputs)})", f"({' '.join(outputs)})"
    a = f"rank {of_inputs} -> {first} rank"
    b = f"{of_outputs} rank -> rank {others}"
    if is_head(path):  # the rows of the table are the outputs of the layer
        a, b = f"{of_inputs} rank -> {first} rank", f"rank {of_outputs} -> rank {others}"
    vector = f"{of_outputs} -> {others}"
    patterns = {
        "a": (names[0], a),
        "b": (names[1], b),
        "magnitude": ("lora_magnitude_vector", vector),
        "bias": ("lora_B.bias", vector),
    }

    def layout(name: str, pattern: str) -> TensorLayout:
        own = {k: part for k, part in parts.items() if k in pattern.partition("->")[0]}
        return parse_layout(f"{module_of(s)}.{name}", pattern, sizes, own)

    return {which: layout(*entry) for which, entry in patterns.items()}


def adapter_specs(params: Tree, specs: Tree, whole: Iterable[str] = ()) -> Tree:
    """The ParamSpec tree of what `lora.split` takes out of stacked parameters.

    Pairs are never decayed by Muon's rule of matrices (role "embedding"); magnitudes and biases are vectors.

    Args:
        params: With adapters; they may be abstract.
        specs: ParamSpec tree of the model.
        whole: Paths of the parameters that are trained as a whole.
    """
    whole = frozenset(whole)

    def one(path: str, s: spec.ParamSpec, w: Any, layer: int | None) -> Any:
        if isinstance(w, Lora):
            return _pair_specs(path, s, w)
        return s if path in whole else None

    return _without_none(map_parameters(one, specs, params))


def _pair_specs(path: str, s: spec.ParamSpec, w: Lora) -> dict[str, spec.ParamSpec]:
    layouts = pair_layouts(path, s, w.a.shape[-1])
    first, others = s.layer_axes[: s.inputs], s.layer_axes[s.inputs :]
    axes = {"a": (*first, None), "b": (None, *others), "magnitude": others, "bias": others}
    roles = {"a": "embedding", "b": "embedding", "magnitude": "vector", "bias": "vector"}
    return {
        name: spec.ParamSpec(layouts[name], axes[name], spec.zeros, roles[name], s.layers)  # type: ignore[arg-type]
        for name in lora.TRAINED
        if getattr(w, name) is not None
    }


def _without_none(tree: Any) -> Any:
    if not isinstance(tree, Mapping):
        return tree
    parts = {k: _without_none(v) for k, v in tree.items()}
    return {k: v for k, v in parts.items() if v is not None} or None
