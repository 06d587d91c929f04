"""The training step of a run, lowered for chips that are not there. Nothing is allocated."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from garrulax import models
from garrulax.core.config import ModelConfig
from garrulax.core.sharding import token_sharding
from garrulax.planning.topology import Topology
from garrulax.train.guard import first_guard
from garrulax.train.objectives import OBJECTIVES, Batch, objective_name
from garrulax.train.optimizers import make_optimizer
from garrulax.train.settings import Settings
from garrulax.train.state import TrainState, abstract_state
from garrulax.train.step import make_train_step


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A step before it is compiled.

    Attributes:
        program: To compile.
        state: Shapes, dtypes and shardings of the run's state.
        batch: The same of a batch.
        seconds: That tracing and lowering took.
    """

    program: Any
    state: TrainState
    batch: Batch
    seconds: float


def lower_step(config: ModelConfig, settings: Settings, topology: Topology, mesh: Mesh) -> Lowered:
    """Lowers the step that `garrulax train` would run.

    Args:
        config: Of the model.
        settings: Of the run.
        topology: To compile for.
        mesh: Over its devices.
    """
    began = time.perf_counter()
    optimizer = make_optimizer(settings, models.parameters(config))
    objective = OBJECTIVES[objective_name(settings.objective, config)]
    step = make_train_step(config, settings, optimizer, objective)
    options: dict[str, Any] = {"strategy": settings.strategy, "strict": settings.strict, "dtype": settings.weights,
                               "average": settings.ema > 0, "guard": first_guard(settings)}  # fmt: skip
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        state = abstract_state(config, optimizer, mesh=mesh, **options)
        batch = abstract_batch(config, settings, mesh)
        platform = "cuda" if topology.chip.platform == "gpu" else topology.chip.platform
        jitted: Any = step
        program = jitted.trace(state, batch).lower(lowering_platforms=(platform,))
    return Lowered(program, state, batch, time.perf_counter() - began)


def abstract_batch(config: ModelConfig, settings: Settings, mesh: Mesh) -> Batch:
    """The shapes, dtypes and shardings of a batch of the run's objective."""
    rows, tokens = token_sharding(mesh, settings.strategy)
    shape = (settings.accumulation, settings.batch // settings.accumulation, settings.window)
    arrays: dict[str, tuple[tuple[int, ...], Any]] = {
        "tokens": (shape, jnp.int32), "targets": (shape, jnp.int32), "weights": (shape, jnp.float32)}  # fmt: skip
    objective = objective_name(settings.objective, config)
    if objective != "causal":
        arrays |= {"rank": (shape, jnp.int32), "segment": (shape, jnp.int32)}
    if objective == "infill":
        conventions = models.blanks(config)
        both = conventions is not None and conventions.rows == 2
        arrays["positions"] = ((*shape[:2], 2, shape[2]) if both else shape, jnp.int32)

    def abstract(size: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        inner = (None,) * (len(size) - 3)
        return jax.ShapeDtypeStruct(size, dtype, sharding=NamedSharding(mesh, jax.P(None, rows, *inner, tokens)))

    described: Any = {name: abstract(*array) for name, array in arrays.items()}
    return described


def bytes_a_device(tree: Any) -> int:
    """Bytes of a device's part of a tree of abstract arrays."""
    total = 0
    for x in jax.tree.leaves(tree):
        shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        size = 1
        for n in shape:
            size *= n
        itemsize = 8 if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x.dtype.itemsize
        total += size * itemsize
    return total
