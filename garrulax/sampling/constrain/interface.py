"""The interface of grammars over tokens: `Grammar`, and a `Matcher` for each text."""

import abc
from collections.abc import Sequence
from typing import Self

import numpy as np

from garrulax.sampling.constrain.vocabulary import Vocabulary


class Matcher(abc.ABC):
    """Follows one text through a grammar, and sees to it that the text ends within its budget.

    At every time there is an ending that fits into the rest of the budget. A token after which none is found that fits
    is refused. So the loop is

        matcher.mask(bits)                     # what may come next
        token = ...                            # sampled under that mask
        while not matcher.accept(token):       # refused: the mask has one token less
            matcher.mask(bits)
            token = ...                        # sampled again, with the same noise

    Refused tokens are a lazy form of the mask: with noise that depends on the token's id, a token sampled again is the
    one that a mask without the refused tokens would have given.

    Attributes:
        left: Number of tokens that may still be written, the end token included.
        finished: Whether an end token was accepted.
    """

    left: int
    finished: bool

    @abc.abstractmethod
    def mask(self, out: np.ndarray) -> None:
        """Writes which tokens may come next.

        A finished text allows its end tokens, so that a mask is never empty.

        Args:
            out: uint32 [ceil(vocab / 32)]; bit i of word j is token 32 j + i.
        """

    @abc.abstractmethod
    def accept(self, token: int) -> bool:
        """Moves on by a token, or refuses it because no ending after it fits into the budget.

        Args:
            token: A token that `mask` allows, or the next of `forced`.

        Returns:
            Whether the token was accepted. If not, nothing has changed but the next mask, which lacks the token.

        Raises:
            ValueError: The grammar does not allow the token, or the text is finished.
        """

    @abc.abstractmethod
    def forced(self) -> list[int]:
        """Ids of the text that must come next, as the tokenizer writes it; [] if there is a choice.

        Of a text that can only end they are the end token, if there is only one.
        """

    @abc.abstractmethod
    def rollback(self, count: int) -> None:
        """Takes back the last `count` tokens that were accepted. ValueError if they are fewer."""

    @abc.abstractmethod
    def copy(self) -> Self:
        """A matcher of the same text so far, which goes its own way."""


class Grammar(abc.ABC):
    """A constraint over the tokens of a model.

    Attributes:
        kind: Name of the constraint, for messages.
        vocabulary: The tokens.
        shortest: Number of tokens of the shortest text that was found, the end token included.
    """

    kind: str
    vocabulary: Vocabulary
    shortest: int

    def matcher(self, budget: int) -> Matcher:
        """The matcher of a new text.

        Args:
            budget: Greatest number of tokens, the end token included.

        Raises:
            ValueError: The shortest text that was found has more tokens; the message says how many.
        """
        if budget < self.shortest:
            raise ValueError(
                f"{self.kind}: the shortest text that was found needs {self.shortest} tokens with its end token, more "
                f"than max_new_tokens={budget}"
            )
        return self._matcher_of(budget)

    @abc.abstractmethod
    def _matcher_of(self, budget: int) -> Matcher:
        """The matcher of a new text; the budget suffices."""

    def forbidden(self, token: int, finished: bool) -> ValueError:
        """The error for a token that may not come next."""
        if finished:
            return ValueError(f"{self.kind}: the text is finished, and token {token} comes after its end")
        text = self.vocabulary.texts[token] if 0 <= token < self.vocabulary.size else b""
        return ValueError(f"{self.kind}: token {token} ({text!r}) is not allowed here")


def set_bits(out: np.ndarray, tokens: Sequence[int]) -> None:
    """Makes `out` the bit map of some tokens."""
    out[:] = 0
    for token in tokens:
        out[token >> 5] |= np.uint32(1 << (token & 31))


def clear_bit(out: np.ndarray, token: int) -> None:
    """Takes a token out of a bit map."""
    out[token >> 5] &= ~np.uint32(1 << (token & 31))
