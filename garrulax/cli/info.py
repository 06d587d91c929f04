"""`garrulax info`: shows the configuration of a model, its parameters, memory and FLOPs."""

import argparse
import dataclasses
import math
from pathlib import Path

from garrulax import hub, models
from garrulax.cli.models import find_model
from garrulax.core.config import ModelConfig
from garrulax.hub.reading import open_checkpoint
from garrulax.hub.tensors import BITS, open_tensors
from garrulax.models.summary import Summary, bytes_of, summarize

DTYPES = ("float32", "bfloat16", "int8")


def info(args: argparse.Namespace) -> None:
    """Prints the table of a preset or a model folder, or the list of presets."""
    if args.all or args.model is None:
        print("\n".join(models.presets()))
        return
    print(describe(args.model, config_of(args.model)))
    if args.model not in models.presets() and Path(args.model).exists():
        print("\n" + _section("weights", _weights(Path(find_model(args.model)))))


def config_of(name: str) -> ModelConfig:
    """The config of a preset, a model folder or a run.

    Raises:
        ValueError: For an unknown name, naming the nearest preset, and for a folder without a readable model.
        FileNotFoundError: For a run without a model.
    """
    if name in models.presets():
        return models.preset(name)
    if Path(name).exists():
        return hub.load_config(find_model(name))
    return models.preset(name)  # raises an error that names the nearest preset


def describe(name: str, config: ModelConfig) -> str:
    """The table of a config as text, under the name of the model."""
    s = summarize(config)
    sections = [("configuration", _fields(config)), ("parameters", _parts(s)), ("memory", _memory(config, s)),
                ("FLOPs per token", _flops(config, s))]  # fmt: skip
    lines = [f"{name}: {models.family(config).__name__} family, {s.parameters:,} parameters"]
    return "\n\n".join([*lines, *(_section(title, rows) for title, rows in sections)])


def _section(title: str, rows: list[tuple[str, str]]) -> str:
    width = max(len(left) for left, _ in rows)
    return "\n".join([title, *(f"  {left:<{width}}  {right}" for left, right in rows)])


def _weights(folder: Path) -> list[tuple[str, str]]:
    """Rows about the weights in a folder, from the headers of its files."""
    try:
        tensors = open_tensors(folder).values()
    except (FileNotFoundError, ValueError) as error:
        return [("none", str(error))]
    files = sorted({Path(str(t.file.name)).name for t in tensors})
    rows = [("files", ", ".join(files) if len(files) < 4 else f"{files[0]} ... {files[-1]} ({len(files)})")]
    for dtype in sorted({t.dtype for t in tensors}):
        numbers = [math.prod(t.shape) for t in tensors if t.dtype == dtype]
        size = _size(sum(numbers) * BITS[dtype] // 8)
        rows.append((dtype, f"{len(numbers):,} tensors, {sum(numbers):,} numbers, {size}"))
    try:
        open_checkpoint(folder)
    except ValueError as error:
        return [*rows, ("misfit", str(error))]
    return [*rows, ("fit", "all that config.json asks for is there")]


def _fields(config: ModelConfig) -> list[tuple[str, str]]:
    rows = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            changed = [f for f in dataclasses.fields(value) if getattr(value, f.name) != f.default]
            value = ", ".join(f"{f.name} {getattr(value, f.name)}" for f in changed) or "default"
        rows.append((field.name, f"{value:,}" if type(value) is int else str(value)))
    return rows


def _parts(s: Summary) -> list[tuple[str, str]]:
    rows = [(part, f"{n:>18,}  {100 * n / s.parameters:5.1f} %") for part, n in s.parts.items()]
    return [*rows, ("all (tied tensors once)", f"{s.parameters:>18,}")]


def _memory(config: ModelConfig, s: Summary) -> list[tuple[str, str]]:
    rows = [(f"parameters in {dtype}", _size(bytes_of(s.parameters, dtype))) for dtype in DTYPES]
    adam = bytes_of(s.parameters, "float32")
    rows.append(("training with Adam in float32", f"{_size(4 * adam)}  (parameters, gradients, two moments)"))
    cache = bytes_of(s.cache_values, "bfloat16")
    rows.append(
        ("KV cache in bfloat16", f"{_size(cache)} a token, {_size(cache * config.context)} for {config.context:,}")
    )
    wide, half = (_size(bytes_of(s.parameters + s.cache_values * config.context, d)) for d in ("float32", "bfloat16"))
    rows.append(
        ("generating, with full cache", f"{wide} in float32, as a CPU loads 16-bit files if it fits; else {half}")
    )
    return rows


def _flops(config: ModelConfig, s: Summary) -> list[tuple[str, str]]:
    short = f"2 x {s.matmul_parameters:,} weights"
    attention = s.forward_flops - 2 * s.matmul_parameters
    return [
        (
            "forward",
            f"{_power(s.forward_flops)}  = {short} + {_power(attention)} of attention at {config.context:,} tokens",
        ),
        ("training", f"{_power(s.training_flops)}  (three times: the backward pass is twice the forward)"),
    ]


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:,.1f} {unit}" if unit != "B" else f"{count:,.0f} B"
        count /= 1024
    return f"{count:,.1f} TiB"


def _power(count: float) -> str:
    for unit in ("", " k", " M", " G", " T"):
        if count < 1000:
            return f"{count:.4g}{unit}FLOP" if unit else f"{count:.0f} FLOP"
        count /= 1000
    return f"{count:,.4g} PFLOP"
