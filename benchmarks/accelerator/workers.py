"""Processes that compile side by side and then measure one at a time.

A worker prints lines of JSON: `{"table": ..., "name": ..., "text": ..., ...}` is a row of results. Before it measures,
it prints `{"ready": true}` and waits for a line on its standard input. So the compilers of several workers share the
processors, and nothing else runs on the device while one of them measures.
"""

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


def emit(table: str, name: str, text: str, **values: Any) -> None:
    """In a worker: reports a row. Of the rows of one table and name the last one counts; people read the text."""
    print(json.dumps(_finite({"table": table, "name": name, "text": text, **values})), flush=True)


def _finite(x: Any) -> Any:
    """What JSON can express: None for NaN and infinity."""
    if isinstance(x, dict):
        return {key: _finite(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def wait_for_turn() -> None:
    """In a worker: says that everything is compiled, and waits until nobody else measures."""
    print(json.dumps({"ready": True}), flush=True)
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
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            worker.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
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

    def failure(self) -> str | None:
        """What it said at its end where it failed."""
        code = self._process.wait()
        if code == 0:
            return None
        self._errors.seek(0)
        said = [line for line in self._errors.read().splitlines() if line.strip()]
        return f"{self.worker.title} failed ({code}): " + " | ".join(said[-3:])[-600:]

    def stop(self) -> None:
        """Ends it and all that it started."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._errors.close()


def run(workers: Sequence[Worker], take: Callable[[dict], None], seconds: float, *, turns: bool = True) -> list[str]:
    """Runs workers, and hands each row to `take` when it arrives.

    Args:
        workers: To start, all at once.
        take: Gets each row.
        seconds: After which the workers that are left are ended.
        turns: Whether they measure one after another; otherwise nobody waits.

    Returns:
        What went wrong: a line for each worker that failed or was ended.
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
                wrong += filter(None, [process.failure()])
            elif (row := _row(line)) is None:
                print(line.rstrip(), flush=True)
            elif "ready" in row:
                process.ready = True
            else:
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
    return row if isinstance(row, dict) and ("table" in row or "ready" in row) else None
