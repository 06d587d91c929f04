"""A Hugging Face folder as a Model: every tensor goes from its file straight to where it will live."""

import dataclasses
import functools
import reprlib
from collections.abc import Callable, Collection
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from garrulax.core import sharding, spec
from garrulax.core.hf import Layout
from garrulax.core.names import nearest
from garrulax.hub import streaming
from garrulax.hub.download import find
from garrulax.hub.json_files import read_object
from garrulax.hub.model import Model
from garrulax.hub.tensors import DTYPES, StoredTensor, open_tensors
from garrulax.hub.tokenizers import Tokenizer, find_tokenizer, load_tokenizer
from garrulax.models import FAMILIES, family


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

    On CPUs the parameters are read straight into the memory where they stay; for other devices host memory holds two
    tensors of one layer at a time. Raises FileNotFoundError where something is missing, and ValueError, before any
    parameter is allocated, naming the keys of config.json that are unknown or not implemented and the tensors that
    are missing, unknown or of another shape.
    """
    checkpoint = open_checkpoint(find(path))
    specs = {name: tree for name, tree in checkpoint.specs.items() if only is None or name in only}
    tensors = checkpoint.tensors
    places = spec.map_specs(lambda _: None, specs) if mesh is None else sharding.shardings(specs, mesh, rules)
    dtypes = spec.map_specs(lambda s: _jax_dtype(s, stored_dtype(s, tensors, dtype)), specs)
    params = spec.map_specs(lambda s, kind, place: _parameter(s, tensors, kind, place), specs, dtypes, places)
    return Model(checkpoint.config, params, _tokenizer(checkpoint.folder))


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A folder whose config.json and tensors fit each other. tensors: by the names of the ParamSpec tree."""

    folder: Path
    config: Any
    specs: spec.Tree
    tensors: dict[str, StoredTensor]


def open_checkpoint(folder: Path) -> Checkpoint:
    """What a folder holds, checked from config.json and the headers alone. Raises as `load` does."""
    config = config_in(folder)
    module = family(config)
    specs = module.parameters(config)
    return Checkpoint(folder, config, specs, match(open_tensors(folder), specs, module.layout(config), folder))


def load_config(path: str | Path) -> Any:
    """The Config of a Hugging Face folder, as `load` finds it; no tensor is read."""
    return config_in(find(path))


def config_in(folder: Path) -> Any:
    """The Config of a folder. Raises FileNotFoundError and ValueError as `load` does."""
    raw = read_config(folder)
    module = family_of(raw)
    try:
        return module.from_hf(raw)
    except (TypeError, AttributeError, LookupError, ArithmeticError) as error:  # any key may hold any kind of value
        raise ValueError(f"{folder / 'config.json'} has a value of the wrong kind: {error}") from error


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a folder. Raises FileNotFoundError, and ValueError where it is not a JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json: it is not a Hugging Face model folder")
    return read_object(path)


def family_of(raw: dict[str, Any]) -> ModuleType:
    """The family module that a parsed config.json belongs to. Raises ValueError with the nearest known model_type."""
    for module in FAMILIES:
        if any(dialect.claims(raw) for dialect in module.DIALECTS):
            return module
    known = list(dict.fromkeys(dialect.model_type for module in FAMILIES for dialect in module.DIALECTS))
    key = "model_type" if "model_type" in raw else "architectures"
    close = nearest(str(raw.get(key))[:100], known, count=3, cutoff=0.5)
    hint = f"the nearest are {close}; " if close else ""
    raise ValueError(
        f"config.json: {key} {reprlib.repr(raw.get(key))} is not implemented ({hint}there are: {', '.join(known)})"
    )


