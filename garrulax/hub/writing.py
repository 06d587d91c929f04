"""A Model as a Hugging Face folder."""

import contextlib
import functools
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from safetensors.numpy import save_file

from garrulax.core import spec
from garrulax.hub.model import Model
from garrulax.hub.tensors import FILE, INDEX
from garrulax.models import family

#: What a model folder consists of; a folder with anything else in it is not replaced.
KNOWN_FILES = (
    "config.json", "generation_config.json", "*.safetensors", INDEX, "tokenizer.json", "*.model", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja",
)  # fmt: skip

Part = tuple[spec.Spec, Callable[[], jax.Array], int]  # and the array of one layer, its bytes


def save(model: Model, path: str | Path, max_shard_size: int = 5_000_000_000) -> None:
    """Writes a folder that `load`, and Hugging Face's `from_pretrained`, read: config.json, generation_config.json,
    safetensors in the parameters' own dtype, and the tokenizer's files.

    model: parameters stacked or unstacked, on one device or sharded over many; with several processes all of them
    must call, and the first writes. max_shard_size: bytes of one safetensors file, which is also about what host
    memory takes; beyond it several files and an index are written.

    Everything is written beside `path` and renamed at the end: a killed process leaves nothing half-written, and an
    older model folder at `path` stays until then. Raises ValueError where the parameters do not fit the config, and
    where `path` holds anything but a model.
    """
    folder = Path(path).expanduser().resolve()
    module = family(model.config)
    entries = _entries(module.parameters(model.config), model.params)
    config = module.to_hf(model.config) | {"torch_dtype": _common_dtype(model.params)}
    ids = {f"{name}_token_id": getattr(model.config, name, None) for name in ("bos", "eos")}
    writes = jax.process_index() == 0
    with _replacing(folder) if writes else contextlib.nullcontext(folder) as temporary:
        _write_tensors(entries, temporary if writes else None, max_shard_size)
        if writes:
            _write_json(temporary / "config.json", config)
            _write_json(temporary / "generation_config.json", {k: v for k, v in ids.items() if v is not None})
            if model.tokenizer is not None:
                model.tokenizer.save(temporary)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"garrulax save {folder}")


def _entries(specs: spec.Tree, params: spec.Tree) -> dict[str, list[Part]]:
    """What each stored tensor consists of, in the order of the tree. ValueError names the leaves that do not fit."""
    entries: dict[str, list[Part]] = {}
    named = spec.named_specs(specs)
    found: dict[str, Any] = _named(params)
    blocks = params.get("blocks")
    if isinstance(blocks, tuple):  # unstacked: one tree a layer
        found = {k: v for k, v in found.items() if not k.startswith("blocks/")}
        layers = [_named(block) for block in blocks]
        found |= {f"blocks/{k}": [layer.get(k) for layer in layers] for layer in layers[:1] for k in layer}
    odd = sorted(found.keys() ^ named.keys())
    if odd:
        raise ValueError(f"the parameters do not fit the config: {', '.join(odd[:4])} missing or unknown")
    for path, s in named.items():
        leaf = found[path]
        shapes = {x.shape for x in leaf} if isinstance(leaf, list) else {leaf.shape[1:] if s.layers else leaf.shape}
        if shapes != {s.layer_shape} or (s.layers and len(leaf) != s.layers):
            raise ValueError(f"the parameters do not fit the config: {path} should be {s.shape}, is {shapes}")
        size = np.dtype((leaf[0] if isinstance(leaf, list) else leaf).dtype).itemsize * math.prod(s.layer_shape)
        for i, name in enumerate(s.names):
            entries.setdefault(name, []).append((s, functools.partial(_layer, leaf, i if s.layers else None), size))
    return entries


def _layer(leaf: Any, i: int | None) -> jax.Array:
    return leaf if i is None else leaf[i]


def _named(tree: spec.Tree) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(k, simple=True, separator="/"): v for k, v in jax.tree_util.tree_leaves_with_path(tree)
    }


def _write_tensors(entries: dict[str, list[Part]], folder: Path | None, max_shard_size: int) -> None:
    """Writes the safetensors files; without a folder only takes part in gathering the arrays."""
    sizes = {name: sum(size for *_, size in parts) for name, parts in entries.items()}
    shards = _shards(sizes, max_shard_size)
    total, where = 0, {}
    for number, shard in enumerate(shards, 1):
        file = FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name in shard:
            parts = [(s, _on_host(part())) for s, part, _ in entries[name]]
            if folder is not None:
                tensors[name] = _assembled(name, parts)
            where[name], total = file, total + sizes[name]
        if folder is not None:
            save_file(tensors, folder / file, metadata={"format": "pt"})
    if folder is not None and len(shards) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def _assembled(name: str, parts: list[tuple[spec.Spec, np.ndarray]]) -> np.ndarray:
    """The tensor to store, from the parameters that lie in it."""
    shape = parts[0][0].stored_shape or parts[0][0].layer_shape
    if sum(x.size for _, x in parts) != math.prod(shape):
        raise ValueError(f"the parameters that {name} holds do not fill its shape {shape}")
    tensor = np.empty(shape, parts[0][1].dtype)
    for s, x in parts:
        s.stored.write(x, tensor)
    return tensor


def _shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _on_host(array: jax.Array) -> np.ndarray:
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def _common_dtype(params: spec.Tree) -> str:
    return str(np.result_type(*{np.dtype(x.dtype) for x in jax.tree.leaves(params)}))


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, which takes its place when all went well and vanishes otherwise."""
    _check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.{kind}") for kind in ("new", "old"))
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.iterdir():
            with file.open("rb") as f:
                os.fsync(f.fileno())
        _check_replaceable(folder)
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
    finally:
        if old.exists() and not folder.exists():  # the second rename failed: put the older model back
            old.rename(folder)
        for leftover in (temporary, old):
            if leftover.exists():
                shutil.rmtree(leftover)


def _check_replaceable(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: choose another place for the model")
    files = {file.name for file in folder.iterdir()}
    known = {file.name for pattern in KNOWN_FILES for file in folder.glob(pattern)}
    if files and not ("config.json" in files and files <= known):
        foreign = sorted(files - known)[:3] or ["no config.json"]
        raise ValueError(f"{folder} holds more than a model ({', '.join(foreign)}): choose another folder")
