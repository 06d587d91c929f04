"""Values that settings may have. What is wrong is said before anything is read or compiled."""

import math
import re
from typing import Any

from garrulax.train.sources import mixture

#: Default (lr, adam_lr, weight_decay) of each optimizer.
DEFAULT_RATES = {
    "muon": (0.02, 4e-3, 0.0),
    "adamw": (1e-3, 1e-3, 0.1),
    "lion": (1e-4, 1e-4, 1.0),
    "adafactor": (0.01, 0.01, 0.0),
}
#: The same for a model that was trained before.
FINETUNING_RATES = {
    "muon": (6e-4, 3e-5, 0.0),
    "adamw": (3e-5, 3e-5, 0.0),
    "lion": (3e-6, 3e-6, 0.0),
    "adafactor": (1e-3, 1e-3, 0.0),
}
#: The same for adapters, which learn at about ten times the rate of all weights.
ADAPTER_RATES = {
    "adamw": (2e-4, 2e-4, 0.0),
    "lion": (2e-5, 2e-5, 0.0),
    "adafactor": (1e-3, 1e-3, 0.0),
}
TRACKERS = ("wandb", "trackio")
_COUNTS = ("steps", "batch", "window", "accumulation", "log_every", "eval_every", "checkpoint_every", "keep")
_NOT_NEGATIVE = ("lr", "adam_lr", "weight_decay", "clip", "eps", "warmup", "decay", "min_lr_ratio", "tail_step",
                 "tail_ratio", "token_blanks", "sentence_blanks", "document_blanks", "eval_tokens",
                 "keep_minutes")  # fmt: skip
#: Setting -> least value, greatest value, and whether each of them is allowed.
_RANGES = {
    "dedup_threshold": (0, 1, False, True),
    "layer_decay": (0, 1, False, True),
    "z_loss": (0, 1, True, True),
    "label_smoothing": (0, 1, True, False),
    "embedding_shrink": (0, 1, True, True),
    "ema": (0, 1, True, False),
    "beta1": (0, 1, True, False),
    "beta2": (0, 1, True, False),
    "momentum": (0, 1, True, False),
    "spike_factor": (0, 1e9, False, True),
    "spike_window": (8, 1e9, True, True),
    "most_skipped": (1, 1e9, True, True),
    "export_every": (0, 1e12, True, True),
    "sample_every": (0, 1e12, True, True),
    "sample_tokens": (1, 1e9, True, True),
}


def check_limits(settings: Any) -> None:
    """Raises ValueError, which names the setting, for a value of `Settings` out of range or of another form."""
    mixture(settings.corpus)  # refuses weights that do not fit together
    for name in _COUNTS:
        if getattr(settings, name) < 1:
            raise ValueError(f"{name}={getattr(settings, name)} must be at least 1")
    for name in _NOT_NEGATIVE:
        value = getattr(settings, name) or 0
        if value < 0:
            raise ValueError(f"{name}={value} must not be negative")
        if not math.isfinite(value):
            raise ValueError(f"{name}={value} must be a finite number")
    if settings.batch % settings.accumulation:
        raise ValueError(f"batch={settings.batch} cannot be cut into accumulation={settings.accumulation} equal parts")
    for name, (least, greatest, with_least, with_greatest) in _RANGES.items():
        value = getattr(settings, name)
        above = value >= least if with_least else value > least
        below = value <= greatest if with_greatest else value < greatest
        if not (above and below):
            start = f"at least {least}" if with_least else f"above {least}"
            end = "" if greatest > 1 else f" and {'at most' if with_greatest else 'below'} {greatest}"
            raise ValueError(f"{name}={value} must be {start}{end}")
    if profiled(settings.profile).stop > settings.steps + 1:
        raise ValueError(f"profile={settings.profile} goes beyond the {settings.steps} steps of the run")
    named_texts(settings.eval_texts)
    unknown = [name for name in settings.trackers if name not in TRACKERS]
    if unknown:
        raise ValueError(f"trackers={','.join(unknown)}: choose from {', '.join(TRACKERS)}")


def profiled(text: str) -> range:
    """The steps of a setting such as "100:103"; empty for "". Raises ValueError for another text."""
    if not text:
        return range(0)
    match = re.fullmatch(r"([0-9]+):([0-9]+)", text)
    if not match or not 1 <= int(match[1]) < int(match[2]):
        raise ValueError(f"profile={text!r} is not like 100:103, the first step and the one after the last")
    return range(int(match[1]), int(match[2]))


def named_texts(values: tuple[str, ...]) -> dict[str, list[str]]:
    """The sources of each text of a setting such as ("code=src", "wiki=a.txt", "wiki=b.txt"), by its name.

    Raises:
        ValueError: For a value without a name, or a name that is more than letters, digits, "_", "-" and ".".
    """
    found: dict[str, list[str]] = {}
    for value in values:
        name, equals, source = value.partition("=")
        if not equals or not source or not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(f"eval_texts={value!r} is not like NAME=SOURCE, such as code=src")
        found.setdefault(name, []).append(source)
    return found
