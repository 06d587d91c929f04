"""Where a run was computed: versions, devices and the machine."""

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import jax

from garrulax.train.digests import write_durably

NAME = "environment.json"
_PACKAGES = ("garrulax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def environment() -> dict[str, Any]:
    """Versions, devices and machine, as JSON values."""
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "backend": jax.default_backend(),
        "processes": jax.process_count(),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }


def write_environment(folder: str | os.PathLike) -> None:
    """Writes environment.json into a run's folder; what stood there, of an earlier start of the run, is replaced."""
    write_durably(Path(folder, NAME), json.dumps(environment(), indent=2) + "\n")


def read_environment(folder: str | os.PathLike) -> dict[str, Any]:
    """Reads environment.json; empty for a run without it. Raises ValueError if the file is damaged."""
    file = Path(folder, NAME)
    try:
        known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except ValueError as error:
        known = error
    if not isinstance(known, dict):
        raise ValueError(f"{file} is damaged: delete it; resuming the run writes it anew")
    return known


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
