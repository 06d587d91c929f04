"""Loads a Hugging Face folder as a Model: every tensor is read from its file directly into its final array."""

import dataclasses
import functools
import reprlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from garrulax.core import sharding, spec
from garrulax.core.config import ModelConfig
from garrulax.core.hf import TensorNames
from garrulax.core.names import nearest
from garrulax.hub import streaming
from garrulax.hub.download import find_folder
from garrulax.hub.json_files import read_object
from garrulax.hub.memory import dtype_to_load
from garrulax.hub.model import Model
from garrulax.hub.tensors import DTYPES, StoredTensor, open_tensors
from garrulax.hub.tokenizers import Tokenizer, find_tokenizer, load_tokenizer
from garrulax.models import FAMILIES, Family, family, parameters


def load(
    path: str | Path,
    mesh: Mesh | None = None,
    dtype: DTypeLike | None = None,
    rules: str | sharding.Rules = "fsdp+tp",
    only: Collection[str] | None = None,
) -> Model:
    """Loads the model in a Hugging Face folder: config.json, safetensors (with an index if several), tokenizer.

    On CPUs the parameters are read directly into their final memory. For other devices, host memory holds two tensors
    of one layer at a time. All checks are made before any parameter is allocated.

    Args:
        path: The folder, or a name on the Hugging Face hub such as "openai-community/gpt2" (extra `hub`).
        mesh: Shards the parameters by `rules` from the start. Each process then reads only the parts of the files that
            its devices need.
        dtype: Dtype of the parameters, or "stored" for that of the files. None is the stored one too, but on CPUs
            bfloat16 and float16 become float32 if that fits into the memory: CPUs compute in float32, and would
            convert the parameters again in every step of decoding. The log says so.
        rules: Name or table of sharding rules (`core.sharding`); used only with a mesh.
        only: top-level names of the parameters to read, such as ("tokens", "head"); None reads all.

    Returns:
        The model; its tokenizer is None if the folder has none.

    Raises:
        FileNotFoundError: The folder or a file in it is missing.
        ValueError: A key of config.json is unknown or not implemented; or a tensor is missing, unknown or of another
            shape. The message names the keys or tensors.

    Example:
        >>> import jax, garrulax as gx
        >>> import tempfile
        >>> config = gx.preset("gpt2-tiny", layers=1, width=32, heads=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     gx.save(gx.Model(config, gx.init(config, jax.random.key(0))), folder)
        ...     model = gx.load(folder, dtype="bfloat16")
        >>> model.config == config, model.params["tokens"].dtype.name
        (True, 'bfloat16')
    """
    checkpoint = open_checkpoint(find_folder(path))
    specs = {name: tree for name, tree in checkpoint.specs.items() if only is None or name in only}
    tensors = checkpoint.tensors
    places = spec.map_specs(lambda _: None, specs) if mesh is None else sharding.shardings(specs, mesh, rules)
    dtype = dtype_to_load(dtype, specs, tensors, on_mesh=mesh is not None)
    dtypes = spec.map_specs(lambda s: _jax_dtype(s, stored_dtype(s, tensors, dtype)), specs)
    params = spec.map_specs(lambda s, kind, place: _parameter(s, tensors, kind, place), specs, dtypes, places)
    return Model(checkpoint.config, params, _tokenizer(checkpoint.folder))


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A folder whose config.json and tensors fit each other.

    Attributes:
        folder: The folder.
        config: Configuration of the model.
        specs: Its ParamSpec tree.
        tensors: The stored tensors, by the names in the ParamSpec tree.
    """

    folder: Path
    config: ModelConfig
    specs: spec.Tree
    tensors: dict[str, StoredTensor]


def open_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in a folder, checked; only config.json and headers are read. Raises as `load` does."""
    config = config_in(folder)
    specs = parameters(config)
    return Checkpoint(folder, config, specs, match(open_tensors(folder), specs, config, folder))


