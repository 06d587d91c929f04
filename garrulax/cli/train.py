"""`garrulax train`: trains a model on text files and saves it in a folder."""

import argparse
import dataclasses
import re
import shutil
import sys
import tempfile
import textwrap
from pathlib import Path

import jax

import garrulax as gx
from garrulax import models
from garrulax.core.config import ModelConfig
from garrulax.hub.tokenizer_training import train_chars, train_sentencepiece
from garrulax.hub.tokenizers import GLM_SPECIALS, GPT_SPECIALS, ByteTokenizer, Tokenizer, load_tokenizer
from garrulax.train import settings as settings_
from garrulax.train.batches import make_data
from garrulax.train.corpus import Corpus, xz_bits_per_byte
from garrulax.train.loop import Result, Run
from garrulax.train.loop import train as run_training
from garrulax.train.objectives import objective_name
from garrulax.train.settings import Settings
from garrulax.train.shards import build_shards

# Folders in the folder of a run.
TOKENIZER = "tokenizer"
MODEL = "model"
#: The first setting of each group in `garrulax train --list`, and the title of the group.
GROUPS = {
    "preset": "Model and data",
    "steps": "Amount of training",
    "optimizer": "Optimizer",
    "seed": "Computation",
    "mesh": "Devices",
    "log_every": "Reports and checkpoints",
}


def train(args: argparse.Namespace) -> None:
    """Reads the settings, prepares tokenizer and data, trains, and saves the model in the run's folder."""
    if args.list:
        print(_list_settings())
        return
    if args.distributed is not None:
        _initialize_distributed(args.distributed)
    settings, config, folder = _read_arguments(args)
    corpus = Corpus(settings.corpus, valid=settings.valid or None)
    say(f"corpus: {', '.join(settings.corpus)}, {corpus.documents:,} documents, {corpus.bytes:,} bytes, "
        f"sha256 {corpus.hash[:12]}")  # fmt: skip
    tokenizer = _tokenizer(settings, config, corpus, folder, resume=bool(args.resume))
    dataset = build_shards(corpus, tokenizer)
    say(f"tokens: {len(dataset.train):,} to train on, {len(dataset.valid):,} held out, "
        f"{dataset.valid.bytes / len(dataset.valid):.2f} bytes a token, {tokenizer.vocab:,} token ids")  # fmt: skip
    config = config if args.resume else fit(config, settings, tokenizer)
    say(f"model: {settings.preset}, {gx.count(config):,} parameters, on {_devices(settings)}")
    run = Run(config, settings, make_data(dataset, settings, config, tokenizer), folder)
    if not args.resume and jax.process_index() == 0:
        _refuse_old_run(folder)
        tokenizer.save(folder / TOKENIZER)

    def export(result: Result) -> None:
        gx.save(gx.Model(config, result.params, tokenizer), folder / MODEL)

    result = run_training(run, resume=bool(args.resume), on_finish=export)
    _report(result, settings, config, corpus, folder)


def say(line: str) -> None:
    """Prints a line to stderr, in the first process only."""
    if jax.process_index() == 0:
        print(line, file=sys.stderr, flush=True)


def _read_arguments(args: argparse.Namespace) -> tuple[Settings, ModelConfig, Path]:
    words = [*args.settings, *([f"mesh={args.mesh}"] if args.mesh else [])]
    words = [word if "=" in word else f"preset={word}" for word in words]
    if args.resume:
        return *settings_.read_run_file(args.resume, words), Path(args.resume)
    settings, config = settings_.read_settings(args.config, words)
    return settings, config, Path(args.run or Path("runs", settings.preset))


def _initialize_distributed(value: str) -> None:
    if not value:  # JAX finds the other processes itself, on a TPU pod or under SLURM
        jax.distributed.initialize()
        return
    address, *numbers = value.split(",")
    if len(numbers) != 2 or not all(n.isdigit() for n in numbers):
        raise ValueError(f"--distributed {value} is not like localhost:1234,2,0 (address, processes, this process)")
    jax.distributed.initialize(address, int(numbers[0]), int(numbers[1]))


def _refuse_old_run(folder: Path) -> None:
    if (folder / "run.json").exists():
        raise FileExistsError(
            f"{folder} holds a run: continue it with garrulax train --resume {folder}, or choose another --run"
        )


def _tokenizer(settings: Settings, config: ModelConfig, corpus: Corpus, folder: Path, resume: bool) -> Tokenizer:
    if resume:
        return load_tokenizer(folder / TOKENIZER)
    with tempfile.TemporaryDirectory() as temporary:  # save and load it, as a resumed run does, to get the same ids
        _new_tokenizer(settings, config, corpus).save(temporary)
        return load_tokenizer(temporary)


