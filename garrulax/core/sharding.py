"""Meshes of named axes and short rule tables from logical axes to mesh axes.

A family names the logical axes of its parameters (`ParamSpec.axes`); a rule table says which mesh axes shard them. The
activations need no table: their shardings follow from those of the tokens and the weights (`core.einsum`). The same
program runs on one device, on fake CPU devices, on several processes, and on a pod.
"""

import math
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from garrulax.core import spec as specs_
from garrulax.core.leaf import Leaf

Rules = dict[str, str | tuple[str, ...] | None]

MESH_AXES = ("data", "fsdp", "tensor", "sequence")  # in this order: devices along the last axis are closest
BATCH_AXES = ("data", "fsdp")  # the mesh axes that shard the examples of a batch
SEQUENCE_AXIS = "sequence"  # the mesh axis that shards the tokens of a text (`kernels.sequence`)
#: Logical axes that are not sharded where the mesh does not divide them: published vocabularies are odd numbers
#: (50257), and key/value heads are few.
MAY_STAY_WHOLE = ("vocab", "kv_heads")

_REPLICATED: Rules = {"layers": None, "position": None, "head": None}
_EMBED = {"embed": "fsdp"}
_FEATURES = {"vocab": "tensor", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor"}
_WHOLE = {"embed": None, "vocab": None, "heads": None, "kv_heads": None, "mlp": None}

#: ddp copies the parameters to every device; fsdp shards their width and gathers a layer when it is used; tp shards
#: heads, feed-forward width and vocabulary and sums the halves of a product.
RULES: dict[str, Rules] = {
    "ddp": {**_REPLICATED, **_WHOLE},
    "fsdp": {**_REPLICATED, **_WHOLE, **_EMBED},
    "tp": {**_REPLICATED, **_WHOLE, **_FEATURES},
    "fsdp+tp": {**_REPLICATED, **_EMBED, **_FEATURES},
}


def make_mesh(axes: str | dict[str, int]) -> Mesh:
    """A mesh in Explicit mode.

    Args:
        axes: Size of each axis, as `"fsdp=4,tensor=2"` or `{"fsdp": 4, "tensor": 2}`; the axes are `MESH_AXES`.

    Raises:
        ValueError: An axis is unknown, a size is below 1, or their product is not the number of devices.

    Example:
        >>> import jax, garrulax as gx
        >>> mesh = gx.make_mesh({"data": jax.device_count()})
        >>> mesh.axis_names
        ('data',)
    """
    sizes = _parse(axes) if isinstance(axes, str) else dict(axes)
    for name, size in sizes.items():
        if name not in MESH_AXES:
            raise ValueError(f"unknown mesh axis {name!r}: the axes are {', '.join(MESH_AXES)}")
        if size < 1:
            raise ValueError(f"mesh axis {name} has size {size}: it must be at least 1")
    devices = jax.device_count()
    if math.prod(sizes.values()) != devices:
        shape = " x ".join(f"{k}={v}" for k, v in sizes.items())
        raise ValueError(f"mesh {shape} needs {math.prod(sizes.values())} devices, but there are {devices}")
    names = tuple(name for name in MESH_AXES if name in sizes)
    return jax.make_mesh(tuple(sizes[n] for n in names), names, axis_types=(AxisType.Explicit,) * len(names))


def _parse(text: str) -> dict[str, int]:
    sizes = {}
    for part in text.split(","):
        name, equals, size = part.partition("=")
        if not equals or not size.strip().isdigit():
            raise ValueError(f"mesh {text!r} is not like fsdp=4,tensor=2")
        if name.strip() in sizes:
            raise ValueError(f"mesh {text!r} names {name.strip()} twice")
        sizes[name.strip()] = int(size)
    return sizes


def shardings(specs: specs_.Tree, mesh: Mesh, rules: str | Rules = "fsdp+tp") -> specs_.Tree:
    """NamedSharding of every parameter of a ParamSpec tree.

    Args:
        specs: The ParamSpec tree.
        mesh: The mesh; mesh axes of the rules that it does not have are left out.
        rules: A name in `RULES`, or a table from logical axes to mesh axes.

    Raises:
        ValueError: A logical axis has no rule, or its mesh axes do not divide a dimension (those in `MAY_STAY_WHOLE`
            are not sharded then).
    """
    table = rules if isinstance(rules, dict) else _table(rules)

    def one(s: specs_.ParamSpec) -> NamedSharding:
        return NamedSharding(mesh, P(*(_axis(s, i, mesh, table) for i in range(len(s.axes)))))

    return specs_.map_specs(one, specs)


def place(params: specs_.Tree, specs: specs_.Tree, mesh: Mesh, rules: str | Rules = "fsdp+tp") -> specs_.Tree:
    """Parameters on a mesh; a weight that is a `core.leaf.Leaf` says how its arrays are sharded.

    Args:
        params: Parameters with stacked layers.
        specs: Their ParamSpec tree.
        mesh: As in `shardings`.
        rules: As in `shardings`.

    Raises:
        ValueError: As `shardings` does, and if a leaf cannot be sharded so.
    """

    def one(_: specs_.ParamSpec, where: NamedSharding, w: Any) -> Any:
        return jax.device_put(w, w.shardings(where) if isinstance(w, Leaf) else where)

    return specs_.map_specs(one, specs, shardings(specs, mesh, rules), params)


def _table(name: str) -> Rules:
    if name not in RULES:
        raise ValueError(f"unknown sharding rules {name!r}: choose from {', '.join(RULES)}")
    return RULES[name]


def _axis(s: specs_.ParamSpec, i: int, mesh: Mesh, table: Rules) -> str | tuple[str, ...] | None:
    logical = s.axes[i]
    if logical is None:
        return None
    if logical not in table:
        raise ValueError(f"{s.name}: no sharding rule for logical axis {logical!r}")
    wanted = table[logical]
    names = tuple(a for a in ((wanted,) if isinstance(wanted, str) else wanted or ()) if a in mesh.shape)
    ways = math.prod(mesh.shape[a] for a in names)
    if s.shape[i] % ways and logical in MAY_STAY_WHOLE:
        return None
    if s.shape[i] % ways:
        raise ValueError(f"{s.name}: {logical}={s.shape[i]} cannot be split {ways} ways over {'+'.join(names)}")
    return names[0] if len(names) == 1 else names or None


def batch_sharding(mesh: Mesh) -> P:
    """PartitionSpec of the leading axis of a batch: the axes `data` and `fsdp` that the mesh has."""
    names = tuple(a for a in BATCH_AXES if a in mesh.shape)
    return P(names if names else None)


def token_sharding(mesh: Mesh) -> P:
    """PartitionSpec of tokens [B, T]: B as in `batch_sharding`, T over `sequence` where the mesh has that axis."""
    return P(*batch_sharding(mesh), SEQUENCE_AXIS if SEQUENCE_AXIS in mesh.shape else None)


def spec_of(x: jax.Array) -> tuple[str | tuple[str, ...] | None, ...]:
    """The PartitionSpec in the type of x, one entry per dimension: JAX leaves trailing None entries out."""
    spec = tuple(jax.typeof(x).sharding.spec)
    return spec + (None,) * (x.ndim - len(spec))


def axis_names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes in one entry of a PartitionSpec."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)
