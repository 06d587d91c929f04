"""The settings of a training run: read from a TOML file, the command line or a run's folder."""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from garrulax import models
from garrulax.core.config import ModelConfig
from garrulax.core.strategies import STRATEGIES
from garrulax.kernels import sequence
from garrulax.layers.stack import REMAT
from garrulax.train import dedup, lora, schedules, typed
from garrulax.train.data_identity import data_differences, different
from garrulax.train.digests import read_sealed, sealed, write_durably
from garrulax.train.objectives import OBJECTIVES
from garrulax.train.setting_limits import ADAPTER_RATES, DEFAULT_RATES, FINETUNING_RATES, check_limits, named_texts
from garrulax.train.settings_text import pairs, read_changes, with_lists
from garrulax.train.sources import absolute_source, expanded

PRECISIONS = ("float32", "bfloat16")
_RATES = ("lr", "adam_lr", "weight_decay")
RUN_FILE = "run.json"
#: Tokenizers that are no paths; `model` is the one of the model's own folder.
TOKENIZERS = ("sentencepiece", "bytes", "chars", "model")


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings of a training run, except the fields of the model's config.

    Attributes:
        preset: Model to train: a preset (`garrulax info --all`), or a folder, GGUF file, run or hub name with weights.
        corpus: Text to train on: files, folders, patterns, URLs, stdlib; a mixture with weights: a.txt:0.7,b.jsonl:0.3.
        valid: Held-out text, written like corpus; if empty, a part of the corpus is held out.
        tokenizer: sentencepiece (trained on the corpus), bytes or chars (one id for each), model (its own), or a path.
        vocab: Number of token ids, if a sentencepiece tokenizer is trained.
        dedup: Documents left out as copies of earlier ones of their corpus: none, exact, or near (by MinHash).
        dedup_threshold: Least share of common five-word runs (Jaccard index) of near-duplicates.
        objective: causal, prefix or infill; none is the default of the model's family.
        token_blanks: Relative frequency of infill's rows with short blanks; none is the family's (GLM 0.5, 130B 0.3).
        sentence_blanks: Relative frequency of infill's rows with blanks of whole sentences; none: GLM 0.3, 130B 0.
        document_blanks: Relative frequency of infill's rows with one long blank; none: GLM 0.2, 130B 0.7.
        packing: cut (rows cut out of the joined text) or first_fit (whole documents in rows, kept apart).
        isolate: Whether the documents in a row are kept apart: no attention from one to another, own positions each.

        steps: Number of updates.
        batch: Rows in a step, over all processes.
        window: Tokens in a row.
        accumulation: Micro-batches in a batch, computed one after another to save memory.

        optimizer: muon, adamw, lion or adafactor.
        lr: Peak learning rate; none is 0.02 with muon, 0.001 with adamw, 0.0001 with lion, 0.01 with adafactor.
        adam_lr: With muon, peak rate of embeddings, output, norms and biases, which use Adam; none is 0.004.
        schedule: How the learning rate changes: constant, linear, cosine, wsd, inverse_sqrt or warmup_linear.
        warmup: Number of warm-up steps, or a share of all steps if below 1.
        decay: Number of steps of wsd's decay, or a share of all steps if below 1.
        min_lr_ratio: Last learning rate divided by the peak.
        tail_step: Step from which the rate falls from tail_ratio; none: set when resumed with other steps, 0: never.
        tail_ratio: Learning rate at tail_step divided by the peak.
        weight_decay: Decoupled weight decay; none is 0.1 with adamw, 1 with lion, 0 with the others.
        clip: Norm that gradients are clipped to; 0 does not clip.
        beta1: Decay rate of Adam's first moment; the first rate of lion.
        beta2: Decay rate of Adam's second moment; the second rate of lion.
        eps: Added to the denominator in Adam.
        momentum: Decay rate of Muon's momentum.
        layer_decay: Each layer's learning rate divided by that of the layer above it; 1 is the same for all.
        z_loss: Coefficient of the squared log of the softmax's denominator in the training loss; PaLM's is 0.0001.
        label_smoothing: Share of a target's probability that all tokens get alike in the training loss.
        embedding_shrink: Factor of the gradient that the token embedding gets from the lookup; GLM-130B's is 0.1.
        ema: Decay rate of a moving average of the parameters, which is evaluated and saved as the model; 0 is none.
        skip_steps: none stops at a loss that is not finite; not_finite skips such steps, spikes also those far above.
        spike_factor: With skip_steps=spikes, standard deviations above the mean from which a step is skipped.
        spike_window: Number of latest steps that the mean is of.
        most_skipped: Number of steps skipped one after another with which the run stops.

        seed: Decides initial parameters, order of the data, and dropout.
        precision: Dtype of the computation: float32 or bfloat16.
        weights: Dtype of the parameters: float32, or bfloat16, which takes half the memory.
        rounding: Of updated bfloat16 parameters: stochastic, or nearest, which loses small updates.
        lora: Trains adapters of a model with weights: a list of rank=16, alpha=32, targets=query+value, dora=true, ...
        quantize: Numbers that the layers' matrices multiply: none, int8 or fp8 (needs the extra quantize).
        remat: Recomputed in the backward pass to save memory: none, dots (all but matrix products) or full.
        unroll: Compile the layers as straight code, not as a loop; none does so for few layers on a CPU or one GPU.
        dropout: Whether to apply the dropout rates of the model's config.

        mesh: Devices by axis, such as fsdp=4,tensor=2; empty is one device.
        strategy: How the mesh shards parameters and activations: ddp, fsdp, hsdp, tp, fsdp+tp or fsdp+tp+sp.
        context_parallel: How a mesh with the axis sequence shares keys: gather, ring, or auto, the cheaper one.
        strict: Whether to refuse a model of which the strategy leaves an array or a dimension whole.

        log_every: Steps between records of the training loss.
        eval_every: Steps between evaluations; the last step is always evaluated.
        eval_tokens: Most tokens of an evaluation, 0 for all; the one after the last step takes all.
        eval_texts: More held-out texts, evaluated besides valid: a list of NAME=SOURCE, such as code=src,wiki=wiki.txt.
        checkpoint_every: Steps between checkpoints; the last step is always saved.
        keep: Number of latest checkpoints to keep, besides the best one.
        keep_minutes: Minutes of training for each of which one checkpoint is kept for good; 0 keeps none so.
        export_every: Steps between exports of the model in Hugging Face layout, to exports/STEP; 0 is none.
        sample_every: Steps between texts that the model writes into the log; 0 is none.
        sample_prompts: Beginnings of these texts; empty takes one out of the held-out text.
        sample_tokens: Most tokens of such a text.
        profile: Steps to record a profiler trace of, such as 100:103 (100, 101 and 102); empty is none.
        trackers: Services that get the metrics too: wandb, trackio.
    """

    preset: str = "gpt2"
    corpus: tuple[str, ...] = ("stdlib",)
    valid: tuple[str, ...] = ()
    tokenizer: str = "sentencepiece"
    vocab: int = 4096
    dedup: str = "none"
    dedup_threshold: float = 0.8
    objective: str | None = None
    token_blanks: float | None = None
    sentence_blanks: float | None = None
    document_blanks: float | None = None
    packing: str = "cut"
    isolate: bool = False

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
    tail_step: int | None = None
    tail_ratio: float = 1.0
    weight_decay: float | None = None
    clip: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    momentum: float = 0.95
    layer_decay: float = 1.0
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    embedding_shrink: float = 1.0
    ema: float = 0.0
    skip_steps: str = "none"
    spike_factor: float = 6.0
    spike_window: int = 128
    most_skipped: int = 10

    seed: int = 0
    precision: str = "float32"
    weights: str = "float32"
    rounding: str = "stochastic"
    lora: tuple[str, ...] = ()
    quantize: str = "none"
    remat: str = "none"
    unroll: bool | None = None
    dropout: bool = False

    mesh: str = ""
    strategy: str = "fsdp+tp"
    context_parallel: str = "auto"
    strict: bool = False

    log_every: int = 10
    eval_every: int = 250
    eval_tokens: int = 131_072
    eval_texts: tuple[str, ...] = ()
    checkpoint_every: int = 500
    keep: int = 2
    keep_minutes: float = 0.0
    export_every: int = 0
    sample_every: int = 0
    sample_prompts: tuple[str, ...] = ()
    sample_tokens: int = 64
    profile: str = ""
    trackers: tuple[str, ...] = ()

    def __post_init__(self):
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in known:
                raise ValueError(f"{name}={value!r}: choose from {', '.join(known)}")
        for name, default in zip(_RATES, DEFAULT_RATES[self.optimizer], strict=True):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        check_limits(self)
        if lora.read(self.lora) is not None:
            lora.check(self)


_CHOICES = {
    "dedup": dedup.KINDS,
    "objective": tuple(OBJECTIVES),
    "packing": ("cut", "first_fit"),
    "optimizer": tuple(DEFAULT_RATES),
    "schedule": schedules.KINDS,
    "precision": PRECISIONS,
    "weights": PRECISIONS,
    "rounding": ("stochastic", "nearest"),
    "quantize": ("none", "int8", "fp8"),
    "skip_steps": ("none", "not_finite", "spikes"),
    "remat": tuple(REMAT),
    "strategy": tuple(STRATEGIES),
    "context_parallel": ("auto", *sequence.STRATEGIES),
}

#: Settings that a resumed run must not change: its optimizer state or the order of its data would not fit.
FIXED_ON_RESUME = (
    "objective", "token_blanks", "sentence_blanks", "document_blanks", "packing", "isolate", "batch",
    "window", "optimizer", "lora", "seed", "ema", "skip_steps", "spike_window",
)  # fmt: skip

_PATHS = ("preset", "corpus", "valid", "eval_texts", "tokenizer")
#: Settings that a resumed run takes from its folder: the tokenizer is there, and the model in the checkpoint.
_IN_THE_FOLDER = ("preset", "tokenizer", "vocab")


def read_settings(
    file: str | os.PathLike | None = None, overrides: Iterable[str] = (), start: Settings | None = None
) -> tuple[Settings, ModelConfig]:
    """Reads the settings and the model's config of a new run.

    Fields of the model's config are set under `model`: in a table `[model]` of the file, or as `model.layers=4` among
    the overrides.

    Args:
        file: TOML, or None.
        overrides: `key=value` texts, which replace values of the file.
        start: Settings to change; None is the defaults.

    Raises:
        ValueError: For an unknown key, naming the nearest known one, and for values of a wrong type or out of range.
        FileNotFoundError: If the file does not exist.
    """
    return apply_changes(read_changes(file, overrides), start)


def apply_changes(
    changes: Mapping[str, Any], start: Settings | None = None, config: ModelConfig | None = None
) -> tuple[Settings, ModelConfig]:
    """The settings and the model's config with some values changed.

    Args:
        changes: From `read_changes`.
        start: Settings to change; None is the defaults.
        config: Config to change; None is that of the preset.

    Raises:
        ValueError: As `read_settings` does.
    """
    changes = dict(changes)
    model = changes.pop("model", {})
    if not isinstance(model, Mapping):
        raise ValueError(f"model={model!r} is not a table of model fields: write model.layers=4")
    model = {**model, **{k[6:]: changes.pop(k) for k in list(changes) if k.startswith("model.")}}
    if "optimizer" in changes:  # its own default rates, not those of the optimizer before
        changes = {**dict.fromkeys(_RATES), **changes}
    settings = typed.replace(start or Settings(), with_lists(changes))
    return settings, typed.replace(config or models.preset(settings.preset), model, "model.")


def finetuning(config: ModelConfig, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The changes with defaults for a model that was trained before: its tokenizer, AdamW, low rates, long rows.

    Args:
        config: Of the model.
        changes: From `read_changes`; they win over the defaults.
    """
    optimizer = changes.get("optimizer", "adamw")
    table = ADAPTER_RATES if changes.get("lora") else FINETUNING_RATES
    rates = table.get(optimizer, (None, None, None))  # of an unknown one: it is refused later
    return {
        "optimizer": optimizer,
        **dict(zip(_RATES, rates, strict=True)),
        "tokenizer": "model",
        "steps": 200,
        "batch": 4,
        "window": min(512, config.context),
        "warmup": 0.1,
        "eval_every": 50,
        "checkpoint_every": 100,
        **changes,
    }


