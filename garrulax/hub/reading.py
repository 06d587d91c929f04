"""Loads a Hugging Face folder or a GGUF file as a Model: every tensor is read directly into its final array."""

import dataclasses
import functools
import logging
import reprlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from garrulax.core import sharding, spec
from garrulax.core.config import ModelConfig
from garrulax.core.dtypes import parameter_dtype
from garrulax.core.hf_keys import without
from garrulax.core.leaf import is_leaf
from garrulax.core.names import nearest
from garrulax.core.strategies import Strategy
from garrulax.hub import streaming
from garrulax.hub.download import find_folder
from garrulax.hub.files import is_file
from garrulax.hub.generation import read_generation, with_ends
from garrulax.hub.gguf import GGUFModel, open_gguf, read_gguf_config, read_gguf_tokenizer
from garrulax.hub.json_files import read_object
from garrulax.hub.matching import match
from garrulax.hub.memory import dtype_to_load
from garrulax.hub.model import Model
from garrulax.hub.quantised.own import Own, is_own, read_own, take_own
from garrulax.hub.quantised.parameters import keeps_codes, read_codes
from garrulax.hub.quantised.schemes import Scheme, take_scheme
from garrulax.hub.quantised.tensors import quantised_tensors
from garrulax.hub.tensors import StoredTensor, open_tensors
from garrulax.hub.tokenizers import Tokenizer, find_tokenizer, load_tokenizer
from garrulax.models import FAMILIES, Family, parameters, unstack

_log = logging.getLogger("garrulax")


