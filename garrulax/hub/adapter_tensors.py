"""The tensors of a LoRA adapter in the format of PEFT: from a file into parameters, and back."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from garrulax.core import spec
from garrulax.core.layout import TensorLayout
from garrulax.core.leaf import Leaf
from garrulax.core.lora import TRAINED, Lora
from garrulax.core.lora_specs import is_head, map_parameters, module_of, pair_layouts, placed
from garrulax.core.names import nearest
from garrulax.hub import peft

Arrays = dict[str, np.ndarray]
_PREFIX = "base_model.model."
#: Ends of the names of a pair's tensors, and what `Lora` calls them; for a table or head, a and b are exchanged or not.
_ENDS = (
    "lora_A.weight",
    "lora_B.weight",
    "lora_B.bias",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
)
_ROWS = "token_adapter.trainable_tokens_delta"


def plain_names(found: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors by names without PEFT's prefix and without the name of the adapter, which some trainers write."""
    plain = {}
    for name, tensor in found.items():
        short = name.removeprefix(_PREFIX).replace("modules_to_save.default.", "")
        short = re.sub(
            r"(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)\.default", r"\1", short
        )
        short = short.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
        plain[short] = tensor
    return plain


def pairs_of(tensors: Mapping[str, Any]) -> dict[str, set[str]]:
    """The modules with pairs, and the ends of the names of their tensors."""
    found: dict[str, set[str]] = {}
    for name in tensors:
        for end in _ENDS:
            if name.endswith(f".{end}"):
                found.setdefault(name.removesuffix(f".{end}"), set()).add(end)
    return found


def read_pairs(params: Any, specs: Any, tensors: Arrays, raw: Mapping[str, Any], label: str) -> Any:
    """Parameters with the pairs and whole tensors of an adapter.

    Args:
        params: Of the model, stacked or unstacked.
        specs: Their ParamSpec tree.
        tensors: The tensors of the adapter, by their plain names.
        raw: Content of adapter_config.json.
        label: Name of the folder in errors.

    Raises:
        ValueError: The adapter is for another model: it names the tensors.
    """
    pairs = pairs_of(tensors)
    whole = {**peft.whole_names(raw, _names(specs), pairs)}
    for module in pairs:  # an adapter of embedding or head has a copy of the table
        if f"{module}.base_layer.weight" in tensors:
            whole[f"{module}.weight"] = f"{module}.base_layer.weight"
    whole = {ours: _stored(theirs, ours, tensors) for ours, theirs in whole.items()}
    rows = _trained_rows(tensors, raw, specs, label)
    known = {f"{m}.{end}" for m, ends in pairs.items() for end in ends} | set(whole.values()) | set(rows)
    if odd := sorted(tensors.keys() - known):
        raise ValueError(f"{label} has tensors that its {peft.CONFIG} does not explain: {', '.join(odd[:4])}")
    if missing := sorted(set(whole.values()) - tensors.keys()):
        raise ValueError(f"{label} lacks {', '.join(missing[:4])}, which its {peft.CONFIG} says it has")
    _check(specs, pairs, tensors, whole, label)
    changed = map_parameters(lambda p, s, w, i: _with_whole(s, w, i, tensors, whole), specs, params)
    changed = map_parameters(lambda p, s, w, i: _with_rows(s, w, tensors, rows), specs, changed)
    return map_parameters(lambda p, s, w, i: _with_pair(p, s, w, i, tensors, pairs, raw), specs, changed)


def _names(specs: Any) -> list[str]:
    return [name for s in spec.named_specs(specs).values() for name in s.names]


def _stored(name: str, plain: str, tensors: Mapping[str, Any]) -> str:
    """The name of a whole tensor: older releases wrote trained biases without `base_layer`."""
    return name if name in tensors or plain not in tensors else plain


def _trained_rows(tensors: Arrays, raw: Mapping[str, Any], specs: Any, label: str) -> dict[str, tuple[str, list[int]]]:
    """Tensors with some rows of a table: their names, the table's and the numbers of the rows."""
    found: dict[str, tuple[str, list[int]]] = {}
    given = raw.get("trainable_token_indices")
    for name in tensors:
        if not name.endswith(f".{_ROWS}"):
            continue
        module = name.removesuffix(f".{_ROWS}")
        per = given if isinstance(given, Mapping) else {module: given}
        indices = next((v for k, v in per.items() if f".{module}".endswith(f".{k}")), None)
        if not isinstance(indices, list) or len(indices) != len(tensors[name]):
            raise ValueError(f"{label}: {name} has {len(tensors[name])} rows, but trainable_token_indices={indices}")
        found[name] = (f"{module}.weight", indices)
    return found


