"""Grammars of regular expressions that a finite automaton follows: exact, and without llguidance."""

from typing import Self

import numpy as np

from garrulax.sampling.constrain.automaton import NEVER, TokenTable
from garrulax.sampling.constrain.interface import Grammar, Matcher, set_bits
from garrulax.sampling.constrain.vocabulary import Vocabulary


class RegularGrammar(Grammar):
    """A regular expression over the tokens of a model.

    Args:
        kind: Name of the constraint, for messages.
        table: The automaton over tokens.
        vocabulary: The tokens.
    """

    def __init__(self, kind: str, table: TokenTable, vocabulary: Vocabulary):
        self.kind, self.table, self.vocabulary = kind, table, vocabulary
        self.shortest = int(table.needed[0])

    def _matcher_of(self, budget: int) -> "RegularMatcher":
        return RegularMatcher(self, budget)


class RegularMatcher(Matcher):
    """Follows one text; `RegularGrammar.matcher` makes it. Its mask is exact: it allows no token that is refused."""

    def __init__(self, grammar: RegularGrammar, left: int):
        self._grammar, self._table = grammar, grammar.table
        self._states = [0]  # at first and after each accepted token with text
        self.left, self.finished = left, False

    def mask(self, out: np.ndarray) -> None:  # noqa: D102
        if self.finished:
            set_bits(out, self._table.ends)
            return
        bits = np.packbits(self._table.after[self._states[-1]] < min(self.left, NEVER), bitorder="little")
        out[:] = 0
        out.view(np.uint8)[: len(bits)] = bits

    def accept(self, token: int) -> bool:  # noqa: D102
        after = self._after(self._states[-1], token)
        if self.finished or after == NEVER:
            raise self._grammar.forbidden(token, self.finished)
        if after >= self.left:
            return False
        self.finished = token in self._table.ends
        if not self.finished:
            self._states.append(self._table.move(self._states[-1], token))
        self.left -= 1
        return True

    def forced(self) -> list[int]:  # noqa: D102
        state, following, accepts = self._states[-1], self._table.automaton.next, self._table.automaton.accepts
        if self.finished:
            return []
        text, at = bytearray(), state
        dead = len(accepts)
        while not accepts[at] and len(ways := np.flatnonzero(following[at] < dead)) == 1:
            text.append(int(ways[0]))
            at = int(following[at, ways[0]])
        if not text and accepts[at] and np.all(following[at] == dead) and len(self._table.ends) == 1:
            return list(self._table.ends)
        return self._written(state, bytes(text))

    def rollback(self, count: int) -> None:  # noqa: D102
        accepted = len(self._states) - 1 + self.finished
        if not 0 <= count <= accepted:
            raise ValueError(f"rollback({count}): {accepted} tokens were accepted")
        if not count:
            return
        del self._states[len(self._states) - (count - self.finished) :]
        self.left, self.finished = self.left + count, False

    def copy(self) -> Self:  # noqa: D102
        other = type(self)(self._grammar, self.left)
        other._states, other.finished = list(self._states), self.finished
        return other

    def _after(self, state: int, token: int) -> int:
        return int(self._table.after[state, token]) if 0 <= token < self._table.after.shape[1] else NEVER

    def _written(self, state: int, text: bytes) -> list[int]:
        """The tokens of a text that must come next, up to where a longer token may come; [] if they do not fit."""
        tokens: list[int] = []
        for token in self._grammar.vocabulary.write(text.decode(errors="ignore")):
            allowed = np.flatnonzero(self._table.after[state] < NEVER)
            written = (self._table.texts[i] for i in allowed)
            if any(len(other) > len(text) and other.startswith(text) for other in written):
                break
            after = self._after(state, token)
            if after >= self.left - len(tokens):
                return []
            tokens.append(token)
            text = text[len(self._table.texts[token]) :]
            state = self._table.move(state, token)
        return tokens
