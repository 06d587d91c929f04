"""A regular expression as a finite automaton over bytes, and over the tokens of a model.

A tree (`syntax`) becomes a nondeterministic automaton (Thompson 1968) over the bytes of UTF-8, and this a deterministic
one, whose states are sets of states. States from which no text ends are left out. Letters: S states, V ids.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import numpy as np

from garrulax.sampling.constrain import syntax
from garrulax.sampling.constrain.syntax import Characters, Choice, Repeat, Sequence, Tree

STATES = 10_000  # limit of states, of either automaton times ten
MEMORY = 256 << 20  # bytes of a table over tokens, at most: two a state and token
NEVER = 0xFFFF  # `TokenTable.after` of a token that is not allowed


@dataclasses.dataclass(frozen=True, eq=False)
class Automaton:
    """A deterministic automaton; state 0 is the first.

    Attributes:
        next: int32 [S + 1, 256], the state after a byte; S if no text goes on so, the last row of which is S too.
        accepts: bool [S], whether a text may end here.
    """

    next: np.ndarray
    accepts: np.ndarray


@functools.lru_cache(maxsize=32)
def automaton(pattern: str) -> Automaton:
    """The automaton of a pattern.

    Raises:
        NotImplementedError: The pattern has something that `syntax` refuses, or too many states.
        ValueError: A syntax error, or nothing matches.
    """
    graph = _Graph()
    start, end = graph.state(), graph.state()
    graph.add(syntax.parse(pattern), start, end)
    following, accepts = graph.determinised(start, end)
    return _trimmed(following, accepts)


class _Graph:
    """A nondeterministic automaton under construction."""

    def __init__(self) -> None:
        self._empty: list[list[int]] = []  # state -> states that follow without a byte
        self._bytes: list[list[tuple[int, int, int]]] = []  # state -> first byte, last byte, next state

    def state(self) -> int:
        if len(self._empty) >= 10 * STATES:
            raise NotImplementedError(f"a pattern of more than {10 * STATES} states")
        self._empty.append([])
        self._bytes.append([])
        return len(self._empty) - 1

    def add(self, tree: Tree, start: int, end: int) -> None:
        """Adds ways from `start` to `end` over the texts of a tree."""
        match tree:
            case Characters(ranges):
                for sequence in (s for low, high in ranges for s in utf8_ranges(low, high)):
                    at = start
                    for i, (first, last) in enumerate(sequence):
                        following = end if i == len(sequence) - 1 else self.state()
                        self._bytes[at].append((first, last, following))
                        at = following
            case Sequence(parts):
                for part in parts:
                    following = self.state()
                    self.add(part, start, following)
                    start = following
                self._empty[start].append(end)
            case Choice(parts):
                for part in parts:
                    self.add(part, start, end)
            case Repeat(part, least, most):
                for _ in range(least):
                    following = self.state()
                    self.add(part, start, following)
                    start = following
                if most is None:
                    loop, back = self.state(), self.state()
                    self._empty[start].append(loop)
                    self.add(part, loop, back)
                    self._empty[back].append(loop)
                    self._empty[loop].append(end)
                    return
                for _ in range(most - least):
                    self._empty[start].append(end)
                    following = self.state()
                    self.add(part, start, following)
                    start = following
                self._empty[start].append(end)

    def determinised(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """next int32 [S, 256] with -1 for none, and accepts bool [S]."""
        first = self._closure(frozenset([start]))
        numbers, queue, rows = {first: 0}, [first], []
        for states in queue:
            row = np.full(256, -1, np.int32)
            ways = [way for state in states for way in self._bytes[state]]
            cuts = sorted({0, 256, *(low for low, _, _ in ways), *(high + 1 for _, high, _ in ways)})
            for low, high in itertools.pairwise(cuts):
                targets = frozenset(to for a, b, to in ways if a <= low <= b)
                if targets:
                    targets = self._closure(targets)
                    if targets not in numbers:
                        if len(numbers) >= STATES:
                            raise NotImplementedError(f"a pattern of more than {STATES} states")
                        numbers[targets] = len(numbers)
                        queue.append(targets)
                    row[low:high] = numbers[targets]
            rows.append(row)
        return np.stack(rows), np.array([end in states for states in queue])

    def _closure(self, states: frozenset[int]) -> frozenset[int]:
        found, queue = set(states), list(states)
        while queue:
            new = [state for state in self._empty[queue.pop()] if state not in found]
            found.update(new)
            queue += new
        return frozenset(found)


def _trimmed(following: np.ndarray, accepts: np.ndarray) -> Automaton:
    """Without the states from which no text ends."""
    reverse = _reversed(following, len(accepts))
    alive, queue = accepts.copy(), np.flatnonzero(accepts).tolist()
    while queue:
        new = [state for state in reverse[queue.pop()] if not alive[state]]
        alive[new] = True
        queue += new
    if not alive[0]:
        raise ValueError("nothing matches it")
    count = int(alive.sum())
    numbers = np.full(len(alive) + 1, count, np.int32)  # the last entry: of -1
    numbers[:-1][alive] = np.arange(count)
    table = np.full((count + 1, 256), count, np.int32)
    table[:-1] = numbers[following[alive]]
    return Automaton(table, accepts[alive])


def _reversed(following: np.ndarray, states: int) -> list[list[int]]:
    """The states that lead to each of the first `states` states, by a table [S, any] of next states."""
    reverse: list[list[int]] = [[] for _ in range(states)]
    for state, row in enumerate(following):
        for target in np.flatnonzero(np.bincount(row[row >= 0], minlength=states)[:states]):
            reverse[target].append(state)
    return reverse


def utf8_ranges(low: int, high: int) -> Iterator[list[tuple[int, int]]]:
    """The code points low .. high in UTF-8, as sequences of ranges of bytes; without surrogates, which UTF-8 lacks."""
    for a, b in ((low, min(high, 0xD7FF)), (max(low, 0xE000), high)):
        if a <= b:
            yield from _split(a, b)


def _split(low: int, high: int) -> Iterator[list[tuple[int, int]]]:
    for last in (0x7F, 0x7FF, 0xFFFF):  # the last code point of one, two and three bytes
        if low <= last < high:
            yield from _split(low, last)
            yield from _split(last + 1, high)
            return
    for bits in (6, 12, 18) if high > 0x7F else ():
        rest = (1 << bits) - 1
        if low & ~rest != high & ~rest:  # an earlier byte varies: the later ones must have all their values
            if low & rest:
                yield from _split(low, low | rest)
                yield from _split((low | rest) + 1, high)
                return
            if high & rest != rest:
                yield from _split(low, (high & ~rest) - 1)
                yield from _split(high & ~rest, high)
                return
    yield list(zip(chr(low).encode(), chr(high).encode(), strict=True))


@dataclasses.dataclass(frozen=True, eq=False)
class TokenTable:
    """An automaton over the tokens of a model.

    Attributes:
        automaton: The automaton over bytes.
        texts: Bytes of each id.
        ends: Ids that end a text.
        after: uint16 [S, V], number of tokens that the shortest text still needs after a token in a state, the end
            token included; 0 for an end token; `NEVER` for a token that is not allowed.
        needed: int32 [S], number of tokens that it needs from a state on.
    """

    automaton: Automaton
    texts: tuple[bytes, ...]
    ends: tuple[int, ...]
    after: np.ndarray
    needed: np.ndarray

    def move(self, state: int, token: int) -> int:
        """The state after a token."""
        for byte in self.texts[token]:
            state = int(self.automaton.next[state, byte])
        return state


@functools.lru_cache(maxsize=16)
def token_table(pattern: str, texts: tuple[bytes, ...], ends: tuple[int, ...], memory: int = MEMORY) -> TokenTable:
    """The table of a pattern over tokens, which takes two bytes a state and token.

    Args:
        pattern: The regular expression.
        texts: Bytes of each id; b"" for ids without text.
        ends: Ids that end a text.
        memory: Greatest number of bytes.

    Raises:
        NotImplementedError: As `automaton`; or the table needs more than `memory` bytes.
        ValueError: As `automaton`; or no text can be written in these tokens.
    """
    found = automaton(pattern)
    states, ids = len(found.accepts), len(texts)
    if 2 * states * ids > memory:
        raise NotImplementedError(
            f"a table of {2 * states * ids >> 20} MB ({states} states, {ids} tokens), more than {memory >> 20} MB"
        )
    after = _next_states(found, texts)  # [S, V]; at first states
    reverse = _reversed(after, states)
    needed = np.full(states + 1, NEVER, np.int32)
    level = np.flatnonzero(found.accepts).tolist()
    needed[level] = 1
    for count in range(2, NEVER):
        level = [s for s in {s for state in level for s in reverse[state]} if needed[s] == NEVER]
        if not level:
            break
        needed[level] = count
    if needed[0] == NEVER:
        raise ValueError("the tokenizer has no tokens for any text that it matches")
    for state in range(states):
        after[state] = needed[after[state]]
        after[state, list(ends)] = 0 if found.accepts[state] else NEVER
    return TokenTable(found, texts, ends, after, needed[:-1])


def _next_states(found: Automaton, texts: tuple[bytes, ...]) -> np.ndarray:
    """uint16 [S, V]: the state after each token in each state; S if it is not allowed, or has no text."""
    states, length = len(found.accepts), max(map(len, texts), default=0)
    content = np.array([np.frombuffer(text.ljust(length, b"\0"), np.uint8) for text in texts]).reshape(-1, length)
    sizes = np.array([len(text) for text in texts])
    result = np.full((states, len(texts)), states, np.uint16)
    for state in range(states):
        alive = np.flatnonzero(sizes)
        at = np.full(len(alive), state, np.int32)
        for i in range(length):
            at = found.next[at, content[alive, i]]
            kept = at < states
            alive, at = alive[kept], at[kept]
            done = sizes[alive] == i + 1
            result[state, alive[done]] = at[done]
            alive, at = alive[~done], at[~done]
            if not len(alive):
                break
    return result
