"""Memory and time of a step by arithmetic on shapes, to choose what is worth compiling. Rough: within a third or so."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from garrulax import models
from garrulax.core.config import ModelConfig
from garrulax.core.sharding import shardings
from garrulax.core.spec import map_specs
from garrulax.core.strategies import strategy_of
from garrulax.planning.program import bandwidth
from garrulax.planning.topology import Topology
from garrulax.train import muon
from garrulax.train.activations import saved_per_token
from garrulax.train.flops import train_flops_per_token
from garrulax.train.settings import Settings

#: Share of the peak that products reach, with what is fused with them.
EFFICIENCY = 0.75
#: Numbers in a row of a TPU's registers. Where a chip holds a narrower slice of the width, the compiler gathers by
#: summing over zeros, which sends twice as much and runs beside nothing (seen with LLaMA-2-70B on v5p:8x8x8).
LANES = 128
#: Bytes of an optimizer's state a parameter, in float32.
_OPTIMIZER = {"adamw": 8.0, "lion": 4.0, "muon": 4.0, "adafactor": 0.1}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of one step on one chip.

    Attributes:
        memory: Bytes.
        compute: Seconds of products.
        gathers: Seconds of gathering weights and of summing gradients that can run beside products.
        sums: Seconds of other collectives, such as summing activations over `tensor`, for which products wait.
        optimizer: Seconds of the optimizer.
    """

    memory: float
    compute: float
    gathers: float
    sums: float
    optimizer: float

    @property
    def seconds(self) -> float:
        """Of the step."""
        return max(self.compute, self.gathers) + self.sums + self.optimizer


def estimate(config: ModelConfig, settings: Settings, topology: Topology, mesh: Mesh) -> Estimate:
    """The estimate for a run on a mesh.

    Args:
        config: Of the model.
        settings: Of the run.
        topology: The chips.
        mesh: Over them.
    """
    sizes, strategy = dict(mesh.shape), strategy_of(settings.strategy)
    data, fsdp, tensor, sequence = (sizes.get(name, 1) for name in ("data", "fsdp", "tensor", "sequence"))
    itemsize = jnp.dtype(settings.precision).itemsize
    tokens = settings.batch * settings.window / (data * fsdp * sequence)  # of a chip and those that share its tokens
    now = tokens / settings.accumulation
    all_of = models.count(config)
    own = _own(config, settings, mesh)
    layer = all_of / config.layers / tensor
    state = own * (jnp.dtype(settings.weights).itemsize + _OPTIMIZER[settings.optimizer])
    weights = own * 2 * itemsize + 4 * layer * itemsize  # a copy and gradients; layers that are gathered
    inputs = config.layers * config.width  # of the layers: every chip of `tensor` has them, unless tokens are split too
    inner = saved_per_token(config, settings.remat) - inputs
    kept = now * itemsize * (inner / tensor + inputs / (tensor if "tensor" in strategy.tokens else 1))
    logits = now * config.vocab / tensor * (4 + 2 * itemsize)
    flops = settings.batch * settings.window * train_flops_per_token(config, settings.window)
    again = {"none": 1.0, "dots": 1.0, "full": 4 / 3}[settings.remat]
    compute = flops * again / topology.chips / (topology.chip.peak * EFFICIENCY)
    split = strategy.rules["embed"]
    along = tuple(a for a in ((split,) if isinstance(split, str) else split or ()) if sizes.get(a, 1) > 1)
    gathers = settings.accumulation * 3 * all_of / tensor * itemsize / bandwidth(topology, mesh, along) if along else 0
    thin = topology.chip.platform == "tpu" and config.width < LANES * math.prod(sizes[a] for a in along)
    rest = tuple(a for a in ("data", "fsdp", "sequence") if sizes.get(a, 1) > 1 and a not in along)
    copied = all_of / tensor / math.prod(sizes[a] for a in along)
    gathers += 2 * copied * itemsize / bandwidth(topology, mesh, rest) if rest else 0
    passes = 4 if settings.remat != "full" else 6
    moved = passes * 2 * tokens * config.width * itemsize * config.layers
    sums = moved / bandwidth(topology, mesh, ("tensor",)) if tensor > 1 else 0.0
    if thin:
        gathers, sums = 0.0, sums + 2 * gathers
    traffic = 2 * state + own * 4  # read and written, and gradients
    optimizer = traffic / topology.chip.bandwidth
    if products := optimizer_flops(config, settings, mesh):
        exchange = 2 * own * itemsize / bandwidth(topology, mesh, mesh.axis_names)
        optimizer += products / (topology.chip.peak * EFFICIENCY) + exchange
    return Estimate(state + weights + kept + logits, compute, gathers, sums, optimizer)


def optimizer_flops(config: ModelConfig, settings: Settings, mesh: Mesh) -> int:
    """FLOPs of the products with which one chip updates its parameters: those of Muon; other optimizers have none."""
    if settings.optimizer != "muon":
        return 0
    specs = models.parameters(config)
    return muon.flops_a_device(specs, shardings(specs, mesh, settings.strategy))


def _own(config: ModelConfig, settings: Settings, mesh: Mesh) -> int:
    """Parameters that one chip holds."""
    specs = models.parameters(config)
    places = shardings(specs, mesh, settings.strategy)
    counts: Any = map_specs(lambda s, place: math.prod(place.shard_shape(s.shape)), specs, places)
    return sum(jax.tree.leaves(counts))
