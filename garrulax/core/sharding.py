"""Meshes of named axes, the shardings of parameters by a strategy, and a report of what stays whole.

The same program runs on one device, on fake CPU devices, on several processes, and on a pod.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from garrulax.core import spec as specs_
from garrulax.core.leaf import Leaf
from garrulax.core.strategies import BATCH_AXES, MESH_AXES, RESERVED_AXES, Strategy, strategy_of

Entry = str | tuple[str, ...] | None  # of a PartitionSpec

_log = logging.getLogger(__name__)


def make_mesh(axes: str | dict[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh in Explicit mode.

    Args:
        axes: Size of each axis, as `"fsdp=4,tensor=2"` or `{"fsdp": 4, "tensor": 2}`; the axes are
            `core.strategies.MESH_AXES`, whose order decides which devices are neighbours.
        devices: To use; None is all devices of this run. Those of a topology make a mesh to compile for.

    Raises:
        ValueError: An axis is unknown or reserved, a size is below 1, or their product is not the number of devices.

    Example:
        >>> import jax, garrulax as gx
        >>> mesh = gx.make_mesh({"data": jax.device_count()})
        >>> mesh.axis_names
        ('data',)
    """
    sizes = mesh_sizes(axes) if isinstance(axes, str) else dict(axes)
    check_axes(sizes)
    wanted, found = math.prod(sizes.values()), jax.device_count() if devices is None else len(devices)
    if wanted != found:
        shape = " x ".join(f"{k}={v}" for k, v in sizes.items())
        raise ValueError(f"mesh {shape} needs {wanted} devices, but there are {found}")
    names = tuple(name for name in MESH_AXES if name in sizes)
    shape_ = tuple(sizes[n] for n in names)
    return jax.make_mesh(shape_, names, axis_types=(AxisType.Explicit,) * len(names), devices=devices)


def check_axes(sizes: Mapping[str, int]) -> None:
    """Raises ValueError for a mesh axis that is reserved or unknown, and for a size below 1."""
    for name, size in sizes.items():
        if name in RESERVED_AXES:
            raise ValueError(f"mesh axis {name} cannot be used: {RESERVED_AXES[name]}")
        if name not in MESH_AXES:
            raise ValueError(f"unknown mesh axis {name!r}: the axes are {', '.join(MESH_AXES)}")
        if size < 1:
            raise ValueError(f"mesh axis {name} has size {size}: it must be at least 1")


