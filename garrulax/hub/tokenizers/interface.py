"""Types and names that the files of this package share. It imports none of them, so that imports form a tree."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

GPT_SPECIALS = ("<|endoftext|>",)
GLM_SPECIALS = (
    "<|endoftext|>",  # end of document, and padding
    "[CLS]",
    "[MASK]",  # a blank of a few tokens
    "[sMASK]",  # a blank of whole sentences
    "[gMASK]",  # a long blank, usually the rest of the text
    "<|startofpiece|>",  # starts the input of every filled span
    "<|endofpiece|>",  # ends the targets of every filled span
    "[dBLOCK]",  # hides single input tokens of a span
)

Message = Mapping[str, Any]  # {"role": "user", "content": "..."}
Span = tuple[int, int, int]  # (start, end, id): characters start .. end - 1 of a text are the control token `id`


class ChatTokenizer(Protocol):
    """The part of a tokenizer that chat formats and Jinja templates use; `base.Tokenizer` describes each member."""

    bos: int | None
    eos: int | None
    specials: dict[str, int]
    config: dict[str, Any]
    chat_format: str | None

    def encode(self, text: str, *, start: bool = True) -> list[int]:
        """Ids of a plain text."""

    def encode_batch(self, texts: Sequence[str], *, start: bool = True) -> list[list[int]]:
        """Ids of several plain texts."""

    def find_specials(self, text: str) -> list[Span]:
        """Places where the text of a template spells control tokens."""

    def encode_with_specials(self, text: str, spans: Sequence[Span]) -> list[int]:
        """Ids of a text in which `spans` are control tokens."""