def _check(specs: Any, pairs: Mapping[str, set[str]], tensors: Arrays, whole: Mapping[str, str], label: str) -> None:
    """Raises ValueError if a module or a shape is not the model's."""
    modules: dict[str, list[tuple[str, spec.ParamSpec]]] = {}
    for path, s in spec.named_specs(specs).items():
        if s.role != "vector":
            for name in s.names:
                modules.setdefault(name.removesuffix(".weight"), []).append((path, s))
    if odd := sorted(set(pairs) - set(modules)):
        close = nearest(odd[0], modules)
        hint = f", whose nearest is {close}" if close else ""
        raise ValueError(f"{label} is an adapter for another model: it has {odd[0]}, which this one lacks{hint}")
    for module, ends in pairs.items():
        for path, s in modules[module]:
            rank = _rank(module, ends, tensors, label)
            layouts = pair_layouts(path, s, rank)
            for layout in layouts.values():
                end = layout.name[len(module_of(s)) + 1 :]
                shape = tensors[f"{module}.{end}"].shape if end in ends else layout.stored_shape
                if shape != layout.stored_shape:
                    raise ValueError(
                        f"{label} is an adapter for another model: {module}.{end} is {shape}, not {layout.stored_shape}"
                    )
    for path, s in spec.named_specs(specs).items():
        for name in s.names:
            shape = tensors[whole[name]].shape if name in whole else s.layout.stored_shape
            if shape != s.layout.stored_shape:
                raise ValueError(f"{label}: {whole[name]} is {shape}, not {s.layout.stored_shape} ({path})")