def mesh_sizes(text: str) -> dict[str, int]:
    """The size of each axis in a text such as fsdp=4,tensor=2. Raises ValueError for a text of another form."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, equals, size = part.partition("=")
        if not equals or not size.strip().isdigit():
            raise ValueError(f"mesh {text!r} is not like fsdp=4,tensor=2")
        if name.strip() in sizes:
            raise ValueError(f"mesh {text!r} names {name.strip()} twice")
        sizes[name.strip()] = int(size)
    return sizes


def shardings(
    specs: specs_.Tree, mesh: Mesh, strategy: str | Strategy = "fsdp+tp", *, strict: bool = False
) -> specs_.Tree:
    """NamedSharding of every parameter of a ParamSpec tree.

    A dimension that the mesh does not divide stays whole on every device, and the log says so once.

    Args:
        specs: The ParamSpec tree.
        mesh: The mesh; mesh axes of the rules that it does not have are left out.
        strategy: A name in `core.strategies.STRATEGIES`, or a strategy of your own.
        strict: Whether to refuse what stays whole against the strategy, see `unsharded`.

    Raises:
        ValueError: A logical axis has no rule, `strict` refuses an array, or `pipeline` does not divide the layers.
    """
    strategy = strategy_of(strategy)
    refused = [u for u in unsharded(specs, mesh, strategy) if u.refused]
    if strict and refused:
        raise ValueError(f"strategy {strategy.name} (strict) leaves arrays whole: {'; '.join(map(str, refused[:8]))}")
    if stages := [u for u in refused if u.axis == "layers"]:
        raise ValueError(f"a pipeline needs as many layers in every stage: {stages[0]}")
    for u in refused:
        if u.size:
            _warn_once(f"strategy {strategy.name}: {u}")
    return specs_.map_specs(lambda s: NamedSharding(mesh, P(*_entries(s, mesh, strategy))), specs)


def place(
    params: specs_.Tree, specs: specs_.Tree, mesh: Mesh, strategy: str | Strategy = "fsdp+tp", strict: bool = False
) -> specs_.Tree:
    """Parameters on a mesh; a weight that is a `core.leaf.Leaf` says how its arrays are sharded.

    Args:
        params: Parameters with stacked layers.
        specs: Their ParamSpec tree.
        mesh: As in `shardings`.
        strategy: As in `shardings`.
        strict: As in `shardings`.

    Raises:
        ValueError: As `shardings` does, and if a leaf cannot be sharded so.
    """

    def one(_: specs_.ParamSpec, where: NamedSharding, w: Any) -> Any:
        return jax.device_put(w, w.shardings(where) if isinstance(w, Leaf) else where)

    return specs_.map_specs(one, specs, shardings(specs, mesh, strategy, strict=strict), params)


@functools.cache
def _warn_once(message: str) -> None:
    if jax.process_index() == 0:  # all processes would say the same
        _log.warning(message)


@dataclasses.dataclass(frozen=True)
class Unsharded:
    """A parameter that the devices of a mesh hold whole, or one of its dimensions.

    Attributes:
        name: Path in the tree of parameters, such as `blocks/attention/query`.
        shape: Of the parameter.
        axis: Logical axis of the dimension that the mesh does not divide; "" where no rule shards the array.
        size: Of that dimension; 0 where no rule shards the array.
        ways: Into how many parts the rules would split the dimension.
        by: The mesh axes of these parts.
        refused: Whether `strict` refuses it: a dimension that does not divide, and a matrix or embedding that no rule
            shards under a strategy that shards others. Norms and biases are small, and are never refused.
    """

    name: str
    shape: tuple[int, ...]
    axis: str = ""
    size: int = 0
    ways: int = 1
    by: tuple[str, ...] = ()
    refused: bool = True

    def __str__(self) -> str:
        if self.size:
            return f"{self.name}: {self.axis}={self.size} cannot be split {self.ways} ways over {'+'.join(self.by)}"
        return f"{self.name} {list(self.shape)}: no rule shards it"


def unsharded(specs: specs_.Tree, mesh: Mesh, strategy: str | Strategy = "fsdp+tp") -> list[Unsharded]:
    """Lists what every device holds whole: dimensions that the mesh does not divide, arrays that no rule shards.

    A strategy that shards nothing on this mesh, such as ddp, leaves everything whole on purpose: the list is empty.

    Args:
        specs: ParamSpec tree of the parameters.
        mesh: The mesh.
        strategy: A name in `core.strategies.STRATEGIES`, or a strategy.

    Raises:
        ValueError: A logical axis has no rule.
    """
    strategy, found, shards = strategy_of(strategy), [], False
    for name, s in specs_.named_specs(specs).items():
        undivided = [
            Unsharded(name, s.shape, axis or "", size, ways, names)
            for axis, size in zip(s.axes, s.shape, strict=True)
            for names, ways in [_wanted(s, axis, mesh, strategy)]
            if size % ways
        ]
        whole = not any(_entries(s, mesh, strategy))
        shards |= not whole or bool(undivided)
        found += undivided
        if whole and not undivided:
            found.append(Unsharded(name, s.shape, refused=s.role != "vector"))
    return found if shards else []


def sharding_report(specs: specs_.Tree, mesh: Mesh, strategy: str | Strategy = "fsdp+tp") -> list[str]:
    """Lines that say how much of the parameters each device holds, and by name what stays whole.

    Args:
        specs: ParamSpec tree of the parameters.
        mesh: The mesh.
        strategy: A name in `core.strategies.STRATEGIES`, or a strategy.

    Returns:
        One line for the whole, and one for each array or dimension that stays whole; norms and biases share one.
    """
    strategy = strategy_of(strategy)
    named = specs_.named_specs(specs)
    total = sum(math.prod(s.shape) for s in named.values())
    own = sum(math.prod(s.shape) // _parts(_entries(s, mesh, strategy), mesh) for s in named.values())
    shape = ",".join(f"{name}={size}" for name, size in mesh.shape.items())
    lines = [f"strategy {strategy.name} on {shape}: a device holds {own:,} of {total:,} parameters"]
    found = unsharded(specs, mesh, strategy)
    lines += [f"  not split: {u}" for u in found if u.refused]
    small = [u for u in found if not u.refused]
    if small:
        lines.append(f"  not split: {len(small)} norms and biases, {sum(math.prod(u.shape) for u in small):,} numbers")
    return lines


def _wanted(s: specs_.ParamSpec, axis: str | None, mesh: Mesh, strategy: Strategy) -> tuple[tuple[str, ...], int]:
    """The mesh axes by which the rules split a logical axis, and into how many parts."""
    if axis is None:
        return (), 1
    if axis not in strategy.rules:
        raise ValueError(f"{s.name}: no sharding rule for logical axis {axis!r}")
    names = tuple(a for a in axis_names(strategy.rules[axis]) if a in mesh.shape)
    return names, math.prod(mesh.shape[a] for a in names)


def _entries(s: specs_.ParamSpec, mesh: Mesh, strategy: Strategy) -> list[Entry]:
    """The PartitionSpec of a parameter."""
    entries: list[Entry] = []
    for axis, size in zip(s.axes, s.shape, strict=True):
        names, ways = _wanted(s, axis, mesh, strategy)
        entries.append(_entry(names) if size % ways == 0 else None)
    return entries


def _parts(entries: Iterable[Entry], mesh: Mesh) -> int:
    return math.prod(mesh.shape[name] for entry in entries for name in axis_names(entry))


def _entry(names: tuple[str, ...]) -> Entry:
    return names[0] if len(names) == 1 else names or None


def batch_sharding(mesh: Mesh) -> P:
    """PartitionSpec of the leading axis of a batch: the axes `data` and `fsdp` that the mesh has."""
    return P(tuple(a for a in BATCH_AXES if a in mesh.shape) or None)


def token_sharding(mesh: Mesh, strategy: str | Strategy = "fsdp+tp") -> P:
    """PartitionSpec of tokens [B, T]: B as in `batch_sharding`, T over the axes by which the strategy splits texts."""
    return P(*batch_sharding(mesh), _entry(tuple(a for a in strategy_of(strategy).tokens if a in mesh.shape)))


def is_explicit(mesh: AbstractMesh) -> bool:
    """Whether the types of arrays on this mesh say how they are sharded; within `shard_map`, over its other axes."""
    return not mesh.empty and bool(mesh.explicit_axes) and not mesh.auto_axes


def spec_of(x: jax.Array) -> tuple[Entry, ...]:
    """The PartitionSpec in the type of x, one entry per dimension: JAX leaves trailing None entries out."""
    spec = tuple(jax.typeof(x).sharding.spec)
    return spec + (None,) * (x.ndim - len(spec))


def axis_names(entry: Entry) -> tuple[str, ...]:
    """The mesh axes in one entry of a PartitionSpec."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)
