"""The safetensors format: reads the headers of a folder's files, and writes files tensor by tensor.

A file is the length of its header (8 bytes, little-endian), the header (JSON: name -> dtype, shape, data_offsets), and
the data (https://github.com/huggingface/safetensors, "Format"). The library's reader is not used, because weights are
read from the file directly into their final arrays (`hub.streaming`). A file may be damaged or hostile, so every header
is checked: its tensors must cover the data without overlaps and gaps.
"""

import dataclasses
import io
import itertools
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from garrulax.hub.files import is_there
from garrulax.hub.json_files import INDEX_BYTES, parse_object, read_object

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
#: Dtypes of the parts of quantised weights.
PART_DTYPES = {
    "U8": np.uint8, "I8": np.int8, "I16": np.int16, "I32": np.int32, "U32": np.uint32, "I64": np.int64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
}  # fmt: skip
#: Bits of a number for every dtype of the format; parameters can only have the dtypes in DTYPES.
BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
HEADER_BYTES = 100_000_000  # the limit of the reference implementation


class Rows(NamedTuple):
    """Rows of memory that receive numbers.

    Attributes:
        array: uint8 [rows, bytes]; a row is contiguous.
        buffers: The same rows, as one writable buffer each.
    """

    array: np.ndarray
    buffers: list

    @classmethod
    def of(cls, array: np.ndarray) -> "Rows":
        """The rows of an array of two dimensions."""
        array = array.view(np.uint8)
        return cls(array, list(array))


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file.

    Attributes:
        shape: Its shape.
        dtype: Its dtype in the notation of safetensors, such as "BF16".
        file: The open file.
        start: Position of its first byte in the file.
    """

    shape: tuple[int, ...]
    dtype: str
    file: io.FileIO
    start: int

    @property
    def numpy_dtype(self) -> np.dtype:
        """The dtype for numpy. Raises KeyError if it is not in DTYPES."""
        return np.dtype(DTYPES[self.dtype])

    @property
    def quantised(self) -> bool:
        """Whether the tensor is stored as codes, which its method `coded` gives (`hub.quantised`)."""
        return False

    def array(self) -> np.ndarray:
        """The whole tensor in memory. Raises ValueError for a dtype that is not in DTYPES."""
        if self.dtype not in DTYPES:
            raise ValueError(f"a tensor is stored as {self.dtype}: there are {', '.join(DTYPES)}")
        out = np.empty(self.shape, self.numpy_dtype)
        self.read(0, out.size, Rows.of(out.reshape(1, -1)))
        return out

    def read(self, first: int, step: int, rows: Rows) -> None:
        """Fills rows from the file: row i begins at number `first + i * step` of the flattened tensor.

        Args:
            first: Index of the first number of row 0.
            step: Distance from row to row, in numbers.
            rows: Where the numbers go.

        Raises:
            ValueError: The file ends too early.
        """
        size = self.numpy_dtype.itemsize
        read_buffers(self.file, self.start + first * size, step * size, rows.buffers, rows.array.shape[1])


def read_buffers(file: io.FileIO, start: int, step: int, buffers: list, width: int) -> None:
    """Fills buffers of `width` bytes from a file; buffer i begins at byte `start + i * step`.

    Raises:
        ValueError: The file ends too early.
    """
    if step == width and os.preadv(file.fileno(), buffers, start) == width * len(buffers):
        return
    for i, buffer in enumerate(buffers):
        done = 0
        while done < width:
            count = os.preadv(file.fileno(), [buffer[done:]], start + i * step + done)
            if not count:
                raise ValueError(f"{file.name} became shorter while it was read")
            done += count


def open_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of the checkpoint in `folder`, by name. Reads only headers.

    Raises:
        FileNotFoundError: There are no safetensors, or one of them is a link to nothing.
        ValueError: A file is damaged, or a name is in two files.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in _files(folder):
        for name, tensor in open_file(path).items():
            if name in tensors:
                raise ValueError(f"{folder}: tensor {name} is in two files, the second is {path.name}")
            tensors[name] = tensor
    return tensors


def read_index(folder: Path) -> dict[str, str]:
    """Name -> file of the tensors in the index of a folder that is read by it; empty if there is none.

    Only the headers of the files say which tensors exist. Writers leave names in an index that are in no file, such as
    a tied output head's; whoever misses a tensor can say what the index claims.

    Raises:
        ValueError: It is damaged, or names something else than files of the folder.
    """
    if is_there(folder / FILE) or not is_there(folder / INDEX):
        return {}
    index = read_object(folder / INDEX, INDEX_BYTES, unique=True).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(file, str) for file in index.values()):
        raise ValueError(f"{folder / INDEX} is damaged: it has no weight_map from tensors to files")
    odd = next((name for name in index if not is_printable_name(name)), None)
    if odd is not None:
        raise ValueError(f"{folder / INDEX} names a tensor {odd[:200]!r}")
    for name in sorted(set(index.values())):
        if Path(name).name != name or name == ".." or not is_printable_name(name):
            raise ValueError(f"{folder / INDEX} names {name[:200]!r}, which is not a file of this folder")
    return index


def _files(folder: Path) -> list[Path]:
    """The safetensors files of a folder. With an index: the files that it names and that exist."""
    if is_there(folder / FILE):
        return [_plain_file(folder / FILE)]
    if index := read_index(folder):
        return [_plain_file(folder / name) for name in sorted(set(index.values())) if is_there(folder / name)]
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return [_plain_file(found[0])]
    if found:
        raise FileNotFoundError(f"{folder} has {len(found)} safetensors files but no {INDEX} that says which belong")
    raise FileNotFoundError(_why_none(folder))


def is_printable_name(name: str) -> bool:
    """Whether a name from a file may appear in a message: 1 to 200 characters, all printable."""
    return 0 < len(name) <= 200 and name.isprintable()


def _plain_file(path: Path) -> Path:
    """`path`, which may be a link. Raises ValueError if it is not a file, FileNotFoundError for a link to nothing."""
    if not is_there(path) or not path.is_file():
        raise ValueError(f"{path} is not a file{' but a folder' if path.is_dir() else ''}")
    return path


def file_to_copy(folder: Path, name: str) -> Path:
    """`folder / name`, checked for copying it elsewhere.

    A link may point into the folder or, in the cache of huggingface_hub (models--x/snapshots/y), to the cache's blobs.
    Other links are refused: a folder made by strangers must not make copies of files elsewhere. Links are followed when
    weights are read: that gives strangers nothing, and people keep big files on other disks.

    Raises:
        ValueError: It is not a plain file, or a link to a file elsewhere.
    """
    path = _plain_file(folder / name)
    real, home = path.resolve(), folder.resolve()
    homes = [home, (home.parent.parent / "blobs").resolve()] if home.parent.name == "snapshots" else [home]
    if not any(real.is_relative_to(place) for place in homes):
        raise ValueError(f"{path} is a link to {real}, outside of the folder: put the file itself there")
    return path


def _why_none(folder: Path) -> str:
    """An error message: why there are no safetensors, and what to do."""
    reason = "only pickled weights (.bin, .pt, .pth), which can run code when opened and are not read"
    if any(folder.glob("consolidated.*.pth")):
        return (
            f"{folder} has {reason}; these are Meta's own: convert them once where torch is: python -m "
            f"transformers.models.llama.convert_llama_weights_to_hf --input_dir '{folder}' --output_dir "
            f"'{folder}-safetensors'"
        )
    if any(itertools.chain.from_iterable(folder.glob(f"*{ending}") for ending in (".bin", ".pt", ".pth"))):
        return (
            f'{folder} has {reason}; convert them once where torch is: python -c "from transformers import '
            f"AutoModelForCausalLM as M; M.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\""
        )
    return f"{folder} has no {FILE} and no {INDEX}"


def open_file(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file. Raises ValueError unless they cover its data without overlaps and gaps."""
    file = io.FileIO(path)
    size = path.stat().st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or not 2 <= length <= min(size - 8, HEADER_BYTES):
        raise ValueError(f"{path} is damaged: a file of {size:,} bytes cannot have a header of {length:,}")
    content = file.read(length)
    header = parse_object(content, f"{path} is damaged: its header", unique=True)
    if not content.startswith(b"{"):
        raise ValueError(f"{path} is damaged: its header does not start with a brace")
    header.pop("__metadata__", None)
    tensors, parts = {}, []
    for name, entry in header.items():
        try:
            if not is_printable_name(name):
                raise ValueError("has an invalid name")
            dtype, shape, begin, end = _checked_entry(entry, size)
        except ValueError as error:
            raise ValueError(f"{path} is damaged: tensor {name[:100]!r} {error}") from error
        tensors[name] = StoredTensor(shape, dtype, file, 8 + length + begin)
        parts.append((begin, end, name))
    parts.sort()
    ends = [0, *(end for _, end, _ in parts)]
    for (begin, _, name), before in zip(parts, ends[:-1], strict=True):
        if begin != before:
            kind = "overlaps with another tensor" if begin < before else "comes after a gap"
            raise ValueError(f"{path} is damaged: tensor {name[:100]!r} {kind}")
    if ends[-1] != size - 8 - length:
        raise ValueError(
            f"{path} is damaged: its tensors end at byte {8 + length + ends[-1]:,}, the file at {size:,} "
            "(is it half a download?)"
        )
    return tensors


