"""Short endings: tokens that lead from the state of a matcher to the end of a document.

No grammar says how long the shortest ending is, so it is looked for: `ending` tries tokens that usually end
something (quotes, brackets, digits), and `search` follows several ways at once. Both return endings that exist, though
perhaps not the shortest.
"""

import re
from collections import Counter
from typing import Any

import numpy as np

from garrulax.sampling.constrain.vocabulary import Vocabulary

PATIENCE = 24  # times that a state which looks the same is left in the same way
PATIENCE_OF_DIGITS = 3  # the same where digits follow each other: 0.000 may never be enough
HEAD = 512  # tokens of an order of preference that are looked at first
WIDTH = 6  # states that a search follows at once


class Closing:
    """Finds endings over a vocabulary.

    Args:
        vocabulary: The tokens.
    """

    def __init__(self, vocabulary: Vocabulary):
        self._vocabulary = vocabulary
        self._end = vocabulary.ends[0]
        texts = vocabulary.texts
        ids = [i for i, text in enumerate(texts) if text]
        self._in_text = np.array(sorted(ids, key=lambda i: (_in_text(texts[i]), i)), np.int64)
        self._elsewhere = np.array(sorted(ids, key=lambda i: (_elsewhere(texts[i]), i)), np.int64)
        self._closers = {i for i in ids if _CLOSERS.fullmatch(texts[i])}
        probes = [next((i for i in ids if texts[i] == letter), None) for letter in (b"z", b"Q", b"%")]
        self._probes = [i for i in probes if i is not None]
        self._mask = np.zeros(-(-vocabulary.size // 32), np.uint32)

    def known(self, matcher: Any, ending: list[int], limit: int) -> list[int] | None:
        """An ending that was found one token earlier, if it still is one; the token may have replaced its beginning."""
        for skipped in range(min(4, len(ending))):
            rest = ending[skipped:]
            if len(rest) <= limit and self._ends(matcher, rest):
                return rest
        return None

    def ending(self, matcher: Any, limit: int) -> list[int] | None:
        """An ending of at most `limit` tokens, the end token included; None if none is found.

        Args:
            matcher: llguidance's; its state is restored.
            limit: Greatest number of tokens.
        """
        matcher = matcher.deep_copy()
        tokens: list[int] = []
        seen: Counter[bytes] = Counter()
        while len(tokens) < limit:
            if matcher.is_accepting():
                return [*tokens, self._end]
            forced = self.forced(matcher)
            if not forced:
                ways = self._ways(matcher, 2)
                if not ways:
                    return None
                look = self._mask.tobytes()
                seen[look] += 1
                patience = PATIENCE_OF_DIGITS if self._vocabulary.texts[ways[0]].isdigit() else PATIENCE
                turn = seen[look] % patience == 0 and ways[0] not in self._closers
                forced = [ways[-1] if turn else ways[0]]
            if not matcher.consume_tokens(forced):
                return None
            tokens += forced
        return None

    def search(self, matcher: Any, limit: int, ways: int) -> list[int] | None:
        """As `ending`, but slow and thorough: tries `ways` tokens in each of `WIDTH` states that look new."""
        states: list[tuple[Any, list[int]]] = [(matcher.deep_copy(), [])]
        seen: Counter[bytes] = Counter()
        best: list[int] | None = None
        while states:
            found = []
            for state, tokens in states:
                if state.is_accepting():
                    best = [*tokens, self._end] if best is None or len(tokens) + 1 < len(best) else best
                    continue
                forced = self.forced(state)
                for rank, way in enumerate([forced] if forced else [[i] for i in self._ways(state, ways)]):
                    child = state.deep_copy()
                    longest = limit if best is None else len(best) - 1
                    if len(tokens) + len(way) < longest and child.consume_tokens(way):
                        self._fill(child)
                        look = self._mask.tobytes()
                        seen[look] += 1
                        found.append(((not child.is_accepting(), seen[look], rank), child, tokens + way))
            found.sort(key=lambda entry: entry[0])
            states = [(child, tokens) for _, child, tokens in found[:WIDTH]]
        return best

    def _ends(self, matcher: Any, ending: list[int]) -> bool:
        if len(ending) == 1:
            return matcher.is_accepting()
        return matcher.validate_tokens(ending) == len(ending)

    def forced(self, matcher: Any) -> list[int]:
        """Ids of the text that must come next in the state of llguidance's matcher, as the tokenizer writes it."""
        forced = matcher.compute_ff_tokens()
        return forced[: matcher.validate_tokens(forced)] if forced else []

    def _fill(self, matcher: Any) -> None:
        matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)

    def _ways(self, matcher: Any, count: int) -> list[int]:
        """The first allowed tokens in the order of preference."""
        self._fill(matcher)
        is_text = bool(self._probes) and all(self._mask[i >> 5] >> (i & 31) & 1 for i in self._probes)
        order = self._in_text if is_text else self._elsewhere
        found: list[int] = []
        for part in (order[:HEAD], order[HEAD:]):  # nearly always the first tokens are enough
            bits = self._mask[part >> 5] >> (part & 31).astype(np.uint32) & 1
            found += part[np.flatnonzero(bits)[: count - len(found)]].tolist()
            if len(found) == count:
                break
        return found


# -- Orders of preference ---------------------------------------------------------------------------------------------

_CLOSERS = re.compile(rb'["\]})>]+')


def _in_text(text: bytes) -> tuple[int, int]:
    """Rank of a token inside of a string. The lowest is tried first: a quote, other closing brackets, one character."""
    if _CLOSERS.fullmatch(text):
        return (0 if text[:1] == b'"' else 1), -len(text)
    return 2 + (len(text) > 1), len(text)


def _elsewhere(text: bytes) -> tuple[int, int]:
    """Rank of a token outside of strings. The lowest is tried first.

    The order: closing brackets, a comma (behind a number), a digit, a short value, strings, punctuation, a letter,
    longer tokens, and last those that begin a list or an object.
    """
    if _CLOSERS.fullmatch(text) and text[:1] != b'"':
        return 0, -len(text)
    if text == b",":
        return 1, 0
    if len(text) == 1 and text.isdigit():
        return 2, text[0]
    if text in (b"[]", b"{}", b'""', b"null", b"true", b"false"):
        return 3, len(text)
    if text[:1] == b'"':
        return 4, (-len(text) if _CLOSERS.fullmatch(text) else len(text))
    if len(text) > 1:
        return 7 + (text[:1] in b"[{"), len(text)
    return (8 if text in b"[{" else 6 if text.isalpha() else 5), text[0]