def write_run_file(folder: str | os.PathLike, settings: Settings, config: ModelConfig, data: Mapping[str, str]) -> None:
    """Writes run.json, the `run_identity`, into a run's folder, if it is not there already."""
    file, text = Path(folder, RUN_FILE), sealed(run_identity(settings, config, data))
    if not (file.is_file() and file.read_bytes() == text.encode()):
        write_durably(file, text)


def read_run_file(folder: str | os.PathLike, overrides: Iterable[str] = ()) -> tuple[Settings, ModelConfig]:
    """Reads the settings and the model's config from a run's folder, to resume the run.

    Args:
        folder: Of the run.
        overrides: Settings to change, as `key=value` texts.

    Raises:
        FileNotFoundError: If it is not the folder of a run.
        ValueError: As `read_settings` does; a `DamagedError` if run.json is not as it was written.
    """
    record = read_record(folder)
    recorded, changes = typed.replace(Settings(), record["settings"]), with_lists(pairs(overrides))
    if model := [name for name in changes if name.partition(".")[0] == "model"]:
        raise ValueError(f"{model[0]}: {folder} goes on with the model that it began with; leave it out")
    new = typed.replace(recorded, changes)
    given = absolute_paths(new)  # what the record says stays as it is
    settings = dataclasses.replace(new, **{k: getattr(given, k) for k in _PATHS if k in changes})
    for name in _IN_THE_FOLDER:
        if getattr(settings, name) != getattr(recorded, name):
            raise ValueError(
                f"{name}={changes[name]}: {folder} goes on with {name}={getattr(recorded, name)}, with which it began"
            )
    return settings, typed.replace(_any_config(record), record["config"], "model.")


