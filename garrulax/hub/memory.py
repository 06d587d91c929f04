"""The dtype in which a checkpoint is read if the caller names none: on CPUs float32 where memory allows."""

import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from jax.typing import DTypeLike

from garrulax.core import spec
from garrulax.hub.tensors import StoredTensor

SHARE = 0.8  # of the available memory that float32 parameters may take: caches and compiled programs need some too

_log = logging.getLogger(__name__)


def dtype_to_load(
    dtype: DTypeLike | None, specs: spec.Tree, tensors: Mapping[str, StoredTensor], *, on_mesh: bool
) -> DTypeLike | None:
    """The dtype for all parameters of a checkpoint; None keeps what is stored.

    On CPUs `forward` computes in the dtype of the parameters: in 16 bits it is less exact there, and slower. So on a
    CPU, without a mesh, they are read as float32 if that fits into the memory. The log says so.

    Args:
        dtype: What the caller asks for: a dtype, "stored", or None.
        specs: ParamSpecs of the parameters to read.
        tensors: The stored tensors by their names.
        on_mesh: Whether the parameters go to a mesh.
    """
    if dtype is not None:
        return None if isinstance(dtype, str) and dtype == "stored" else dtype
    leaves = jax.tree.leaves(specs, is_leaf=spec.is_spec)
    kinds = {tensors[name].dtype for s in leaves for name in s.names}
    if on_mesh or jax.default_backend() != "cpu" or not kinds & {"BF16", "F16"} or not kinds <= {"BF16", "F16", "F32"}:
        return None
    needed, available = 4 * sum(math.prod(s.shape) for s in leaves), available_memory()
    if available is not None and needed > SHARE * available:
        _log.warning(
            "the parameters stay in 16 bits: as float32 they would need %s of the %s that are free. Decoding on this "
            "CPU may be slower.", _gib(needed), _gib(available)
        )  # fmt: skip
        return None
    _log.warning(
        "16-bit parameters are read as float32 (%s), in which CPUs compute; dtype='stored' keeps them as they are",
        _gib(needed),
    )
    return np.float32


def available_memory() -> int | None:
    """Bytes that this process may still allocate without swapping: of the machine and of its control group.

    None if the system does not say (it is no Linux).
    """
    found = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text() for name in ("max", "current"))
        found.append(int(limit) - int(used))
    except (OSError, ValueError):  # another system, or a control group without a limit ("max")
        pass
    return min(found) if found else _physical_memory()


def _physical_memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**29 else f"{size / 2**20:.0f} MiB"
