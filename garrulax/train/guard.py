"""Which steps count: one whose loss is not a number, or far above the latest ones, can be skipped."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from garrulax.train.settings import Settings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Guard:
    """Statistics of the earlier steps. They are part of the state of a run, and so of its checkpoints.

    Attributes:
        losses: float32 [W], the losses of the latest W steps that counted, as a ring.
        norms: float32 [W], their gradient norms.
        counted: int32, steps that counted.
        skipped: int32, steps that were skipped.
        in_a_row: int32, steps skipped since the last one that counted.
    """

    losses: Any
    norms: Any
    counted: Any
    skipped: Any
    in_a_row: Any


def first_guard(settings: Settings) -> Guard | None:
    """The guard before the first step; None for settings that skip nothing."""
    if settings.skip_steps == "none":
        return None
    values = [
        jnp.zeros(settings.spike_window, jnp.float32) for _ in range(2)
    ]  # arrays of their own: a step donates them
    return Guard(*values, *(jnp.zeros((), jnp.int32) for _ in range(3)))


def judge(
    guard: Guard, loss: jax.Array, norm: jax.Array, factor: float | None
) -> tuple[jax.Array, Guard, dict[str, jax.Array]]:
    """Whether a step counts, and the guard after it.

    It counts if loss and norm are finite and, with a factor, neither is above the mean of the latest ones by more than
    `factor` standard deviations. The first W / 2 steps are not compared: there are too few to compare them with.

    Args:
        guard: Before the step.
        loss: Scalar.
        norm: Scalar, of the gradient.
        factor: None accepts every finite step.

    Returns:
        A bool scalar, the guard, and for the log: skipped, in_a_row, loss_limit and norm_limit (infinite if there is
        no limit).
    """
    window = guard.losses.shape[0]
    counts = jnp.isfinite(loss) & jnp.isfinite(norm)
    limits = [jnp.array(jnp.inf, jnp.float32)] * 2
    if factor is not None:
        enough = guard.counted >= window // 2
        known = jnp.arange(window, dtype=jnp.int32) < guard.counted
        limits = [jnp.where(enough, _limit(v, known, factor), jnp.inf) for v in (guard.losses, guard.norms)]
        counts = counts & (loss <= limits[0]) & (norm <= limits[1])
    here = jnp.arange(window, dtype=jnp.int32) == guard.counted % window

    def noted(values: jax.Array, value: jax.Array) -> jax.Array:
        return jnp.where(here & counts, value.astype(values.dtype), values)

    one = counts.astype(jnp.int32)
    after = Guard(
        noted(guard.losses, loss),
        noted(guard.norms, norm),
        guard.counted + one,
        guard.skipped + 1 - one,
        (guard.in_a_row + 1) * (1 - one),
    )
    said = {"skipped": ~counts, "in_a_row": after.in_a_row, "loss_limit": limits[0], "norm_limit": limits[1]}
    return counts, after, said


def _limit(values: jax.Array, known: jax.Array, factor: float) -> jax.Array:
    """Mean plus `factor` standard deviations of the known values."""
    count = jnp.maximum(known.sum(dtype=jnp.int32), 1).astype(values.dtype)
    mean = jnp.sum(jnp.where(known, values, 0)) / count
    variance = jnp.sum(jnp.where(known, jnp.square(values - mean), 0)) / count
    return mean + factor * jnp.sqrt(variance)


def why_skipped(metrics: Mapping[str, Any]) -> str:
    """The reason why a step was skipped, from its metrics on the host (`step.make_train_step`)."""
    guard = metrics["guard"]
    values = {
        "loss": (metrics["loss"], guard["loss_limit"]),
        "gradient norm": (metrics["grad_norm"], guard["norm_limit"]),
    }
    return " and ".join(
        f"{name} {value:.4g}" + (f" above {limit:.4g}" if value > limit else "")
        for name, (value, limit) in values.items()
        if not np.isfinite(value) or value > limit
    )
