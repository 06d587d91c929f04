"""A Hugging Face folder as a Model: every tensor goes from its file straight to where it will live."""

import functools
import json
from collections.abc import Collection
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from garrulax.core import sharding, spec
from garrulax.core.hf import Layout
from garrulax.hub.download import find
from garrulax.hub.model import Model
from garrulax.hub.tensors import DTYPES, StoredTensor, open_tensors, read_part
from garrulax.hub.tokenizers import Tokenizer, find_tokenizer, load_tokenizer
from garrulax.models import FAMILIES


def load(
    path: str | Path,
    mesh: Mesh | None = None,
    dtype: Any = None,
    rules: str | sharding.Rules = "fsdp+tp",
    only: Collection[str] | None = None,
) -> Model:
    """The model in a Hugging Face folder: config.json, safetensors (one file, or several with an index), tokenizer.

    path: the folder, or a name on the Hugging Face hub such as "openai-community/gpt2" (extra `hub`).
    mesh, rules: with a mesh the parameters are born sharded by `rules` (`core.sharding`), and of the files only what
    the devices of this process need is read. dtype: of the parameters; None keeps what is stored. only: top-level
    names of the parameters to read, such as ("tokens", "head"); None is all.

    Host memory holds one tensor of one layer at a time. Raises FileNotFoundError where something is missing, and
    ValueError, before any parameter is allocated, naming the keys of config.json that are unknown or not implemented
    and the tensors that are missing, unknown or of another shape.
    """
    folder = find(path)
    raw = read_config(folder)
    family = family_of(raw)
    config = family.from_hf(raw)
    specs = family.parameters(config)
    tensors = match(open_tensors(folder), specs, family.layout(config), folder)
    specs = {name: tree for name, tree in specs.items() if only is None or name in only}
    places = spec.map_specs(lambda _: None, specs) if mesh is None else sharding.shardings(specs, mesh, rules)
    dtypes = spec.map_specs(lambda s: _dtype(s, tensors, dtype), specs)
    params = spec.map_specs(lambda s, kind, place: _parameter(s, tensors, kind, place), specs, dtypes, places)
    return Model(config, params, _tokenizer(folder))


def load_config(path: str | Path) -> Any:
    """The Config of a Hugging Face folder, as `load` finds it; no tensor is read."""
    raw = read_config(find(path))
    return family_of(raw).from_hf(raw)


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a folder. Raises FileNotFoundError, and ValueError where it is not a JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json: it is not a Hugging Face model folder")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} is not a JSON object")
    return raw


def family_of(raw: dict[str, Any]) -> ModuleType:
    """The family module that a parsed config.json belongs to. Raises ValueError, naming those there are."""
    for module in FAMILIES:
        if any(dialect.claims(raw) for dialect in module.DIALECTS):
            return module
    known = ", ".join(dict.fromkeys(dialect.model_type for module in FAMILIES for dialect in module.DIALECTS))
    named = f"model_type {raw['model_type']!r}" if "model_type" in raw else f"architectures {raw.get('architectures')}"
    raise ValueError(f"config.json: {named} is not implemented (there are: {known})")


