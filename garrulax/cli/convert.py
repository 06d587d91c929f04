"""`garrulax convert`: a model folder as another."""

import argparse
import sys
import time

from garrulax.cli.models import find_model
from garrulax.hub.converting import convert as convert_
from garrulax.train.progress import duration, si

WIDTH = 30  # of the bar


def convert(args: argparse.Namespace) -> None:
    """Writes the folder, with a bar where stderr is a terminal."""
    progress = Bar() if sys.stderr.isatty() else None
    convert_(
        find_model(args.source), args.target, args.dtype, args.max_shard_size, args.dialect,
        None if progress is None else progress.update,
    )  # fmt: skip
    if progress is not None:
        progress.close()
    print(f"model in {args.target}", file=sys.stderr)


class Bar:
    """One line on stderr: how much is written, how fast, how long to go."""

    def __init__(self) -> None:
        self._start, self._shown = time.perf_counter(), 0.0

    def update(self, done: int, total: int) -> None:
        """Shows `done` of `total` bytes, ten times a second at most."""
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
        """Leaves the line as it is."""
        sys.stderr.write("\n")
