"""Prefixes and soft prompts in files: those of PEFT, and the prefix encoders of ChatGLM's P-tuning v2."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from garrulax.core.config import ModelConfig
from garrulax.hub.peft import CONFIG, WEIGHTS
from garrulax.hub.tensors import open_file, open_tensors
from garrulax.models.prefix import Prefix, SoftPrompt

_ROWS = "prompt_embeddings"
_ENCODER = "prefix_encoder."
_CHATGLM = f"transformer.{_ENCODER}"


def read_peft(folder: Path, raw: Mapping[str, Any], config: ModelConfig) -> Prefix | SoftPrompt:
    """The prefix or soft prompt in a folder of PEFT.

    The file has what the encoder of the training gave; the encoder itself is not stored.

    Raises:
        ValueError: It is for another model, or a setting is not implemented.
    """
    label = str(folder / CONFIG)
    if raw.get("modules_to_save") or raw.get("num_transformer_submodules", 1) != 1:
        raise ValueError(f"{label}: modules_to_save and encoder-decoder models are not implemented with a prefix")
    found = open_file(folder / WEIGHTS)
    if set(found) != {_ROWS}:
        raise ValueError(f"{folder / WEIGHTS} has {', '.join(sorted(found)[:4])}, not {_ROWS} alone")
    rows = found[_ROWS].array()
    if raw["peft_type"] == "PREFIX_TUNING":
        return _prefix(rows, config, True, label)
    if rows.ndim != 2 or rows.shape[1] != config.width:
        raise ValueError(f"{label}: {_ROWS} is {rows.shape}, not (tokens, {config.width}): it is for another model")
    return SoftPrompt(jnp.asarray(rows, jnp.float32))


def read_chatglm(folder: Path, config: ModelConfig) -> Prefix | None:
    """The prefix that ChatGLM's P-tuning v2 saved; None if the folder has none.

    Whether the encoder is a projection is seen from its tensors: published configs say `(false,)`, which is true.
    """
    if not any(folder.glob("*.safetensors")):
        return None
    found = {k.partition(_ENCODER)[2]: t for k, t in open_tensors(folder).items() if _ENCODER in k}
    if "embedding.weight" not in found:
        return None
    tensors = {name: np.asarray(tensor.array(), np.float32) for name, tensor in found.items()}
    rows = tensors["embedding.weight"]
    if "trans.0.weight" in tensors:
        hidden = np.tanh(rows @ tensors["trans.0.weight"].T + tensors["trans.0.bias"])
        rows = hidden @ tensors["trans.2.weight"].T + tensors["trans.2.bias"]
    return _prefix(rows, config, False, str(folder))


def _prefix(rows: np.ndarray, config: ModelConfig, counted: bool, label: str) -> Prefix:
    """[P, 2 L K C], of each layer the keys and then the values."""
    shape = (config.layers, 2, config.kv_heads, config.head_dim)
    if rows.ndim != 2 or rows.shape[1] != np.prod(shape):
        raise ValueError(
            f"{label}: the prefix is {rows.shape}, not (tokens, {np.prod(shape)}): it is for another model"
        )
    pairs = rows.reshape(len(rows), *shape).transpose(2, 1, 0, 3, 4)  # [2, L, P, K, C]
    return Prefix(jnp.asarray(pairs[0], jnp.float32), jnp.asarray(pairs[1], jnp.float32), counted)


def tensors_of(prefix: Prefix | SoftPrompt) -> dict[str, np.ndarray]:
    """The tensors to store: under PEFT's name, or where positions are not counted under ChatGLM's."""
    if isinstance(prefix, SoftPrompt):
        return {_ROWS: np.asarray(prefix.rows)}
    pairs = np.stack([np.asarray(prefix.key), np.asarray(prefix.value)])  # [2, L, P, K, C]
    rows = np.ascontiguousarray(pairs.transpose(2, 1, 0, 3, 4)).reshape(prefix.size, -1)
    return {_ROWS if prefix.counted else f"{_CHATGLM}embedding.weight": rows}


def config_of(prefix: Prefix | SoftPrompt, raw: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The adapter_config.json of a prefix; it keeps what it said when it was loaded."""
    made: dict[str, Any] = {
        "peft_type": "PREFIX_TUNING" if isinstance(prefix, Prefix) else "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "num_virtual_tokens": prefix.size,
        "num_layers": config.layers,
        "num_transformer_submodules": 1,
        "num_attention_heads": config.kv_heads,
        "token_dim": config.kv_heads * config.head_dim if isinstance(prefix, Prefix) else config.width,
    }
    return made | dict(raw)