def match(
    found: dict[str, StoredTensor], specs: spec.Tree, layout: Layout, folder: Path | str
) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint by the names of the Spec tree.

    Prefixes that a checkpoint has too few or too many of are put right, buffers left out, the two names of a tied
    tensor made one. Raises ValueError that names every kind of misfit.
    """
    wanted = {name: s for s in jax.tree.leaves(specs, is_leaf=spec.is_spec) for name in s.names}
    tensors, unknown, twice = {}, [], []
    for stored, tensor in found.items():
        name = _canonical(stored, wanted.keys() | layout.tied.keys(), layout)
        if name is None:
            if not (layout.buffers and stored.endswith(layout.buffers)):
                unknown.append(stored)
        elif name in tensors:
            twice.append(stored)
        else:
            tensors[name] = tensor
    tied = {name: tensors.pop(name) for name in layout.tied if name in tensors}
    for name, tensor in tied.items():
        tensors.setdefault(layout.tied[name], tensor)
    missing = [name for name in wanted if name not in tensors]
    shapes, kinds = [], []
    for name, tensor in tensors.items():
        expected = wanted[name].stored_shape or wanted[name].layer_shape
        if tensor.shape != expected:
            shapes.append(f"{name} is {tensor.shape}, not {expected}")
        if tensor.dtype not in DTYPES:
            kinds.append(f"{name} is {tensor.dtype}")
    problems = [
        _listed("missing", missing),
        _listed("unknown", unknown),
        _listed("given twice under names that mean the same", twice),
        _listed("of a shape that config.json does not give", shapes),
        _listed(f"of a dtype that is not {', '.join(DTYPES)}", kinds),
    ]
    if any(problems):
        raise ValueError(f"the tensors in {folder} do not fit its config.json: {'; '.join(filter(None, problems))}")
    for name, tensor in tied.items():
        _check_equal(name, tensor, layout.tied[name], tensors[layout.tied[name]])
    return tensors


def _canonical(stored: str, known: set[str], layout: Layout) -> str | None:
    short = stored.removeprefix(layout.extra_prefix)
    return next((name for name in (stored, short, layout.prefix + short) if name in known), None)


def _listed(what: str, names: list[str], shown: int = 4) -> str:
    if not names:
        return ""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{len(names)} {what} ({', '.join(names[:shown])}{more})"


def _check_equal(name: str, tensor: StoredTensor, other_name: str, other: StoredTensor, rows: int = 4096) -> None:
    if tensor is other:
        return
    if tensor.shape == other.shape:
        length = tensor.shape[0]
        parts = (slice(start, min(start + rows, length)) for start in range(0, length, rows))
        if all(np.array_equal(tensor[(part,)], other[(part,)]) for part in parts):
            return
    raise ValueError(
        f"config.json ties {name} to {other_name}, but they differ: it should say tie_word_embeddings=false"
    )


def _dtype(s: spec.Spec, tensors: dict[str, StoredTensor], dtype: Any) -> np.dtype:
    kinds = {np.dtype(DTYPES[tensors[name].dtype]) for name in s.names}
    if dtype is None and len(kinds) > 1:
        raise ValueError(f"the layers of {s.stored.name} are stored as {', '.join(map(str, kinds))}: give a dtype")
    kind = np.dtype(kinds.pop() if dtype is None else dtype)
    if jax.dtypes.canonicalize_dtype(kind) != kind:
        raise ValueError(f"{s.stored.name} would be {kind}, which JAX has only with jax_enable_x64: give another dtype")
    return kind


def _parameter(
    s: spec.Spec, tensors: dict[str, StoredTensor], dtype: np.dtype, place: NamedSharding | None
) -> jax.Array:
    """The array of one Spec; a stacked one is filled layer by layer in place."""
    parts = [tensors[name] for name in s.names]
    if not s.layers:
        return _array(parts[0], s, dtype, place)
    one_layer = None if place is None else NamedSharding(place.mesh, PartitionSpec(*place.spec[1:]))
    whole = jnp.zeros(s.shape, dtype, device=place)
    for i, part in enumerate(parts):
        whole = _put(whole, _array(part, s, dtype, one_layer), i)
    return whole


@functools.partial(jax.jit, donate_argnums=0)
def _put(whole: jax.Array, layer: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(whole, layer, i, 0)


def _array(tensor: StoredTensor, s: spec.Spec, dtype: np.dtype, place: NamedSharding | None) -> jax.Array:
    def part(index: tuple[slice, ...] | None = None) -> np.ndarray:
        return read_part(tensor, s.stored, s.layer_shape, index).astype(dtype, copy=False)

    if place is None:
        return jnp.asarray(part())
    return jax.make_array_from_callback(s.layer_shape, place, part)  # asks once for what several devices hold


def _tokenizer(folder: Path) -> Tokenizer | None:
    return None if find_tokenizer(folder) is None else load_tokenizer(folder)
