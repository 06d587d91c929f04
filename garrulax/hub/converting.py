"""Converts a model folder or GGUF file: to another dtype, other file sizes, or another dialect of config.json."""

import dataclasses
import functools
import shutil
from collections.abc import Collection
from pathlib import Path

import numpy as np

from garrulax.core import spec
from garrulax.hub import streaming
from garrulax.hub.download import find_folder
from garrulax.hub.entries import Entries, TensorPart
from garrulax.hub.reading import open_checkpoint, stored_dtype, tokenizer_of
from garrulax.hub.tensors import DTYPES, StoredTensor, file_to_copy
from garrulax.hub.writing import COMPANIONS, Progress, write_folder
from garrulax.models import family, parameters


def convert_folder(
    source: str | Path,
    target: str | Path,
    dtype: str | np.dtype | None = None,
    max_shard_size: int | str = "5GB",
    dialect: str | None = None,
    progress: Progress | None = None,
    ignore: Collection[str] = (),
) -> None:
    """Writes the model in `source` to the folder `target` as `save` would, without loading it.

    Memory holds one tensor at a time. The tokenizer's files and generation_config.json are copied; those of a GGUF
    file are made from its metadata.

    Args:
        source: A model folder, a GGUF file, or a name on the Hugging Face hub.
        target: The folder to write.
        dtype: Dtype of all tensors, such as "bfloat16"; None keeps the stored ones. Of a GGUF file, None means the
            dtype of its matrices, or float32 where they are quantised.
        max_shard_size: As in `save`.
        dialect: Format of the checkpoint, if the family has several: "glm", for example, turns a ChatGLM checkpoint
            into one that transformers loads with its own class. None keeps the format.
        progress: As in `save`.
        ignore: Keys of config.json, or of a GGUF file's metadata, to leave out, as in `load`.

    Raises:
        FileNotFoundError: As in `load`.
        TypeError: As in `load`.
        ValueError: One folder contains the other, or the dtype or dialect is unknown; and as in `load` and `save`.
    """
    numpy_dtype = _parse_dtype(dtype)
    folder, goal = find_folder(source).resolve(), Path(target).expanduser().resolve()
    if folder == goal or folder in goal.parents or goal in folder.parents:
        raise ValueError(f"{target} and {source} are one folder, or one lies in the other: choose another target")
    checkpoint = open_checkpoint(folder, ignore)
    if checkpoint.own:
        raise ValueError(f"{source} is quantised in Garrulax's own format: load it with a dtype, and save that")
    config, gguf = checkpoint.config, checkpoint.gguf
    tokenizer = None if gguf is None else tokenizer_of(checkpoint)
    if gguf is not None and numpy_dtype is None:
        numpy_dtype = gguf.dtype
    if dialect is not None:
        if "dialect" not in {field.name for field in dataclasses.fields(config)}:
            raise ValueError(f"dialect={dialect!r}: a {family(config).DIALECTS[0].model_type} has only one")
        config = dataclasses.replace(config, dialect=dialect)
    entries = _converted_entries(checkpoint.specs, parameters(config), checkpoint.tensors, numpy_dtype)

    def add_files(temporary: Path) -> None:
        if gguf is not None:
            if tokenizer is not None:
                tokenizer.save(temporary)
            return
        for pattern in COMPANIONS:
            for file in folder.glob(pattern):
                copy = temporary / file.relative_to(folder)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file_to_copy(folder, str(file.relative_to(folder))), copy)

    write_folder(goal, config, entries, max_shard_size, "converted by `garrulax convert`", add_files, progress)


def _parse_dtype(name: str | np.dtype | None) -> np.dtype | None:
    known = {str(np.dtype(kind)): np.dtype(kind) for kind in DTYPES.values()}
    if name is not None and str(name) not in known:
        raise ValueError(f"dtype={str(name)!r} is none of {', '.join(known)}")
    return None if name is None else known[str(name)]


def _converted_entries(
    source: spec.Tree, target: spec.Tree, tensors: dict[str, StoredTensor], dtype: np.dtype | None
) -> Entries:
    """The parts of the tensors of `target`, read from the tensors of `source`: two ParamSpec trees of one model."""
    ours, theirs = spec.named_specs(source), spec.named_specs(target)
    differing = [path for path in theirs if path not in ours or ours[path].shape != theirs[path].shape]
    if differing or len(ours) != len(theirs):
        raise ValueError(f"this dialect has other parameters: {', '.join(differing[:4])}")
    entries: Entries = {}
    for path, s in theirs.items():
        kind = stored_dtype(ours[path], tensors, dtype)
        for name, old in zip(s.names, ours[path].names, strict=True):
            write = functools.partial(_copy_parameter, ours[path], tensors[old], s)
            parts = entries.setdefault(name, [])
            assert isinstance(parts, list)
            parts.append(TensorPart(s, kind, write))
    return entries


def _copy_parameter(source: spec.ParamSpec, tensor: StoredTensor, s: spec.ParamSpec, target: np.ndarray | None) -> None:
    """Reads a parameter from the stored `tensor` (layout of `source`) into the tensor `target` (layout of `s`)."""
    # `place` is a view of `target`: from one stored form to the other, without the form that a model uses.
    if target is not None:
        place = s.layout.read(target)
        streaming.read_windows([streaming.window(tensor, source.layout, place)])
