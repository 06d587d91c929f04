"""Texts and their conditions as token ids."""

from collections.abc import Sequence
from typing import Any

from garrulax import models
from garrulax.core.config import ModelConfig
from garrulax.core.text import whole_characters
from garrulax.models.unpack import TokenizerLike
from garrulax.sampling.requests import Prompt, check_ids, prompt_list, token_ids


def conditions_of(condition: Any, count: int) -> Sequence[Prompt | None]:
    """One condition for each of `count` texts.

    Raises:
        ValueError: Another number of conditions.
    """
    if condition is None:
        return [None] * count
    conditions, single = prompt_list(condition)
    if single:
        return conditions * count
    if len(conditions) != count:
        raise ValueError(f"condition has {len(conditions)} values for {count} texts: give one, or one a text")
    return conditions


def encode_pair(
    text: Prompt,
    condition: Prompt | None,
    prefix: Sequence[int] | None,
    config: ModelConfig,
    tokenizer: TokenizerLike | None,
    name: str,
) -> tuple[list[int], list[int]]:
    """The ids of the context, which is read and not scored, and those of the text.

    Texts are encoded as lm-evaluation-harness does: the spaces at the end of the condition go to the text, since tokens
    of words begin with their space; condition and text are encoded as one and cut where the condition ends.

    Args:
        text: A text or token ids.
        condition: Likewise; None for none.
        prefix: Ids in front; None is those of the tokenizer for a text, and none for ids.
        config: The family's Config.
        tokenizer: Needed for texts.
        name: Name of the text in errors.

    Returns:
        Ids of the context, perhaps none, and of the text.

    Raises:
        ValueError: The text is empty, an id is outside the vocabulary, a text without a tokenizer, or a text with a
            condition of token ids.
    """
    if condition is not None and isinstance(text, str) != isinstance(condition, str):
        raise ValueError(f"{name} and its condition must both be texts, or both be token ids")
    if not isinstance(text, str):
        context = [] if condition is None else token_ids(condition, tokenizer, f"the condition of {name}")
        context, ids = [*(prefix or ()), *context], token_ids(text, tokenizer, name)
    else:
        whole = whole_characters(str(condition or ""))
        kept = whole.rstrip()
        text = whole[len(kept) :] + whole_characters(text)
        context = token_ids(kept, tokenizer, name) if kept else []
        ids = token_ids(kept + text, tokenizer, name)[len(context) :]
        context = [*_prefix(prefix, config, tokenizer), *context]
        if text and not ids:
            raise ValueError(f"{name} adds no token to its condition: give both as token ids")
    check_ids(ids, config, name)
    if context:
        check_ids(context, config, f"the condition of {name}")
    return context, ids


def _prefix(prefix: Sequence[int] | None, config: ModelConfig, tokenizer: TokenizerLike | None) -> Sequence[int]:
    """`prefix`, or the tokenizer's; families that fill blanks have ids of their own in front (`rows`)."""
    if prefix is not None:
        return prefix
    return () if tokenizer is None or models.blanks(config) is not None else tokenizer.prefix


def text_of(text: Prompt, tokenizer: TokenizerLike | None) -> str | None:
    """The text itself, or that of token ids; None for ids without a tokenizer."""
    if isinstance(text, str):
        return whole_characters(text)
    return None if tokenizer is None else tokenizer.decode(token_ids(text, tokenizer, "text"))


def size_in_bytes(text: str | None) -> int | None:
    """Number of UTF-8 bytes."""
    return None if text is None else len(text.encode())
