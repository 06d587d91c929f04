"""A progress bar of the commands that convert."""

import sys
import time

from garrulax.train.progress import duration, si

WIDTH = 30  # of the bar, in characters


class Bar:
    """A progress bar on stderr: bytes written (or other units), speed, time left."""

    def __init__(self, unit: str = "B") -> None:
        self._start, self._shown, self._unit = time.perf_counter(), 0.0, unit

    def update(self, done: int, total: int) -> None:
        """Shows that `done` of `total` bytes are written; redraws at most ten times a second."""
        now = time.perf_counter()
        if done < total and now - self._shown < 0.1:
            return
        self._shown = now
        speed = done / max(now - self._start, 1e-9)
        full = WIDTH * done // max(total, 1)
        sys.stderr.write(
            f"\r\x1b[K[{'#' * full}{'.' * (WIDTH - full)}] {si(done)}{self._unit} of {si(total)}{self._unit}  "
            f"{si(speed)}{self._unit}/s  "
            f"{duration((total - done) / max(speed, 1e-9))} left"
        )
        sys.stderr.flush()

    def close(self) -> None:
        """Ends the line."""
        sys.stderr.write("\n")
