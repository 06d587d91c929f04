"""The state of a run: the arrays that a step updates and a checkpoint saves."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, SingleDeviceSharding

from garrulax import models
from garrulax.core import sharding, spec
from garrulax.core.config import ModelConfig
from garrulax.core.leaf import check_arrays, map_weights
from garrulax.core.strategies import Strategy


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of a run, a tree.

    A part that is None is no part of the tree, and so of no checkpoint: those without it stay as they are.

    Attributes:
        step: int32 scalar, number of steps so far; skipped ones count.
        params: Parameters of the model, in the dtype that they are updated in.
        opt_state: Of the Optax optimizer.
        key: PRNG key of the run. It never changes: dropout folds the step into it.
        ema: Moving average of the parameters, in float32 at least; None if the settings ask for none.
        guard: What decides whether a step is skipped (`guard.Guard`); None if none is.
    """

    step: Any
    params: spec.Tree
    opt_state: Any
    key: Any
    ema: Any = None
    guard: Any = None

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], tuple[str, ...]]:
        """For JAX: the parts with their names, and the names."""
        optional = ("ema", "guard")
        names = [
            f.name for f in dataclasses.fields(self) if f.name not in optional or getattr(self, f.name) is not None
        ]
        return [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in names], tuple(names)

    @classmethod
    def tree_unflatten(cls, names: tuple[str, ...], parts: Any) -> "TrainState":
        """For JAX: the state of these parts."""
        return cls(**dict(zip(names, parts, strict=True)))

    @property
    def model(self) -> spec.Tree:
        """The parameters to evaluate and to save: the moving average, if there is one."""
        return self.params if self.ema is None else self.ema


def init_state(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    seed: int,
    *,
    mesh: Mesh | None = None,
    strategy: str | Strategy = "fsdp+tp",
    strict: bool = False,
    dtype: Any = jnp.float32,
    params: spec.Tree | Callable[[], spec.Tree] | None = None,
    specs: spec.Tree | None = None,
    average: bool = False,
    guard: Any = None,
) -> TrainState:
    """Makes the state before the first step.

    Args:
        config: Of the model.
        optimizer: From `optimizers.make_optimizer`.
        seed: Of the initial parameters and of dropout.
        mesh: To create the state on, already sharded. It must be set with `jax.set_mesh`. None is one device.
        strategy: A name in `core.strategies.STRATEGIES`, or a strategy.
        strict: Whether to refuse what stays whole against the strategy (`core.sharding.unsharded`).
        dtype: Of the parameters. The optimizer's state is in float32 at least.
        params: Parameters to start from, as arrays of any kind; None draws random ones. They are copied, because a step
            donates its state; the arrays that a function returns are not.
        specs: ParamSpec tree of `params`, if they have more leaves than the config's family says, such as a head.
        average: Whether the state has a moving average of the parameters.
        guard: From `guard.first_guard`.

    Raises:
        ValueError: If `params` do not fit the config; it names them.
    """
    init_key, key = jax.random.split(jax.random.key(seed))
    if params is None:
        params = models.init(config, init_key, mesh, dtype, strategy, strict)
    else:
        ours = callable(params)
        specs = models.parameters(config) if specs is None else specs
        params = params() if callable(params) else params
        spec.check_params(specs, params)
        check_arrays(params, "training all weights")
        params = jax.tree.map(lambda p: jnp.asarray(p, dtype) if ours else jnp.array(p, dtype, copy=True), params)
        if mesh is not None:
            params = sharding.place(params, specs, mesh, strategy, strict=strict)
    step = jnp.zeros((), jnp.int32)
    if mesh is not None:
        step, key, guard = jax.device_put((step, key, guard), jax.NamedSharding(mesh, jax.P()))
    opt_state = jax.jit(lambda p: optimizer.init(in_full(p)))(params)
    return TrainState(step, params, opt_state, key, jax.jit(_average)(params) if average else None, guard)


def in_full(tree: spec.Tree) -> spec.Tree:
    """The parameters with those of 16 bits, such as bfloat16, in float32."""
    return map_weights(lambda x: x.astype(jnp.float32) if x.dtype in (jnp.bfloat16, jnp.float16) else x, tree)


def _average(params: spec.Tree) -> spec.Tree:
    return jax.tree.map(jnp.copy, in_full(params))  # copies: a step donates both


def abstract_state(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh | None = None,
    strategy: str | Strategy = "fsdp+tp",
    strict: bool = False,
    dtype: Any = jnp.float32,
    specs: spec.Tree | None = None,
    average: bool = False,
    guard: Any = None,
) -> TrainState:
    """The shapes, dtypes and shardings of `init_state`'s result, to restore a checkpoint into. Allocates nothing.

    Args:
        config: Of the model.
        optimizer: From `optimizers.make_optimizer`.
        mesh: Of the state; None is one device.
        strategy: A name in `core.strategies.STRATEGIES`, or a strategy.
        strict: Whether to refuse what stays whole against the strategy (`core.sharding.unsharded`).
        dtype: Of the parameters.
        specs: ParamSpec tree of the parameters, if it is not that of the config's family.
        average: Whether the state has a moving average of the parameters.
        guard: From `guard.first_guard`.
    """
    specs = models.parameters(config) if specs is None else specs
    params = spec.abstract(
        specs, dtype, None if mesh is None else sharding.shardings(specs, mesh, strategy, strict=strict)
    )
    opt_state = jax.eval_shape(lambda p: optimizer.init(in_full(p)), params)
    key = jax.eval_shape(lambda: jax.random.key(0))
    ema = jax.eval_shape(_average, params) if average else None
    guard = jax.eval_shape(lambda: guard)
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, opt_state, key, ema, guard)

    def placed(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        place: jax.sharding.Sharding = SingleDeviceSharding(jax.local_devices()[0])
        if mesh is not None:
            place = jax.NamedSharding(mesh, x.sharding.spec if x.sharding is not None else jax.P())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    return jax.tree.map(placed, state)
