"""The parameters in a checkpoint of a run, without the rest of its state."""

import os
from pathlib import Path

import jax

from garrulax import models
from garrulax.core import spec
from garrulax.core.config import ModelConfig
from garrulax.core.spec import Tree
from garrulax.train import digests
from garrulax.train import settings as settings_
from garrulax.train.checkpoint import load_part, saved_steps


def read_weights(folder: str | os.PathLike, step: int) -> tuple[ModelConfig, Tree]:
    """Reads the parameters of one step, or their moving average if the run has one, onto one device.

    A run that is being trained may be read: nothing in its folder is changed.

    Args:
        folder: Of the run.
        step: Of the checkpoint.

    Returns:
        The config of the model, and its parameters in the dtype of the run's weights (the average in float32).

    Raises:
        FileNotFoundError: If it is not the folder of a run, or there is no checkpoint of that step.
        DamagedError: If run.json or the checkpoint is damaged; it names the file.
    """
    settings, config = settings_.read_run_file(folder)
    place = Path(folder, "checkpoints", str(step)).resolve()
    there = saved_steps(place.parent)
    if step not in there:
        listed = ", ".join(map(str, there)) or "none"
        raise FileNotFoundError(f"{folder} has no checkpoint of step {step}; its checkpoints: {listed}")
    digests.check(place)
    part, dtype = ("ema", "float32") if settings.ema else ("params", settings.weights)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = spec.map_specs(lambda s: jax.ShapeDtypeStruct(s.shape, dtype, sharding=device), models.parameters(config))
    return config, load_part(place, part, target)
