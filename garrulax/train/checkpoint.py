"""Checkpoints of a run: arrays written with Orbax's v1 API, digests of their files, and what belongs to which run."""

import contextlib
import logging
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from garrulax.core.disk import sync
from garrulax.core.spec import Tree
from garrulax.train import digests
from garrulax.train import settings as settings_
from garrulax.train.digests import DamagedError
from garrulax.train.state import TrainState

_WRITING, _DELETING, _DAMAGED = ".writing", ".deleting", ".damaged"  # ends of folders that are no checkpoints


class Checkpoints:
    """The checkpoints in a folder, one sub-folder a step.

    Saving runs in the background. A checkpoint is written under another name; when all its arrays are on disk, the
    digests of its files are added, and it is renamed. So a folder with the name of a step was whole once, and the
    digests tell whether it still is. A killed process or a full disk does not damage the earlier ones. Use as a
    context manager.

    A checkpoint is saved before its held-out loss is known, so that no evaluation can cost a run; `record` notes it,
    and the next checkpoint has it.

    With several processes all of them make the same calls. The folder is one that all can reach.

    Args:
        folder: Of the checkpoints; it is created if it does not exist.
        identity: Of this run (`settings.run_identity`). It is saved in every checkpoint and compared on restore.
        keep: Number of latest checkpoints to keep. The one with the lowest held-out loss is kept as well.
        losses: Held-out losses by step that were recorded before, such as those in metrics.jsonl. Those that a
            checkpoint has win.
        keep_minutes: Keep, for good, one checkpoint for every so many minutes of training; 0 keeps none in this way.

    Attributes:
        identity: As the argument; saved with the next checkpoint.
        losses: Held-out losses by step.
        damaged: What is wrong with each checkpoint that is not whole, by step, as far as it is known.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        identity: Mapping[str, Any],
        keep: int = 2,
        losses: Mapping[int, float] | None = None,
        keep_minutes: float = 0,
    ):
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax reports every save, and errors that it raises too
        self.identity, self.damaged = dict(identity), dict[int, str]()
        self._folder, self._keep, self._seconds = Path(os.path.abspath(folder)), keep, 60 * keep_minutes
        self._writes = jax.process_index() == 0
        self._saving: tuple[int, Future] | None = None
        self._background = ThreadPoolExecutor(1)
        self._checked: set[int] = set()
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._writes:
            for entry in self._folder.iterdir():
                if _WRITING in entry.name or entry.name.endswith(_DELETING):  # left by a process that died
                    shutil.rmtree(entry, ignore_errors=True)
        self._records: dict[int, dict[str, Any]] = {}
        for step in saved_steps(self._folder):
            try:
                self._records[step] = digests.read(self._folder / str(step))
            except DamagedError as error:
                self.damaged[step] = str(error)
        self.losses = dict(losses or {})
        for _, record in sorted(self._records.items()):  # what checkpoints say is protected by their digests
            self.losses |= {int(step): loss for step, loss in record.get("losses", {}).items()}

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self.close()
            return
        try:  # raise the error that ended the run; an error from saving only becomes a note on it
            if self._saving is not None:
                self._saving[1].result()
        except Exception as second:
            error.add_note(f"and the last checkpoint could not be written: {_first_line(second)}")
        finally:
            self._background.shutdown()

    @property
    def latest(self) -> int | None:
        """Step of the latest checkpoint that is not known to be damaged, or None."""
        return max((step for step in self._records if step not in self.damaged), default=None)

    @property
    def best(self) -> int | None:
        """Step of the checkpoint with the lowest held-out loss, or None if none was evaluated."""
        return self.best_of(self._records)

    def best_of(self, steps: Iterable[int]) -> int | None:
        """The one of these steps with the lowest held-out loss, or None if none has a loss that is a number."""
        scored = [step for step in steps if math.isfinite(self.losses.get(step, math.nan))]
        return min(scored, key=self.losses.__getitem__, default=None)

    @property
    def saved_identity(self) -> dict[str, Any] | None:
        """The identity in the latest checkpoint, or None if there is none."""
        return None if self.latest is None else self._records[self.latest]["identity"]

    def record(self, step: int, loss: float) -> None:
        """Notes the held-out loss of a step (nats per token), to find the best checkpoint."""
        self.losses[step] = loss

    def check(self) -> list[str]:
        """Reads the latest checkpoint, and earlier ones until one is whole; `latest` is that one then.

        A damaged checkpoint is renamed, to its step and `.damaged`, so that its step can be saved again.

        Returns:
            A line for every damaged checkpoint, which names the step and the file.
        """
        while (step := self.latest) is not None and step not in self._checked:
            with contextlib.suppress(DamagedError):
                self._check(step)
        rest = "the run starts again at step 0" if self.latest is None else f"going on from step {self.latest}"
        lines = []
        for step in sorted(self.damaged, reverse=True):
            found, name = self._folder / str(step), f"{step}{_DAMAGED}"
            if self._writes and found.exists():
                _remove(self._folder / name)
                found.rename(self._folder / name)
            self._records.pop(step, None)
            lines.append(f"the checkpoint of step {step} is damaged: {self.damaged[step]}; {rest} ({name} has it)")
        self.damaged.clear()
        if lines and jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints are renamed")
        return lines

    def wait(self) -> None:
        """Waits until the save in the background is complete. Raises OSError if it failed."""
        if self._saving is None:
            return
        (step, saving), self._saving = self._saving, None
        with self._as_oserror():
            record = saving.result()
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"the checkpoint of step {step} is complete")
        self._records[step] = record
        self._checked.add(step)
        for gone in set(self._records) - set(self._kept()):
            del self._records[gone]

    def save(self, state: TrainState, step: int, loss: float | None = None) -> None:
        """Starts to write the state in the background. Its arrays may be donated as soon as this returns.

        Args:
            state: To save. If its step is the latest checkpoint already, nothing is written.
            step: Must be the state's.
            loss: held-out loss at this step, as for `record`; None if it is not known yet.

        Raises:
            OSError: If this save or an earlier one failed; it names the checkpoints that are complete.
        """
        if step in self._records or (self._saving is not None and self._saving[0] == step):
            return
        self.wait()
        if loss is not None:
            self.record(step, loss)
        losses = {str(s): self.losses[s] for s in (*self._records, step) if s in self.losses}
        record = {"step": step, "time": time.time(), "losses": losses, "identity": self.identity}
        target = self._folder / f"{step}{_WRITING}"
        with self._as_oserror():
            arrays = ocp.save_async(target, state)
            self._saving = step, self._background.submit(self._commit, arrays, target, record)

    def close(self) -> None:
        """Waits until the last save is complete. Raises OSError if it failed."""
        try:
            self.wait()
        finally:
            self._background.shutdown()

    def restore(self, target: TrainState, step: int | None = None) -> TrainState:
        """Loads a checkpoint after comparing its files with their digests.

        Args:
            target: Shapes, dtypes and shardings of the state (`state.abstract_state`), on any mesh and in any dtypes.
            step: Of the checkpoint; None is the latest.

        Raises:
            FileNotFoundError: If there is no such checkpoint.
            DamagedError: If it is damaged; it names the step and the file. `check` finds an earlier one.
            ValueError: If the checkpoint is of another run; it names the differences.
        """
        step = self._whole(step)
        different = settings_.differences(self.identity, self._records[step]["identity"])
        if different:
            raise ValueError(
                f"the checkpoint in {self._folder} is of another run: {'; '.join(different)}. Put the run's own "
                "checkpoints there, put back the data that it began with, or leave out the settings that changed"
            )
        return ocp.load(self._folder / str(step), target)

    def restore_params(self, target: Tree, step: int | None = None) -> Tree:
        """Loads the parameters of a checkpoint alone. Arguments and errors as for `restore`, of any run's identity.

        Args:
            target: Shapes, dtypes and shardings of the parameters.
            step: Of the checkpoint; None is the latest.
        """
        step = self._whole(step)
        return load_part(self._folder / str(step), "params", target)

    def _whole(self, step: int | None) -> int:
        """The step, or that of the latest checkpoint, after checking it."""
        step = self.latest if step is None else step
        if step is None and not self.damaged:
            raise FileNotFoundError(f"{self._folder} holds no complete checkpoint")
        if step not in self._records and step not in self.damaged and step is not None:
            raise FileNotFoundError(
                f"{self._folder} has no checkpoint of step {step}, only of {_listed(self._records)}"
            )
        if step is None or step in self.damaged:
            step = max(self.damaged) if step is None else step
            raise DamagedError(f"the checkpoint of step {step} is damaged: {self.damaged[step]}")
        self._check(step)
        return step

    def _check(self, step: int) -> None:
        """Compares the files of a checkpoint with their digests; every process reads a part of them."""
        if step in self._checked:
            return
        damage = None
        try:
            digests.check(self._folder / str(step), jax.process_index(), jax.process_count())
        except DamagedError as error:
            damage = str(error)
        if jax.process_count() > 1:
            found = multihost_utils.process_allgather(np.int32(damage is not None))
            if damage is None and found.any():
                damage = f"process {int(np.argmax(found))} read a damaged file"
        if damage is not None:
            self.damaged[step] = damage
            raise DamagedError(f"the checkpoint of step {step} is damaged: {damage}")
        self._checked.add(step)

    def _commit(self, arrays: Any, target: Path, record: dict[str, Any]) -> dict[str, Any]:
        """Makes a checkpoint of the arrays when they are written: in the background, by process 0."""
        arrays.result()
        if self._writes:
            digests.write(target, record)
            final = self._folder / str(record["step"])
            _remove(final)  # a damaged one that nobody asked for
            target.rename(final)
            sync(self._folder)
            _remove(final.with_name(f"{final.name}{_DAMAGED}"))
            kept = {*self._kept({record["step"]: record}), *self.damaged}
            for step in set(saved_steps(self._folder)) - kept:
                _remove(self._folder / str(step))
        return record

    def _kept(self, more: Mapping[int, dict[str, Any]] | None = None) -> list[int]:
        """The steps to preserve: the latest, the best, and one for every so many minutes."""
        records = {**self._records, **(more or {})}
        steps = sorted(records)
        kept = {*steps[-self._keep :], self.best_of(steps)}
        last = -math.inf
        for step in steps if self._seconds else ():
            if records[step]["time"] >= last + self._seconds:
                last = records[step]["time"]
                kept.add(step)
        return [step for step in steps if step in kept]

    @contextlib.contextmanager
    def _as_oserror(self) -> Iterator[None]:
        """Any error of the block becomes an OSError that names the checkpoints which are complete."""
        try:
            yield
        except Exception as error:
            there = saved_steps(self._folder)
            rest = f"complete are those of step {_listed(there)}" if there else "there is no earlier one"
            raise OSError(
                f"a checkpoint could not be written to {self._folder}: {_first_line(error)}; {rest}"
            ) from error


def load_part(folder: Path, name: str, target: Tree) -> Tree:
    """Loads one field of the state in a checkpoint, without looking at the digests.

    Args:
        folder: Of the checkpoint.
        name: Of the field of `TrainState`.
        target: Shapes, dtypes and shardings of its arrays.
    """
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        return ocp.load(folder, {name: target})[name]


def saved_steps(folder: str | os.PathLike) -> list[int]:
    """The steps of the checkpoints in a folder, in order; empty if there is no folder."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))


def _remove(folder: Path) -> None:
    """Deletes a checkpoint; it loses its name first, so that nobody takes half of it for a whole one."""
    if folder.exists():
        gone = folder.with_name(f"{folder.name}{_DELETING}")
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _listed(steps: Iterable[int]) -> str:
    return ", ".join(str(int(s)) for s in np.sort(list(steps)))


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