def read_record(folder: str | os.PathLike) -> dict[str, Any]:
    """The object in a run's run.json, see `run_identity`. Raises as `read_run_file` does."""
    file = Path(folder, RUN_FILE)
    if not file.exists():
        raise FileNotFoundError(f"{folder} is not the folder of a run: it has no run.json")
    return read_sealed(file)


def _any_config(record: Mapping[str, Any]) -> ModelConfig:
    """A Config of the run's family, all of whose fields the record replaces."""
    for family in models.FAMILIES:
        if _family_name(family) == record.get("family"):
            return next(iter(family.PRESETS.values()))
    raise ValueError(f"there is no family {record.get('family')!r} of models: the run is of another version")


def run_identity(settings: Settings, config: ModelConfig, data: Mapping[str, str]) -> dict[str, Any]:
    """The JSON object that identifies a run in run.json and in every checkpoint.

    Args:
        settings: Of the run.
        config: Of the model.
        data: Hashes, by name, of everything that the batches depend on (`batches.Data.identity`).
    """
    record = {
        "settings": dataclasses.asdict(settings),
        "family": _family_name(models.family(config)),
        "config": dataclasses.asdict(config),
        "data": dict(data),
    }
    return json.loads(json.dumps(record))  # tuples become lists, as in a record read from a file


