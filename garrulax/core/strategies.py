"""Parallel strategies: short rule tables that say which mesh axes shard the parameters and the activations.

A family names the logical axes of its parameters (`ParamSpec.axes`). A strategy maps them to mesh axes, and says which
mesh axes split the tokens of a text between the layers. Nothing else about activations is written down: their shardings
follow from those of the tokens and the weights (`core.einsum`). A mesh axis that a mesh does not have is left out, so
that one table serves many meshes.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

Rules = dict[str, str | tuple[str, ...] | None]

#: From the outermost to the innermost: devices along the last axis are closest, and `tensor` communicates most often.
MESH_AXES = ("pipeline", "data", "fsdp", "sequence", "tensor")
#: Names that are kept for later.
RESERVED_AXES = {"expert": "it is reserved for mixtures of experts, and no family has experts yet"}
BATCH_AXES = ("data", "fsdp")  # the mesh axes that split the examples of a batch
SEQUENCE_AXIS = "sequence"  # the mesh axis that splits the tokens of a text, in attention too (`kernels.sequence`)
TENSOR_AXIS = "tensor"  # the mesh axis that splits heads, feed-forward width and vocabulary
PIPELINE_AXIS = "pipeline"  # the mesh axis that splits the stack of layers


@dataclasses.dataclass(frozen=True)
class Strategy:
    """How parameters and activations are sharded.

    Attributes:
        name: Of the strategy.
        rules: From logical axes of parameters to the mesh axes that shard them, in the order of major to minor.
        tokens: Mesh axes that split the tokens of a text between the layers.
        needs: Mesh axes without which the strategy is not what its name says.
    """

    name: str
    rules: Rules
    tokens: tuple[str, ...] = (SEQUENCE_AXIS,)
    needs: tuple[str, ...] = ()

    @property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes that the strategy uses."""
        used = {*BATCH_AXES, *self.tokens}
        for entry in self.rules.values():
            used |= {entry} if isinstance(entry, str) else set(entry or ())
        return tuple(name for name in MESH_AXES if name in used)


_WHOLE: Rules = dict.fromkeys(("embed", "heads", "kv_heads", "mlp", "position", "head"))
#: Stages share the vocabulary: each computes its part of the logits, where all would compute the same ones.
_LAYERS: Rules = {**_WHOLE, "layers": PIPELINE_AXIS, "vocab": PIPELINE_AXIS}
_TENSOR: Rules = {
    **dict.fromkeys(("heads", "kv_heads", "mlp"), TENSOR_AXIS),
    "vocab": (TENSOR_AXIS, PIPELINE_AXIS),
}
_EVERY: Rules = {"embed": BATCH_AXES}
_GROUP: Rules = {"embed": "fsdp"}

#: ddp copies the parameters to every device; fsdp splits their width over all devices that share a batch, and gathers a
#: layer when it is used; hsdp splits it over `fsdp` and copies it along `data`; tp splits heads, feed-forward width and
#: vocabulary; sp (sequence parallelism) splits the tokens between the blocks over `tensor`, and with them the norms.
STRATEGIES: dict[str, Strategy] = {
    s.name: s
    for s in (
        Strategy("ddp", _LAYERS),
        Strategy("fsdp", _LAYERS | _EVERY),
        Strategy("tp", _LAYERS | _TENSOR, needs=(TENSOR_AXIS,)),
        Strategy("fsdp+tp", _LAYERS | _EVERY | _TENSOR),
        Strategy("fsdp+tp+sp", _LAYERS | _EVERY | _TENSOR, (TENSOR_AXIS,), needs=(TENSOR_AXIS,)),
        Strategy("hsdp", _LAYERS | _GROUP | _TENSOR, needs=BATCH_AXES),
    )
}


def strategy_of(strategy: str | Strategy) -> Strategy:
    """The strategy of that name; a `Strategy` is returned as it is.

    Raises:
        ValueError: There is no strategy of that name.
    """
    if isinstance(strategy, Strategy):
        return strategy
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown strategy {strategy!r}: choose from {', '.join(STRATEGIES)}")
    return STRATEGIES[strategy]


def check_strategy(strategy: str | Strategy, sizes: Mapping[str, Any]) -> None:
    """Checks that a strategy and a mesh fit together.

    Args:
        strategy: A name in `STRATEGIES`, or a strategy.
        sizes: Size of each mesh axis by name (`mesh.shape`).

    Raises:
        ValueError: The mesh lacks an axis that the strategy needs, or has one that the strategy does not use.
    """
    strategy = strategy_of(strategy)
    for name in strategy.needs:
        if name not in sizes:
            raise ValueError(f"strategy {strategy.name} needs the mesh axis {name}: the mesh has {', '.join(sizes)}")
    for name, size in sizes.items():
        if size > 1 and name not in strategy.axes:
            raise ValueError(
                f"strategy {strategy.name} does not use the mesh axis {name}={size}, whose devices would repeat one "
                f"another's work: use {', '.join(strategy.axes)}, or another strategy"
            )
