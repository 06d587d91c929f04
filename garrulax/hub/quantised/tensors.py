"""Quantised matrices of a folder as stored tensors, under the names that their plain weights would have."""

import dataclasses
import functools
import json
import threading
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from garrulax.core.coded import Coded
from garrulax.hub import streaming
from garrulax.hub.quantised.formats import check_scales
from garrulax.hub.quantised.schemes import Scheme
from garrulax.hub.tensors import DTYPES, PART_DTYPES, Rows, StoredTensor, read_buffers

_RAW: dict[str, Any] = {**DTYPES, **PART_DTYPES, "F8_E4M3": np.uint8, "F8_E8M0": np.uint8}
_lock = threading.Lock()


def raw_array(tensor: StoredTensor, name: str) -> np.ndarray:
    """A tensor as it is stored; float8 as its bits. Raises ValueError for a dtype that no format has."""
    if tensor.dtype not in _RAW:
        raise ValueError(f"{name} is {tensor.dtype}, which no format of quantised weights has")
    array = streaming.empty(tensor.shape, np.dtype(_RAW[tensor.dtype]))  # JAX on CPUs takes it without a copy
    octets = array.reshape(-1).view(np.uint8)
    read_buffers(tensor.file, tensor.start, 0, [octets], len(octets))
    return array


@dataclasses.dataclass(frozen=True, eq=False)
class QuantisedTensor(StoredTensor):
    """A quantised matrix [outputs, inputs]; `read` gives its numbers in float32.

    Attributes:
        name: Of the linear layer, for messages.
        parts: The stored tensors that it is made of, by the end of their name.
        scheme: How it was quantised.
    """

    name: str
    parts: Mapping[str, StoredTensor]
    scheme: Scheme

    @property
    def quantised(self) -> bool:
        """True."""
        return True

    def coded(self) -> Coded:
        """The codes. Raises ValueError if the tensors do not fit each other or a scale is unusable."""
        arrays = {end: raw_array(tensor, f"{self.name}.{end}") for end, tensor in self.parts.items()}
        found = self.scheme.read(arrays, self.name, self.scheme.settings)
        if found.codes.shape != self.shape:
            raise ValueError(f"{self.name} has codes for {found.codes.shape}, not {self.shape}")
        return check_scales(found, self.name, self.scheme.zero_scales)

    def read(self, first: int, step: int, rows: Rows) -> None:
        """As `StoredTensor.read`."""
        with _lock:  # several threads read one tensor after another
            numbers = _numbers(self)
        count = rows.array.shape[1] // numbers.itemsize
        for i, row in enumerate(rows.array):
            row[...] = numbers[first + i * step : first + i * step + count].view(np.uint8)


@functools.lru_cache(maxsize=2)
def _numbers(tensor: QuantisedTensor) -> np.ndarray:
    return tensor.coded().numbers().reshape(-1)


def quantised_tensors(
    found: Mapping[str, StoredTensor], scheme: Scheme, known: Collection[str]
) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint, in which the parts of each quantised matrix are one tensor `{name}.weight`.

    Args:
        found: The stored tensors by name.
        scheme: How the checkpoint was quantised.
        known: Names of the tensors that the model has, without which a bias of zeros is left out.

    Raises:
        ValueError: A part is missing.
    """
    tensors = dict(found)
    modules = [name[: -len(scheme.marker) - 1] for name in found if name.endswith(f".{scheme.marker}")]
    if not modules:
        raise ValueError(
            f"config.json says that the weights are quantised ({scheme.name}), but no tensor ends in .{scheme.marker}"
        )
    for module in modules:
        parts = {}
        for end in scheme.ends:
            tensor = tensors.pop(f"{module}.{end}", None)
            if tensor is not None:
                parts[end] = tensor
        for end in [end for end in tensors if end.startswith(f"{module}.weight.quant_state.")]:
            parts[end[len(module) + 1 :]] = tensors.pop(end)
        missing = [end for end in scheme.needed if end not in parts]
        if missing:
            raise ValueError(f"{module}, which is quantised ({scheme.name}), lacks {', '.join(missing)}")
        for end in scheme.dropped:
            tensors.pop(f"{module}.{end}", None)
        marker = parts[scheme.marker]
        shape = _shape(parts, module, scheme)
        tensors[f"{module}.weight"] = QuantisedTensor(shape, "F32", marker.file, marker.start, module, parts, scheme)
        name = f"{module}.bias"  # tools write one for every linear layer
        unknown = name in tensors and not any(name.endswith(n) or n.endswith(name) for n in known)
        if unknown and not raw_array(tensors[name], name).any():
            del tensors[name]
    return tensors


def _shape(parts: Mapping[str, StoredTensor], module: str, scheme: Scheme) -> tuple[int, int]:
    """[outputs, inputs] of a quantised matrix, from headers and small tensors."""
    marker = parts[scheme.marker].shape
    if "weight_shape" in parts:
        outputs, inputs = (int(n) for n in raw_array(parts["weight_shape"], f"{module}.weight_shape"))
        return outputs, inputs
    state = next((end for end in parts if end.startswith("weight.quant_state.")), None)
    if state is not None:
        outputs, inputs = json.loads(raw_array(parts[state], f"{module}.{state}").tobytes())["shape"]
        return int(outputs), int(inputs)
    main = parts[scheme.main].shape
    if len(main) != 2:
        raise ValueError(f"{module}.{scheme.main} is {main}: a quantised matrix has two dimensions")
    return scheme.shape(main, marker)
