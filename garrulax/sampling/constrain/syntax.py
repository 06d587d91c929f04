"""Regular expressions as trees: the subset of Python's syntax that a finite automaton can follow.

Letters, `.`, sets such as `[^a-z_]`, the classes \\d \\w \\s \\D \\W \\S (ASCII), the escapes \\n \\t \\r \\f \\v \\a
\\0 \\xHH \\uHHHH \\UHHHHHHHH, groups, `|`, `* + ? {m} {m,} {,n} {m,n}`, and `^` and `$` around the whole. Other syntax
is refused by name.
"""

import functools
from typing import NamedTuple

Ranges = tuple[tuple[int, int], ...]  # first and last code point of each range, in order

LAST = 0x10FFFF
MOST = 1000  # greatest number in {m,n}


class Characters(NamedTuple):
    """One character of a set."""

    ranges: Ranges


class Sequence(NamedTuple):
    """One tree after another."""

    parts: tuple["Tree", ...]


class Choice(NamedTuple):
    """One of several trees."""

    parts: tuple["Tree", ...]


class Repeat(NamedTuple):
    """A tree `least` to `most` times; None for any number."""

    part: "Tree"
    least: int
    most: int | None


Tree = Characters | Sequence | Choice | Repeat


def union(ranges: list[tuple[int, int]]) -> Ranges:
    """Sorted ranges that do not overlap."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return tuple(merged)


def complement(ranges: Ranges) -> Ranges:
    """All other code points."""
    cuts = [-1, *(x for low, high in ranges for x in (low - 1, high)), LAST]
    return tuple((a + 1, b) for a, b in zip(cuts[::2], cuts[1::2], strict=True) if a < b)


_DIGIT: Ranges = ((48, 57),)
_WORD: Ranges = ((48, 57), (65, 90), (95, 95), (97, 122))
_SPACE: Ranges = ((9, 13), (32, 32))
_CLASSES = {"d": _DIGIT, "w": _WORD, "s": _SPACE}
_CLASSES |= {name.upper(): complement(ranges) for name, ranges in _CLASSES.items()}
_ESCAPES = {"n": 10, "t": 9, "r": 13, "f": 12, "v": 11, "0": 0, "a": 7}
_NUMBERS = {"x": 2, "u": 4, "U": 8}
_REFUSED = {"b": r"the word boundary \b", "B": r"the word boundary \B", "A": r"the anchor \A", "Z": r"the anchor \Z",
            "p": r"the property \p", "P": r"the property \P", "N": r"the name \N"}  # fmt: skip
_GROUPS = {"=": "lookahead", "!": "lookahead", "<=": "lookbehind", "<!": "lookbehind", "(": "a conditional group",
           ">": "an atomic group", "#": "a comment", "P=": "a backreference"}  # fmt: skip


@functools.lru_cache(maxsize=64)
def parse(pattern: str) -> Tree:
    """The tree of a pattern.

    Raises:
        NotImplementedError: Something that a finite automaton, or this module, cannot express; the message names it.
        ValueError: A syntax error.
    """
    return _Parser(pattern).whole()


class _Parser:
    def __init__(self, pattern: str):
        self._text, self._at = pattern, 0

    def whole(self) -> Tree:
        self._take("^")
        tree = self._choice()
        if self._at < len(self._text):
            raise self._wrong("unbalanced parenthesis")
        return tree

    def _choice(self) -> Tree:
        parts = [self._sequence()]
        while self._take("|"):
            parts.append(self._sequence())
        return parts[0] if len(parts) == 1 else Choice(tuple(parts))

    def _sequence(self) -> Tree:
        parts: list[Tree] = []
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            if self._text[self._at :] == "$":
                self._at += 1
                break
            parts.append(self._repeated())
        return parts[0] if len(parts) == 1 else Sequence(tuple(parts))

    def _repeated(self) -> Tree:
        tree = self._atom()
        if (bounds := self._bounds()) is None:
            return tree
        self._take("?")  # as few as possible: the same texts match from beginning to end
        if self._take("+"):
            raise NotImplementedError("a possessive repetition")
        if self._bounds() is not None:
            raise self._wrong("multiple repeat")
        least, most = bounds
        if max(least, most or 0) > MOST:
            raise NotImplementedError(f"more than {MOST} repetitions")
        return Repeat(tree, least, most)

    def _bounds(self) -> tuple[int, int | None] | None:
        for sign, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._take(sign):
                return bounds
        if not self._text.startswith("{", self._at):
            return None
        inside, brace, _ = self._text[self._at + 1 :].partition("}")
        first, comma, last = inside.partition(",")
        if not brace or not (first or last) or not all(x.isascii() and x.isdigit() for x in (first, last) if x):
            return None  # as in Python, a brace that bounds nothing is a letter
        least, most = int(first or 0), (int(last) if last else None) if comma else int(first)
        if most is not None and most < least:
            raise self._wrong("min repeat greater than max repeat")
        self._at += len(inside) + 2
        return least, most

    def _atom(self) -> Tree:
        c = self._text[self._at]
        self._at += 1
        if c == "(":
            return self._group()
        if c == "[":
            return Characters(self._set())
        if c == ".":
            return Characters(complement(((10, 10),)))
        if c == "\\":
            return Characters(self._escape())
        if c in "^$":
            raise NotImplementedError(f"the anchor {c} within the pattern")
        if c in "*+?":
            raise self._wrong("nothing to repeat")
        return Characters(((ord(c), ord(c)),))

    def _group(self) -> Tree:
        if self._take("?"):
            rest = self._text[self._at :]
            kind = next((k for k in sorted(_GROUPS, key=len, reverse=True) if rest.startswith(k)), None)
            if kind is not None:
                raise NotImplementedError(_GROUPS[kind])
            if rest.startswith("P<"):
                name, found, _ = rest[2:].partition(">")
                if not found or not name.isidentifier():
                    raise self._wrong("bad group name")
                self._at += len(name) + 3
            elif not self._take(":"):
                raise NotImplementedError("inline flags")
        tree = self._choice()
        if not self._take(")"):
            raise self._wrong("missing ), unterminated subpattern")
        return tree

    def _set(self) -> Ranges:
        negated = self._take("^")
        ranges: list[tuple[int, int]] = []
        first = True
        while first or not self._take("]"):
            first = False
            low = self._member()
            if self._text.startswith("-", self._at) and not self._text.startswith("-]", self._at):
                self._at += 1
                high = self._member()
                if len(low) != 1 or len(high) != 1 or low[0][0] != low[0][1] or low[0][0] > high[0][1]:
                    raise self._wrong("bad character range")
                low = ((low[0][0], high[0][1]),)
            ranges += low
        return complement(union(ranges)) if negated else union(ranges)

    def _member(self) -> Ranges:
        if self._at >= len(self._text):
            raise self._wrong("unterminated character set")
        c = self._text[self._at]
        self._at += 1
        return self._escape() if c == "\\" else ((ord(c), ord(c)),)

    def _escape(self) -> Ranges:
        if self._at >= len(self._text):
            raise self._wrong("bad escape (end of pattern)")
        c = self._text[self._at]
        self._at += 1
        if c in _CLASSES:
            return _CLASSES[c]
        if c in _NUMBERS:
            digits = self._text[self._at : self._at + _NUMBERS[c]]
            self._at += len(digits)
            try:
                point = int(digits, 16) if len(digits) == _NUMBERS[c] else LAST + 1
            except ValueError:
                point = LAST + 1
            if point > LAST:
                raise self._wrong(f"incomplete escape \\{c}{digits}")
            return ((point, point),)
        if c in _ESCAPES:
            return ((_ESCAPES[c], _ESCAPES[c]),)
        if c in _REFUSED:
            raise NotImplementedError(_REFUSED[c])
        if c.isdigit():
            raise NotImplementedError("a backreference")
        if c.isascii() and c.isalpha():
            raise self._wrong(f"bad escape \\{c}")
        return ((ord(c), ord(c)),)

    def _take(self, text: str) -> bool:
        found = self._text.startswith(text, self._at)
        self._at += len(text) * found
        return found

    def _wrong(self, problem: str) -> ValueError:
        return ValueError(f"{problem} at position {self._at}")
