"""Checkpoints of a run: Orbax's v1 API, and the question whether a checkpoint belongs to this run."""

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from orbax.checkpoint import v1 as ocp

from garrulax.train import settings as settings_
from garrulax.train.state import TrainState

_KEPT = ocp.training.preservation_policies


class Checkpoints:
    """The checkpoints in a folder, one sub-folder a step.

    A checkpoint is written beside its final name and renamed when complete, so that a killed process or a full disk
    leaves the earlier ones as they are. Saving goes on in the background. Use as a context manager.

    folder: where they are. identity: of this run (`settings.identity`), kept in every checkpoint and compared when one
    is restored. keep: latest checkpoints that stay; the one with the lowest held-out loss stays as well.
    """

    def __init__(self, folder: str | os.PathLike, identity: Mapping[str, Any], keep: int = 2):
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports every save at length
        best = _KEPT.BestN(get_metric_fn=lambda m: m["loss"], reverse=True, n=1, keep_checkpoints_without_metrics=False)
        self._identity = dict(identity)
        self._folder = os.path.abspath(folder)
        self._orbax = ocp.training.Checkpointer(
            self._folder,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=_KEPT.AnyPreservationPolicy([_KEPT.LatestN(keep), best]),
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self.close()
        else:  # the error that ends the run counts, not what saving has to say about it
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
        """Step of the checkpoint with the lowest held-out loss, or None where none was evaluated."""
        scored = [c for c in self._orbax.checkpoints if c.metrics]
        return min(scored, key=lambda c: c.metrics["loss"]).step if scored else None

    def save(self, state: TrainState, step: int, loss: float | None = None) -> None:
        """Begins to write the state; its arrays may be donated as soon as this returns.

        step: must be the state's. loss: held-out loss at this step, for choosing the best. A step that is there
        already is left as it is. Raises OSError where this or an earlier save failed, naming what is still there.
        """
        if step == self.latest:
            return
        metrics = None if loss is None else {"loss": loss}
        self._guard(
            lambda: self._orbax.save_async(step, state, metrics=metrics, custom_metadata=self._identity, force=True)
        )

    def close(self) -> None:
        """Waits for the last save. Raises OSError where it failed."""
        self._guard(self._orbax.close)

    def restore(self, target: TrainState, step: int | None = None) -> TrainState:
        """The state of a step, by default the latest, with the shardings of `target` (`state.abstract_state`).

        Raises FileNotFoundError where there is none, ValueError where it is of another run, naming the differences.
        """
        if self.latest is None:
            raise FileNotFoundError(f"{self._folder} holds no complete checkpoint")
        step = self.latest if step is None else step
        found = {c.step for c in self._orbax.checkpoints}
        if step not in found:
            raise FileNotFoundError(f"{self._folder} has no checkpoint of step {step}, only of {_listed(found)}")
        theirs = self._orbax.metadata(step).custom_metadata
        different = settings_.differences(self._identity, theirs)
        if different:
            raise ValueError(f"the checkpoint in {self._folder} is of another run: {'; '.join(different)}")
        return self._orbax.load(step, target)

    def _guard(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:
            there = sorted(int(n) for n in os.listdir(self._folder) if n.isdigit())
            rest = f"complete are those of step {_listed(there)}" if there else "there is no earlier one"
            raise OSError(
                f"a checkpoint could not be written to {self._folder}: {_first_line(error)}; {rest}"
            ) from error


def _listed(steps: Iterable[int]) -> str:
    return ", ".join(str(int(s)) for s in np.sort(list(steps)))


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
