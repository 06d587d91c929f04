"""The metrics of a run: metrics.jsonl, and the same numbers as TensorBoard events."""

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from garrulax.train.digests import write_durably
from garrulax.train.events import Events
from garrulax.train.trackers import Trackers

NAME = "metrics.jsonl"


class MetricsLog:
    """Appends records to metrics.jsonl and to TensorBoard events in the folder `events`. Only process 0 writes.

    The events are a copy: when they cannot be written, the log says so once and goes on without them. Use as a context
    manager.

    Args:
        folder: Of the run.
        step: Of the state that the run starts from. Records of later steps, left by a killed run, are deleted. Lines
            that are no records are moved to metrics.jsonl.damaged.
        say: Called with a line for the user.
        trackers: Services that get the records too.

    Raises:
        OSError: If metrics.jsonl cannot be written.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        step: int = 0,
        say: Callable[[str], None] = lambda line: None,
        trackers: Trackers | None = None,
    ):
        self._file, self._events, self._say, self._trackers = None, None, say, trackers
        self._path, self._folder = Path(folder, NAME), Path(folder, "events")
        if jax.process_index() != 0:
            return
        with self._explained():
            records = self._cut(step)
            self._file = self._path.open("ab", buffering=0)
        with self._without_events():
            try:
                self._events = Events(self._folder, records)
            except ImportError:
                say("no TensorBoard events are written; to get them: pip install 'garrulax[plots]'")

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        with self._without_events():
            if self._events is not None:
                self._events.close()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one record.

        Args:
            step: Number of updates before the measurement.
            values: Measured, by name, or texts; None values are left out.

        Raises:
            OSError: If metrics.jsonl cannot be written, such as on a full disk.
        """
        values = {k: v for k, v in values.items() if v is not None}
        if self._file is not None:
            line = (json.dumps({"step": step, **values}) + "\n").encode()
            with self._explained():
                if self._file.write(line) != len(line):
                    raise OSError("only a part of a line could be written: the disk is full")
        with self._without_events():
            if self._events is not None:
                self._events.write(step, values)
        if self._trackers is not None:
            self._trackers.write(step, values)

    def _cut(self, step: int) -> list[dict[str, Any]]:
        """Deletes the records of later steps from the file, and returns the others."""
        before = self._path.read_bytes() if self._path.exists() else b""
        records, damaged = _records(before)
        records = [r for r in records if r["step"] <= step] if step else []
        if damaged and step:
            aside = self._path.with_name(f"{NAME}.damaged")
            with aside.open("ab") as file:
                file.write(b"".join(line + b"\n" for line in damaged))
            self._say(f"{self._path}: {len(damaged)} damaged lines are left out; they are in {aside}")
        text = "".join(json.dumps(r) + "\n" for r in records)
        if text.encode() != before:
            write_durably(self._path, text)
        return records

    @contextlib.contextmanager
    def _explained(self):
        try:
            yield
        except OSError as error:
            raise OSError(
                f"{self._path} cannot be written: {error.strerror or error}; the checkpoints are intact: make room, "
                "then continue with --resume"
            ) from error

    @contextlib.contextmanager
    def _without_events(self):
        try:
            yield
        except OSError as error:
            self._events = None
            self._say(f"no more TensorBoard events: {self._folder} cannot be written ({error.strerror or error}); "
                      f"{NAME} has everything, and --resume writes them anew")  # fmt: skip


def read_metrics(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """All records of a run's metrics.jsonl, without the lines that are none, such as half a line at the end.

    Empty if the run has no such file.
    """
    path = Path(folder, NAME)
    return _records(path.read_bytes())[0] if path.exists() else []


def held_out_losses(records: Iterable[Mapping[str, Any]]) -> dict[int, float]:
    """The held-out loss after each step that a run evaluated, from its records."""
    return {r["step"]: r["valid_loss"] for r in records if isinstance(r.get("valid_loss"), int | float)}


def _records(content: bytes) -> tuple[list[dict[str, Any]], list[bytes]]:
    """The records of the file, and the lines that are none; half a line at the end is neither."""
    records, damaged = [], []
    for line in content.split(b"\n")[:-1]:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict) and type(record.get("step")) is int:
            records.append(record)
        else:
            damaged.append(line)
    return records, damaged
