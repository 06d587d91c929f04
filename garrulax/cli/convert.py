"""`garrulax convert`: writes a model folder as another, with another dtype, file size or dialect."""

import argparse
import sys
import time

from garrulax.cli.models import find_model
from garrulax.hub.converting import convert_folder
from garrulax.train.progress import duration, si

WIDTH = 30  # of the bar, in characters


def convert(args: argparse.Namespace) -> None:
    """Runs the command; shows a progress bar if stderr is a terminal."""
    progress = Bar() if sys.stderr.isatty() else None
    convert_folder(
        find_model(args.source), args.target, args.dtype, args.max_shard_size, args.dialect,
        None if progress is None else progress.update, args.ignore,
    )  # fmt: skip
    if progress is not None:
        progress.close()
    print(f"model in {args.target}", file=sys.stderr)


class Bar:
    """A progress bar on stderr: bytes written, speed, time left."""

    def __init__(self) -> None:
        self._start, self._shown = time.perf_counter(), 0.0

    def update(self, done: int, total: int) -> None:
        """Shows that `done` of `total` bytes are written; redraws at most ten times a second."""
        now = time.perf_counter()
        if done < total and now - self._shown < 0.1:
            return
        self._shown = now
        speed = done / max(now - self._start, 1e-9)
        full = WIDTH * done // max(total, 1)
        sys.stderr.write(
            f"\r\x1b[K[{'#' * full}{'.' * (WIDTH - full)}] {si(done)}B of {si(total)}B  {si(speed)}B/s  "
            f"{duration((total - done) / max(speed, 1e-9))} left"
        )
        sys.stderr.flush()

    def close(self) -> None:
        """Ends the line."""
        sys.stderr.write("\n")