def load_config(path: str | Path) -> ModelConfig:
    """The Config of a Hugging Face folder or of a name on the hub; reads no tensors. Raises as `load` does."""
    return config_in(find_folder(path))


def config_in(folder: Path) -> ModelConfig:
    """The Config of a local folder. Raises as `load` does."""
    raw = read_config_json(folder)
    module = family_of(raw)
    try:
        return module.from_hf(raw)
    except (TypeError, AttributeError, LookupError, ArithmeticError) as error:  # any key may have a value of any type
        raise ValueError(f"{folder / 'config.json'} has a value of the wrong kind: {error}") from error


def read_config_json(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a folder. Raises FileNotFoundError, or ValueError if it is not a JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json: it is not a Hugging Face model folder")
    return read_object(path)


def family_of(raw: dict[str, Any]) -> Family:
    """The family that a parsed config.json belongs to. Raises ValueError that names the nearest model_type."""
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
    found: dict[str, StoredTensor], specs: spec.Tree, config: ModelConfig, folder: Path | str
) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint by the names in the ParamSpec tree.

    Missing prefixes are added and extra ones removed, buffers are dropped, and of two tied tensors one is kept.

    Args:
        found: The tensors of the checkpoint, by their names there.
        specs: ParamSpec tree of the model.
        config: The configuration of the model.
        folder: The folder, for messages.

    Raises:
        ValueError: The tensors do not fit `specs`; the message names every kind of misfit.
    """
    _check_amounts(found, specs, folder)
    more = family(config).tensor_names(config)
    ties = dict.fromkeys(more.heads, specs["tokens"].name) if config.tied else {}
    wanted = {name: s for s in jax.tree.leaves(specs, is_leaf=spec.is_spec) for name in s.names}
    tensors, unknown, twice = {}, [], []
    for stored, tensor in found.items():
        name = _canonical(stored, wanted.keys() | ties.keys(), more)
        if name is None:
            if not (more.buffers and stored.endswith(more.buffers)):
                unknown.append(stored)
        elif name in tensors:
            twice.append(stored)
        else:
            tensors[name] = tensor
    tied = {name: tensors.pop(name) for name in ties if name in tensors}
    for name, tensor in tied.items():
        tensors.setdefault(ties[name], tensor)
    missing = [name for name in wanted if name not in tensors]
    shapes, kinds = [], []
    for name, tensor in tensors.items():
        expected = wanted[name].layout.stored_shape
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
        _check_equal(name, tensor, ties[name], tensors[ties[name]])
    return tensors


def _canonical(stored: str, known: set[str], more: TensorNames) -> str | None:
    """The known name of a stored tensor, with prefixes corrected; None if it is unknown."""
    short = stored.removeprefix(more.extra_prefix)
    return next((name for name in (stored, short, more.prefix + short) if name in known), None)


def _listed(what: str, names: list[str], shown: int = 4) -> str:
    if not names:
        return ""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{len(names)} {what} ({', '.join(names[:shown])}{more})"


def _check_amounts(found: dict[str, StoredTensor], specs: spec.Tree, folder: Path | str, spare: int = 1000) -> None:
    """Raises ValueError if config.json asks for far more tensors than exist; their names could fill the memory."""
    leaves = jax.tree.leaves(specs, is_leaf=spec.is_spec)
    names = sum({s.name: max(s.layers, 1) for s in leaves}.values())
    if names > len(found) + spare:
        raise ValueError(f"config.json asks for {names:,} tensors, but {folder} holds {len(found):,}")


def _check_equal(name: str, tensor: StoredTensor, other_name: str, other: StoredTensor) -> None:
    """Raises ValueError if two tied tensors differ."""
    if tensor is other:
        return
    if (tensor.shape, tensor.dtype) == (other.shape, other.dtype):
        pairs = zip(streaming.chunks(tensor), streaming.chunks(other), strict=True)
        if all(np.array_equal(a, b) for a, b in pairs):
            return
    raise ValueError(
        f"config.json ties {name} to {other_name}, but they differ: it should say tie_word_embeddings=false"
    )


def stored_dtype(s: spec.ParamSpec, tensors: dict[str, StoredTensor], dtype: DTypeLike | None = None) -> np.dtype:
    """`dtype`, or if None the dtype of a parameter's tensors. Raises ValueError if these differ in dtype."""
    if dtype is not None:
        return np.dtype(dtype)
    kinds = {tensors[name].numpy_dtype for name in s.names}
    if len(kinds) > 1:
        raise ValueError(f"the layers of {s.name} are stored as {', '.join(map(str, kinds))}: give a dtype")
    return kinds.pop()


