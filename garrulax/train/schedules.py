"""Learning-rate schedules: functions from the step's number to the learning rate.

All begin with a linear warm-up. Steps are counted from 0, so the last one is `steps` - 1.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Schedule = Callable[[jax.Array | int], jax.Array]

KINDS = ("constant", "linear", "cosine", "wsd", "inverse_sqrt", "warmup_linear")


def make_schedule(
    kind: str,
    peak: float,
    steps: int,
    *,
    warmup: float = 0.0,
    min_ratio: float = 0.0,
    decay: float = 0.2,
    tail: tuple[int, float] | None = None,
) -> Schedule:
    """Makes a schedule that rises to `peak` in the warm-up and then falls to `min_ratio * peak`.

    Args:
        kind: "constant" stays at the peak. "linear" and "cosine" (Loshchilov & Hutter 2017, eq. 5) fall from the
            warm-up to the last step. "wsd" (warm-up, stable, decay: Hu et al. 2024, arXiv 2404.06395) stays at the peak
            and falls linearly at the end. "inverse_sqrt" is peak * sqrt(warm-up / step) (Vaswani et al. 2017, section
            5.3): it does not depend on the number of steps, and min_ratio is its least value. "warmup_linear" is
            GPT-1's: it decays during the warm-up too, and its first rate is 0.
        peak: Highest learning rate.
        steps: Number of updates in the run.
        warmup: Number of steps, or a share of all steps if below 1.
        min_ratio: Last learning rate divided by the peak.
        decay: Length of wsd's decay: number of steps, or a share of all steps if below 1.
        tail: (step, ratio) of the end of an earlier run that goes on here: without a warm-up, the rate falls from
            `ratio * peak` at that step as it otherwise falls from the peak, or stays if it is at its end already.

    Returns:
        A function from the step number (int or int32 scalar) to the learning rate.

    Raises:
        ValueError: For an unknown kind, and if warm-up and decay are longer than the run.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown schedule {kind!r}: choose from {', '.join(KINDS)}")
    rise, fall = warmup_steps(warmup, steps), warmup_steps(decay, steps) if kind == "wsd" else 0
    if tail is not None:
        return _tail(kind, peak, steps, *tail, min_ratio, fall)
    if rise + fall > steps:
        raise ValueError(f"warmup={warmup} and decay={decay} are longer than the {steps} steps of the run")
    if kind == "warmup_linear":
        return _warmup_linear(peak, steps, warmup if warmup < 1 else warmup / steps, min_ratio)
    if kind == "inverse_sqrt":
        return _inverse_sqrt(peak, max(1, rise), min_ratio)
    begin = steps - fall if kind == "wsd" else rise

    def schedule(step):
        ratio = _fall(kind, step, begin, steps, 1, min_ratio)
        return peak * ratio * jnp.clip((step + 1) / max(1, rise), 0, 1)

    return schedule


def _fall(kind: str, step: jax.Array | int, begin: int, steps: int, ratio: float, end: float) -> jax.Array:
    """Learning rate divided by the peak: `ratio` until `begin`, then falling to `end` at the last step."""
    done = jnp.clip((step - begin) / max(1, steps - begin), 0, 1)  # share of the decay
    if kind == "constant":
        return jnp.full_like(done, ratio)
    if kind == "cosine":
        return end + (ratio - end) * 0.5 * (1 + jnp.cos(jnp.pi * done))
    return ratio - (ratio - end) * done


def _tail(kind: str, peak: float, steps: int, at: int, ratio: float, min_ratio: float, fall: int) -> Schedule:
    if kind == "inverse_sqrt":  # the step in which the warm-up would have ended, for this rate at that step
        return _inverse_sqrt(peak, ratio**2 * (at + 1), min(ratio, min_ratio))
    begin = max(at, steps - fall) if kind == "wsd" else at
    return lambda step: peak * _fall(kind, step, begin, steps, ratio, min(ratio, min_ratio))


def _inverse_sqrt(peak: float, rise: float, min_ratio: float) -> Schedule:
    """min(n / rise, sqrt(rise / n)) times the peak, where n = step + 1 counts from 1."""

    def schedule(step):
        n = (step + 1) / rise
        return peak * jnp.minimum(n, jnp.maximum(min_ratio, jax.lax.rsqrt(jnp.maximum(n, 1.0))))

    return schedule


def _warmup_linear(peak: float, steps: int, warmup: float, min_ratio: float) -> Schedule:
    """(s x / w + 1 - s) (1 - x), where x = step / steps, w = warmup, and s = 1 if x <= w, else 0.

    Source: openai/finetune-transformer-lm opt.py.
    """

    def schedule(step):
        x = jnp.clip(step / steps, 0, 1)
        rise = jnp.clip(x / warmup, 0, 1) if warmup else 1.0
        return peak * rise * (1 - (1 - min_ratio) * x)

    return schedule


def warmup_steps(value: float, steps: int) -> int:
    """Number of steps from a setting such as warmup: a number, or a share of all steps if below 1."""
    return round(value * steps) if value < 1 else int(value)
