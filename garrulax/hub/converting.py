"""A model folder as another: another dtype, other shards, another dialect of config.json and names."""

import dataclasses
import functools
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from garrulax.core import spec
from garrulax.hub import streaming
from garrulax.hub.download import find
from garrulax.hub.reading import open_checkpoint, stored_dtype
from garrulax.hub.tensors import DTYPES, StoredTensor, contained
from garrulax.hub.writing import COMPANIONS, Entries, Part, Progress, write_folder
from garrulax.models import family, parameters


def convert(
    source: str | Path,
    target: str | Path,
    dtype: Any = None,
    max_shard_size: int | str = "5GB",
    dialect: str | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes the model in the folder `source` (or on the hub) to the folder `target`, as `save` would, without
    loading it: memory holds one tensor at a time.

    dtype: of all tensors, such as "bfloat16"; None keeps what is stored. max_shard_size, progress: as in `save`.
    dialect: the format of the checkpoint, where the family has several ("glm" for a chatglm that transformers shall
    load with its own class); None keeps it. The files of the tokenizer and generation_config.json are copied.

    Raises ValueError where the two folders are one or lie in each other, for an unknown dtype or dialect, and as
    `load` and `save` do.
    """
    kind = _dtype(dtype)
    folder, goal = find(source).resolve(), Path(target).expanduser().resolve()
    if folder == goal or folder in goal.parents or goal in folder.parents:
        raise ValueError(f"{target} and {source} are one folder, or one lies in the other: choose another target")
    checkpoint = open_checkpoint(folder)
    config = checkpoint.config
    if dialect is not None:
        if "dialect" not in {field.name for field in dataclasses.fields(config)}:
            raise ValueError(f"dialect={dialect!r}: a {family(config).DIALECTS[0].model_type} has only one")
        config = dataclasses.replace(config, dialect=dialect)
    entries = _entries(checkpoint.specs, parameters(config), checkpoint.tensors, kind)

    def finish(temporary: Path) -> None:
        for pattern in COMPANIONS:
            for file in folder.glob(pattern):
                shutil.copyfile(contained(folder, file.name), temporary / file.name)

    write_folder(goal, config, entries, max_shard_size, "converted by `garrulax convert`", finish, progress)


def _dtype(name: Any) -> np.dtype | None:
    known = {str(np.dtype(kind)): np.dtype(kind) for kind in DTYPES.values()}
    if name is not None and str(name) not in known:
        raise ValueError(f"dtype={str(name)!r} is none of {', '.join(known)}")
    return None if name is None else known[str(name)]


def _entries(source: spec.Tree, target: spec.Tree, tensors: dict[str, StoredTensor], dtype: np.dtype | None) -> Entries:
    """What to write for the ParamSpec tree `target`, from the tensors of the tree `source` of the same model."""
    ours, theirs = spec.named_specs(source), spec.named_specs(target)
    differing = [path for path in theirs if path not in ours or ours[path].shape != theirs[path].shape]
    if differing or len(ours) != len(theirs):
        raise ValueError(f"this dialect has other parameters: {', '.join(differing[:4])}")
    entries: Entries = {}
    for path, s in theirs.items():
        kind = stored_dtype(ours[path], tensors, dtype)
        for name, old in zip(s.names, ours[path].names, strict=True):
            put = functools.partial(_put, ours[path], tensors[old], s)
            entries.setdefault(name, []).append(Part(s, kind, put))
    return entries


def _put(source: spec.ParamSpec, tensor: StoredTensor, s: spec.ParamSpec, target: np.ndarray | None) -> None:
    if target is not None:  # what the parameter is in memory does not matter: from one stored form to the other
        place = s.layout.read(target)
        streaming.fill([streaming.window(tensor, source.layout, place)])
