"""The contract of a family's Config, and field types that say which values are allowed."""

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Protocol, get_args, get_type_hints


class ModelConfig(Protocol):
    """The names that every Config has, as fields or as properties. A Config is a frozen dataclass.

    Other packages read these names only. A family's Config has more fields, which the files of the family read.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __hash__(self) -> int: ...

    @property
    def vocab(self) -> int:
        """Number of token ids."""

    @property
    def context(self) -> int:
        """Longest text of the training, in tokens."""

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
    def norm_eps(self) -> float:
        """Epsilon of the norms."""

    @property
    def tied(self) -> bool:
        """Whether the token embedding is the output head too."""

    @property
    def eos(self) -> int | tuple[int, ...] | None:
        """Ids of the tokens that end a text; None where there is no such token."""


@dataclasses.dataclass(frozen=True)
class Check:
    """A condition on the value of a field: the annotation of a type such as `Size`.

    Attributes:
        allowed: Whether a value is right.
        wanted: The end of the sentence "field=value must be ...".
    """

    allowed: Callable[[Any], bool]
    wanted: str


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


_ID = "a token id of at least 0"

Size = Annotated[int, Check(lambda x: _is_whole(x, 1), "a whole number of at least 1")]
Count = Annotated[int, Check(lambda x: _is_whole(x, 0), "a whole number of at least 0")]
OptionalSize = Annotated[
    int | None, Check(lambda x: x is None or _is_whole(x, 1), "a whole number of at least 1, or none")
]
Rate = Annotated[float, Check(lambda x: _is_number(x) and 0 <= x < 1, "at least 0 and below 1")]
Positive = Annotated[float, Check(lambda x: _is_number(x) and x > 0, "a number above 0")]
Flag = Annotated[bool, Check(lambda x: isinstance(x, bool), "true or false")]
TokenId = Annotated[int, Check(lambda x: _is_whole(x, 0), _ID)]
OptionalTokenId = Annotated[int | None, Check(lambda x: x is None or _is_whole(x, 0), _ID)]
TokenIds = Annotated[
    int | tuple[int, ...] | None,
    Check(
        lambda x: all(_is_whole(i, 0) for i in x) if isinstance(x, tuple) else x is None or _is_whole(x, 0),
        f"{_ID}, or several",
    ),
]


def check_fields(config: Any) -> None:
    """Checks every field of a dataclass whose type is one of the above, or a class such as str, in their order.

    Raises:
        ValueError: A field has a value that its type does not allow.
    """
    for name, check in _checks(type(config)):  # type: ignore[arg-type]
        check_value(name, getattr(config, name), check)


def check_value(name: str, value: Any, kind: Any) -> None:
    """Checks one value.

    Args:
        name: Name of the value in the message.
        value: The value.
        kind: A `Check`, or a type such as `Size`.

    Raises:
        ValueError: The value is not allowed.
    """
    check = kind if isinstance(kind, Check) else get_args(kind)[1]
    if not check.allowed(value):
        raise ValueError(f"{name}={value!r} must be {check.wanted}")


@functools.cache
def _checks(kind: Any) -> tuple[tuple[str, Check], ...]:
    hints = get_type_hints(kind, include_extras=True)
    checks = {name: _check_of(hint) for name, hint in hints.items()}
    return tuple((name, check) for name, check in checks.items() if check is not None)


def _check_of(hint: Any) -> Check | None:
    if isinstance(hint, type):
        return Check(lambda x: isinstance(x, hint), f"of type {hint.__name__}")
    return next((extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Check)), None)


#: For Configs without a field of that name: `head_dim = fields.width_over_heads`.
width_over_heads = property(lambda config: config.width // config.heads, doc="C: width of a head.")
heads_as_kv_heads = property(lambda config: config.heads, doc="K: as many key/value heads as query heads.")
context_as_max_length = property(lambda config: config.context, doc="Tokens that a text may have: the context.")


def fill_head_dim(config: Any) -> None:
    """Sets a `head_dim` of 0 to width / heads.

    Raises:
        ValueError: Heads does not divide width.
    """
    if config.head_dim == 0:
        check_heads(config.width, config.heads, "; give head_dim")
        object.__setattr__(config, "head_dim", config.width // config.heads)


def check_heads(width: int, heads: int, hint: str = "") -> None:
    """Checks that the heads divide the width.

    Raises:
        ValueError: They do not; the message ends with `hint`.
    """
    if width % heads:
        raise ValueError(f"width {width} is not a multiple of heads {heads}{hint}")


def check_groups(heads: int, kv_heads: int) -> None:
    """Checks that each key/value head serves the same number of query heads.

    Raises:
        ValueError: It does not.
    """
    if heads % kv_heads:
        raise ValueError(f"heads {heads} is not a multiple of kv_heads {kv_heads}")
