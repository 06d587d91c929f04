"""generation_config.json: what a folder says about generating; Garrulax acts on its end tokens and keeps the rest."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from garrulax import models
from garrulax.core.config import ModelConfig
from garrulax.hub.files import is_file
from garrulax.hub.json_files import read_object

FILE = "generation_config.json"


def read_generation(folder: Path) -> dict[str, Any]:
    """The content of generation_config.json; {} if there is none.

    Raises:
        ValueError: It is not a JSON object, or its `eos_token_id` is no token id.
    """
    path = folder / FILE
    if not is_file(path):
        return {}
    content = read_object(path)
    try:
        end_ids(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return content


def end_ids(generation: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids in `eos_token_id`, which is null, an id or a list. Raises ValueError for anything else."""
    value = generation.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise ValueError(f"eos_token_id must be a token id or a list of them, not {value!r:.60}")
    return tuple(ids)


def with_ends(config: ModelConfig, generation: Mapping[str, Any]) -> ModelConfig:
    """`config` with the end tokens of generation_config.json, which win over those of config.json, as in transformers.

    A file without end tokens changes nothing. Nor does any file for a family that fills blanks: the family's code
    knows the tokens that end an answer, and `eos` is another one of its control tokens.
    """
    ids = end_ids(generation)
    if not ids or set(ids) == set(_ids(config)) or models.blanks(config) is not None:
        return config
    return dataclasses.replace(config, eos=ids if len(ids) > 1 else ids[0])


def content_to_write(config: ModelConfig, raw: Mapping[str, Any], generation: Mapping[str, Any]) -> dict[str, Any]:
    """The generation_config.json of a model.

    Args:
        config: Configuration of the model.
        raw: Its config.json.
        generation: What the model was loaded with. It is kept, except for end tokens that `config` has changed.
    """
    if not generation:
        return {key: raw[key] for key in ("bos_token_id", "eos_token_id") if raw.get(key) is not None}
    ids = _ids(config)
    if not end_ids(generation) or set(ids) == set(end_ids(generation)) or models.blanks(config) is not None:
        return dict(generation)
    return {**generation, "eos_token_id": None if not ids else ids[0] if len(ids) == 1 else list(ids)}


def _ids(config: ModelConfig) -> tuple[int, ...]:
    return config.eos if isinstance(config.eos, tuple) else () if config.eos is None else (config.eos,)
