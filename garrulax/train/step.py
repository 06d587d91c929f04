"""One training step: a pure function of the state and a batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from garrulax import models
from garrulax.core.config import ModelConfig
from garrulax.core.leaf import cast
from garrulax.core.lora import join
from garrulax.core.spec import Tree
from garrulax.train import lora
from garrulax.train.averaging import next_average
from garrulax.train.freed_memory import keep_freed_memory
from garrulax.train.guard import judge
from garrulax.train.norms import gradient_norms
from garrulax.train.objectives import Batch, Objective
from garrulax.train.optimizers import schedule_of
from garrulax.train.quantized import quantized
from garrulax.train.regularizers import Regularizers
from garrulax.train.settings import Settings
from garrulax.train.state import TrainState, in_full

Metrics = dict[str, jax.Array]
OPTIMIZER = "optimizer"  # name in compiled programs of what updates the parameters: plans state its cost


def make_train_step(
    config: ModelConfig, settings: Settings, optimizer: optax.GradientTransformation, objective: Objective
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Makes the jitted step `(state, batch, frozen=None) -> (state, metrics)`.

    Without `frozen` the parameters of the state are those of the model. With it they are those that are trained, and
    `frozen` has the rest (`core.lora.split`), which gets no gradients and no optimizer state.

    The state passed in is donated: use the returned one afterwards. If the loss or the gradient is not finite, the
    state is returned unchanged. If the state has a guard (`guard.first_guard`), a step that it does not accept changes
    only the guard and the number of the step, so that the run goes on with the next batch.

    The arrays of a batch are [A, B, ...]: A micro-batches, whose gradients are averaged over all their tokens. The
    metrics are scalars: loss (what is minimised, nats per token), grad_norm (before clipping), lr, tokens (in the mean
    of the loss) and finite (bool); grad_norms has the norms of the parts (`norms.gradient_norms`), extra the further
    metrics of the objective, averaged as the loss, and guard what `guard.judge` says, if there is one.

    On a CPU it also makes the process keep the memory that it frees (`freed_memory.keep_freed_memory`); for steps whose
    temporary arrays take more than 64 MiB see `freed_memory.run_in_the_calling_thread` too.

    Args:
        config: Of the model.
        settings: Of the run; uses precision, rounding, remat, unroll, dropout, context_parallel, the learning-rate
            schedule, the regularizers, ema and spike_factor.
        optimizer: From `optimizers.make_optimizer`.
        objective: To minimise, see `train.objectives`.
    """
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    gradient = _gradient(config, settings, objective)
    schedule = schedule_of(settings, settings.lr)
    factor = settings.spike_factor if settings.skip_steps == "spikes" else None

    def step(state: TrainState, batch: Batch, frozen: Tree | None = None) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step) if settings.dropout else None
        loss, tokens, extra, grads = _accumulated(gradient, state.params, frozen, batch, key)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # Optax relies on promotion
            norm, norms = gradient_norms(grads)
            updates = state.step if state.guard is None else state.step - state.guard.skipped  # the optimizer's count
            lr = schedule(updates)
            with jax.named_scope(OPTIMIZER):
                params, opt_state = _update(optimizer, grads, state, settings.rounding)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        metrics = {"loss": loss, "grad_norm": norm, "grad_norms": norms, "lr": lr, "tokens": tokens, "extra": extra,
                   "finite": finite}  # fmt: skip
        counts, guard, number = finite, None, _select(finite, state.step + 1, state.step)
        if state.guard is not None:
            counts, guard, metrics["guard"] = judge(state.guard, loss, norm, factor)
            number = state.step + 1
        params, opt_state = _select(counts, (params, opt_state), (state.params, state.opt_state))
        ema = state.ema
        if ema is not None:  # of the array of new parameters: computed again, they would keep a copy of the old ones
            ema = _select(counts, next_average(ema, jax.lax.optimization_barrier(params), updates, settings.ema), ema)
        return TrainState(number, params, opt_state, state.key, ema, guard), metrics

    return jax.jit(step, donate_argnums=0)


def compute_dtype(params: Tree, precision: str) -> Tree:
    """The parameters in the dtype of the computation: those of 32 bits or more are unchanged for "float32"."""
    return in_full(params) if precision == "float32" else cast(params, precision)


def should_unroll(config: ModelConfig) -> bool:
    """Whether to compile the layers as straight code instead of a loop (`scan`).

    Straight code copies nothing into and out of stacks of activations and gradients. On a GPU that saves a tenth of the
    step, and the memory of the stacks; on CPU a small model trains a quarter faster. But the time to compile grows with
    the layers, on a GPU by half a second to a second each. On a mesh of several GPUs the loop stays: the weights
    gathered for one layer are then freed before the next.
    """
    if jax.default_backend() == "cpu":
        return config.layers <= 16
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() == "gpu" and config.layers <= 32 and (mesh.empty or mesh.size == 1)


