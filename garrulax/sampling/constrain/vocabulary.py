"""The tokens of a tokenizer as byte strings, and how a text is written in them."""

import functools
from typing import Any

import numpy as np

LONGEST = 1024  # bytes of a token; llguidance fails on longer ones


@functools.lru_cache(maxsize=4)
def vocabulary(tokenizer: Any, vocab: int, ends: tuple[int, ...]) -> "Vocabulary":
    """The `Vocabulary` of a model. It is made once and cached. Arguments as in `Constraint.bind`.

    Raises:
        ValueError: A token of more than `LONGEST` bytes, no end token, or one that is no id of the model.
    """
    return Vocabulary(tokenizer, vocab, ends)


class Vocabulary:
    """The tokens of a model: their bytes, and how a text is written in them.

    Attributes:
        texts: Bytes of each id; b"" for ids without text: control tokens, `ends`, padding of the embedding.
        names: Id -> name of the ids that are control tokens or end a text.
        ends: Ids that end a text.
        size: Number of ids.
    """

    def __init__(self, tokenizer: Any, vocab: int, ends: tuple[int, ...]):
        if not ends:
            raise ValueError("a constrained text needs an end token, and this model has none: give end_tokens=")
        if wrong := [i for i in ends if not 0 <= i < vocab]:
            raise ValueError(f"end token {wrong[0]} is no id of this model, whose ids are 0 to {vocab - 1}")
        specials = {i: name for name, i in tokenizer.specials.items() if i < vocab}
        self.names = {i: f"<|end_{i}|>" for i in ends} | specials
        known = min(vocab, tokenizer.vocab)
        texts = [b"" if i in self.names else tokenizer.token_bytes(i) for i in range(known)]
        if long := [i for i, text in enumerate(texts) if len(text) > LONGEST]:
            raise ValueError(
                f"token {long[0]} ({texts[long[0]][:20]!r}...) has {len(texts[long[0]])} bytes: constraints work with "
                f"tokens of at most {LONGEST}"
            )
        self.texts = (*texts, *[b""] * (vocab - known))
        self.ends, self.size = ends, vocab
        self._encode = functools.partial(tokenizer.encode, start=False)

    def write(self, text: str) -> list[int]:
        """The ids that spell a text: as the tokenizer encodes it, or else longest token first.

        If no tokens spell the text, the ids of its longest beginning that tokens spell.
        """
        content = text.encode()
        try:
            ids = self._encode(text)
        except ValueError:
            ids = []
        if b"".join(self.texts[i] if i < self.size else b"" for i in ids) == content:
            return ids
        ids, at = [], 0
        while at < len(content):
            sizes = range(min(self._longest, len(content) - at), 0, -1)
            found = next((i for n in sizes if (i := self._ids.get(content[at : at + n])) is not None), None)
            if found is None:
                break
            ids.append(found)
            at += len(self.texts[found])
        return ids

    @functools.cached_property
    def _ids(self) -> dict[bytes, int]:
        return {text: i for i, text in reversed(list(enumerate(self.texts))) if text}

    @functools.cached_property
    def _longest(self) -> int:
        return max(map(len, self.texts), default=0)

    def ids(self, mask: np.ndarray) -> np.ndarray:
        """The ids of a bit map, in order."""
        return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little", count=self.size))
