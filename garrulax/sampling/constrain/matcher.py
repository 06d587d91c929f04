"""`Grammar`, a constraint over the tokens of a model, and `Matcher`, which follows it for one text."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from garrulax.sampling.constrain import engine
from garrulax.sampling.constrain.closing import Closing
from garrulax.sampling.constrain.vocabulary import Vocabulary, vocabulary

REFUSALS = 4  # tokens refused in one state, after which the ending is written
NARROW = 16  # allowed tokens, at most, of which each is tried when the budget is short
SHORT = 32  # tokens between the ending and the budget below which it is short
_FAR = 1 << 30


@functools.lru_cache(maxsize=64)
def bound(kind: str, source: str, tokenizer: Any, vocab: int, ends: tuple[int, ...]) -> "Grammar":
    """The grammar of a constraint over the tokens of a model; see `Constraint.bind`."""
    if not ends:
        raise ValueError(f"{kind}: a constrained text needs an end token, and this model has none: give end_tokens=")
    if wrong := [i for i in ends if not 0 <= i < vocab]:
        raise ValueError(f"{kind}: end token {wrong[0]} is no id of this model, whose ids are 0 to {vocab - 1}")
    return Grammar(kind, source, vocabulary(tokenizer, vocab, ends))


class Grammar:
    """A constraint over the tokens of a model.

    Args:
        kind: Name of the constraint, for messages.
        source: The grammar, in the format of llguidance.
        vocabulary: The tokens.

    Attributes:
        shortest: Tokens of the shortest text that was found, the end token included.

    Raises:
        ValueError: The tokenizer has no tokens for any text.
    """

    def __init__(self, kind: str, source: str, vocabulary: Vocabulary):
        self.kind, self.vocabulary = kind, vocabulary
        tokenizer = vocabulary.json if kind == "json_schema" else vocabulary.general
        self._matcher = engine.llguidance().LLMatcher(tokenizer, source, log_level=0)
        if self._matcher.is_error():
            raise ValueError(f"{kind}: {engine.one_line(self._matcher.get_error())}")
        self.closing = _closing(vocabulary)
        quick = self.closing.ending(self._matcher, 4096)
        thorough = self.closing.search(self._matcher, 256 if quick is None else min(256, len(quick)))
        self._ending = thorough or quick
        if self._ending is None:
            raise ValueError(f"{kind}: no text was found that satisfies it and that this tokenizer can write")
        self.shortest = len(self._ending)

    def matcher(self, budget: int) -> "Matcher":
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
        return Matcher(self, self._matcher.deep_copy(), list(self._ending or ()), budget)


@functools.lru_cache(maxsize=4)
def _closing(vocabulary: Vocabulary) -> Closing:
    return Closing(vocabulary)


class Matcher:
    """Follows one text through a grammar, and sees to it that the text ends within its budget.

    At every time it knows an ending that fits into the rest of the budget. A token after which it finds none that fits
    is refused. So the loop is

        matcher.mask(bits)                     # what may come next
        token = ...                            # sampled under that mask
        while not matcher.accept(token):       # refused: the mask has one token less
            matcher.mask(bits)
            token = ...                        # sampled again, with the same noise

    Refused tokens are a lazy form of the mask: with noise that depends on the token's id, a token sampled again is the
    one that a mask without the refused tokens would have given. Do not construct: `Grammar.matcher` does.

    Attributes:
        left: Tokens that may still be written, the end token included.
        ending: Ids of an ending from here, the end token included; at most `left`.
        finished: Whether the end token was accepted.
    """

    def __init__(self, grammar: Grammar, matcher: Any, ending: list[int], left: int):
        self._grammar, self._matcher = grammar, matcher
        self._refused: set[int] = set()
        self._history: list[list[int]] = []  # the ending before each accepted token
        self.ending, self.left, self.finished = ending, left, False

    def mask(self, out: np.ndarray) -> None:
        """Writes which tokens may come next.

        A finished text allows its end tokens, so that a mask is never empty.

        Args:
            out: uint32 [ceil(vocab / 32)]; bit i of word j is token 32 j + i.
        """
        ends = self._grammar.vocabulary.ends
        if self.finished or self._must_end():
            out[:] = 0
            allowed = ends if self.finished or self.ending[0] in ends else self.ending[:1]
            for token in allowed:
                out[token >> 5] |= np.uint32(1 << (token & 31))
            return
        self._matcher.unsafe_compute_mask_ptr(out.ctypes.data, out.nbytes)
        self._check()
        for token in self._refused:
            out[token >> 5] &= ~np.uint32(1 << (token & 31))
        if self.left - len(self.ending) < SHORT and int(np.bitwise_count(out).sum()) <= NARROW:
            for token in self._grammar.vocabulary.ids(out).tolist():
                if self._ending_after(token) is None:
                    out[token >> 5] &= ~np.uint32(1 << (token & 31))

    def accept(self, token: int) -> bool:
        """Moves on by a token, or refuses it because no ending after it fits into the budget.

        Args:
            token: A token that `mask` allows, or the next of `forced`.

        Returns:
            Whether the token was accepted. If not, nothing has changed but the next mask, which lacks the token.

        Raises:
            ValueError: The grammar does not allow the token, or the text is finished.
        """
        if self.finished:
            raise ValueError(f"{self._grammar.kind}: the text is finished, and token {token} comes after its end")
        ending: list[int] | None
        if token in self._grammar.vocabulary.ends:
            if not self._matcher.is_accepting():
                raise self._forbidden(token)
            ending, self.finished = [], True
        else:
            if self._must_end() and token != self.ending[0]:
                return False
            ending = self._ending_after(token)
            if ending is None:
                self._refused.add(token)
                return False
            self._consume(token)
        self._history.append(self.ending)
        self._refused.clear()
        self.ending, self.left = ending, self.left - 1
        return True

    def forced(self) -> list[int]:
        """Ids of the text that must come next, as the tokenizer writes it; [] if there is a choice.

        When the budget is used up they are the whole ending.
        """
        if self.finished:
            return []
        if self.left <= len(self.ending):
            return list(self.ending)
        if self._refused:
            return self.ending[:1] if self._must_end() else []
        tokens = self._matcher.compute_ff_tokens()
        tokens = tokens[: self._matcher.validate_tokens(tokens)] if tokens else []
        if tokens and tokens != self.ending[: len(tokens)]:
            self._matcher.consume_tokens(tokens)
            ending = self._find(self.ending, self.left - len(tokens))
            self._matcher.rollback(len(tokens))
            if ending is None:
                return self.ending[:1]
            self.ending = tokens + ending
        return tokens

    def rollback(self, count: int) -> None:
        """Takes back the last `count` tokens that were accepted."""
        if not 0 <= count <= len(self._history):
            raise ValueError(f"rollback({count}): {len(self._history)} tokens were accepted")
        if not count:
            return
        if count - self.finished:
            self._matcher.rollback(count - self.finished)
        self._refused.clear()
        self.ending, self.left, self.finished = self._history[-count], self.left + count, False
        del self._history[-count:]

    def copy(self) -> "Matcher":
        """A matcher of the same text so far, which goes its own way."""
        other = Matcher(self._grammar, self._matcher.deep_copy(), list(self.ending), self.left)
        other._refused, other._history, other.finished = set(self._refused), list(self._history), self.finished
        return other

    def _must_end(self) -> bool:
        return self.left <= len(self.ending) or len(self._refused) >= REFUSALS

    def _ending_after(self, token: int) -> list[int] | None:
        """An ending after a token that fits, or None. The state stays; ValueError if the token is not allowed."""
        if token == self.ending[0]:
            return self.ending[1:]
        if token in self._grammar.vocabulary.ends:
            return []
        self._consume(token)
        ending = self._find(self.ending, self.left - 1)
        self._matcher.rollback(1)
        return ending

    def _find(self, before: list[int], limit: int) -> list[int] | None:
        """An ending of the present state with at most `limit` tokens; `before` was one a moment ago."""
        known = self._grammar.closing.known(self._matcher, before, limit)
        if known is not None and limit > len(known):
            return known  # perhaps not the shortest, but there is time to look for a shorter one
        new = self._grammar.closing.ending(self._matcher, limit if known is None else len(known) - 1)
        return known if new is None else new

    def _consume(self, token: int) -> None:
        if self._matcher.try_consume_tokens([token]) != 1:
            raise self._forbidden(token)
        self._check()

    def _forbidden(self, token: int) -> ValueError:
        text = self._grammar.vocabulary.texts[token] if 0 <= token < self._grammar.vocabulary.size else b""
        return ValueError(f"{self._grammar.kind}: token {token} ({text!r}) is not allowed here")

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RuntimeError(f"{self._grammar.kind}: {engine.one_line(self._matcher.get_error())}")


def allowed(vocabulary: Vocabulary, matchers: Sequence[Matcher]) -> np.ndarray:
    """The masks of several texts: uint32 [rows, ceil(vocab / 32)]."""
    out = np.zeros((len(matchers), -(-vocabulary.size // 32)), np.uint32)
    for row, matcher in zip(out, matchers, strict=True):
        matcher.mask(row)
    return out