def load(
    path: str | Path,
    mesh: Mesh | None = None,
    dtype: DTypeLike | None = None,
    strategy: str | Strategy = "fsdp+tp",
    only: Collection[str] | None = None,
    ignore: Collection[str] = (),
    while_reading: Callable[[Model], Any] | None = None,
) -> Model:
    """Loads the model in a Hugging Face folder (config.json, safetensors, tokenizer) or in a GGUF file.

    On CPUs the parameters are read directly into their final memory. For other devices, host memory holds two tensors
    of one layer at a time. All checks are made before any parameter is allocated.

    Args:
        path: The folder; a GGUF file, or a folder with one; or a name on the Hugging Face hub such as
            "openai-community/gpt2" (extra `hub`).
        mesh: Shards the parameters by `strategy` from the start. Each process then reads only the parts of the files
            that its devices need.
        dtype: Dtype of the parameters, or "stored" for that of the files. None is the stored one too, but on CPUs
            bfloat16 and float16 become float32 if that fits into the memory: CPUs compute in float32, and would
            convert the parameters again in every step of decoding. The log says so. Quantised weights keep their codes
            (`core.quantised.Quantised`) with None and "stored", beside which other parameters are float32 on CPUs
            (None) or bfloat16; any other dtype makes plain weights of them. Of a GGUF file that is not quantised, None
            is float32 on CPUs and "stored" elsewhere.
        strategy: A name in `core.strategies.STRATEGIES`, or a strategy of your own; used only with a mesh.
        only: top-level names of the parameters to read, such as ("tokens", "head"); None reads all.
        ignore: Keys of config.json to leave out, as if the file did not have them, such as ["sparsity"] or
            ["rope_scaling.finetuned"]: a way past keys that are refused but do not change what the model computes. Of a
            GGUF file, keys of its metadata, such as ["llama.logit_scale"].
        while_reading: Called before the tensors are read, with the model whose parameters are still abstract
            (`jax.ShapeDtypeStruct`), for work that can go on beside the reading, such as
            `sampling.compile_ahead`, which returns at once.

    Returns:
        The model; its tokenizer is None if the folder or file has none. The end tokens in generation_config.json win
        over those in config.json.

    Raises:
        FileNotFoundError: The folder or a file in it is missing.
        TypeError: `ignore` is one string.
        ValueError: A key of config.json is not implemented, or is unknown and may change what the model computes; or a
            tensor is missing, unknown or of another shape; or `ignore` names a key that is not there, or `dtype` is
            none. The message names the keys or tensors.

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
    if dtype is not None and not (isinstance(dtype, str) and dtype == "stored"):
        dtype = parameter_dtype(dtype)
    checkpoint = open_checkpoint(find_folder(path), ignore)
    generation = read_generation(checkpoint.folder)
    specs = {name: tree for name, tree in checkpoint.specs.items() if only is None or name in only}
    tensors, tokenizer = checkpoint.tensors, tokenizer_of(checkpoint)
    coded = set()  # names of the parameters that stay codes
    keep = dtype is None or (isinstance(dtype, str) and dtype == "stored")
    if keep:
        leaves = jax.tree.leaves(specs, is_leaf=spec.is_spec)
        coded = {s.name for s in leaves if keeps_codes(s, [tensors[name] for name in s.names])}
        if checkpoint.gguf is not None or coded or checkpoint.own:
            dtype = _dtype_beside_codes(checkpoint, mesh, dtype)
    places = spec.map_specs(lambda _: None, specs) if mesh is None else sharding.shardings(specs, mesh, strategy)
    dtype = dtype_to_load(dtype, specs, tensors, on_mesh=mesh is not None)
    dtypes = spec.map_specs(lambda s: _jax_dtype(s, stored_dtype(s, tensors, dtype)), specs)
    config = with_ends(checkpoint.config, generation)

    def read(s: spec.ParamSpec, kind: np.dtype, place: NamedSharding | None) -> Any:
        if s.name not in coded:
            return _parameter(s, tensors, kind, place)
        return _placed(read_codes(s, [tensors[name] for name in s.names], kind.name), place)

    own = {path: one for path, one in checkpoint.own.items() if only is None or path.split("/")[0] in only}
    late = bool(coded or own)  # the shapes of codes are known when they are read
    if while_reading is not None and not late:
        abstract = spec.map_specs(lambda s, kind: jax.ShapeDtypeStruct(s.shape, kind), specs, dtypes)
        while_reading(Model(config, abstract, tokenizer, generation))
    params = spec.map_specs(read, specs, dtypes, places)
    if own:
        compute = np.dtype(dtype).name if dtype is not None else "float32"
        where = {} if mesh is None else spec.named_leaves(sharding.shardings(parameters(config), mesh, strategy))
        params = _with_own(params, {p: _placed(read_own(w, compute, not keep), where.get(p)) for p, w in own.items()})
    params = _unstacked_if_mixed(params)
    if while_reading is not None and late:
        while_reading(Model(config, jax.eval_shape(lambda: params), tokenizer, generation))
    return Model(config, params, tokenizer, generation)


def _placed(leaf: Any, place: NamedSharding | None) -> Any:
    """A quantised parameter, or a list of those of the layers, or an array, on its devices."""
    if isinstance(leaf, list):
        if place is not None:
            raise ValueError(
                "the layers of this checkpoint are quantised in different forms, which cannot be sharded: give a dtype"
            )
        return [_placed(one, None) for one in leaf]
    if place is None:
        return jax.tree.map(lambda x: jax.device_put(x, may_alias=True), leaf)
    return jax.device_put(leaf, leaf.shardings(place) if is_leaf(leaf) else place)


def _unstacked_if_mixed(params: spec.Tree) -> spec.Tree:
    """The parameters with one tree a layer, if any is a list of leaves of different forms; else as they are."""
    if not any(isinstance(x, list) for x in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, list))):
        return params
    leaves, tree = jax.tree.flatten(params["blocks"], is_leaf=lambda x: isinstance(x, list) or is_leaf(x))
    layers = (x if isinstance(x, list) else unstack({"blocks": x})["blocks"] for x in leaves)
    return {**params, "blocks": tuple(jax.tree.unflatten(tree, layer) for layer in zip(*layers, strict=True))}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A folder whose config.json and tensors fit each other, or a GGUF file.

    Attributes:
        folder: The folder, or the GGUF file.
        config: Configuration of the model.
        specs: Its ParamSpec tree.
        tensors: The stored tensors, by the names in the ParamSpec tree.
        gguf: What else a GGUF file says; None for a folder.
        own: Quantised parameters in our own format, by path, which `specs` and `tensors` are without.
    """

    folder: Path
    config: ModelConfig
    specs: spec.Tree
    tensors: dict[str, StoredTensor]
    gguf: GGUFModel | None = None
    own: Own = dataclasses.field(default_factory=dict)


def open_checkpoint(folder: Path, ignore: Collection[str] = ()) -> Checkpoint:
    """The checkpoint in a folder or GGUF file, checked; reads config.json and headers only. Raises as `load` does."""
    if folder.is_file():
        found = open_gguf(folder, family_of, ignore)
        return Checkpoint(folder, found.config, found.specs, found.tensors, found)
    config, scheme, raw = _config_and_scheme(folder, ignore)
    if (folder / "adapter_config.json").exists():
        _log.warning(
            "%s holds an adapter too (adapter_config.json), which gx.load_adapter applies to the weights", folder
        )
    specs = parameters(config)
    tensors = open_tensors(folder)
    if is_own(raw):
        own, tensors = take_own(raw, specs, tensors)
        plain = _without(specs, own)
        return Checkpoint(folder, config, plain, match(tensors, plain, config, folder), own=own)
    if scheme is not None:
        names = [name for s in jax.tree.leaves(specs, is_leaf=spec.is_spec) for name in s.names]
        tensors = quantised_tensors(tensors, scheme, names)
    return Checkpoint(folder, config, specs, match(tensors, specs, config, folder))


