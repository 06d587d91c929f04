"""Services that show the metrics of runs: Weights & Biases, and trackio. Neither is needed; each is an extra."""

import hashlib
import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

PROJECT = "garrulax"


class Trackers:
    """Sends the records of a run to services. Only process 0 does. Use as a context manager.

    Both have the functions init, log and finish. A run that is resumed goes on under its own name; the services keep
    the first record of a step that they get twice.

    Args:
        names: Of the services, of `setting_limits.TRACKERS`; empty sends nothing.
        folder: Of the run; its name is that of the run.
        settings: By name, to show beside the metrics.

    Raises:
        ImportError: If a service is not installed.
    """

    def __init__(self, names: Sequence[str], folder: str | os.PathLike, settings: Mapping[str, Any]):
        modules = [_module(name) for name in names] if jax.process_index() == 0 else []
        path = Path(folder).absolute()
        self._modules = []
        for module in modules:
            options: dict[str, Any] = {"project": PROJECT, "name": path.name, "config": dict(settings)}
            if module.__name__ == "wandb":
                known_as = hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
                options |= {"id": f"{path.name}-{known_as}", "dir": str(path)}
            module.init(resume="allow", **options)
            self._modules.append(module)

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, *_: object) -> None:
        for module in self._modules:
            module.finish()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Sends one record, see `metrics.MetricsLog.write`."""
        known = {name: value for name, value in values.items() if value is not None}
        for module in self._modules:
            module.log(known, step=step)


def check_trackers(names: Sequence[str]) -> None:
    """Raises ImportError for a service that is not installed."""
    for name in names:
        _module(name)


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ImportError(f"trackers={name} needs the package {name}: pip install 'garrulax[{name}]'") from None
