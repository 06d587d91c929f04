"""Finding the model that a user means."""

from pathlib import Path


def find_model(name: str) -> str:
    """The model folder of a run, or `name` itself: a model folder or a name on the hub.

    Raises FileNotFoundError for a run that has not exported a model yet.
    """
    folder = Path(name)
    if (folder / "model" / "config.json").exists():
        return str(folder / "model")
    if (folder / "run.json").exists():
        raise FileNotFoundError(f"{name} has no model yet: finish it with garrulax train --resume {name}")
    return name