def load_config(path: str | Path, ignore: Collection[str] = ()) -> ModelConfig:
    """The Config of a Hugging Face folder, of a GGUF file or of a name on the hub; reads no tensors.

    Args:
        path: The folder, file or name.
        ignore: Keys of config.json, or of a GGUF file's metadata, to leave out, as in `load`.

    Raises:
        FileNotFoundError: As `load` does.
        TypeError: As `load` does.
        ValueError: As `load` does, for config.json.

    Example:
        >>> import pathlib, tempfile, garrulax as gx
        >>> text = '''{"model_type": "gpt2", "vocab_size": 96, "n_positions": 64, "n_embd": 32, "n_layer": 1,
        ...     "n_head": 2, "logit_scale": 1}'''
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = pathlib.Path(folder, "config.json").write_text(text)
        ...     gx.load_config(folder, ignore=["logit_scale"]).width
        32
    """
    folder = find_folder(path)
    return with_ends(config_in(folder, ignore), read_generation(folder))


def config_in(folder: Path, ignore: Collection[str] = ()) -> ModelConfig:
    """The Config of a local folder or GGUF file. Raises as `load` does."""
    if folder.is_file():
        return read_gguf_config(folder, family_of, ignore)[3]
    return _config_and_scheme(folder, ignore)[0]


def _config_and_scheme(folder: Path, ignore: Collection[str]) -> tuple[ModelConfig, Scheme | None, dict[str, Any]]:
    """The Config of a folder, how its weights are quantised, and its config.json."""
    label = str(folder / "config.json")
    raw = without(read_config_json(folder), ignore, label)
    if is_own(raw):
        return parse_config({key: raw[key] for key in raw if key != "quantization_config"}, label), None, raw
    rest, scheme = take_scheme(raw, folder)
    return parse_config(rest, label), scheme, raw


def _without(specs: spec.Tree, own: Collection[str]) -> spec.Tree:
    """The ParamSpecs but for some, by path."""

    def kept(tree: spec.Tree, path: str) -> spec.Tree:
        if spec.is_spec(tree):
            return tree
        below = {name: kept(part, f"{path}{name}/") for name, part in tree.items() if f"{path}{name}" not in own}
        return {name: part for name, part in below.items() if part != {}}

    return kept(specs, "")


def _with_own(params: spec.Tree, own: Mapping[str, Any]) -> spec.Tree:
    """The parameters with those of our own format at their paths."""
    for path, leaf in own.items():
        *above, name = path.split("/")
        tree = params
        for part in above:
            tree = tree.setdefault(part, {})
        tree[name] = leaf
    return params


def parse_config(raw: dict[str, Any], label: str = "config.json") -> ModelConfig:
    """The Config of a parsed config.json, which `label` names in errors. Raises ValueError as `load` does."""
    module = family_of(raw)
    try:
        return module.from_hf(raw)
    except (TypeError, AttributeError, LookupError, ArithmeticError) as error:  # any key may have a value of any type
        raise ValueError(f"{label} has a value of the wrong kind: {error}") from error


def read_config_json(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a folder. Raises FileNotFoundError, or ValueError if it is not a JSON object."""
    path = folder / "config.json"
    if not is_file(path):
        if (folder / "adapter_config.json").exists():
            raise FileNotFoundError(
                f"{folder} has no config.json: it is an adapter (adapter_config.json), not a model: load its model "
                "and then gx.load_adapter(model, folder), or write both as one with garrulax merge"
            )
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
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{s.name} would be {dtype}: parameters have a floating-point dtype, such as float32")
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


def _dtype_beside_codes(checkpoint: Checkpoint, mesh: Mesh | None, asked: object) -> np.dtype:
    """Dtype of the parameters of a GGUF file or a quantised folder, where none or "stored" is asked for."""
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    if asked is None and platform == "cpu":
        return np.dtype(np.float32)
    if checkpoint.gguf is not None and not checkpoint.gguf.quantised:
        return checkpoint.gguf.dtype
    return jnp.dtype(jnp.bfloat16)


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer | None:
    """The tokenizer of a checkpoint; None if it has none. Raises ValueError for one that cannot be read."""
    if checkpoint.gguf is not None:
        return read_gguf_tokenizer(checkpoint.gguf.container.metadata, checkpoint.gguf.raw, checkpoint.folder)
    return None if find_tokenizer(checkpoint.folder) is None else load_tokenizer(checkpoint.folder)
