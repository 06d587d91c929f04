"""The tensors of a folder of safetensors files: what there is, from the headers, and any part of one on demand."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from garrulax.core.spec import Stored

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: its shape, its dtype as safetensors writes it ("BF16"), and its data through `[...]`."""

    shape: tuple[int, ...]
    dtype: str
    data: Any

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        return self.data[index] if index else self.data[...]


def open_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint in `folder` by name; nothing but headers is read.

    Raises FileNotFoundError where there are no safetensors or a file that the index names is missing, ValueError for
    a damaged file and for a name that stands in two files.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in _files(folder):
        try:
            file = safe_open(path, framework="numpy")
            views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        for name, view in views.items():
            if name in tensors:
                raise ValueError(f"{folder}: tensor {name} stands in two files, the second is {path.name}")
            tensors[name] = StoredTensor(tuple(view.get_shape()), view.get_dtype(), view)
    return tensors


def _files(folder: Path) -> list[Path]:
    if (folder / FILE).exists():
        return [folder / FILE]
    if (folder / INDEX).exists():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{folder / INDEX} is damaged: {error!r}") from error
        for name in names:
            if Path(name).name != name:
                raise ValueError(f"{folder / INDEX} names {name!r}, which is not a file of this folder")
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} lacks {name}, one of the {len(names)} files that {INDEX} names")
        return [folder / name for name in names]
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found
    if found:
        raise FileNotFoundError(f"{folder} has {len(found)} safetensors files but no {INDEX} that says which belong")
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise FileNotFoundError(
            f"{folder} has only pickled weights (.bin, .pt), which can run code when opened and are not read; convert "
            'them once where torch is: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\""
        )
    raise FileNotFoundError(f"{folder} has no {FILE} and no {INDEX}")


def read_part(
    tensor: StoredTensor, stored: Stored, shape: tuple[int, ...], index: tuple[slice, ...] | None = None
) -> np.ndarray:
    """`parameter[index]` for the parameter of `shape` that lies in `tensor` as `stored` says; all of it by default.

    Of the file only the rows and columns that the part needs are read.
    """
    index = tuple(slice(*i.indices(n)[:2]) for i, n in zip(index or (slice(None),) * len(shape), shape, strict=True))
    split = stored.split or (tensor.shape if stored.order or stored.take else shape)
    chosen = (*stored.index, *(slice(None),) * (len(split) - len(stored.index)))
    taken = [range(i, i + 1) if isinstance(i, int) else range(n)[i] for n, i in zip(split, chosen, strict=True)]
    kept = [at for at, i in enumerate(chosen) if not isinstance(i, int)]
    order = stored.order or tuple(range(len(kept)))
    if tuple(len(taken[kept[i]]) for i in order) != shape:
        raise ValueError(f"{stored.name}: {split} taken {stored.take} in order {order} is not the shape {shape}")
    wanted = [slice(part.start, part.stop) for part in taken]
    for i, here in zip(order, index, strict=True):
        part = taken[kept[i]][here]
        wanted[kept[i]] = slice(part.start, part.stop)
    take, read, crop = _window(tensor.shape, split, wanted)
    x = tensor[take].reshape(read)[crop]
    return x.reshape([x.shape[i] for i in kept]).transpose(order)


def _window(shape: tuple[int, ...], split: tuple[int, ...], wanted: list[slice]) -> tuple[tuple, tuple, tuple]:
    """The slices of `shape` to read for the `wanted` slices of its refinement `split`: (slices, the refined shape of
    what they give, slices of the wanted part in it). Only the first of the dimensions that a stored one is split into
    narrows the reading: of the others a part is not contiguous."""
    take, read, crop, at = [], [], [], 0
    for i, size in enumerate(shape):
        first, product = at, 1
        while at == first or product < size or (i == len(shape) - 1 and at < len(split)):
            product *= split[at]
            at += 1
        major, inner = wanted[first], product // split[first]
        take.append(slice(major.start * inner, major.stop * inner))
        read += [major.stop - major.start, *split[first + 1 : at]]
        crop += [slice(None), *wanted[first + 1 : at]]
    if math.prod(split) != math.prod(shape) or at != len(split):
        raise ValueError(f"a tensor of shape {shape} does not split into {split}")
    return tuple(take), tuple(read), tuple(crop)