def _checked_entry(entry: Any, size: int) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape, begin and end of a tensor from its entry in the header of a file of `size` bytes; checked."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError("should have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"has the unknown dtype {str(dtype)[:40]!r}")
    for what, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or any(type(n) is not int or not 0 <= n < 2**63 for n in numbers):
            raise ValueError(f"has a {what} that is not a list of whole numbers")
    if len(shape) > 32 or len(offsets) != 2:
        raise ValueError("has more dimensions than 32, or not two offsets")
    begin, end = offsets
    if math.prod(shape) * BITS[dtype] != (end - begin) * 8:
        raise ValueError(f"has {end - begin:,} bytes, which is not {dtype} {tuple(shape)}")
    if end > size:
        raise ValueError(f"ends at byte {end:,} of a file of {size:,}")
    return dtype, tuple(shape), begin, end


def write_tensors(path: Path, layout: dict[str, tuple[np.dtype, tuple[int, ...]]], data: Iterable[np.ndarray]) -> None:
    """Writes a safetensors file.

    Args:
        path: The file.
        layout: Name -> (dtype, shape) of every tensor.
        data: The tensors, in the order of `layout`; only one is in memory at a time if this is a generator.

    Raises:
        ValueError: A dtype is not in DTYPES or PART_DTYPES, or a tensor does not fit `layout`.
    """
    names = {np.dtype(kind): name for name, kind in (DTYPES | PART_DTYPES).items()}
    odd = sorted({str(dtype) for dtype, _ in layout.values() if dtype not in names})
    if odd:
        raise ValueError(f"tensors are stored as {', '.join(map(str, names))}, not as {', '.join(odd)}")
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers requires it
    at = 0
    for name, (dtype, shape) in layout.items():
        end = at + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": names[dtype], "shape": shape, "data_offsets": (at, end)}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (dtype, shape), tensor in zip(layout.values(), data, strict=True):
            if (tensor.dtype, tensor.shape) != (dtype, shape):
                raise ValueError(f"{path}: a tensor is {tensor.dtype} {tensor.shape}, not {dtype} {shape}")
            file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
