"""The metrics of a run: metrics.jsonl, and the same numbers as TensorBoard events."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from garrulax.train.trackers import Trackers

NAME = "metrics.jsonl"


class MetricsLog:
    """Appends records to metrics.jsonl and to TensorBoard events in the folder `events`. Only process 0 writes.

    Use as a context manager.

    Args:
        folder: Of the run.
        step: Of the state that the run starts from. Records of later steps, left by a killed run, are deleted.
        trackers: Services that get the records too.

    Attributes:
        note: Says why no TensorBoard events are written; None if they are.
    """

    def __init__(self, folder: str | os.PathLike, step: int = 0, trackers: Trackers | None = None):
        self.note: str | None = None
        self._trackers = trackers
        self._file, self._events = None, None
        if jax.process_index() != 0:
            return
        path = Path(folder, NAME)
        valid = [r for r in read_metrics(folder) if r["step"] <= step] if step and path.exists() else []
        path.write_text("".join(json.dumps(r) + "\n" for r in valid), encoding="utf-8")
        self._file = path.open("a", buffering=1, encoding="utf-8")
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            self.note = "no TensorBoard events are written; to get them: pip install 'garrulax[plots]'"
        else:
            self._events = SummaryWriter(str(Path(folder, "events")), purge_step=step + 1)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        for output in (self._file, self._events):
            if output is not None:
                output.close()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one record.

        Args:
            step: Number of updates before the measurement.
            values: Measured, by name, or texts; None values are left out.
        """
        values = {k: v for k, v in values.items() if v is not None}
        if self._file is not None:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
        if self._events is not None:
            for name, value in values.items():
                (self._events.add_text if isinstance(value, str) else self._events.add_scalar)(name, value, step)
        if self._trackers is not None:
            self._trackers.write(step, values)


def read_metrics(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """All complete records of a run's metrics.jsonl, without half a line that a killed run may have left."""
    records = []
    for line in Path(folder, NAME).read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def held_out_losses(folder: str | os.PathLike) -> dict[int, float]:
    """The held-out loss after each step that a run evaluated, from its metrics.jsonl; empty if it has none."""
    records = read_metrics(folder) if Path(folder, NAME).exists() else []
    return {r["step"]: r["valid_loss"] for r in records if "valid_loss" in r}
