"""Finds and loads the model for a name on the command line."""

import json
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax

import garrulax as gx

SMALL = 1 << 28  # bytes of a GGUF file; in float32 it takes 3 GB at most
ADAPTER = "adapter"  # folder of the trained adapter in the folder of a run
_CONFIG = "adapter_config.json"


def find_model(name: str) -> str:
    """The model folder for the name of a run, a model folder, or a model on the hub.

    Raises:
        FileNotFoundError: For a run that has not exported its model yet, and for one of an adapter.
    """
    folder = Path(name)
    if (folder / "model" / "config.json").exists():
        return str(folder / "model")
    if (folder / ADAPTER / _CONFIG).exists():
        raise FileNotFoundError(
            f"{name} has an adapter and no model of its own: garrulax merge {shlex.quote(name)} DST writes both as one"
        )
    if (folder / "run.json").exists():
        raise FileNotFoundError(f"{name} has no model yet: finish it with garrulax train --resume {shlex.quote(name)}")
    return name


def find_adapter(name: str) -> Path | None:
    """The folder of the adapter for the name of a run or a folder; None if it is no adapter."""
    for folder in (Path(name, ADAPTER), Path(name)):
        if (folder / _CONFIG).exists() and not (folder / "config.json").exists():
            return folder
    return None


def base_of(adapter: Path) -> str:
    """The model that an adapter says it is for.

    Raises:
        ValueError: It says none.
    """
    base = json.loads((adapter / _CONFIG).read_text(encoding="utf-8-sig")).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{adapter / _CONFIG} does not say which model it is for: give the model, and --adapter")
    return base


def load(
    name: str,
    adapter: str | None = None,
    ignore: Collection[str] = (),
    while_reading: Any = None,
    mesh: str | None = None,
) -> gx.Model:
    """The model for a name, with an adapter.

    Args:
        name: As for `find_model`, or an adapter or the run of one: its model is loaded then.
        adapter: The folder of an adapter, or the run of one.
        ignore: As in `gx.load`.
        while_reading: As in `gx.load`; called after reading where the model has an adapter or a mesh.
        mesh: Devices by axis, such as "tensor=2", each of which reads its own part; None is one device.
    """
    own = find_adapter(name) if adapter is None else find_adapter(adapter) or Path(adapter)
    if own is None and mesh is None:
        path = find_model(name)
        return gx.load(path, dtype=_dtype(Path(path)), ignore=ignore, while_reading=while_reading)
    base = base_of(own) if own is not None and adapter is None else name
    model = gx.load(find_model(base), None if mesh is None else gx.make_mesh(mesh), ignore=ignore)
    if own is not None:
        model = gx.load_adapter(model, own)
    if mesh is not None:
        model = model.replace(params=gx.unstack(model.params))  # here, so that the stacked ones are freed
    if while_reading is not None:
        while_reading(model)
    return model


def _dtype(path: Path) -> str | None:
    """The dtype in which a command reads a model: float32 for a small GGUF file on a CPU, else as `gx.load` decides.

    Programs for blocks of codes take twice as long to compile, which is most of what a user of a small model waits for;
    and its tokens come no sooner from codes there.
    """
    small = path.suffix == ".gguf" and path.is_file() and path.stat().st_size <= SMALL
    return "float32" if small and jax.default_backend() == "cpu" else None
