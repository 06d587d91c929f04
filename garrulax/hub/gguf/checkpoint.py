"""A GGUF file as a checkpoint: its Config, its ParamSpec tree, and its tensors by the names in the tree."""

import dataclasses
import math
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import numpy as np

from garrulax.core import spec
from garrulax.core.config import ModelConfig
from garrulax.core.hf_keys import without
from garrulax.hub.gguf.architectures import ARCHITECTURES, Architecture, Raw, Settings
from garrulax.hub.gguf.blocks import FORMATS
from garrulax.hub.gguf.container import Container, Entry, read_container
from garrulax.hub.gguf.special_ids import special_id
from garrulax.hub.gguf.tensors import stored_tensor
from garrulax.hub.tensors import Rows, StoredTensor
from garrulax.models import Family, parameters

ROPE_FACTORS = "rope_freqs.weight"
_BUFFERS = (ROPE_FACTORS, ".attn_rot_embd.weight")  # read by `_scaled_rope`, and of no use


@dataclasses.dataclass(frozen=True)
class GGUFModel:
    """A GGUF file whose metadata and tensors fit each other.

    Attributes:
        container: The file.
        raw: The config.json that the metadata stand for.
        config: Configuration of the model.
        specs: Its ParamSpec tree, with the layouts that the file has.
        tensors: The stored tensors, by the names in the tree.
        dtype: The dtype of the matrices; float32 where they are quantised or of several dtypes.
    """

    container: Container
    raw: Raw
    config: ModelConfig
    specs: spec.Tree
    tensors: dict[str, StoredTensor]
    dtype: np.dtype

    @property
    def quantised(self) -> bool:
        """Whether any tensor is stored in blocks."""
        return any(FORMATS[entry.kind].codes is not None for entry in self.container.tensors.values())


def read_gguf_config(
    path: Path, family_of: Callable[[Raw], Family], ignore: Collection[str] = ()
) -> tuple[Container, Settings, Raw, ModelConfig]:
    """The header of a GGUF file, its settings, and the Config that they stand for.

    Args:
        path: The file.
        family_of: Finds the family of a config.json.
        ignore: Keys of the metadata to leave out, as if the file did not have them.

    Raises:
        TypeError: `ignore` is one string.
        ValueError: The file is damaged, its architecture unknown, or a setting not implemented; or a key to leave out
            is not there.
    """
    container = read_container(path)
    metadata = without(container.metadata, ignore, f"the metadata of {path}")
    container = dataclasses.replace(container, metadata=metadata)
    if "general.architecture" not in metadata:
        raise ValueError(f"{path} does not say what model it holds: its metadata lack general.architecture")
    settings = Settings(container.metadata, {n: e.shape for n, e in container.tensors.items()}, path)
    if settings.architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(
            f"{path} is of architecture {settings.architecture[:40]!r}, which is not implemented ({known} are)"
        )
    raw = ARCHITECTURES[settings.architecture].config(settings)
    settings.check_all_read()
    if ROPE_FACTORS in container.tensors:
        raw |= {"rope_scaling": _scaled_rope(raw, container.tensors[ROPE_FACTORS], settings)}
    try:
        raw |= token_ids(container.metadata, settings.shapes["token_embd.weight"][0])
        return container, settings, raw, family_of(raw).from_hf(raw)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ValueError(f"{path}: {error}") from error


def open_gguf(path: Path, family_of: Callable[[Raw], Family], ignore: Collection[str] = ()) -> GGUFModel:
    """The model in a GGUF file; reads only its header. Arguments and errors are those of `read_gguf_config`.

    Raises:
        ValueError: Also where tensors are missing, unknown or of another shape.
    """
    container, settings, raw, config = read_gguf_config(path, family_of, ignore)
    architecture = ARCHITECTURES[settings.architecture]
    specs = spec.map_specs(lambda s: _as_in_file(s, architecture, settings), parameters(config))
    tensors = _match(container, specs, config, architecture, settings)
    return GGUFModel(container, raw, config, specs, tensors, _exact_dtype(container))


def token_ids(metadata: dict[str, Any], rows: int) -> Raw:
    """bos_token_id, eos_token_id and pad_token_id of a config.json. All tokens that end a text or a turn are eos.

    Args:
        metadata: The metadata.
        rows: Number of rows of the token embedding.

    Raises:
        ValueError: An id is none; the message names its key.
    """
    tokens = metadata.get("tokenizer.ggml.tokens")
    vocab = min(rows, len(tokens)) if isinstance(tokens, list) else rows
    ids = {role: special_id(metadata, role, vocab) for role in ("bos", "eos", "eot", "eom", "padding")}
    ends = list(dict.fromkeys(i for i in (ids["eos"], ids["eot"], ids["eom"]) if i is not None))
    raw: Raw = {"bos_token_id": ids["bos"], "eos_token_id": ends[0] if len(ends) == 1 else ends or None}
    return raw | ({} if ids["padding"] is None else {"pad_token_id": ids["padding"]})


