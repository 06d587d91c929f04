"""Topologies that are not there: chips and how they are connected, and meshes over them to compile for."""

import dataclasses
import importlib.util
import math
import os
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh

from garrulax.core.sharding import check_axes
from garrulax.core.strategies import MESH_AXES, TENSOR_AXIS, Strategy
from garrulax.planning.chips import Chip, chip_named

HOST = 8  # GPUs that NVLink connects
_TARGETS = Path(__file__).parent / "targets"


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips and how they are connected.

    Attributes:
        chip: Each of them.
        shape: Of the torus; of GPUs, (hosts, GPUs a host).
    """

    chip: Chip
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        """Number of chips."""
        return math.prod(self.shape)

    @property
    def name(self) -> str:
        """As `read_topology` reads it."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"


def read_topology(text: str) -> Topology:
    """The topology of a text such as v5p:4x4x4, v5e:16x16 or h100:2x8 (hosts x GPUs a host; h100:8 is one host).

    Raises:
        ValueError: The chip is unknown, or the shape is not one of its.

    Example:
        >>> from garrulax.planning.topology import read_topology
        >>> read_topology("v5p:4x4x4").chips
        64
    """
    name, _, sizes = text.partition(":")
    chip = chip_named(name)
    example = {3: "4x4x4", 2: "16x16"}.get(len(chip.pod), "2x8")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes):
        raise ValueError(f"topology {text!r} is not like {name}:{example}")
    shape = tuple(map(int, sizes.split("x")))
    if chip.platform == "gpu":
        shape = (1, *shape) if len(shape) == 1 else shape
        if len(shape) != 2 or shape[1] > HOST:
            raise ValueError(f"topology {text!r} is not like {name}:{example}: hosts x at most {HOST} GPUs")
        return Topology(chip, shape)
    if len(shape) != len(chip.pod):
        raise ValueError(f"topology {text!r}: {name} has {len(chip.pod)} dimensions, such as {name}:{example}")
    if any(size > most for size, most in zip(sorted(shape), sorted(chip.pod), strict=True)):
        raise ValueError(f"topology {text!r} is larger than a pod, {name}:{'x'.join(map(str, chip.pod))}")
    if shape[0] % 2 or shape[1] % 2:
        raise ValueError(f"topology {text!r}: a host has 2 x 2 chips, so the first two dimensions must be even")
    return Topology(chip, shape)


def mesh_over(topology: Topology, sizes: dict[str, int]) -> Mesh:
    """A mesh in Explicit mode over devices that can be compiled for, but not run on.

    Args:
        topology: The chips.
        sizes: Size of each mesh axis.

    Raises:
        ValueError: An axis is unknown, or the mesh is not as large as the topology.
        ImportError: The compiler for these chips is not installed.
    """
    check_sizes(topology, sizes)
    names = tuple(name for name in MESH_AXES if name in sizes)
    shape = tuple(sizes[name] for name in names)
    devices = _devices(topology)
    if topology.chip.platform == "gpu":
        placed = np.array(devices).reshape(shape)  # the last axes are within a host
    else:
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(placed, names, axis_types=(AxisType.Explicit,) * len(names))


def check_sizes(topology: Topology, sizes: dict[str, int]) -> None:
    """Raises ValueError for an unknown axis, a size below 1, or a mesh that is not as large as the topology."""
    check_axes(sizes)
    count = math.prod(sizes.values())
    if count != topology.chips:
        shape = ",".join(f"{k}={v}" for k, v in sizes.items())
        raise ValueError(f"mesh {shape} has {count} devices, but {topology.name} has {topology.chips} chips")


def default_mesh(strategy: Strategy, topology: Topology) -> dict[str, int]:
    """A mesh for a strategy: `tensor` is the shortest side of a torus or a host of GPUs, hsdp's `data` the longest.

    Args:
        strategy: What the mesh is for.
        topology: The chips.
    """
    sides = sorted(n for n in topology.shape if n > 1) or [1]
    chips = topology.chips
    if strategy.name == "ddp":
        return {"data": chips}
    if strategy.name == "fsdp":
        return {"fsdp": chips}
    if strategy.name == "hsdp":
        return {"data": sides[-1], "fsdp": chips // sides[-1]}
    tensor = topology.shape[-1] if topology.chip.platform == "gpu" else sides[0]
    return {"data" if strategy.name == "tp" else "fsdp": chips // tensor, TENSOR_AXIS: tensor}


def _devices(topology: Topology) -> list[Any]:
    if topology.chip.platform == "gpu":
        return _gpu_devices(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError("a plan for TPUs needs their compiler, libtpu: pip install 'jax[tpu]'")
    if jax.default_backend() != "tpu":
        quiet_compiler()
    options = {"chip_config_name": "megacore"} if topology.chip.name == "v4" else {}  # else a device is half a chip
    return _described("tpu", topology.name, options)


def _gpu_devices(topology: Topology) -> list[Any]:
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        raise ImportError("a plan for GPUs needs XLA's compiler for them: pip install 'jax[cuda13]'")
    target = (_TARGETS / f"{topology.chip.name}.txtpb").read_text()
    hosts, gpus = topology.shape
    return _described("cuda", "", {"target_config": target, "topology": f"1x{hosts}x{gpus}"})


def _described(platform: str, name: str, options: dict[str, Any]) -> list[Any]:
    try:
        return list(topologies.get_topology_desc(name, platform, **options).devices)
    except jax.errors.JaxRuntimeError as error:
        first = str(error).splitlines()[0]
        if not first.startswith(("INVALID_ARGUMENT", "NOT_FOUND")):
            raise
        raise ValueError(f"the compiler does not know the topology {name or options['topology']}: {first}") from error


def quiet_compiler() -> None:
    """Sets what libtpu reads from the environment where there is no TPU.

    Without it libtpu asks the network where it is, and two compilations cannot run side by side.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
