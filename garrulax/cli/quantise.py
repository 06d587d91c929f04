"""`garrulax convert --quantise`: writes a model with quantised weights, and reports what that changed."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import garrulax as gx
from garrulax.cli.bar import Bar
from garrulax.cli.models import find_model
from garrulax.quantisation import MatrixError

METHODS = ("gptq", "awq", "smoothquant")  # options that need a text
HELD_OUT = 0.1  # share of the calibration text that only measures the perplexity
MOST_HELD_OUT, MOST_READ = 20_000, 200_000  # characters


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for options that do not go together."""
    if args.quantise is None:
        given = [f"--{name}" for name in ("group", *METHODS, "calibrate", "format") if getattr(args, name)]
        if given:
            raise ValueError(f"{given[0]} needs --quantise KIND, such as --quantise int4")
        return
    if args.step is not None or args.dtype is not None:
        raise ValueError("--quantise does not go with --step and --dtype: convert first, then quantise the folder")
    methods = _methods(args)
    if len(methods) > 1:
        raise ValueError(f"--{methods[0]} and --{methods[1]} are two methods: give one")
    if methods and args.calibrate is None:
        raise ValueError(f"--{methods[0]} needs a text: --calibrate FILE")


def _methods(args: argparse.Namespace) -> list[str]:
    return [name for name in METHODS if getattr(args, name)]


def write_quantised(args: argparse.Namespace) -> None:
    """Runs the command; shows a progress bar if stderr is a terminal."""
    read, held = (None, None) if args.calibrate is None else _texts(Path(args.calibrate))
    model = gx.load(find_model(args.source), dtype="float32", ignore=args.ignore)
    method = next(iter(_methods(args)), "rtn")
    bar = Bar("") if sys.stderr.isatty() else None
    errors: list[MatrixError] = []

    def progress(error: MatrixError, total: int) -> None:
        errors.append(error)
        if bar is not None:
            bar.update(len(errors), total)

    texts = None if method == "rtn" or read is None else [read]
    small = gx.quantise(model, args.quantise, args.group, method, texts, progress=progress)
    if bar is not None:
        bar.close()
    gx.save(small, args.target, args.max_shard_size, quantised=args.format or "compressed-tensors")
    print("\n".join(report(errors)))
    if held is not None:
        before, after = (
            gx.perplexity(m, held, window=min(512, model.config.context)).perplexity for m in (model, small)
        )
        print(f"perplexity of the last {len(held):,} characters: {before:.4f} before, {after:.4f} after")
    print(f"model in {args.target}", file=sys.stderr)


def report(errors: Sequence[MatrixError]) -> list[str]:
    """The lines of a table: the relative error of each layer's weights, and of its outputs for the calibration text."""
    layers: dict[str, list[MatrixError]] = {}
    for error in errors:
        top, _, rest = error.name.partition("/")
        number = rest.partition("/")[0]
        layers.setdefault(f"layer {number}" if top == "blocks" and number.isdigit() else top, []).append(error)
    outputs = errors[0].output is not None
    lines = [f"{'relative error of':<20}{'weights':>10}" + (f"{'outputs':>10}" if outputs else "")]
    for name, some in layers.items():
        line = f"{name:<20}{np.mean([e.weight for e in some]):>10.4f}"
        lines.append(line + (f"{np.mean([e.output for e in some if e.output is not None]):>10.4f}" if outputs else ""))
    worst = max(errors, key=lambda e: e.weight if e.output is None else e.output)
    return [*lines, f"largest: {worst.name}, {worst.weight if worst.output is None else worst.output:.4f}"]


def _texts(path: Path) -> tuple[str, str]:
    """Splits a text into a part for calibration and its end, on which the perplexity is measured."""
    text = path.read_text(encoding="utf-8")
    count = min(int(len(text) * HELD_OUT), MOST_HELD_OUT)
    if count < 100:
        raise ValueError(f"{path} has {len(text):,} characters: calibration needs at least 1,000")
    return text[:-count][:MOST_READ], text[-count:]
