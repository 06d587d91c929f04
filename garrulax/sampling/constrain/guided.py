"""Grammars that llguidance follows."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np

from garrulax.sampling.constrain import engine
from garrulax.sampling.constrain.closing import Closing
from garrulax.sampling.constrain.interface import Grammar, Matcher, clear_bit, set_bits
from garrulax.sampling.constrain.vocabulary import Vocabulary

REFUSALS = 4  # tokens refused in one state, after which the ending goes on
NARROW = 16  # allowed tokens, at most, of which each is tried when the budget is short
SHORT = 32  # tokens between the ending and the budget below which it is short
LONGEST = 4096  # tokens of an ending
THOROUGH = 128  # tokens of an ending that is searched for
FEW_WAYS, MANY_WAYS = 24, 256  # tokens that a search tries in each state
_MARK = b"\xff"  # begins the name of a control token in llguidance; no text in UTF-8 has this byte


class _Tokens:
    """A tokenizer with the members that llguidance reads."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    special_token_ids = ()

    def __init__(self, tokens: Sequence[bytes], end: int, write: Callable[[str], list[int]]):
        self.tokens, self.eos_token_id, self._write = tokens, end, write

    def __call__(self, text: str | bytes) -> list[int]:
        return self._write(text if isinstance(text, str) else text.decode())


@functools.lru_cache(maxsize=4)
def _prepared(vocabulary: Vocabulary) -> tuple[Any, Any, Closing]:
    """llguidance's tokenizer, the same prepared for JSON, and what finds endings."""
    library, names = engine.llguidance(), vocabulary.names
    tokens = [_MARK + names[i].encode() if i in names else text for i, text in enumerate(vocabulary.texts)]
    wrapper = _Tokens(tokens, vocabulary.ends[0], vocabulary.write)
    general = library.LLTokenizer(wrapper, eos_token=list(vocabulary.ends))
    return general, general.with_slices(library.LLTokenizer.json_slices()), Closing(vocabulary)


