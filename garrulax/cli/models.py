"""Finds the model for a name on the command line."""

import shlex
from pathlib import Path


def find_model(name: str) -> str:
    """The model folder for the name of a run, a model folder, or a model on the hub.

    Raises:
        FileNotFoundError: For a run that has not exported its model yet.
    """
    folder = Path(name)
    if (folder / "model" / "config.json").exists():
        return str(folder / "model")
    if (folder / "run.json").exists():
        raise FileNotFoundError(f"{name} has no model yet: finish it with garrulax train --resume {shlex.quote(name)}")
    return name
