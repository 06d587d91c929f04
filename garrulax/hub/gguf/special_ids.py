"""Ids of the tokens that begin, end and fill texts, in the metadata of a GGUF file."""

from collections.abc import Mapping
from typing import Any

#: Values that stand for no token: llama.cpp's -1, and the same 32 bits without a sign.
_NONE = (-1, 0xFFFFFFFF)


def special_id(metadata: Mapping[str, Any], role: str, vocab: int) -> int | None:
    """The id of a token with a role; None if the file names none.

    Args:
        metadata: The metadata.
        role: As in their keys: bos, eos, eot, eom, unknown, padding.
        vocab: Number of ids.

    Raises:
        ValueError: The value is no id; the message names the key.
    """
    key = f"tokenizer.ggml.{role}_token_id"
    value = metadata.get(key)
    if value is None or (type(value) is int and value in _NONE):
        return None
    if type(value) is not int or not 0 <= value < vocab:
        shown = repr(value) if isinstance(value, str | int | float) else f"a list of {len(value)}"
        raise ValueError(f"the metadata have {key}={shown:.40}, which is no id from 0 to {vocab - 1:,} (-1 is none)")
    return value
