"""What the Config of every family offers, and the checks that it makes."""

import sys
from typing import Any, ClassVar, Protocol


class ModelConfig(Protocol):
    """What every package may ask of a model's configuration, whatever its family: a frozen dataclass with these names.

    Fields or properties, as the family likes. Each family has more fields of its own, which only its own files read.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def vocab(self) -> int:
        """Number of token ids."""

    @property
    def context(self) -> int:
        """Tokens of a text that the model was trained on."""

    @property
    def max_length(self) -> int:
        """Tokens that a text may have: the context, unless rotary positions are stretched."""

    @property
    def width(self) -> int:
        """D: width of the hidden states."""

    @property
    def layers(self) -> int:
        """Number of layers."""

    @property
    def heads(self) -> int:
        """H: query heads of a layer."""

    @property
    def kv_heads(self) -> int:
        """K: key/value heads of a layer."""

    @property
    def head_dim(self) -> int:
        """C: width of a head."""

    @property
    def tied(self) -> bool:
        """Whether the token embedding is the output head too."""

    @property
    def eos(self) -> int | tuple[int, ...] | None:
        """Ids of the tokens that end a text; None where there is no such token."""


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def check_sizes(config: Any, *names: str, least: int = 1) -> None:
    """Raises ValueError for a field that is not a whole number of at least `least`."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")


def check_rates(config: Any, *names: str) -> None:
    """Raises ValueError for a dropout rate outside 0 <= rate < 1."""
    for name in names:
        value = getattr(config, name)
        if not _number(value) or not 0 <= value < 1:
            raise ValueError(f"{name}={value!r} must be at least 0 and below 1")


def check_positive(config: Any, *names: str) -> None:
    """Raises ValueError for a field that is not a finite number above 0."""
    for name in names:
        value = getattr(config, name)
        if not _number(value) or value <= 0:
            raise ValueError(f"{name}={value!r} must be a number above 0")


def check_flags(config: Any, *names: str) -> None:
    """Raises ValueError for a field that is not True or False."""
    for name in names:
        if not isinstance(getattr(config, name), bool):
            raise ValueError(f"{name}={getattr(config, name)!r} must be true or false")


def check_ids(config: Any, *names: str, several: tuple[str, ...] = ()) -> None:
    """Raises ValueError for a token id that is neither None nor a whole number of at least 0; for those of the names
    that are in `several`, it may be a tuple of such numbers."""
    for name in names:
        value = getattr(config, name)
        ids = value if isinstance(value, tuple) and name in several else () if value is None else (value,)
        if any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in ids):
            raise ValueError(f"{name}={value!r} must be a token id of at least 0{', or several' * (name in several)}")
