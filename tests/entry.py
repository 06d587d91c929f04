"""`Entry`: everything that the tests know about a family. Each file in `families/` makes one."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from drawing import Drawn

from garrulax.core.config import ModelConfig
from garrulax.layers.rope import Rope

SIZES: dict[str, Any] = {"vocab": 40, "context": 16, "width": 8, "layers": 2, "heads": 2}


@dataclasses.dataclass(frozen=True)
class Change:
    """Another value of a field, for the tests that every field matters and survives config.json.

    Attributes:
        value: The other value.
        base: Fields to set in both configs that are compared.
        also: Fields to set in the changed config only.
    """

    value: Any
    base: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    also: Mapping[str, Any] = dataclasses.field(default_factory=dict)


#: For fields that several families have. A bool needs no entry: it is inverted.
COMMON_CHANGES = {
    "vocab": 41, "context": 17, "width": 12, "layers": 3, "heads": 1, "kv_heads": 1, "head_dim": 12, "mlp_width": 20,
    "activation": "relu", "norm_eps": 1e-2, "embedding_dropout": 0.4, "attention_dropout": 0.4, "residual_dropout": 0.4,
    "init_std": 0.03, "rope": Rope(theta=50.0), "eos": 3, "bos": 4, "pad": 5, "cls": 6, "mask": 7, "sentence_mask": 8,
    "generation_mask": 9, "sop": 10, "eop": 11,
}  # fmt: skip
#: Fields that sampling, tokenizers and the data pipeline read, and no number in the model depends on.
ELSEWHERE = ("bos", "eos")
ELSEWHERE_BLANKS = ("pad", "cls", "mask", "sentence_mask", "generation_mask", "sop", "eop", "dialect")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One family.

    Attributes:
        config: A tiny Config of the sizes `SIZES`, in which every field matters: dropout rates above 0 and so on.
        rows: Its rows in README's table.
        oracles: Reference case in `oracles/` -> row, of causal language models.
        unstacked: Those of the cases that are run with unstacked parameters too.
        changes: Another value of each field that `COMMON_CHANGES` does not serve.
        elsewhere: Fields besides `ELSEWHERE` that no number in the model depends on.
        counts: Published number of parameters of every preset, except our own tiny ones.
        foreign: A model_type that `from_hf` refuses.
        draws: Random configurations, for the families that transformers has.
        rich: A Config with every optional part, for gradients; None where `config` is one.
        text: A Config for decoding: wide initial weights, so that greedy texts do not repeat. None derives one.
    """

    config: Any
    rows: tuple[str, ...]
    counts: Mapping[str, int]
    oracles: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unstacked: tuple[str, ...] = ()
    changes: Mapping[str, Change] = dataclasses.field(default_factory=dict)
    elsewhere: tuple[str, ...] = ()
    foreign: str | None = None
    draws: tuple[Drawn, ...] = ()
    rich: Any = None
    text: Any = None

    @property
    def with_all_parts(self) -> ModelConfig:
        return self.rich or self.config

    @property
    def decoding(self) -> ModelConfig:
        return self.text or _resized(self.config, vocab=101, context=96, width=32, heads=4, init_std=0.4, eos=None)

    @property
    def sharded(self) -> ModelConfig:
        """Sizes that a mesh of eight devices divides."""
        plain = {name: 0.0 for name in _fields(self.config) if name.endswith("_dropout")}
        return _resized(self.with_all_parts, vocab=96, context=24, width=32, heads=4, init_std=0.02, **plain)

    def changed(self, name: str) -> tuple[ModelConfig, ModelConfig]:
        """Two Configs that differ in the field of that name."""
        value = getattr(self.config, name)
        change = self.changes.get(name)
        if change is None and isinstance(value, bool):
            change = Change(not value)
        elif change is None:
            assert name in COMMON_CHANGES, f"give another value of {name} in `changes` of the family's Entry"
            change = Change(COMMON_CHANGES[name])
        base = dataclasses.replace(self.config, **change.base)
        assert change.value != getattr(base, name), f"{name} is {value!r} already: give another value in `changes`"
        return base, dataclasses.replace(base, **{name: change.value, **change.also})


def _fields(config: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(config)]


def _resized(config: Any, **sizes: Any) -> Any:
    more = {"mlp_width": 48, "kv_heads": 2, "head_dim": 0}
    given = {name: value for name, value in {**more, **sizes}.items() if name in _fields(config)}
    return dataclasses.replace(config, **given)