def _rank(module: str, ends: set[str], tensors: Arrays, label: str) -> int:
    for a, b in (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")):
        if a in ends or b in ends:
            if not {a, b} <= ends:
                raise ValueError(f"{label}: {module} has only one matrix of its pair")
            one, other = tensors[f"{module}.{a}"], tensors[f"{module}.{b}"]
            if one.ndim != 2 or other.ndim != 2 or len(one) != other.shape[1] or not len(one):
                raise ValueError(f"{label}: the pair of {module} has shapes {one.shape} and {other.shape}")
            return len(one)
    raise ValueError(f"{label}: {module} has {', '.join(sorted(ends))} and no pair")


def _with_whole(s: spec.ParamSpec, w: Any, layer: int | None, tensors: Arrays, whole: Mapping[str, str]) -> Any:
    """A parameter with what the adapter has of it as a whole."""
    layers = [layer] if layer is not None else list(range(s.layers))
    names = {i: whole.get(s.name.format(i)) for i in layers} if layers else {None: whole.get(s.name)}
    given = {i: s.layout.read(tensors[name]) for i, name in names.items() if name is not None}
    if not given:
        return w
    if isinstance(w, Leaf):
        raise ValueError(f"the adapter replaces {s.name}, which is {w.kind}: {w.advice}")
    if layers and layer is None:
        return w.at[np.array(list(given))].set(jnp.asarray(np.stack(list(given.values())), w.dtype))
    return jax.device_put(jnp.asarray(next(iter(given.values())), w.dtype), w.sharding)


def _with_rows(s: spec.ParamSpec, w: Any, tensors: Arrays, rows: Mapping[str, tuple[str, list[int]]]) -> Any:
    """A table with some rows replaced. PEFT calls them a difference, but they are the rows themselves."""
    for name, (table, indices) in rows.items():
        if s.name == table:
            if isinstance(w, Leaf):
                raise ValueError(f"the adapter replaces rows of {table}, which is {w.kind}: {w.advice}")
            w = w.at[np.array(indices)].set(jnp.asarray(tensors[name], w.dtype))
    return w


def _with_pair(
    path: str, s: spec.ParamSpec, w: Any, layer: int | None, tensors: Arrays, pairs: Mapping[str, set[str]],
    raw: Mapping[str, Any],
) -> Any:  # fmt: skip
    """A parameter with its pair: ranks of layers are padded to the greatest, and layers without a pair get zeros."""
    if s.role == "vector":
        return w
    numbers: list[int | None] = [layer] if layer is not None else list(range(s.layers)) if s.layers else [None]
    modules = [module_of(s).format(i) for i in numbers]
    if not any(module in pairs for module in modules):
        return w
    ranks = [_rank(m, pairs[m], tensors, "") if m in pairs else 0 for m in modules]
    widest = max(ranks)
    parts = [_read_pair(path, s, m, rank, tensors, pairs.get(m, set())) for m, rank in zip(modules, ranks, strict=True)]
    like = next(part for part in parts if part)
    arrays: dict[str, Any] = {}
    for name in like:
        axis = {"a": -1, "b": 0}.get(name)
        whole = [_padded(part[name], axis, widest) if part else None for part in parts]
        shape = next(x.shape for x in whole if x is not None)
        filled = [np.zeros(shape, np.float32) if x is None else x for x in whole]
        arrays[name] = np.stack(filled) if s.layers else filled[0]
    scales = np.array([peft.scale_for(raw, m, r) if r else 0 for m, r in zip(modules, ranks, strict=True)], np.float32)
    scale = scales if s.layers else scales[0]
    if "magnitude" in arrays and any(not part for part in parts):
        raise ValueError(f"DoRA in some layers of {s.name} only is not implemented")
    pair = Lora(w, jnp.asarray(arrays["a"]), jnp.asarray(arrays["b"]), jnp.asarray(scale))
    more = {name: jnp.asarray(arrays[name]) for name in ("magnitude", "bias") if name in arrays}
    return placed(dataclasses.replace(pair, **more))


def _read_pair(path: str, s: spec.ParamSpec, module: str, rank: int, tensors: Arrays, ends: set[str]) -> Arrays:
    if not rank:
        return {}
    found = {}
    for which, layout in pair_layouts(path, s, rank).items():
        end = layout.name[len(module_of(s)) + 1 :]
        if end in ends:
            found[which] = np.asarray(layout.read(tensors[f"{module}.{end}"]), np.float32)
    return found


def _padded(x: np.ndarray, axis: int | None, rank: int) -> np.ndarray:
    if axis is None:
        return x
    more = [(0, 0)] * x.ndim
    more[axis] = (0, rank - x.shape[axis])
    return np.pad(x, more)


# -- Writing ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class WrittenPair:
    """The pair of one module as it is written.

    Attributes:
        tensors: By the ends of their names.
        rank: Of the pair.
        scale: The factor of its product.
    """

    tensors: Arrays
    rank: int
    scale: float


def write_pairs(params: Any, specs: Any) -> dict[str, WrittenPair]:
    """The pairs of parameters, by module.

    Parts of one stored tensor share A if theirs are equal. Otherwise A has those of all parts one above another and B
    is block-diagonal, which is the same product at the sum of the ranks.
    """
    parts: dict[str, list[tuple[str, spec.ParamSpec, dict[str, Any]]]] = {}

    def collect(path: str, s: spec.ParamSpec, w: Any, layer: int | None) -> None:
        if isinstance(w, Lora):
            layers = range(s.layers) if s.layers else [None]
            for i in layers:
                one = w if i is None else w[i]
                number = layer if i is None else i
                pair = _trimmed({n: np.asarray(getattr(one, n)) for n in TRAINED if getattr(one, n) is not None})
                if pair is not None:
                    module = module_of(s).format(number)
                    parts.setdefault(module, []).append((path, s, {**pair, "scale": float(one.scale)}))

    map_parameters(collect, specs, params)
    return {module: _written(module, found) for module, found in parts.items()}


def _trimmed(pair: Arrays) -> Arrays | None:
    """A pair without the zeros that fill it up to the rank of other layers; None if nothing is left."""
    used = np.any(pair["a"].reshape(-1, pair["a"].shape[-1]) != 0, axis=0)
    used = used | np.any(pair["b"].reshape(len(pair["b"]), -1) != 0, axis=1)
    if not used.any():
        return None
    rank = int(np.flatnonzero(used)[-1]) + 1
    return {**pair, "a": pair["a"][..., :rank], "b": pair["b"][:rank]}


def _written(module: str, parts: list[tuple[str, spec.ParamSpec, dict[str, Any]]]) -> WrittenPair:
    path, _, one = parts[0]
    shared = "b" if is_head(path) else "a"  # what all parts of a fused tensor may have in common
    scale = one["scale"]
    if all(np.array_equal(pair[shared], one[shared]) and pair["scale"] == scale for _, _, pair in parts):
        return WrittenPair(
            _stored_tensors(parts, [slice(0, one["a"].shape[-1])] * len(parts)), one["a"].shape[-1], scale
        )
    rank = sum(pair["a"].shape[-1] for _, _, pair in parts)
    wide, places, start = [], [], 0
    for path, s, pair in parts:
        own = pair["a"].shape[-1]
        places.append(slice(start, start + own))
        wide.append((path, s, {**pair, "b": pair["b"] * np.float32(pair["scale"] / scale)}))
        start += own
    return WrittenPair(_stored_tensors(wide, places, rank), rank, scale)


def _stored_tensors(
    parts: list[tuple[str, spec.ParamSpec, dict[str, Any]]], places: list[slice], rank: int | None = None
) -> Arrays:
    """The tensors of a module, with the ranks of each part at its place."""
    tensors: Arrays = {}
    for (path, s, pair), place in zip(parts, places, strict=True):
        layouts = pair_layouts(path, s, rank or pair["a"].shape[-1])
        for name, layout in layouts.items():
            if name not in pair:
                continue
            x = pair[name]
            if name in ("a", "b"):
                axis = x.ndim - 1 if name == "a" else 0
                more = [(0, 0)] * x.ndim
                more[axis] = (place.start, (rank or place.stop) - place.stop)
                x = np.pad(x, more)
            _add(tensors, layout, module_of(s), x)
    return tensors


def _add(tensors: Arrays, layout: TensorLayout, module: str, x: np.ndarray) -> None:
    end = layout.name[len(module) + 1 :]
    own = np.zeros(layout.stored_shape, x.dtype)
    layout.write(x, own)
    there = tensors.get(end)
    # Parts fill rows of their own, except the A that they share or lie in one above another.
    tensors[end] = own if there is None else np.where(own != 0, own, there)