def _jax_dtype(s: spec.ParamSpec, dtype: np.dtype) -> np.dtype:
    """`dtype`. Raises ValueError if JAX would silently replace it by a smaller one."""
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"{s.name} would be {dtype}, which JAX has only with jax_enable_x64: give another dtype")
    return dtype


def _parameter(
    s: spec.ParamSpec, tensors: dict[str, StoredTensor], dtype: np.dtype, place: NamedSharding | None
) -> jax.Array:
    """The array of one ParamSpec.

    On CPUs, JAX uses the memory into which the tensors were read. Elsewhere the layers of a stacked parameter are
    copied to the device one by one, into a buffer that is updated in place: host memory holds one layer at a time.
    """
    parts = [tensors[name] for name in s.names]
    if _platform(place) == "cpu" or not s.layers:
        return _device_array(functools.partial(_read_parameter, s, parts, dtype), s.shape, place)
    one_layer = None if place is None else NamedSharding(place.mesh, PartitionSpec(*place.spec[1:]))
    stacked = jnp.zeros(s.shape, dtype, device=place)
    for i, part in enumerate(parts):
        layer = _device_array(functools.partial(_read_parameter, s, [part], dtype), s.layer_shape, one_layer)
        stacked = _set_layer(jax.block_until_ready(stacked), layer, i)
    return stacked


def _platform(place: NamedSharding | None) -> str:
    return jax.default_backend() if place is None else place.mesh.devices.flat[0].platform


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(stacked: jax.Array, layer: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stacked, layer, i, 0)


def _device_array(
    read: Callable[[tuple[slice, ...]], np.ndarray], shape: tuple[int, ...], place: NamedSharding | None
) -> jax.Array:
    """The array on its devices. `read` gives the part at an index; a part that several devices hold is read once."""
    if place is None:
        return jax.device_put(read((slice(None),) * len(shape)), may_alias=True)
    parts: dict[tuple, np.ndarray] = {}

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        ends = tuple(i.indices(n)[:2] for i, n in zip(index or (), shape, strict=True))
        if ends not in parts:
            parts[ends] = read(tuple(slice(*end) for end in ends))
        return parts[ends]

    return jax.make_array_from_callback(shape, place, part)


def _read_parameter(
    s: spec.ParamSpec, parts: list[StoredTensor], dtype: np.dtype, index: tuple[slice, ...]
) -> np.ndarray:
    """`parameter[index]` of a stacked parameter, or of one layer if the index has no axis of layers.

    `parts` are the stored tensors: one, or one a layer.
    """
    stacked = len(index) > len(s.layer_shape)
    inner = index[1:] if stacked else index
    shape = tuple(len(range(n)[i]) for n, i in zip(s.layer_shape, inner, strict=True))
    chosen = parts[index[0]] if stacked else parts
    out = streaming.empty((len(chosen), *shape), dtype)
    streaming.read_windows(
        streaming.window(part, s.layout, target, inner) for part, target in zip(chosen, out, strict=True)
    )
    return out if stacked else out[0]


def _tokenizer(folder: Path) -> Tokenizer | None:
    return None if find_tokenizer(folder) is None else load_tokenizer(folder)