def differences(current: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """The differences that forbid a run to resume from a checkpoint, such as "config.layers is 4, was 6".

    Args:
        current: `run_identity` of the run.
        saved: `run_identity` in the checkpoint.
    """
    if current.get("family") != saved.get("family"):  # all of their configs differs then
        return [f"family is {current.get('family')}, was {saved.get('family')}"]
    # An older version saved fewer settings: those that it lacks have their defaults.
    defaults = {field.name: field.default for field in dataclasses.fields(Settings)}
    settings, before = ({**defaults, **x["settings"]} for x in (current, saved))
    return [
        *different("config", current["config"], saved["config"]),
        *data_differences(current["data"], saved["data"]),
        *different("settings", *({name: x[name] for name in FIXED_ON_RESUME} for x in (settings, before))),
    ]


def _family_name(family: models.Family) -> str:
    return family.__name__.rsplit(".", 1)[-1]


def absolute_paths(settings: Settings) -> Settings:
    """The settings with paths that mean the same from every folder, so that the run can be resumed from anywhere."""
    corpus, valid = (tuple(map(absolute_source, sources)) for sources in (settings.corpus, settings.valid))
    model, tokenizer = settings.preset, settings.tokenizer
    if model not in models.presets() and os.path.exists(expanded(model)):  # else it may be a name on the hub
        model = os.path.abspath(expanded(model))
    if tokenizer not in TOKENIZERS:
        tokenizer = os.path.abspath(expanded(tokenizer))
    named = named_texts(settings.eval_texts)
    texts = tuple(f"{name}={absolute_source(source)}" for name, sources in named.items() for source in sources)
    return dataclasses.replace(
        settings, corpus=corpus, valid=valid, eval_texts=texts, preset=model, tokenizer=tokenizer
    )
