"""`garrulax convert`: writes a model folder as another, with another dtype, file size or dialect."""

import argparse
import dataclasses
import sys
from pathlib import Path

import jax

import garrulax as gx
from garrulax.cli import quantise, starting
from garrulax.cli.bar import Bar
from garrulax.cli.models import find_model
from garrulax.core.dtypes import parameter_dtype
from garrulax.hub.converting import convert_folder
from garrulax.train.weights import read_weights


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
