"""The record of a run: metrics.jsonl, and the same as TensorBoard events."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

NAME = "metrics.jsonl"


class MetricsLog:
    """Appends records to metrics.jsonl and to TensorBoard events under `events`; from process 0 only.

    folder: of the run. step: the run goes on from here; records of later steps, which a killed run left, are dropped.
    Use as a context manager. `note` says why no events are written, or is None.
    """

    def __init__(self, folder: str | os.PathLike, step: int = 0):
        self.note: str | None = None
        self._file, self._events = None, None
        if jax.process_index() != 0:
            return
        path = Path(folder, NAME)
        kept = [r for r in read(folder) if r["step"] <= step] if step and path.exists() else []
        path.write_text("".join(json.dumps(r) + "\n" for r in kept))
        self._file = path.open("a", buffering=1)
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            self.note = "TensorBoard events are not written: pip install 'garrulax[plots]' brings tensorboardX"
        else:
            self._events = SummaryWriter(str(Path(folder, "events")), purge_step=step + 1)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        for sink in (self._file, self._events):
            if sink is not None:
                sink.close()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One record of what was measured after `step` updates; None values are left out."""
        values = {k: v for k, v in values.items() if v is not None}
        if self._file is not None:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)


def read(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """All complete records of a run's metrics.jsonl (a killed run may leave half a line at the end)."""
    records = []
    for line in Path(folder, NAME).read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
