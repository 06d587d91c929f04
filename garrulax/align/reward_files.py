"""Reward models on disk: a folder of the model as any other, and its head in reward_head.safetensors beside it."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from garrulax.core.spec import Tree
from garrulax.hub import Model, load, save
from garrulax.models.reward import NAME, without_head

FILE = "reward_head.safetensors"


def save_reward_model(model: Model, folder: str | Path) -> None:
    """Writes a model whose parameters have a reward head.

    Args:
        model: With the head under `models.reward.NAME`.
        folder: New or empty.
    """
    save(model.replace(params=without_head(model.params)), folder)
    head = model.params[NAME]
    tensors = {
        "score.weight": np.asarray(head["weight"], np.float32).T,
        "score.bias": np.asarray(head["bias"], np.float32),
    }
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, Path(folder, FILE))


def load_reward_model(folder: str | Path, **options: Any) -> Model:
    """Reads what `save_reward_model` wrote.

    Args:
        folder: Its folder.
        **options: Of `garrulax.load`, such as dtype.

    Raises:
        FileNotFoundError: If the folder has no reward head.
        ValueError: If the head does not fit the model.
    """
    file = Path(folder, FILE)
    if not file.exists():
        raise FileNotFoundError(
            f"{folder} is no reward model: it has no {FILE}; `garrulax align --method reward` makes one"
        )
    model, tensors = load(Path(folder), **options), load_file(file)
    weight = tensors["score.weight"]
    if weight.shape != (1, model.config.width):
        raise ValueError(f"{file}: the head has shape {weight.shape}, the model's width is {model.config.width}")
    head: Tree = {"weight": jnp.asarray(weight.T), "bias": jnp.asarray(tensors["score.bias"])}
    return model.replace(params={**model.params, NAME: head})