def match(
    found: dict[str, StoredTensor], specs: spec.Tree, layout: Layout, folder: Path | str
) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint by the names of the ParamSpec tree.

    Prefixes that a checkpoint has too few or too many of are put right, buffers left out, the two names of a tied
    tensor made one. Raises ValueError that names every kind of misfit.
    """
    _check_amounts(found, specs, folder)
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


def _check_amounts(found: dict[str, StoredTensor], specs: spec.Tree, folder: Path | str, spare: int = 1000) -> None:
    """Raises ValueError where config.json asks for far more than the files hold, before that many names are made."""
    leaves = jax.tree.leaves(specs, is_leaf=spec.is_spec)
    names = sum({s.stored.name: max(s.layers, 1) for s in leaves}.values())
    if names > len(found) + spare:
        raise ValueError(f"config.json asks for {names:,} tensors, but {folder} holds {len(found):,}")


def _check_equal(name: str, tensor: StoredTensor, other_name: str, other: StoredTensor) -> None:
    if tensor is other:
        return
    if (tensor.shape, tensor.dtype) == (other.shape, other.dtype):
        pairs = zip(streaming.chunks(tensor), streaming.chunks(other), strict=True)
        if all(np.array_equal(a, b) for a, b in pairs):
            return
    raise ValueError(
        f"config.json ties {name} to {other_name}, but they differ: it should say tie_word_embeddings=false"
    )


def stored_dtype(s: spec.ParamSpec, tensors: dict[str, StoredTensor], dtype: Any = None) -> np.dtype:
    """`dtype`, or that of a parameter's tensors. Raises ValueError where these have several."""
    if dtype is not None:
        return np.dtype(dtype)
    kinds = {tensors[name].kind for name in s.names}
    if len(kinds) > 1:
        raise ValueError(f"the layers of {s.stored.name} are stored as {', '.join(map(str, kinds))}: give a dtype")
    return kinds.pop()


def _jax_dtype(s: spec.ParamSpec, kind: np.dtype) -> np.dtype:
    if jax.dtypes.canonicalize_dtype(kind) != kind:
        raise ValueError(f"{s.stored.name} would be {kind}, which JAX has only with jax_enable_x64: give another dtype")
    return kind


def _parameter(
    s: spec.ParamSpec, tensors: dict[str, StoredTensor], dtype: np.dtype, place: NamedSharding | None
) -> jax.Array:
    """The array of one ParamSpec. JAX on CPUs takes over the memory that it was read into; elsewhere a stacked one is
    filled layer by layer in place."""
    parts = [tensors[name] for name in s.names]
    if _platform(place) == "cpu" or not s.layers:
        return _placed(functools.partial(_read, s, parts, dtype), s.shape, place)
    one_layer = None if place is None else NamedSharding(place.mesh, PartitionSpec(*place.spec[1:]))
    whole = jnp.zeros(s.shape, dtype, device=place)
    for i, part in enumerate(parts):
        layer = _placed(functools.partial(_read, s, [part], dtype), s.layer_shape, one_layer)
        whole = _put(jax.block_until_ready(whole), layer, i)
    return whole


def _platform(place: NamedSharding | None) -> str:
    return jax.default_backend() if place is None else place.mesh.devices.flat[0].platform


@functools.partial(jax.jit, donate_argnums=0)
def _put(whole: jax.Array, layer: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(whole, layer, i, 0)


def _placed(
    read: Callable[[tuple[slice, ...]], np.ndarray], shape: tuple[int, ...], place: NamedSharding | None
) -> jax.Array:
    """The array of which `read` gives any part; what several devices hold is read once."""
    if place is None:
        return jax.device_put(read((slice(None),) * len(shape)), may_alias=True)
    known: dict[tuple, np.ndarray] = {}

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        ends = tuple(i.indices(n)[:2] for i, n in zip(index or (), shape, strict=True))
        if ends not in known:
            known[ends] = read(tuple(slice(*end) for end in ends))
        return known[ends]

    return jax.make_array_from_callback(shape, place, part)


def _read(s: spec.ParamSpec, parts: list[StoredTensor], dtype: np.dtype, index: tuple[slice, ...]) -> np.ndarray:
    """`parameter[index]`, of a stacked parameter or, where there is no axis of layers in the index, of one layer."""
    stacked = len(index) > len(s.layer_shape)
    inner = index[1:] if stacked else index
    shape = tuple(len(range(n)[i]) for n, i in zip(s.layer_shape, inner, strict=True))
    chosen = parts[index[0]] if stacked else parts
    out = streaming.empty((len(chosen), *shape), dtype)
    streaming.fill(
        streaming.window(part, s.stored, target, s.layer_shape, inner) for part, target in zip(chosen, out, strict=True)
    )
    return out if stacked else out[0]


def _tokenizer(folder: Path) -> Tokenizer | None:
    return None if find_tokenizer(folder) is None else load_tokenizer(folder)
