"""`garrulax train`: trains a model on text files and saves it in a folder."""

import argparse
import contextlib
import dataclasses
import re
import shlex
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path

import jax
from jax.experimental import multihost_utils

import garrulax as gx
from garrulax import models
from garrulax.cli import starting
from garrulax.cli.models import ADAPTER
from garrulax.cli.samples import Samples
from garrulax.cli.starting import Start, fit
from garrulax.cli.train_medusa import train_medusa
from garrulax.core.spec import Tree
from garrulax.hub.tokenizers import Tokenizer
from garrulax.train import lock, peers, progress, spare
from garrulax.train.batches import make_data, with_new_text
from garrulax.train.components import check_length
from garrulax.train.corpus import Corpora, xz_bits_per_byte
from garrulax.train.eval_texts import with_eval_texts
from garrulax.train.freed_memory import run_in_the_calling_thread
from garrulax.train.loop import Result, Run
from garrulax.train.loop import train as run_training
from garrulax.train.objectives import objective_name
from garrulax.train.settings import Settings
from garrulax.train.shards import Dataset, build_shards
from garrulax.train.sources import expanded

MODEL = "model"  # folder of the trained model in the folder of a run
EXPORTS = "exports"  # folder of the models that are saved on the way, by step
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
    run_in_the_calling_thread()
    if args.medusa:
        train_medusa(args)
        return
    if args.choices is not None or args.heads is not None:
        raise ValueError("--heads and --choices belong to --medusa")
    if args.distributed is not None:
        _initialize_distributed(args.distributed)
    with contextlib.ExitStack() as stack:
        _train(_begin(args, stack), bool(args.resume))


def _begin(args: argparse.Namespace, stack: contextlib.ExitStack) -> Start:
    """The start of the run, with the lock on its folder; of a resumed run, with damaged files put back."""
    if not args.resume:
        begun = starting.start(args)
        stack.enter_context(peers.watched(begun.folder))
        stack.enter_context(lock.held(begun.folder))
        starting.check_new(begun.folder)  # again: another process may have begun one meanwhile
        return begun
    folder = Path(expanded(args.resume))
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not the folder of a run: there is no such folder")
    stack.enter_context(peers.watched(folder))
    stack.enter_context(lock.held(folder))
    if jax.process_index() == 0:
        for line in spare.mend(folder):
            say(line)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("files of the run are mended")
    return starting.start(args)


def _train(begun: Start, resume: bool) -> None:
    settings = begun.settings
    corpus = starting.corpora(settings)
    datasets = starting.cached_datasets(begun)
    if datasets is None:
        starting.check_corpus(begun, corpus)
        say(f"corpus: {', '.join(settings.corpus)}, {corpus.documents:,} documents, {corpus.bytes:,} bytes, "
            f"sha256 {starting.short(corpus.hash)}")  # fmt: skip
        begun = begun if resume else starting.with_tokenizer(begun, corpus)
        datasets = [build_shards(part, _tokenizer_of(begun), say=say) for part in corpus.parts]
    else:
        say(f"corpus: {', '.join(settings.corpus)}, its token ids from the cache, "
            f"sha256 {starting.short(begun.recorded['corpus'])}")  # fmt: skip
    tokenizer = _tokenizer_of(begun)
    for dataset in datasets:
        check_length(dataset.valid, 1)
    held_out = datasets[:1] if settings.valid else datasets  # `valid` is the held-out text of every corpus
    train = sum(len(d.train) for d in datasets)
    valid, size = (sum(map(count, held_out)) for count in (lambda d: len(d.valid), lambda d: d.valid.bytes))
    say(f"tokens: {train:,} to train on, {valid:,} held out, "
        f"{size / valid:.2f} bytes a token, {tokenizer.vocab:,} token ids")  # fmt: skip
    config = begun.model.config
    if begun.loaded:
        starting.check(config, settings, tokenizer)
    elif not resume:
        config = fit(config, settings, tokenizer)
    begun = dataclasses.replace(begun, model=begun.model.replace(config=config))
    say(f"model: {settings.preset}, {gx.count(config):,} parameters, on {_devices(settings)}")
    data = make_data(datasets, settings, config, tokenizer)
    for line in data.notes:
        say(line)
    data = with_eval_texts(data, settings, datasets[0], config, tokenizer)
    starting.check_eval_texts(begun, data.identity)
    if begun.new_data:
        data = with_new_text(data, begun.recorded)
    if not resume and jax.process_index() == 0:
        starting.save_tokenizer(begun)

    def export(params: Tree, step: int) -> None:
        save_model(begun, params, begun.folder / EXPORTS / str(step))

    def finish(result: Result) -> None:
        save_model(begun, result.params, begun.folder / product(begun))

    prompts = settings.sample_prompts or (_prompt(begun, datasets[0]),)
    samples = Samples(begun.model, prompts, settings.sample_tokens, settings.mesh) if settings.sample_every else None
    run = Run(config, settings, data, begun.folder, params=begun.params, export=export, write_samples=samples)
    _report(run_training(run, resume=resume, on_finish=finish), begun, corpus, datasets)


