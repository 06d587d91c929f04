"""`garrulax info`: shows the configuration of a model, its parameters, memory and FLOPs."""

import argparse
import dataclasses
import math
from collections.abc import Collection, Sequence
from pathlib import Path

from garrulax import hub, models
from garrulax.cli import costs, starting
from garrulax.cli.models import find_model
from garrulax.core.config import ModelConfig
from garrulax.hub.download import find_folder
from garrulax.hub.gguf import read_container
from garrulax.hub.gguf.blocks import FORMATS
from garrulax.hub.matching import match
from garrulax.hub.reading import open_checkpoint
from garrulax.hub.tensors import BITS, open_tensors
from garrulax.models.forward_pass import cache_dtype
from garrulax.models.summary import Summary, bytes_of, summarize
from garrulax.quantisation.planned import planned_bytes
from garrulax.sampling.buckets import POWERS_OF_TWO
from garrulax.train.activations import saved_per_token
from garrulax.train.progress import duration

DTYPES = ("float32", "bfloat16")
QUANTISED = {"int8": "a scale a row", "int4": "groups of 128, tables in int8"}


def info(args: argparse.Namespace) -> None:
    """Prints the table of a preset or a model folder, or the list of presets."""
    if args.train:
        print(describe_training(([args.model] if args.model else []) + args.settings))
        return
    if args.settings:
        raise ValueError(f"{args.settings[0]}: settings are for --train only")
    if args.all or args.model is None:
        print("\n".join(models.presets()))
        return
    config = config_of(args.model, args.ignore)
    print(describe(args.model, config))
    if args.model not in models.presets() and Path(args.model).exists():
        print("\n" + _section("weights", _weights(find_folder(find_model(args.model)), config, args.ignore)))


def describe_training(words: Sequence[str]) -> str:
    """Memory and time of a training run as text.

    Args:
        words: As after `garrulax train`: the model and settings.
    """
    settings, model, loaded = starting.chosen(None, starting.settings_words(words))
    config, c = model.config, costs.training_costs(model.config, settings)
    rate, origin = costs.device_rate(settings.precision)
    seconds = c.flops / rate / costs.EFFICIENCY
    n = models.count(config)
    of = {"float32": 4, "bfloat16": 2}
    memory = [
        ("parameters", f"{_size(c.parameters)}  = {of[settings.weights]} x {n:,} ({settings.weights})"),
        ("gradients", f"{_size(c.gradients)}  of every parameter"),
        ("optimizer", f"{_size(c.optimizer)}  {settings.optimizer} in float32"),
        ("computation", f"{_size(c.copies)}  parameters once more in {settings.precision}"),
        ("activations", f"{_size(c.activations)}  = {settings.batch // settings.accumulation} rows x {settings.window} "
                        f"tokens x {saved_per_token(config, settings.remat):,} numbers x "
                        f"{of[settings.precision]} bytes: inputs and outputs of all products, remat={settings.remat}"),
        ("logits", f"{_size(c.logits)}  = rows x tokens x {config.vocab:,} ids, and their gradient"),
        ("saving", f"{_size(c.save)}  copy of the state while a checkpoint is written"),
        ("program", f"{_size(costs.PROGRAM)}  Python, JAX and the compiled step, roughly"),
        ("all", f"{_size(c.memory + costs.PROGRAM)}  on one device; a mesh shares it"),
    ]  # fmt: skip
    if not c.copies:
        memory = [row for row in memory if row[0] != "computation"]
    begin = "its own weights" if loaded else "random weights"
    disk = settings.keep + 1
    work = [
        ("a step", f"{settings.batch} rows x {settings.window} tokens, {_power(c.flops)} (6 N a token, and attention)"),
        ("rate", f"{_power(rate)}/s: {origin}; training reaches about {costs.EFFICIENCY:.0%} of it"),
        ("time", f"{seconds:.3g} s a step, {duration(seconds * settings.steps)} for {settings.steps:,} steps, without "
                 "evaluation and compilation"),
        ("disk", f"{_size(disk * c.save)}  = {disk} checkpoints (keep={settings.keep} and the best one)"),
    ]  # fmt: skip
    head = f"training {settings.preset} from {begin}: {models.family(config).__name__} family, {n:,} parameters"
    return "\n\n".join([head, _section("memory", memory), _section("work", work)])


