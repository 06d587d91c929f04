"""The state of a run: all that a step changes and a checkpoint keeps."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, SingleDeviceSharding

from garrulax import models
from garrulax.core import sharding, spec


@struct.dataclass
class TrainState:
    """step: int32 scalar, updates made so far. params: the model's, the master copy in `dtype`. opt_state: optax's.
    key: PRNG key scalar of the run, folded with the step for dropout; it never changes.
    """

    step: Any
    params: spec.Tree
    opt_state: Any
    key: Any


def init_state(
    config: Any,
    optimizer: optax.GradientTransformation,
    seed: int,
    *,
    mesh: Mesh | None = None,
    rules: str | sharding.Rules = "fsdp+tp",
    dtype: Any = jnp.float32,
    params: spec.Tree | None = None,
    specs: spec.Tree | None = None,
) -> TrainState:
    """The state before the first step. With a mesh, which must be set (`jax.set_mesh`), it is born sharded.

    params: start from these, as arrays of any kind, instead of random ones (they are copied: a step donates its state).
    specs: of the given params where they have more leaves than the config's family, such as a head.
    """
    init_key, key = jax.random.split(jax.random.key(seed))
    if params is None:
        params = models.init(config, init_key, mesh, dtype, rules)
    else:
        params = jax.tree.map(lambda p: jnp.array(p, dtype, copy=True), params)
        if mesh is not None:
            specs = models.parameters(config) if specs is None else specs
            params = jax.device_put(params, sharding.shardings(specs, mesh, rules))
    step = jnp.zeros((), jnp.int32)
    if mesh is not None:
        step, key = jax.device_put((step, key), jax.NamedSharding(mesh, jax.P()))
    return TrainState(step, params, jax.jit(optimizer.init)(params), key)


def abstract_state(
    config: Any,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh | None = None,
    rules: str | sharding.Rules = "fsdp+tp",
    dtype: Any = jnp.float32,
    specs: spec.Tree | None = None,
) -> TrainState:
    """Shapes, dtypes and shardings of `init_state`'s result: the target of a restore. Nothing is allocated."""
    specs = models.parameters(config) if specs is None else specs
    params = spec.abstract(specs, dtype, None if mesh is None else sharding.shardings(specs, mesh, rules))
    opt_state = jax.eval_shape(optimizer.init, params)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, opt_state, key)

    def placed(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        where: jax.sharding.Sharding = SingleDeviceSharding(jax.local_devices()[0])
        if mesh is not None:
            where = jax.NamedSharding(mesh, x.sharding.spec if x.sharding is not None else jax.P())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    return jax.tree.map(placed, state)
