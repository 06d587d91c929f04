"""Services that show the metrics of runs: Weights & Biases, and trackio. Neither is needed; each is an extra."""

import hashlib
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

PROJECT = "garrulax"


class Trackers:
    """Sends the records of a run to services. Only process 0 does. Use as a context manager.

    Both have the functions init, log and finish. A run that is resumed goes on under its own name; the services keep
    the first record of a step that they get twice. A service that fails while the run is training gets no
    more records, which a line says: it must not be able to stop a run.

    Args:
        names: Of the services, of `setting_limits.TRACKERS`; empty sends nothing.
        folder: Of the run; its name is that of the run.
        settings: By name, to show beside the metrics.
        say: Called with a line for the user.

    Raises:
        ImportError: If a service is not installed.
        OSError: If a service does not start, such as without a login.
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: str | os.PathLike,
        settings: Mapping[str, Any],
        say: Callable[[str], None] = lambda line: None,
    ):
        self._say = say
        modules = [_module(name) for name in names] if jax.process_index() == 0 else []
        path = Path(folder).absolute()
        self._modules = []
        for module in modules:
            options: dict[str, Any] = {"project": PROJECT, "name": path.name, "config": dict(settings)}
            if module.__name__ == "wandb":
                known_as = hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
                options |= {"id": f"{path.name}-{known_as}", "dir": str(path)}
            try:
                module.init(resume="allow", **options)
            except Exception as error:
                raise OSError(f"trackers={module.__name__} does not start: {error}; log in, or leave it out") from error
            self._modules.append(module)

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, *_: object) -> None:
        for module in list(self._modules):
            self._call(module, "finish")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Sends one record, see `metrics.MetricsLog.write`."""
        known = {name: value for name, value in values.items() if value is not None}
        for module in list(self._modules):
            self._call(module, "log", known, step=step)

    def _call(self, module: Any, function: str, *args: Any, **options: Any) -> None:
        try:
            getattr(module, function)(*args, **options)
        except Exception as error:  # the services raise errors of every kind
            self._modules.remove(module)
            self._say(f"no more records for {module.__name__}: {error}; metrics.jsonl has everything")


def check_trackers(names: Sequence[str]) -> None:
    """Raises ImportError for a service that is not installed."""
    for name in names:
        _module(name)


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ImportError(f"trackers={name} needs the package {name}: pip install 'garrulax[{name}]'") from None