def config_of(name: str, ignore: Collection[str] = ()) -> ModelConfig:
    """The config of a preset, a model folder, a GGUF file or a run.

    Args:
        name: Its name.
        ignore: Keys of config.json, or of a GGUF file's metadata, to leave out, as in `gx.load`.

    Raises:
        ValueError: For an unknown name, naming the nearest preset, and for a folder without a readable model.
        FileNotFoundError: For a run without a model.
    """
    if name in models.presets():
        return models.preset(name)
    if Path(name).exists() or Path(name).is_symlink():  # a link to nothing is explained there
        return hub.load_config(find_model(name), ignore)
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


def _weights(folder: Path, config: ModelConfig, ignore: Collection[str]) -> list[tuple[str, str]]:
    """Rows about the weights in a folder or GGUF file, from the headers of its files."""
    try:
        tensors = _stored(folder)
    except (FileNotFoundError, ValueError) as error:
        return [("none", str(error))]
    files = sorted({name for name, *_ in tensors})
    rows = [("files", ", ".join(files) if len(files) < 4 else f"{files[0]} ... {files[-1]} ({len(files)})")]
    for dtype in sorted({kind for _, kind, *_ in tensors}):
        of_kind = [(numbers, size) for _, kind, numbers, size in tensors if kind == dtype]
        numbers, size = (sum(column) for column in zip(*of_kind, strict=True))
        rows.append((dtype, f"{len(of_kind):,} tensors, {numbers:,} numbers, {_size(size)}"))
    try:
        if folder.is_file():
            open_checkpoint(folder, ignore)
        else:  # config.json has been read: its warnings are not repeated
            match(open_tensors(folder), models.parameters(config), config, folder)
    except (FileNotFoundError, ValueError) as error:
        return [*rows, ("misfit", str(error))]
    return [*rows, ("fit", "all that config.json asks for is there")]


def _stored(folder: Path) -> list[tuple[str, str, int, int]]:
    """Name of the file, type, number of numbers and of bytes of each stored tensor."""
    if folder.is_file():
        entries = [
            (Path(str(e.file.name)).name, FORMATS[e.kind], e.shape) for e in read_container(folder).tensors.values()
        ]
        return [(file, kind.name, math.prod(shape), kind.size(shape)) for file, kind, shape in entries]
    found = [(Path(str(t.file.name)).name, t.dtype, math.prod(t.shape)) for t in open_tensors(folder).values()]
    return [(file, dtype, count, count * BITS[dtype] // 8) for file, dtype, count in found]


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
    rows += [
        (f"quantised to {kind}", f"{_size(planned_bytes(config, kind))}  ({what})") for kind, what in QUANTISED.items()
    ]
    adam = bytes_of(s.parameters, "float32")
    rows.append(("training with Adam in float32", f"{_size(4 * adam)}  (parameters, gradients, two moments)"))
    cache = bytes_of(s.cache_values, "bfloat16")
    rows.append(
        ("KV cache in bfloat16", f"{_size(cache)} a token, {_size(cache * config.context)} for {config.context:,}")
    )
    lone = POWERS_OF_TWO.of("rows", 1)  # rows of the state of one prompt (docs/decoding.md)
    kept = [bytes_of(lone * s.cache_values * config.context, str(cache_dtype(dtype))) for dtype in DTYPES]
    wide, half = (_size(bytes_of(s.parameters, dtype) + more) for dtype, more in zip(DTYPES, kept, strict=True))
    reading = _size(costs.reading_bytes(config, config.context))
    return [
        *rows,
        (
            f"generating, cache of {lone} full {'row' if lone == 1 else 'rows'}",
            f"{wide} in float32, as a CPU loads 16-bit files if it fits; else {half}",
        ),
        ("  reading a full prompt", f"{reading} more while it lasts, roughly: what one layer computes, in float32"),
        (
            "  the program itself",
            f"{_size(costs.GENERATING)} more on a CPU, roughly: Python, JAX, tokenizer, compiling",
        ),
    ]


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
