"""The token ids of blank infilling, from the tokenizer or from the model."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from garrulax.core.blanks import Blanks

_SENTENCE_ENDS = ".?!;:。？！；：…\n"


class InfillTokenizer(Protocol):
    """The parts of a tokenizer that blank infilling uses. Every `garrulax.hub.tokenizers.Tokenizer` has them."""

    vocab: int
    eos: int | None
    pad: int | None
    specials: dict[str, int]

    def token_bytes(self, token: int) -> bytes:
        """The bytes of text that a token stands for."""
        ...


@dataclass(frozen=True)
class InfillTokens:
    """The token ids that blank infilling uses.

    Attributes:
        cls: Begins a row; None in models whose texts have no such token (GLM-130B, ChatGLM-6B).
        mask: Replaces a token-level blank.
        sentence_mask: Replaces a sentence-level blank; the same as `mask` in models without task masks.
        document_mask: Replaces a document-level blank; the same as `mask` in models without task masks.
        start: Start of piece, in front of a span in part B.
        end: End of piece, the last target of a span.
        eos: Separates documents.
        pad: Fills up a row.
        sentence_ends: bool [V], whether a sentence ends after the token.
        block: [dBLOCK], which may replace single input tokens of a span; None if the tokenizer has no such token.
        rows: Number of rows of positions, 1 or 2 (`core.blanks.Blanks`).
        goes_on: Whether the answer to `document_mask` has the positions after the text, not that of its mask.
    """

    cls: int | None
    mask: int
    sentence_mask: int
    document_mask: int
    start: int
    end: int
    eos: int
    pad: int
    sentence_ends: np.ndarray
    block: int | None = None
    rows: int = 2
    goes_on: bool = False

    @property
    def first(self) -> int:
        """Index of the first token of a text that may be hidden."""
        return 0 if self.cls is None else 1

    @classmethod
    def of(cls, tokenizer: InfillTokenizer, task_mask: bool = True) -> "InfillTokens":
        """Finds the ids in a tokenizer that has GLM's control tokens.

        Args:
            tokenizer: To read them from.
            task_mask: Whether the model has [sMASK] for sentences and [gMASK] for documents, or [MASK] for all blanks.

        Raises:
            ValueError: If control tokens are missing; it lists them.
        """
        specials = tokenizer.specials
        names = {
            "cls": "[CLS]",
            "mask": "[MASK]",
            "sentence_mask": "[sMASK]" if task_mask else "[MASK]",
            "document_mask": "[gMASK]" if task_mask else "[MASK]",
            "start": "<|startofpiece|>",
            "end": "<|endofpiece|>",
        }
        missing = [name for name in names.values() if name not in specials]
        eos = tokenizer.eos
        if missing or eos is None:
            missing += ["an end-of-text token"] if eos is None else []
            raise ValueError(
                f"blank infilling needs control tokens that this tokenizer lacks: {', '.join(missing)}; "
                "train one with specials=GLM_SPECIALS"
            )
        found = {field: specials[name] for field, name in names.items()}
        return cls(
            cls=found["cls"],
            mask=found["mask"],
            sentence_mask=found["sentence_mask"],
            document_mask=found["document_mask"],
            start=found["start"],
            end=found["end"],
            eos=eos,
            pad=eos if tokenizer.pad is None else tokenizer.pad,
            sentence_ends=_sentence_ends(tokenizer),
            block=specials.get("[dBLOCK]"),
        )

    @classmethod
    def of_blanks(cls, tokenizer: InfillTokenizer, blanks: Blanks) -> "InfillTokens":
        """The ids of a model whose texts have no [CLS]: its own, of which the tokenizer may have other names.

        Args:
            tokenizer: The one that the text was made with.
            blanks: Of the model.

        Raises:
            ValueError: If the tokenizer has no end-of-text token.
        """
        if tokenizer.eos is None:
            raise ValueError("blank infilling needs an end-of-text token, which this tokenizer lacks")
        mask, sentence_mask, document_mask = (blanks.masks[kind] for kind in ("", "s", "g"))
        return cls(
            cls=None,
            mask=mask,
            sentence_mask=sentence_mask,
            document_mask=document_mask,
            start=blanks.sop,
            end=blanks.end_tokens[0],
            eos=tokenizer.eos,
            pad=tokenizer.eos if tokenizer.pad is None else tokenizer.pad,
            sentence_ends=_sentence_ends(tokenizer),
            rows=blanks.rows,
            goes_on=document_mask in blanks.masks_answered_at_end,
        )


def _sentence_ends(tokenizer: InfillTokenizer) -> np.ndarray:
    return np.array([_ends_sentence(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab)])


def _ends_sentence(piece: bytes) -> bool:
    return any(mark in piece.decode("utf-8", "replace") for mark in _SENTENCE_ENDS)
