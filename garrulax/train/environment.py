"""Where a run was computed: versions, devices and the machine."""

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import jax

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
    text = json.dumps(environment(), indent=2) + "\n"
    hidden = Path(folder, f".{NAME}")
    hidden.write_text(text, encoding="utf-8")
    hidden.replace(Path(folder, NAME))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
