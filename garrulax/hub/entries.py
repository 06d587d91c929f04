"""What a model folder is written from."""

import dataclasses
from collections.abc import Callable

import numpy as np

from garrulax.core import spec


@dataclasses.dataclass(frozen=True)
class TensorPart:
    """A parameter, or one layer of it, and how to write it into the stored tensor that contains it.

    Attributes:
        spec: The parameter.
        dtype: Dtype of the stored tensor.
        write: Writes the parameter to its place in the stored tensor (the argument). Every process must call it, since
            it may gather a sharded array; a process that writes no files passes None.
    """

    spec: spec.ParamSpec
    dtype: np.dtype
    write: Callable[[np.ndarray | None], None]


@dataclasses.dataclass(frozen=True)
class WholeTensor:
    """A stored tensor that is no parameter, such as the codes of a quantised one.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
        make: Makes it. Every process must call it, as `TensorPart.write`.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]


#: Name -> the parts of each stored tensor, or the whole of it, in the order of writing.
Entries = dict[str, list[TensorPart] | WholeTensor]
