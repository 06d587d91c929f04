"""The `model` argument of `generate`, `fill` and `glitch_tokens`: its type, and its parts."""

from collections.abc import Iterable
from typing import Any, Protocol

from garrulax import models
from garrulax.core.config import ModelConfig
from garrulax.core.spec import Tree


class DecoderLike(Protocol):
    """A decoder of token ids that arrive one by one, such as `hub.tokenizers.StreamDecoder`."""

    def push(self, tokens: Iterable[int]) -> str:
        """Returns the characters that the new tokens complete."""
        ...

    def flush(self) -> str:
        """Returns the text of the bytes that are not a complete character."""
        ...


class TokenizerLike(Protocol):
    """The members of `hub.tokenizers.Tokenizer` that sampling and the search for glitch tokens use.

    A tokenizer with a chat format also has `answer_ends`, the ids that end an answer, at which `generate` ends a text.
    """

    vocab: int
    specials: dict[str, int]
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    strips_space: bool

    def encode(self, text: str, *, start: bool = True) -> list[int]:
        """Returns the ids of a text, without control tokens."""
        ...

    def decode(self, tokens: Iterable[int], *, start: bool = True) -> str:
        """Returns the text of token ids."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """Returns the UTF-8 bytes of one token."""
        ...

    def stream(self, *, start: bool = True) -> DecoderLike:
        """Returns a decoder for ids that arrive one by one."""
        ...


class LoadedModel(Protocol):
    """An object with a configuration, parameters and a tokenizer, such as `garrulax.Model`."""

    @property
    def config(self) -> ModelConfig:
        """The configuration."""

    @property
    def params(self) -> Tree:
        """The parameters."""

    @property
    def tokenizer(self) -> TokenizerLike | None:
        """The tokenizer, if there is one."""


ModelLike = LoadedModel | tuple[Tree, ModelConfig]


def unpack_model(model: ModelLike) -> tuple[Tree, ModelConfig, TokenizerLike | None]:
    """Returns the parameters, the configuration and the tokenizer (or None) of a model.

    Args:
        model: The result of `garrulax.load`, or a tuple (params, config).

    Raises:
        ValueError: The model has a prefix, which would be left out.
        TypeError: `model` is something else, or its config is not the Config of a family.
    """
    parts: tuple[Any, ...]
    if isinstance(model, tuple):
        if len(model) != 2:
            raise TypeError(f"a model given as a tuple is (params, config), not {len(model)} things")
        parts = (*model, None)
    elif all(hasattr(model, name) for name in ("params", "config", "tokenizer")):
        parts = (model.params, model.config, model.tokenizer)
    else:
        raise TypeError(f"a model is what gx.load returns, or a tuple (params, config), not {type(model).__name__}")
    if getattr(model, "prefix", None) is not None:
        raise ValueError("the model has a prefix, which only generate and stream read (models.prefix.forward_after)")
    params, config, tokenizer = parts
    models.family(config)  # raises TypeError
    return params, config, tokenizer
