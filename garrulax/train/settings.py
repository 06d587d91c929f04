"""All settings of a training run, and reading them from a TOML file, the command line and a run's folder."""

import dataclasses
import json
import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from garrulax import models
from garrulax.core.sharding import RULES
from garrulax.layers.stack import REMAT
from garrulax.train import schedules, typed
from garrulax.train.objectives import OBJECTIVES
from garrulax.train.optimizers import OPTIMIZERS
from garrulax.train.step import PRECISIONS

#: Peak learning rates and decay where the settings give none: (lr, adam_lr, weight_decay).
_RATES = {"muon": (0.02, 4e-3, 0.0), "adamw": (1e-3, 1e-3, 0.1)}


@dataclasses.dataclass(frozen=True)
class Settings:
    """A training run, but for the sizes of the model.

    Data. preset: the model to start from (`garrulax.presets()`). corpus: files, folders, globs or "stdlib". valid:
    held-out sources; none holds out a part of the corpus. tokenizer: "sentencepiece" trains one of `vocab` ids, "bytes"
    and "chars" take one id a byte or character, anything else is a path. objective: "causal" or "infill"; None is
    what the family was made for.
    token_blanks, sentence_blanks, document_blanks: shares of infill's three kinds of blanks.

    Amount. steps: updates in all. batch: rows of a step, over all processes. window: tokens in a row. accumulation:
    micro-batches that a batch is cut into, one after another.

    Optimizer. optimizer: "muon" or "adamw". lr: peak rate. adam_lr: peak rate of the embeddings, output and vectors
    that Muon leaves to Adam. None takes the optimizer's default. schedule: constant, linear, cosine, wsd or
    warmup_linear. warmup and decay (wsd): steps, or below 1 a share of them. min_lr_ratio: the last rate in terms of
    the peak. weight_decay: decoupled. clip: greatest norm of the gradient, 0 for none. beta1, beta2, eps: Adam's.
    momentum: Muon's.

    Numbers. seed: of initial weights, order of the data and dropout. precision: dtype of the computation ("float32",
    "bfloat16"); parameters are kept in float32. remat: what the backward pass recomputes (none, dots, full).
    unroll: lay the layers out instead of scanning them; None does so for few layers on a CPU.
    dropout: whether to use the rates of the model's config.

    Devices. mesh: such as "fsdp=4,tensor=2"; empty is one device. rules: sharding rules, a name in
    `core.sharding.RULES`.

    Keeping watch. log_every, eval_every, checkpoint_every: steps; the last step is always evaluated and kept.
    eval_tokens: most held-out tokens of an evaluation on the way, 0 for all; the last one takes all. keep: latest
    checkpoints that stay on disk, beside the best.
    """

    preset: str = "gpt2"
    corpus: tuple[str, ...] = ("stdlib",)
    valid: tuple[str, ...] = ()
    tokenizer: str = "sentencepiece"
    vocab: int = 4096
    objective: str | None = None
    token_blanks: float = 0.5
    sentence_blanks: float = 0.3
    document_blanks: float = 0.2

    steps: int = 2000
    batch: int = 12
    window: int = 64
    accumulation: int = 1

    optimizer: str = "muon"
    lr: float | None = None
    adam_lr: float | None = None
    schedule: str = "cosine"
    warmup: float = 0.05
    decay: float = 0.2
    min_lr_ratio: float = 0.1
    weight_decay: float | None = None
    clip: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    momentum: float = 0.95

    seed: int = 0
    precision: str = "float32"
    remat: str = "none"
    unroll: bool | None = None
    dropout: bool = False

    mesh: str = ""
    rules: str = "fsdp+tp"

    log_every: int = 10
    eval_every: int = 250
    eval_tokens: int = 131_072
    checkpoint_every: int = 500
    keep: int = 2

    def __post_init__(self):
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in known:
                raise ValueError(f"{name}={value!r}: choose from {', '.join(known)}")
        for name in ("steps", "batch", "window", "accumulation", "log_every", "eval_every", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name, default in zip(("lr", "adam_lr", "weight_decay"), _RATES[self.optimizer], strict=True):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        for name in ("lr", "adam_lr", "weight_decay", "clip", "warmup", "decay", "eval_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.batch % self.accumulation:
            raise ValueError(f"batch={self.batch} cannot be cut into accumulation={self.accumulation} equal parts")


_CHOICES = {
    "objective": tuple(OBJECTIVES),
    "optimizer": OPTIMIZERS,
    "schedule": schedules.KINDS,
    "precision": tuple(PRECISIONS),
    "remat": tuple(REMAT),
    "rules": tuple(RULES),
}

#: What a resumed run may not change: its weights, optimizer state or order of data would not fit.
LASTING = ("objective", "token_blanks", "sentence_blanks", "document_blanks", "batch", "window", "optimizer", "seed")


def read(
    file: str | os.PathLike | None = None, overrides: Iterable[str] = (), start: Settings | None = None
) -> tuple[Settings, Any]:
    """(Settings, Config of the model) from a TOML file and `key=value` overrides, which win.

    Model fields are those of the family's Config under `model`: a table `[model]` in the file, `model.layers=4` among
    the overrides. start: settings to begin from, such as a recipe's.

    Raises ValueError for unknown keys, with the nearest known one, and for values of the wrong type or out of range;
    FileNotFoundError for a missing file.
    """
    changes = {**_toml(file), **_pairs(overrides)}
    model = changes.pop("model", {})
    if not isinstance(model, Mapping):
        raise ValueError(f"model={model!r} is not a table of model fields: write model.layers=4")
    model = {**model, **{k[6:]: changes.pop(k) for k in list(changes) if k.startswith("model.")}}
    settings = typed.replace(start or Settings(), changes)
    return settings, typed.replace(models.preset(settings.preset), model, "model.")


def save(folder: str | os.PathLike, settings: Settings, config: Any, data: Mapping[str, str]) -> None:
    """Writes run.json: the settings, the model's config, and what identifies the data."""
    record = identity(settings, config, data)
    Path(folder, "run.json").write_text(json.dumps(record, indent=2) + "\n")


def load(folder: str | os.PathLike, overrides: Iterable[str] = ()) -> tuple[Settings, Any]:
    """(Settings, Config) of a run's folder, settings changed by `key=value` overrides: what a resumed run needs.

    Raises FileNotFoundError if it is not the folder of a run, ValueError as `read` does.
    """
    file = Path(folder, "run.json")
    if not file.exists():
        raise FileNotFoundError(f"{folder} is not the folder of a run: it has no run.json")
    record = json.loads(file.read_text())
    settings = typed.replace(typed.replace(Settings(), record["settings"]), _pairs(overrides))
    return settings, typed.replace(models.preset(settings.preset), record["config"], "model.")


def identity(settings: Settings, config: Any, data: Mapping[str, str]) -> dict[str, Any]:
    """What a checkpoint says about its run, as JSON: settings, config, and hashes of tokenizer and data set."""
    record = {"settings": dataclasses.asdict(settings), "config": dataclasses.asdict(config), "data": dict(data)}
    return json.loads(json.dumps(record))  # tuples become lists, as they are read back


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """What keeps a run from going on from a checkpoint of another identity: "config.layers is 4, was 6", ..."""
    found = []
    for part in ("config", "data", "settings"):
        for name in sorted(ours[part].keys() | theirs[part].keys()):
            now, was = ours[part].get(name), theirs[part].get(name)
            if now != was and (part != "settings" or name in LASTING):
                found.append(f"{part}.{name} is {now!r}, was {was!r}")
    return found


def _toml(file: str | os.PathLike | None) -> dict[str, Any]:
    if file is None:
        return {}
    if not Path(file).exists():
        raise FileNotFoundError(f"no settings file {file}")
    try:
        return tomllib.loads(Path(file).read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{file} is not valid TOML: {error}") from None


def _pairs(overrides: Iterable[str]) -> dict[str, str]:
    pairs = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ValueError(f"{text!r} is not like key=value")
        pairs[key.strip()] = value.strip()
    return pairs