def _as_in_file(s: spec.ParamSpec, architecture: Architecture, m: Settings) -> spec.ParamSpec:
    """A parameter with its layout in the file: transposed where files have it so."""
    names = architecture.names(m)
    if any(s.name.endswith(f"{names[name]}.weight") for name in architecture.transposed):
        return dataclasses.replace(s, layout=s.layout.transposed())
    return s


def _match(
    container: Container, specs: spec.Tree, config: ModelConfig, architecture: Architecture, m: Settings
) -> dict[str, StoredTensor]:
    """The tensors by the names in the ParamSpec tree. Raises ValueError that names every kind of misfit."""
    wanted = {name: s for s in jax.tree.leaves(specs, is_leaf=spec.is_spec) for name in s.names}
    names, layer = architecture.names(m), architecture.layer(m)
    tensors: dict[str, StoredTensor] = {}
    unknown, shapes = [], []
    for name, entry in container.tensors.items():
        if name.endswith(_BUFFERS):
            continue
        found = re.fullmatch(r"(?:blk\.(0|[1-9]\d*)\.)?(\w+)\.(weight|bias)", name)
        theirs = names.get(found[2]) if found else None
        if found is None or theirs is None:
            unknown.append(name)
            continue
        theirs = f"{'' if found[1] is None else layer.format(found[1])}{theirs}.{found[3]}"
        if theirs not in wanted:
            unknown.append(name)
            continue
        shape = wanted[theirs].layout.stored_shape
        if entry.shape != shape:
            shapes.append(f"{name} is {entry.shape}, not {shape}")
            continue
        tensors[theirs] = stored_tensor(entry, shape, architecture.rows(name, shape[0], config))
    missing = [_name_in_file(name, names, layer) for name in wanted if name not in tensors]
    problems = [
        f"{len(found)} {what} ({', '.join(found[:4])}{', ...' if len(found) > 4 else ''})"
        for what, found in (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
        if found and not (what == "missing" and shapes)
    ]
    if problems:
        raise ValueError(f"the tensors in {container.path} do not fit its metadata: {'; '.join(problems)}")
    return tensors


def _name_in_file(name: str, names: Any, layer: str) -> str:
    """The name in the file of a checkpoint's tensor."""
    before, _, after = layer.partition("{}")
    found = re.fullmatch(f"(?:{re.escape(before)}(\\d+){re.escape(after)})?(.+)\\.(weight|bias)", name)
    ours = next((ours for ours, theirs in names.items() if found and theirs == found[2]), None)
    if found is None or ours is None:
        return name
    return f"{'' if found[1] is None else f'blk.{found[1]}.'}{ours}.{found[3]}"


def _exact_dtype(container: Container) -> np.dtype:
    kinds = {FORMATS[entry.kind].dtype for entry in container.tensors.values() if len(entry.shape) > 1}
    kind = kinds.pop() if len(kinds) == 1 else None
    return np.dtype(np.float32) if kind is None else kind


def _scaled_rope(raw: Raw, entry: Entry, m: Settings) -> Raw:
    """rope_scaling for the divisors of the frequencies that a file states: those of LLaMA 3.1, or any others."""
    if len(entry.shape) != 1 or FORMATS[entry.kind].name != "F32" or raw.get("rope_scaling") or "head_dim" not in raw:
        raise m.error(f"the tensor {ROPE_FACTORS} is not implemented for this file")
    if entry.shape[0] * 2 != raw["head_dim"]:
        raise m.error(f"the tensor {ROPE_FACTORS} should have {raw['head_dim'] // 2} numbers")
    factors = np.empty(entry.shape, np.float32)
    StoredTensor(entry.shape, "F32", entry.file, entry.start).read(0, 0, Rows.of(factors[None]))
    waves = 2 * math.pi * raw["rope_theta"] ** (np.arange(len(factors)) / len(factors))
    factor, context = float(factors.max()), 8192
    if math.isfinite(factor) and factor > 1:
        smooth = np.clip((context / waves - 1) / 3, 0, 1)
        if np.allclose(factors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
            return {
                "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": context,
            }  # fmt: skip
    divisors = [float(x) for x in factors]
    return {
        "rope_type": "longrope", "factor": 1.0, "short_factor": divisors, "long_factor": divisors,
        "attention_factor": 1.0, "original_max_position_embeddings": raw["max_position_embeddings"],
    }  # fmt: skip