def product(begun: Start) -> str:
    """The folder, in that of a run, of what was trained."""
    return ADAPTER if begun.settings.lora else MODEL


def save_model(begun: Start, params: Tree, folder: Path) -> None:
    """Saves the model, or the adapter alone if the weights of the model are frozen."""
    if begun.settings.lora:
        gx.save_adapter(begun.with_params(params), folder, base=begun.settings.preset)
    else:
        gx.save(begun.with_params(params), folder)


def say(line: str) -> None:
    """Prints a line to stderr, in the first process only."""
    if jax.process_index() == 0:
        progress.write(f"{line}\n")


def _initialize_distributed(value: str) -> None:
    if not value:  # JAX finds the other processes itself, on a TPU pod or under SLURM
        jax.distributed.initialize()
        return
    address, *numbers = value.split(",")
    if len(numbers) != 2 or not all(n.isdigit() for n in numbers):
        raise ValueError(f"--distributed {value} is not like localhost:1234,2,0 (address, processes, this process)")
    jax.distributed.initialize(address, int(numbers[0]), int(numbers[1]))


def _tokenizer_of(begun: Start) -> Tokenizer:
    assert begun.model.tokenizer is not None  # `starting` has set or refused it
    return begun.model.tokenizer


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
    lines = [
        "Settings with their defaults. Write them as KEY=VALUE, and lists with commas: corpus=one.txt,two.txt",
        "For a model with weights other defaults hold: tokenizer=model optimizer=adamw lr=3e-05 weight_decay=0 "
        "warmup=0.1",
        "steps=200 batch=4 window=512 (or the model's context) eval_every=50 checkpoint_every=100",
    ]
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


def _report(result: Result, begun: Start, corpus: Corpora, datasets: Sequence[Dataset]) -> None:
    e, folder, config = result.evaluation, begun.folder, begun.model.config
    if not result.finished or e is None:
        return
    say(f"\nheld-out loss {e.loss:.4f} nats a token, perplexity {e.perplexity:.2f}")
    if e.bits_per_byte is not None and objective_name(begun.settings.objective, config) == "causal":
        sha256 = ",".join(str(dataset.meta["corpus"]) for dataset in datasets)
        xz = _xz(corpus, sha256)
        same = "" if xz is None else f"; xz -9 needs {xz:.3f} for the same text"
        say(f"{e.bits_per_byte:.3f} bits a byte of held-out text{same} (corpus sha256 {starting.short(sha256)})")
    say(
        f"{product(begun)} in {folder / product(begun)}"
        + (f", loss curves in {result.picture}" if result.picture else "")
    )
    command = "generate" if models.blanks(config) is None else "fill"
    say(f"next: {shlex.join(['garrulax', command, str(folder), _prompt(begun, datasets[0])])}")


def _xz(corpus: Corpora, sha256: str) -> float | None:
    """Bits a byte of `xz -9`; None if a resumed run's text is not there any more, or is another one."""
    try:
        return xz_bits_per_byte(d.text for d in corpus.split("valid")) if corpus.hash == sha256 else None
    except (OSError, ValueError):
        return None


def _prompt(begun: Start, dataset: Dataset) -> str:
    """A beginning for the trained model to continue, or a text with a blank, out of the held-out text.

    So it has no character that the tokenizer does not know. It takes at most a quarter of the model's context.
    """
    tokenizer, config = _tokenizer_of(begun), begun.model.config
    ids = [int(i) for i in dataset.valid[:256] if int(i) not in tokenizer.specials.values()]
    lines = [line.strip().split("\ufffd")[0] for line in tokenizer.decode(ids).splitlines()]
    line = next((line for line in lines if len(line) > 1 and not line.startswith("-")), "a")[:40]
    line = line.rsplit(" ", 1)[0] if len(line) == 40 else line
    while len(line) > 1 and len(tokenizer.prompt(line)) > max(1, config.context // 4):
        line = line[:-1]
    if models.blanks(config) is None:
        return line
    words = line.split(" ")
    return " ".join(["[MASK]" if i == len(words) // 2 else word for i, word in enumerate(words)] if len(words) > 1
                    else [f"{line}[MASK]"])  # fmt: skip
