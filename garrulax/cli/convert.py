"""`garrulax convert`: writes a model folder as another, with another dtype, file size or dialect."""

import argparse
import dataclasses
import sys
import time
from pathlib import Path

import jax

import garrulax as gx
from garrulax.cli import quantise, starting
from garrulax.cli.models import find_model
from garrulax.core.dtypes import parameter_dtype
from garrulax.hub.converting import convert_folder
from garrulax.train.progress import duration, si
from garrulax.train.weights import read_weights

WIDTH = 30  # of the bar, in characters


def convert(args: argparse.Namespace) -> None:
    """Runs the command; shows a progress bar if stderr is a terminal."""
    quantise.check(args)
    if args.quantise is not None:
        quantise.write_quantised(args)
        return
    progress = Bar() if sys.stderr.isatty() else None
    if args.step is not None:
        _convert_checkpoint(args, progress)
    else:
        _convert_model(args, progress)
    if progress is not None:
        progress.close()
    print(f"model in {args.target}", file=sys.stderr)


def _convert_model(args: argparse.Namespace, progress: "Bar | None") -> None:
    convert_folder(
        find_model(args.source), args.target, args.dtype, args.max_shard_size, args.dialect,
        None if progress is None else progress.update, args.ignore,
    )  # fmt: skip


def _convert_checkpoint(args: argparse.Namespace, progress: "Bar | None") -> None:
    """Writes the model of one step of a run."""
    begun = starting.resumed(Path(args.source))
    config, params = read_weights(args.source, args.step)
    if args.dialect is not None:
        if "dialect" not in {field.name for field in dataclasses.fields(config)}:
            raise ValueError(f"dialect={args.dialect!r}: models of this family have only one")
        config = dataclasses.replace(config, dialect=args.dialect)
    if args.dtype is not None:
        dtype = parameter_dtype(args.dtype)
        params = jax.tree.map(lambda p: p.astype(dtype), params)
    model = begun.model.replace(config=config, params=params)
    gx.save(model, args.target, args.max_shard_size, None if progress is None else progress.update)


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
