"""Profiler traces of chosen steps, for TensorBoard, XProf or Perfetto."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax


class Profiler:
    """Records a trace of some steps of a run. Use as a context manager, which ends a trace that an error left open.

    Args:
        steps: Numbers of the steps, counted from 1; empty records nothing.
        folder: For the traces.
    """

    def __init__(self, steps: range, folder: Path):
        self._steps, self._folder, self._recording = steps, folder, False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Runs one step, recorded if it is chosen."""
        if number not in self._steps:
            yield
            return
        if not self._recording:
            jax.profiler.start_trace(str(self._folder))
            self._recording = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def ends_with(self, number: int) -> bool:
        """Whether a trace is recorded of which this step is the last."""
        return self._recording and number + 1 not in self._steps

    def finish(self, results: Any) -> None:
        """Ends the trace when the device has computed the results of its last step."""
        jax.block_until_ready(results)
        self._stop()

    def _stop(self) -> None:
        if self._recording:
            self._recording = False
            jax.profiler.stop_trace()