class GuidedGrammar(Grammar):
    """A grammar that llguidance follows. No grammar says how long its shortest text is; `closing` looks for one.

    Args:
        kind: Name of the constraint, for messages.
        source: The grammar, in the format of llguidance.
        vocabulary: The tokens.

    Raises:
        ValueError: No text was found that the tokens can write.
    """

    def __init__(self, kind: str, source: str, vocabulary: Vocabulary):
        self.kind, self.vocabulary = kind, vocabulary
        general, for_json, self.closing = _prepared(vocabulary)
        tokenizer = for_json if kind == "json_schema" else general
        # In llguidance a control token is a byte that no text has, and its name, which a regex with ~ may match.
        # So the mask leaves out those that the grammar does not name.
        named = source if kind == "grammar" else ""
        self._silent = {i for i, name in vocabulary.names.items() if name not in named and "<[" not in named}
        self._spoken = np.full(-(-vocabulary.size // 32), 0xFFFFFFFF, np.uint32)
        for token in self._silent:
            clear_bit(self._spoken, token)
        self._first = engine.llguidance().LLMatcher(tokenizer, source, log_level=0)
        if self._first.is_error():
            raise ValueError(f"{kind}: {engine.one_line(self._first.get_error())}")
        quick = self.closing.ending(self._first, LONGEST)
        thorough, self._ways = None, 0
        for ways in FEW_WAYS, MANY_WAYS:
            if thorough is None and (quick is None or ways == FEW_WAYS):
                thorough = self.closing.search(self._first, min(THOROUGH, len(quick or range(THOROUGH))), ways)
                self._ways = ways
        # In the loop the search is only for grammars of which the quick way is known to miss short endings.
        if quick is not None and (thorough is None or 2 * len(thorough) >= len(quick)):
            self._ways = 0
        ending = thorough or quick
        if ending is None:
            raise ValueError(f"{kind}: no text was found that satisfies it and that this tokenizer can write")
        self._ending, self.shortest = ending, len(ending)

    def fill(self, matcher: Any, out: np.ndarray) -> None:
        """Writes which tokens may come next in the state of llguidance's matcher."""
        matcher.unsafe_compute_mask_ptr(out.ctypes.data, out.nbytes)
        out &= self._spoken
        if matcher.is_accepting():
            for token in self.vocabulary.ends:
                out[token >> 5] |= np.uint32(1 << (token & 31))

    def is_silent(self, token: int) -> bool:
        """Whether a token is never part of a text: an end or control token that the grammar does not name."""
        return token in self._silent

    def ending(self, matcher: Any, limit: int) -> list[int] | None:
        """An ending of at most `limit` tokens from the state of llguidance's matcher; None if none is found."""
        found = self.closing.ending(matcher, min(limit, LONGEST))
        if found is None and self._ways:
            found = self.closing.search(matcher, min(limit, THOROUGH), self._ways)
        return found

    def _matcher_of(self, budget: int) -> "GuidedMatcher":
        return GuidedMatcher(self, self._first.deep_copy(), self._ending, budget)


class GuidedMatcher(Matcher):
    """Follows one text; `GuidedGrammar.matcher` makes it.

    Attributes:
        ending: Ids of an ending from here, the end token included; at most `left`.
    """

    def __init__(self, grammar: GuidedGrammar, matcher: Any, ending: list[int], left: int):
        self._grammar, self._matcher = grammar, matcher
        self._refused: set[int] = set()
        self._history: list[list[int]] = []  # the ending before each accepted token
        self.ending, self.left, self.finished = ending, left, False

    def mask(self, out: np.ndarray) -> None:  # noqa: D102
        vocabulary = self._grammar.vocabulary
        if self.finished or self._must_end():
            set_bits(out, vocabulary.ends if self.finished or len(self.ending) == 1 else self.ending[:1])
            return
        self._grammar.fill(self._matcher, out)
        self._check()
        for token in self._refused:
            clear_bit(out, token)
        if self.left - len(self.ending) < SHORT and int(np.bitwise_count(out).sum()) <= NARROW:
            for token in vocabulary.ids(out).tolist():
                if self._ending_after(token) is None:
                    clear_bit(out, token)

    def accept(self, token: int) -> bool:  # noqa: D102
        if self.finished:
            raise self._grammar.forbidden(token, finished=True)
        if token in self._grammar.vocabulary.ends:
            if not self._matcher.is_accepting():
                raise self._grammar.forbidden(token, finished=False)
            ending: list[int] | None = []
            self.finished = True
        elif self._must_end() and token != self.ending[0]:
            return False
        else:
            ending = self._ending_after(token)
            if ending is None:
                self._refused.add(token)
                return False
            self._consume(token)
        self._history.append(self.ending)
        self._refused.clear()
        self.ending, self.left = ending or [], self.left - 1
        return True

    def forced(self) -> list[int]:
        """Ids of the text that must come next; the whole ending when the budget is used up."""
        if self.finished or (len(self.ending) == 1 and len(self._grammar.vocabulary.ends) > 1):
            return []
        if self.left <= len(self.ending) or self._matcher.is_stopped():
            return list(self.ending)
        if self._refused:
            return self.ending[:1] if self._must_end() else []
        tokens = self._grammar.closing.forced(self._matcher)
        if tokens and tokens != self.ending[: len(tokens)]:
            self._matcher.consume_tokens(tokens)
            ending = self._find(self.ending, self.left - len(tokens))
            self._matcher.rollback(len(tokens))
            if ending is None:
                return self.ending[:1]
            self.ending = tokens + ending
        return tokens

    def rollback(self, count: int) -> None:  # noqa: D102
        if not 0 <= count <= len(self._history):
            raise ValueError(f"rollback({count}): {len(self._history)} tokens were accepted")
        if not count:
            return
        if count - self.finished:  # llguidance never gets the end token
            self._matcher.rollback(count - self.finished)
        self._refused.clear()
        self.ending, self.left, self.finished = self._history[-count], self.left + count, False
        del self._history[-count:]

    def copy(self) -> Self:  # noqa: D102
        other = type(self)(self._grammar, self._matcher.deep_copy(), self.ending, self.left)
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
        new = self._grammar.ending(self._matcher, limit if known is None else len(known) - 1)
        return known if new is None else new

    def _consume(self, token: int) -> None:
        known = 0 <= token < self._grammar.vocabulary.size and not self._grammar.is_silent(token)
        if not known or self._matcher.try_consume_tokens([token]) != 1:
            raise self._grammar.forbidden(token, finished=False)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RuntimeError(f"{self._grammar.kind}: {engine.one_line(self._matcher.get_error())}")
