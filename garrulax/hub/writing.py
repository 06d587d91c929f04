"""Saves a Model as a Hugging Face folder, tensor by tensor."""

import contextlib
import functools
import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from garrulax.core import spec
from garrulax.core.config import ModelConfig
from garrulax.core.leaf import check_arrays, weights
from garrulax.core.quantised import Quantised
from garrulax.hub.card import CARD, card_text, write_card
from garrulax.hub.entries import Entries, TensorPart, WholeTensor
from garrulax.hub.generation import content_to_write
from garrulax.hub.model import Model
from garrulax.hub.quantised.writing import FORMATS, compressed_entries, own_entries
from garrulax.hub.replacing import replacing
from garrulax.hub.tensors import DTYPES, FILE, INDEX, write_tensors
from garrulax.models import family, parameters

TEMPLATES = "additional_chat_templates"
#: Files beside the config and the weights that belong to a model folder.
COMPANIONS = (
    "generation_config.json", "tokenizer.json", "*.model", "vocab.json", "merges.txt", "vocab.txt",
    "encoder_bpe_40000.json", "vocab_40000.bpe", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json", f"{TEMPLATES}/*.jinja",
)  # fmt: skip
#: All files of a model folder. A folder with any other file is not replaced.
KNOWN_FILES = ("config.json", "*.safetensors", INDEX, CARD, *COMPANIONS)

Progress = Callable[[int, int], None]  # (bytes written so far, bytes of all tensors)


def save(
    model: Model,
    path: str | Path,
    max_shard_size: int | str = "5GB",
    progress: Progress | None = None,
    quantised: str = "compressed-tensors",
) -> None:
    """Saves a model as a folder that `load`, and `from_pretrained` of Hugging Face, read.

    The folder has config.json, generation_config.json, safetensors in the dtype of the parameters, the tokenizer's
    files, and a stub of a model card. Host memory holds one tensor at a time.

    Everything is written to a hidden folder beside `path`, which is renamed at the end. So an older model at `path`
    stays until the new one is complete, and a killed process leaves only the hidden folder, which the next `save`
    removes. A model card that somebody edited is kept.

    Args:
        model: Its parameters may be stacked or unstacked, on one device or sharded. With several processes all must
            call `save`; the first one writes.
        path: The folder.
        max_shard_size: Most bytes of one safetensors file, such as 200_000_000, "200MB" or "5GB". A larger model is
            written as several files and an index.
        progress: Called after every tensor with the number of bytes written and the number of all bytes.
        quantised: Format of quantised weights. "compressed-tensors" is read by transformers and vLLM; it has int4,
            int8, fp8 and mxfp4 in linear layers, and embeddings become plain numbers. "garrulax" has every form as it
            is, and only `load` reads it.

    Raises:
        ValueError: The parameters do not fit the config, their form does not exist in the format `quantised`, or `path`
            holds other files than a model's or is a mount point.
        OSError: The folder cannot be written; an older model in it is intact.

    Example:
        >>> import jax, garrulax as gx
        >>> import pathlib, tempfile
        >>> config = gx.preset("gpt2-tiny", layers=1, width=32, heads=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     gx.save(gx.Model(config, gx.init(config, jax.random.key(0))), folder)
        ...     sorted(file.name for file in pathlib.Path(folder).iterdir())
        ['README.md', 'config.json', 'generation_config.json', 'model.safetensors']
    """
    if model.prefix is not None:
        raise ValueError("a model with a prefix cannot be saved as one: save the prefix alone with gx.save_adapter")
    specs = parameters(model.config)
    stored, replaced, more = _quantised_entries(specs, model.params, quantised)
    entries = _entries(specs, model.params, replaced) | stored

    def add_files(folder: Path) -> None:
        if model.tokenizer is not None:
            model.tokenizer.save(folder)

    origin = "written by `garrulax.save`"
    write_folder(Path(path), model.config, entries, max_shard_size, origin, add_files, progress, model.generation, more)


def write_folder(
    path: Path,
    config: ModelConfig,
    entries: Entries,
    max_shard_size: int | str,
    origin: str,
    add_files: Callable[[Path], None],
    progress: Progress | None,
    generation: Mapping[str, Any] | None = None,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Writes a model folder from parts of tensors.

    Args:
        path: The folder.
        config: Configuration of the model.
        entries: The parts of every tensor.
        max_shard_size: As in `save`.
        origin: How the files came about, for the model card.
        add_files: Called with the new folder to add files such as the tokenizer's.
        progress: As in `save`.
        generation: As in `Model`; None writes the ids of the config only.
        more: Further keys of config.json.

    Raises:
        ValueError: As in `save`.
    """
    folder, limit = path.expanduser().resolve(), parse_size(max_shard_size)
    with jax.numpy_dtype_promotion("standard"):  # strict promotion has no common dtype of a float32 and a bfloat16
        parts = (part for entry in entries.values() if isinstance(entry, list) for part in entry)
        dtype = str(functools.reduce(jnp.promote_types, {part.dtype for part in parts}))
    raw = family(config).to_hf(config) | {"torch_dtype": dtype} | dict(more or {})
    writes = jax.process_index() == 0
    with replacing(folder, check_replaceable) if writes else contextlib.nullcontext(folder) as temporary:
        _write_shards(entries, temporary if writes else None, limit, progress)
        if writes:
            _write_json(temporary / "config.json", raw)
            _write_json(temporary / "generation_config.json", content_to_write(config, raw, generation or {}))
            write_card(folder, temporary, card_text(config, dtype, origin))
            add_files(temporary)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"garrulax save {folder}")


def parse_size(size: int | str) -> int:
    """Number of bytes from a number or a text such as "200MB", "5GB" or "2GiB". Raises ValueError for anything else."""
    units = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmgt]?)(i?)b?", str(size).strip().lower())
    count = 0
    if found and not (found[3] and not found[2]):
        unit = units[found[2]] if not found[3] else 1024 ** ("kmgt".index(found[2]) + 1)
        count = int(float(found[1]) * unit)
    if count < 1:
        raise ValueError(f"max_shard_size={size!r} is not a size such as 5GB, 200MB or 1000000")
    return count


def _named(params: spec.Tree) -> dict[str, Any]:
    """The parameters by path; for unstacked layers a list with that of each."""
    found = spec.named_leaves(params)
    blocks = params.get("blocks")
    if isinstance(blocks, tuple):  # unstacked: one tree a layer
        found = {k: v for k, v in found.items() if not k.startswith("blocks/")}
        layers = [spec.named_leaves(block) for block in blocks]
        found |= {f"blocks/{k}": [layer.get(k) for layer in layers] for layer in layers[:1] for k in layer}
    return found


def _is_quantised(leaf: Any) -> bool:
    return all(isinstance(x, Quantised) for x in (leaf if isinstance(leaf, list) else [leaf]))


def _quantised_entries(specs: spec.Tree, params: spec.Tree, format: str) -> tuple[Entries, set[str], dict[str, Any]]:
    """The tensors of quantised parameters, the names of plain tensors that they replace, and keys of config.json."""
    if format not in FORMATS:
        raise ValueError(f"quantised={format!r} is none of {', '.join(FORMATS)}")
    named = spec.named_specs(specs)
    found = {path: leaf for path, leaf in _named(params).items() if _is_quantised(leaf) and path in named}
    if format == "compressed-tensors":
        found = {path: leaf for path, leaf in found.items() if named[path].role == "matrix"}
    if not found:
        return {}, set(), {}
    replaced = {name for path in found for name in named[path].names}
    partly = [n for path, s in named.items() if path not in found for n in s.names if n in replaced]
    if partly:
        raise ValueError(f"{partly[0]} holds a quantised parameter and a plain one: quantise both or none")
    entries, more = compressed_entries(named, found) if format == "compressed-tensors" else own_entries(found)
    return entries, replaced, more


def _entries(specs: spec.Tree, params: spec.Tree, without: Collection[str] = ()) -> Entries:
    """The parts of the tensors of parameters in memory, but for some.

    Quantised ones become plain. Raises ValueError that names leaves that do not fit.
    """
    check_arrays([w for w in weights(params) if not isinstance(w, Quantised)], "saving")
    entries: Entries = {}
    named = spec.named_specs(specs)
    found = _named(params)
    odd = sorted(found.keys() ^ named.keys())
    if odd:
        raise ValueError(f"the parameters do not fit the config: {', '.join(odd[:4])} missing or unknown")
    for path, s in named.items():
        leaf = found[path]
        shapes = {x.shape for x in leaf} if isinstance(leaf, list) else {leaf.shape[1:] if s.layers else leaf.shape}
        if shapes != {s.layer_shape} or (s.layers and len(leaf) != s.layers):
            raise ValueError(f"the parameters do not fit the config: {path} should be {s.shape}, is {shapes}")
        dtype = np.dtype((leaf[0] if isinstance(leaf, list) else leaf).dtype)
        for i, name in enumerate(s.names):
            if name not in without:
                write = functools.partial(_write_parameter, s, leaf, i if s.layers else None)
                parts = entries.setdefault(name, [])
                assert isinstance(parts, list)
                parts.append(TensorPart(s, dtype, write))
    return entries


def _write_parameter(s: spec.ParamSpec, leaf: Any, i: int | None, target: np.ndarray | None) -> None:
    """Writes a parameter, or layer `i` of it, into the stored tensor `target`."""
    x = leaf if i is None else _layer(leaf, i)
    x = _on_host(x.dense() if isinstance(x, Quantised) else x)
    if target is not None:
        s.layout.write(x, target)


def _write_shards(entries: Entries, folder: Path | None, limit: int, progress: Progress | None) -> None:
    """Writes the safetensors files; a process without a folder only takes part in gathering sharded arrays."""
    layout = {name: _tensor_layout(name, parts) for name, parts in entries.items()}
    sizes = {name: dtype.itemsize * math.prod(shape) for name, (dtype, shape) in layout.items()}
    shards, total, done = _split_into_shards(sizes, limit), sum(sizes.values()), 0
    where: dict[str, str] = {}

    def tensors(names: list[str]) -> Iterator[np.ndarray]:
        nonlocal done
        for name in names:
            dtype, shape = layout[name]
            entry = entries[name]
            if isinstance(entry, WholeTensor):
                whole = entry.make()
                if folder is not None:
                    yield whole
            else:
                tensor = None if folder is None else np.empty(shape, dtype)
                for part in entry:
                    part.write(tensor)
                if tensor is not None:
                    yield tensor
            done += sizes[name]
            if progress is not None:
                progress(done, total)

    for number, names in enumerate(shards, 1):
        file = FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        where |= dict.fromkeys(names, file)
        if folder is None:
            list(tensors(names))
        else:
            write_tensors(folder / file, {name: layout[name] for name in names}, tensors(names))
    if folder is not None and len(shards) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def _tensor_layout(name: str, parts: list[TensorPart] | WholeTensor) -> tuple[np.dtype, tuple[int, ...]]:
    """dtype and shape of a tensor to store. Raises ValueError if its parts do not fill it or differ in dtype."""
    if isinstance(parts, WholeTensor):
        return np.dtype(parts.dtype), parts.shape
    shape = parts[0].spec.layout.stored_shape
    if sum(math.prod(part.spec.layer_shape) for part in parts) != math.prod(shape):
        raise ValueError(f"the parameters in {name} do not fill its shape {shape}")
    known = [np.dtype(kind) for kind in DTYPES.values()]
    if parts[0].dtype not in known:
        raise ValueError(f"parameters are stored as {', '.join(map(str, known))}, not as {parts[0].dtype}")
    if len({part.dtype for part in parts}) > 1:
        raise ValueError(f"the parameters in {name} have several dtypes")
    return parts[0].dtype, shape


def _split_into_shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """The names of the tensors of each file: in order, as many as fit into `limit` bytes, but at least one."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _layer(stacked: Any, i: int) -> Any:
    """`stacked[i]`, also where a mesh splits the layers."""
    place = getattr(stacked, "sharding", None)
    if not isinstance(place, jax.NamedSharding) or not any(place.spec[:1]):
        return stacked[i]
    return stacked.at[i].get(out_sharding=jax.NamedSharding(place.mesh, jax.P(*place.spec[1:])))


def _on_host(array: jax.Array) -> np.ndarray:
    """The array in host memory, gathered if other processes hold parts of it."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def check_replaceable(folder: Path) -> None:
    """Raises ValueError if `folder` exists and is anything but an empty folder or a model folder."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: choose another place for the model")
    files = {file.name for file in folder.iterdir()}
    if TEMPLATES in files and not (folder / TEMPLATES).is_symlink():
        files = files - {TEMPLATES} | {f"{TEMPLATES}/{file.name}" for file in (folder / TEMPLATES).iterdir()}
    known = {str(file.relative_to(folder)) for pattern in KNOWN_FILES for file in folder.glob(pattern)}
    if files and not ("config.json" in files and files <= known):
        foreign = sorted(files - known)[:3] or ["no config.json"]
        raise ValueError(f"{folder} holds more than a model ({', '.join(foreign)}): choose another folder")
