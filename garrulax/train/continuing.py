"""A run that is resumed: its learning rate must not jump without a word, nor its data be other ones."""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

from garrulax.train import typed
from garrulax.train.data_identity import data_differences
from garrulax.train.optimizers import schedule_of
from garrulax.train.schedules import warmup_steps
from garrulax.train.settings import Settings, read_record

_TAIL = ("tail_step", "tail_ratio")  # `continued` sets and explains them
_SHAPE = ("optimizer", "lr", "adam_lr", "schedule", "warmup", "decay", "min_lr_ratio", "tail_step", "tail_ratio")


def continued(settings: Settings, saved: Mapping[str, Any], step: int) -> tuple[Settings, str | None]:
    """The settings for the rest of a run, and what to say about its learning rate.

    With another number of steps alone, the rate goes on from where it is and falls to its end over the remaining steps
    (`tail_step`, `tail_ratio`); a warm-up that is not over stays as long as it was. If the rate would jump for another
    reason, such as a new lr, it does, and the line says so.

    Args:
        settings: As given for the rest of the run.
        saved: The settings in the checkpoint that it goes on from (`run_identity`).
        step: Of that checkpoint.

    Returns:
        The settings and None if the rate goes on as planned; else the settings to use, and a line with the rates.
    """
    old = typed.replace(Settings(), saved)
    if step >= settings.steps or step == 0:
        return settings, None
    last, planned, now = _rate(old, step - 1), _rate(old, step), _rate(settings, step)
    if math.isclose(planned, now, rel_tol=1e-6):
        return settings, None
    said = f"learning rate: {last:.3g} in step {step:,}"
    if (
        settings.steps == old.steps
        or settings.tail_step == 0
        or any(getattr(settings, name) != getattr(old, name) for name in _SHAPE)
    ):
        return settings, f"{said}, {now:.3g} in the next one, as the settings now say"
    rise = warmup_steps(old.warmup, old.steps)
    same_warmup = dataclasses.replace(settings, warmup=float(rise))
    if step < rise and math.isclose(_rate(same_warmup, step), planned, rel_tol=1e-6):
        return same_warmup, None
    assert old.lr is not None
    tail = dataclasses.replace(settings, tail_step=step, tail_ratio=planned / old.lr)
    return tail, (
        f"{said}; it goes on from {planned:.3g} and ends at {_rate(tail, settings.steps):.3g}. A new schedule of "
        f"{settings.steps:,} steps would be at {now:.3g} here: take it with tail_step=0"
    )


def changed(now: Mapping[str, Any], saved: Mapping[str, Any], step: int) -> list[str]:
    """A line about the settings that differ from those in the checkpoint that a run goes on from, if there are any.

    Args:
        now: The settings for the rest of the run (`run_identity`).
        saved: Those in the checkpoint.
        step: Of the checkpoint.
    """
    names = [name for name in now if name in saved and now[name] != saved[name] and name not in _TAIL]
    if not names:
        return []
    texts = [f"{name}={now[name]} (was {saved[name]})" for name in names]
    return [f"settings changed since the checkpoint of step {step:,}: {', '.join(texts)}"]


def check_data(folder: str | os.PathLike, data: Mapping[str, str]) -> None:
    """Checks that a run without a checkpoint begins again with the data that it began with.

    Args:
        folder: Of the run.
        data: Hashes of the data that it has now (`batches.Data.identity`).

    Raises:
        ValueError: If run.json has other hashes; it names them.
    """
    if found := data_differences(data, read_record(folder)["data"]):
        raise ValueError(
            f"{folder} began with other data: {'; '.join(found)}. Put back what it began with, or start another run"
        )


def _rate(settings: Settings, step: int) -> float:
    return float(schedule_of(settings, settings.lr)(step))