def _gradient(config: ModelConfig, settings: Settings, objective: Objective) -> Callable:
    extra = Regularizers(settings.z_loss, settings.label_smoothing, settings.embedding_shrink)
    options: dict[str, Any] = (
        {} if extra == Regularizers() else {"extra": extra}
    )  # objectives of other people may have no such option
    adapters = lora.read(settings.lora)
    if adapters is not None and adapters.group:
        options["group"] = adapters.group
    if settings.context_parallel != "auto":
        options["context_parallel"] = settings.context_parallel

    def loss(params, frozen, batch, key):
        params = compute_dtype(params if frozen is None else join(params, frozen), settings.precision)
        if settings.quantize != "none":
            params = quantized(params, models.parameters(config), settings.quantize)
        unroll = should_unroll(config) if settings.unroll is None else settings.unroll
        return objective(params, batch, config, key, remat=settings.remat, unroll=unroll, **options)

    return jax.value_and_grad(loss, has_aux=True)


def _accumulated(gradient: Callable, params: Tree, frozen: Tree | None, batch: Batch, key: jax.Array | None) -> tuple:
    """Loss, number of tokens, further metrics and gradient of the mean over the tokens of all micro-batches.

    Micro-batches differ in their number of tokens, so this is not the mean of their means.
    """
    micro_batches = next(iter(batch.values())).shape[0]
    if micro_batches == 1:
        (loss, aux), grads = gradient(params, frozen, {k: v[0] for k, v in batch.items()}, key)
        return loss, aux["tokens"], _extra(aux), grads

    def add(total, item):
        i, part = item
        (loss, aux), grads = gradient(params, frozen, part, None if key is None else jax.random.fold_in(key, i))
        tokens = aux["tokens"]
        return jax.tree.map(
            lambda t, x: t + x.astype(t.dtype) * tokens.astype(t.dtype),
            total,
            (loss, jnp.ones_like(loss), _extra(aux), grads),
        ), None

    shapes = jax.eval_shape(lambda: gradient(params, frozen, {k: v[0] for k, v in batch.items()}, key))
    zero = jnp.zeros((), shapes[0][0].dtype)
    extra = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), _extra(shapes[0][1]))
    total = (zero, zero, extra, jax.tree.map(jnp.zeros_like, in_full(params)))
    (loss, tokens, extra, grads), _ = jax.lax.scan(add, total, (jnp.arange(micro_batches, dtype=jnp.int32), batch))
    count = jnp.maximum(tokens, 1)
    extra, grads = jax.tree.map(lambda x: x / count.astype(x.dtype), (extra, grads))
    return loss / count, tokens, extra, grads


def _extra(metrics: Metrics) -> Metrics:
    return {name: x for name, x in metrics.items() if name != "tokens"}


def _update(optimizer: optax.GradientTransformation, grads: Tree, state: TrainState, rounding: str) -> tuple[Tree, Any]:
    """The next parameters and optimizer state, sharded as they are."""
    full = in_full(state.params)
    updates, opt_state = optimizer.update(in_full(grads), state.opt_state, full)
    new, key = optax.apply_updates(full, updates), jax.random.fold_in(state.key, state.step)
    if jax.sharding.get_abstract_mesh().empty:
        return _rounded(new, state.params, key, rounding), opt_state
    shardings = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, state.params)
    rounded = jax.sharding.auto_axes(  # random bits are made where they are used
        lambda new, like, key: _rounded(new, like, key, rounding), out_sharding=shardings
    )
    return rounded(new, state.params, key), opt_state


def _rounded(new: Tree, like: Tree, key: jax.Array, rounding: str) -> Tree:
    """The new parameters in the dtypes of the old ones; bfloat16 by stochastic rounding, unless it is "nearest".

    A bfloat16 has 8 bits: most updates are smaller than half a step between two of them and would be lost. Rounding up
    with a probability equal to the distance from below keeps them in expectation.
    """
    leaves, tree = jax.tree.flatten(new)
    rounded = [
        stochastic_round(x, jax.random.fold_in(key, i))
        if old.dtype == jnp.bfloat16 and rounding == "stochastic"
        else x.astype(old.dtype)
        for i, (x, old) in enumerate(zip(leaves, jax.tree.leaves(like), strict=True))
    ]
    return jax.tree.unflatten(tree, rounded)


def stochastic_round(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 to bfloat16, up or down at random, so that the expected value is x."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits = bits + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)  # carries into the upper half
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def _select(condition: jax.Array, new: Tree, old: Tree) -> Any:
    return jax.tree.map(lambda n, o: n if n is o else jnp.where(condition, n, o), new, old)
