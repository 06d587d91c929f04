"""Sampling and scoring on a mesh: programs that XLA's partitioner splits.

Training states in the types of arrays how each is split (Explicit mode). Transforms of logits sort, gather and scatter,
and users write their own: in Explicit mode each of these operations would have to say how its result is split. So
sampling runs in Auto mode, where XLA's partitioner decides how arrays are split, and code fixes only what decides
memory and traffic: how keys and values, tokens and logits are split.
"""

import contextlib
import math
from collections.abc import Generator
from typing import Any, TypeVar

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from garrulax.core.sharding import Entry
from garrulax.core.strategies import BATCH_AXES, PIPELINE_AXIS, TENSOR_AXIS

T = TypeVar("T")
Piece = TypeVar("Piece")


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh of arrays on several devices, in Auto mode; None if all are on one device.

    Raises:
        ValueError: They are not on one mesh, or it has the axis `pipeline`.
    """
    places = [x.sharding for x in jax.tree.leaves(tree) if isinstance(x, jax.Array) and len(x.sharding.device_set) > 1]
    if not places:
        return None
    meshes = {place.mesh if isinstance(place, NamedSharding) else None for place in places}
    mesh = meshes.pop()
    if mesh is None or meshes:
        raise ValueError("the parameters are not on one mesh: load them with gx.load(path, mesh=gx.make_mesh(...))")
    if mesh.shape.get(PIPELINE_AXIS, 1) > 1:
        raise ValueError(
            "sampling and scoring do not run in stages: put the parameters on a mesh without the axis pipeline"
        )
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def in_auto_mode(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays with types of the mesh in Auto mode, in the memory in which they are.

    Args:
        tree: Arrays, split over the devices of the mesh or on one device; the latter are copied to all devices.
        mesh: From `mesh_of`; None changes nothing.
    """
    if mesh is None:
        return tree

    def one(x: jax.Array) -> jax.Array:
        spec = x.sharding.spec if len(x.sharding.device_set) > 1 else P()  # type: ignore[attr-defined]
        return jax.device_put(x, NamedSharding(mesh, spec))

    return jax.tree.map(one, tree)


def using(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """The context in which programs over these parameters run; without a mesh that of the caller."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def each_using(mesh: Mesh | None, pieces: Generator[Piece, None, T]) -> Generator[Piece, None, T]:
    """A generator whose every step runs with the mesh, which the caller does not see between two steps."""
    try:
        while True:
            with using(mesh):
                try:
                    piece = next(pieces)
                except StopIteration as end:
                    return end.value
            yield piece
    finally:
        with using(mesh):
            pieces.close()


def in_context() -> bool:
    """Whether the program that is traced runs on a mesh in Auto mode."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.are_all_axes_auto


def dividing(mesh: AbstractMesh, size: int, names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of some mesh axes that the mesh has, if together they divide a size; else none."""
    there = tuple(name for name in names if name in mesh.shape)
    return there if size % math.prod(mesh.shape[name] for name in there) == 0 else ()


def split(x: jax.Array, rows: int | None = None, heads: int | None = None) -> jax.Array:
    """x with its rows over `data` and `fsdp` and its heads over `tensor`, as far as they divide; the rest whole.

    Without a mesh in Auto mode, x itself.

    Args:
        x: Any array of a program.
        rows: The axis of rows, if there is one.
        heads: The axis of heads, if there is one.
    """
    if not in_context():
        return x
    mesh = jax.sharding.get_abstract_mesh()
    entries: list[Entry] = [None] * x.ndim
    for axis, names in ((rows, BATCH_AXES), (heads, (TENSOR_AXIS,))):
        if axis is not None:
            entries[axis] = dividing(mesh, x.shape[axis], names) or None
    return jax.lax.with_sharding_constraint(x, P(*entries))
