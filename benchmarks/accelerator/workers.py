"""Processes that compile side by side and then measure one at a time.

A worker prints lines of JSON: `{"table": ..., "name": ..., "text": ..., ...}` is a row of results. Before it measures,
it prints `{"ready": true}` and waits for a line on its standard input. So the compilers of several workers share the
processors, and nothing else runs on the device while one of them measures. A worker that prints `{"planned": 8}` has
failed if it reports fewer rows.
"""

import contextlib
import dataclasses
import json
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

_WRITING = threading.Lock()
_ROW = '{"table":'  # how a row begins, so that one that cannot be read is told from what libraries print
_KEYS = ({"ready"}, {"planned"}, {"table", "name", "text"})  # that make a line ours
_END = 5  # seconds that a process has to end after its last line, or when it is killed


def emit(table: str, name: str, text: str, **values: Any) -> None:
    """In a worker: reports a row. Of the rows of one table and name the last one counts; people read the text."""
    _say(_finite({"table": table, "name": name, "text": text, **values}))


def plan(rows: int) -> None:
    """In a worker: says how many rows it will report, so that a missing one is noticed."""
    _say({"planned": rows})


def _say(values: dict[str, Any]) -> None:
    """Writes a line of JSON, which no other thread's line gets into."""
    with _WRITING:
        sys.stdout.write(json.dumps(values) + "\n")
        sys.stdout.flush()


def _finite(x: Any) -> Any:
    """What JSON can express: None for NaN and infinity."""
    if isinstance(x, dict):
        return {key: _finite(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def wait_for_turn() -> None:
    """In a worker: says that everything is compiled, and waits until nobody else measures."""
    _say({"ready": True})
    sys.stdin.readline()


@dataclasses.dataclass(frozen=True)
class Worker:
    """A process to start.

    Attributes:
        command: With its arguments.
        environment: Variables besides those of this process.
    """

    command: Sequence[str]
    environment: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def title(self) -> str:
        """For messages: what comes after the interpreter."""
        return " ".join(self.command[1:])


class _Process:
    """A running worker, whose lines go into a queue that all share; None is the end."""

    def __init__(self, worker: Worker, lines: queue.Queue):
        self.worker, self.done, self.ready = worker, False, False
        self.planned = self.rows = 0
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            worker.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, **worker.environment},
            start_new_session=True,  # so that what it starts ends with it
        )
        threading.Thread(target=self._read, args=(lines,), daemon=True).start()

    def _read(self, lines: queue.Queue) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            lines.put((self, line))
        lines.put((self, None))

    def go(self) -> None:
        """Gives it its turn."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("\n")
            self._process.stdin.close()
        except BrokenPipeError:  # it failed: its end is in the queue
            pass

    def failure(self, seconds: float) -> str | None:
        """What is wrong with it after its last line; it has so many seconds to end."""
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.stop()
            return f"{self.worker.title} said no more, and was ended {seconds:.0f} s later"
        if code == 0:
            missing = self.rows < self.planned
            return f"{self.worker.title} reported {self.rows} of {self.planned} rows" if missing else None
        self._errors.seek(0)
        said = [line for line in self._errors.read().splitlines() if line.strip()]
        return f"{self.worker.title} failed ({code}): " + " | ".join(said[-3:])[-600:]

    def stop(self) -> None:
        """Ends it and all that it started."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold it; the results must be written
            self._process.wait(_END)
        self._errors.close()


def run(workers: Sequence[Worker], take: Callable[[dict], None], seconds: float, *, turns: bool = True) -> list[str]:
    """Runs workers, and hands each row to `take` when it arrives.

    Args:
        workers: To start, all at once.
        take: Gets each row.
        seconds: After which the workers that are left are ended.
        turns: Whether they measure one after another; otherwise nobody waits.

    Returns:
        What went wrong: a line for each worker that failed or was ended, and for each row that cannot be read.
    """
    lines: queue.Queue = queue.Queue()
    until = time.monotonic() + seconds
    processes = [_Process(worker, lines) for worker in workers]
    waiting = list(processes)
    wrong = []
    if not turns:
        for process in processes:
            process.go()
    try:
        while not all(p.done for p in processes):
            measuring = [p for p in processes if p not in waiting and not p.done]
            if turns and not measuring and all(p.ready or p.done for p in waiting):
                waiting.pop(0).go()  # where it has ended already, the next one follows
                continue
            try:
                process, line = lines.get(timeout=max(0.01, until - time.monotonic()))
            except queue.Empty:
                wrong += [f"{p.worker.title} was ended after {seconds:.0f} s" for p in processes if not p.done]
                break
            if line is None:
                process.done = True
                left = max(0.1, until - time.monotonic())
                wrong += filter(None, [process.failure(min(_END, left))])
            elif (row := _row(line)) is None:
                print(line.rstrip(), flush=True)
                if _ROW in line:
                    wrong.append(f"{process.worker.title} reported what is no row: {line.strip()[:200]}")
            elif "ready" in row:
                process.ready = True
            elif "planned" in row:
                process.planned = row["planned"]
            else:
                process.rows += 1
                take(row)
    finally:
        for process in processes:
            process.stop()
    return wrong


def _row(line: str) -> dict | None:
    """The object of a line of JSON; None for other lines, which libraries print."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and any(keys <= row.keys() for keys in _KEYS) else None
