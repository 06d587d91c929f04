"""Checkpoints of a run, written with Orbax's v1 API, and the check that a checkpoint belongs to this run."""

import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from orbax.checkpoint import v1 as ocp

from garrulax.train import settings as settings_
from garrulax.train.state import TrainState

_policies = ocp.training.preservation_policies


class Checkpoints:
    """The checkpoints in a folder, one sub-folder a step.

    A checkpoint is written under a temporary name and renamed when complete, so that a killed process or a full disk
    does not damage the earlier ones. Saving runs in the background. Use as a context manager.

    A checkpoint is saved before its held-out loss is known, so that no evaluation can cost a run; `record` adds it.

    Args:
        folder: Of the checkpoints; it is created if it does not exist.
        identity: Of this run (`settings.run_identity`). It is saved in every checkpoint and compared on restore.
        keep: Number of latest checkpoints to keep. The one with the lowest held-out loss is kept as well.
        losses: Held-out losses by step that were recorded before, such as those in metrics.jsonl.

    Attributes:
        identity: As the argument; saved with the next checkpoint.
        losses: Held-out losses by step.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        identity: Mapping[str, Any],
        keep: int = 2,
        losses: Mapping[int, float] | None = None,
    ):
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports every save at length
        self.identity = dict(identity)
        self.losses = dict(losses or {})
        self._saving: Any = None
        self._folder = os.path.abspath(folder)
        self._orbax = ocp.training.Checkpointer(
            self._folder,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=_policies.AnyPreservationPolicy([_policies.LatestN(keep), _KeepBest(self)]),
            cleanup_tmp_directories=True,
        )
        for checkpoint in self._orbax.checkpoints:
            if checkpoint.metrics:
                self.losses.setdefault(checkpoint.step, checkpoint.metrics["loss"])

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self.close()
        else:  # raise the error that ended the run; an error from saving only becomes a note on it
            try:
                self._orbax.close()
            except Exception as second:
                error.add_note(f"and the last checkpoint could not be written: {_first_line(second)}")

    @property
    def latest(self) -> int | None:
        """Step of the latest checkpoint, or None."""
        return None if self._orbax.latest is None else self._orbax.latest.step

    @property
    def best(self) -> int | None:
        """Step of the checkpoint with the lowest held-out loss, or None if none was evaluated."""
        return self.best_of([c.step for c in self._orbax.checkpoints])

    def best_of(self, steps: Iterable[int]) -> int | None:
        """The one of these steps with the lowest held-out loss, or None if none has a loss that is a number."""
        scored = [step for step in steps if math.isfinite(self.losses.get(step, math.nan))]
        return min(scored, key=self.losses.__getitem__, default=None)

    @property
    def saved_identity(self) -> dict[str, Any] | None:
        """The identity in the latest checkpoint, or None if there is none."""
        return None if self.latest is None else self._orbax.metadata(self.latest).custom_metadata

    def record(self, step: int, loss: float) -> None:
        """Notes the held-out loss of a step (nats per token), to find the best checkpoint."""
        self.losses[step] = loss

    def wait(self) -> None:
        """Waits until the save in the background is complete. Raises OSError if it failed."""
        if self._saving is not None:
            self._raise_oserror(self._saving.result)

    def save(self, state: TrainState, step: int, loss: float | None = None) -> None:
        """Starts to write the state in the background. Its arrays may be donated as soon as this returns.

        Args:
            state: To save. If its step is the latest checkpoint already, nothing is written.
            step: Must be the state's.
            loss: held-out loss at this step, as for `record`; None if it is not known yet.

        Raises:
            OSError: If this save or an earlier one failed; it names the checkpoints that are complete.
        """
        if step == self.latest:
            return
        if loss is not None:
            self.record(step, loss)
        metrics = None if loss is None else {"loss": loss}

        def start() -> None:
            self._saving = self._orbax.save_async(
                step, state, metrics=metrics, custom_metadata=self.identity, force=True
            )

        self._raise_oserror(start)

    def close(self) -> None:
        """Waits until the last save is complete. Raises OSError if it failed."""
        self._raise_oserror(self._orbax.close)

    def restore(self, target: TrainState, step: int | None = None) -> TrainState:
        """Loads a checkpoint.

        Args:
            target: Shapes, dtypes and shardings of the state (`state.abstract_state`).
            step: Of the checkpoint; None is the latest.

        Raises:
            FileNotFoundError: If there is no such checkpoint.
            ValueError: If the checkpoint is of another run; it names the differences.
        """
        if self.latest is None:
            raise FileNotFoundError(f"{self._folder} holds no complete checkpoint")
        step = self.latest if step is None else step
        steps = {c.step for c in self._orbax.checkpoints}
        if step not in steps:
            raise FileNotFoundError(f"{self._folder} has no checkpoint of step {step}, only of {_listed(steps)}")
        saved = self._orbax.metadata(step).custom_metadata
        different = settings_.differences(self.identity, saved)
        if different:
            raise ValueError(f"the checkpoint in {self._folder} is of another run: {'; '.join(different)}")
        return self._orbax.load(step, target)

    def _raise_oserror(self, action: Callable[[], Any]) -> None:
        """Runs `action`; any error becomes an OSError that names the checkpoints which are complete."""
        try:
            action()
        except Exception as error:
            there = sorted(int(n) for n in os.listdir(self._folder) if n.isdigit())
            rest = f"complete are those of step {_listed(there)}" if there else "there is no earlier one"
            raise OSError(
                f"a checkpoint could not be written to {self._folder}: {_first_line(error)}; {rest}"
            ) from error


class _KeepBest:
    """A policy of Orbax: preserves the checkpoint with the lowest held-out loss."""

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Which checkpoints to preserve, in the same order."""
        best = self._checkpoints.best_of([c.step for c in checkpoints])
        return [c.step == best for c in checkpoints]


def _listed(steps: Iterable[int]) -> str:
    return ", ".join(str(int(s)) for s in np.sort(list(steps)))


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