def _new_tokenizer(settings: Settings, config: ModelConfig, corpus: Corpus) -> Tokenizer:
    specials = GPT_SPECIALS if models.blanks(config) is None else GLM_SPECIALS
    if settings.tokenizer == "sentencepiece":
        texts = (document.text for document in corpus.split("train"))
        try:
            return train_sentencepiece(texts, vocab=settings.vocab, specials=specials)
        except ValueError as error:
            if "vocabulary" not in str(error):
                raise
            raise ValueError(f"{error}; set it with vocab=NUMBER (now vocab={settings.vocab})") from error
    if settings.tokenizer == "chars":
        return train_chars("".join(document.text for document in corpus), specials=specials)
    if settings.tokenizer == "bytes":
        return ByteTokenizer(specials)
    return load_tokenizer(settings.tokenizer)


def fit(config: ModelConfig, settings: Settings, tokenizer: Tokenizer) -> ModelConfig:
    """Fits a model's config to a tokenizer.

    Args:
        config: Of the model.
        settings: Of the run.
        tokenizer: To take the control tokens from, and the size of the vocabulary if `config.vocab` is the preset's. A
            different `config.vocab`, chosen by the user, is kept.

    Raises:
        ValueError: If the vocabulary is too small for the tokenizer, the window longer than the model's context, or a
            control token missing; and for the GLMs whose blanks `train.infill` cannot make (GLM-130B, ChatGLM-6B).
    """
    family = models.family(config)
    if family.OBJECTIVE is None:
        raise ValueError(
            f"garrulax train makes the blanks of the original GLM, not those of {settings.preset}: choose a glm "
            "preset, or give garrulax.train.step batches of your own"
        )
    if config.vocab == models.preset(settings.preset).vocab:
        config = dataclasses.replace(config, vocab=tokenizer.vocab)
    if config.vocab < tokenizer.vocab:
        trains_one = settings.tokenizer == "sentencepiece"
        raise ValueError(
            f"model.vocab={config.vocab} is smaller than the tokenizer's {tokenizer.vocab} ids: leave out model.vocab"
            + (f", or train a smaller tokenizer with vocab={config.vocab}" if trains_one else "")
        )
    if settings.window > config.context:
        raise ValueError(f"window={settings.window} is longer than model.context={config.context}: change one of them")
    missing = [name for name in family.CONTROL_TOKENS.values() if name not in tokenizer.specials]
    if not family.CONTROL_TOKENS:
        return dataclasses.replace(config, bos=tokenizer.bos, eos=tokenizer.eos)
    if missing or tokenizer.eos is None:
        raise ValueError(
            f"{family.__name__} needs control tokens that the tokenizer lacks: {', '.join(missing) or 'an end of text'}"
        )
    ids = {field: tokenizer.specials[name] for field, name in family.CONTROL_TOKENS.items()}
    pad = tokenizer.eos if tokenizer.pad is None else tokenizer.pad
    return dataclasses.replace(config, **ids, eos=tokenizer.eos, pad=pad)


def _devices(settings: Settings) -> str:
    device = jax.devices()[0]
    return (
        f"{jax.device_count()} {device.device_kind} devices as {settings.mesh}" if settings.mesh else device.device_kind
    )


def _list_settings() -> str:
    """All settings with their defaults and meanings, in the words of the docstring of `Settings`."""
    meanings = dict(re.findall(r"^ +(\w+): (.+)$", Settings.__doc__ or "", re.MULTILINE))
    rows = [(f.name, f"{f.name}={_written(f.default)}") for f in dataclasses.fields(Settings)]
    left = max(len(row) for _, row in rows) + 4
    width = max(60, min(120, shutil.get_terminal_size((120, 24)).columns))
    lines = ["Settings with their defaults. Write them as KEY=VALUE, and lists with commas: corpus=one.txt,two.txt"]
    for name, row in rows:
        lines += ["", GROUPS[name]] if name in GROUPS else []
        lines += textwrap.wrap(
            meanings[name].rstrip("."), width, initial_indent=f"  {row}".ljust(left), subsequent_indent=" " * left
        )
    return "\n".join([*lines, "", "Fields of the model's config", "  model.FIELD=...".ljust(left) + "such as "
                      "model.layers=6; `garrulax info PRESET` shows them all"])  # fmt: skip


def _written(value: object) -> str:
    """A default as it is written on the command line."""
    if isinstance(value, tuple):
        return ",".join(value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _report(result: Result, settings: Settings, config: ModelConfig, corpus: Corpus, folder: Path) -> None:
    e = result.evaluation
    if not result.finished or e is None:
        return
    say(f"\nheld-out loss {e.loss:.4f} nats a token, perplexity {e.perplexity:.2f}")
    if e.bits_per_byte is not None and objective_name(settings.objective, config) == "causal":
        xz = xz_bits_per_byte(document.text for document in corpus.split("valid"))
        say(f"{e.bits_per_byte:.3f} bits a byte of held-out text; xz -9 needs {xz:.3f} for the same text "
            f"(corpus sha256 {corpus.hash[:12]})")  # fmt: skip
    say(f"model in {folder / MODEL}" + (f", loss curves in {result.picture}" if result.picture else ""))
    if models.blanks(config) is not None:
        say(f"next: garrulax fill {folder} 'for i in [MASK](10):'")
    else:
        say(f"next: garrulax generate {folder} 'def main():'")
