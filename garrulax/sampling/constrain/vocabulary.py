"""The tokens of a tokenizer as byte strings, and llguidance's tokenizer made of them."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from garrulax.sampling.constrain import engine

LONGEST = 1024  # bytes of a token; llguidance fails on longer ones
_MARK = b"\xff"  # begins the name of a control token in llguidance; no text in UTF-8 has this byte


@functools.lru_cache(maxsize=8)
def token_texts(tokenizer: Any, vocab: int, ends: tuple[int, ...]) -> tuple[bytes, ...]:
    """The bytes of each of a model's ids; b"" for ids without text: control tokens, `ends`, padding of the embedding.

    Raises:
        ValueError: A token of more than `LONGEST` bytes.
    """
    silent = {*tokenizer.specials.values(), *ends}
    known = min(vocab, tokenizer.vocab)
    texts = [b"" if i in silent else tokenizer.token_bytes(i) for i in range(known)]
    if long := [i for i, text in enumerate(texts) if len(text) > LONGEST]:
        raise ValueError(
            f"token {long[0]} ({texts[long[0]][:20]!r}...) has {len(texts[long[0]])} bytes: constraints work with "
            f"tokens of at most {LONGEST}"
        )
    return (*texts, *[b""] * (vocab - known))


@functools.lru_cache(maxsize=4)
def vocabulary(tokenizer: Any, vocab: int, ends: tuple[int, ...]) -> "Vocabulary":
    """The vocabulary of a model, for llguidance. It is made once and kept."""
    return Vocabulary(tokenizer, vocab, ends)


class Vocabulary:
    """The tokens of a model: their bytes, how a text is written in them, and llguidance's object of them.

    Attributes:
        texts: Bytes of each id, b"" for an id without text.
        ends: Ids that end a text.
        size: Number of ids.
        general: llguidance's tokenizer.
        json: The same, prepared for JSON.
    """

    def __init__(self, tokenizer: Any, vocab: int, ends: tuple[int, ...]):
        self.texts = token_texts(tokenizer, vocab, ends)
        self.ends, self.size = ends, vocab
        self._encode = functools.partial(tokenizer.encode, start=False)
        names = {i: name for name, i in tokenizer.specials.items()} | {
            i: f"<|end_{i}|>" for i in ends if i not in tokenizer.specials.values()
        }
        tokens = [_MARK + names[i].encode() if i in names else text for i, text in enumerate(self.texts)]
        library = engine.llguidance()
        self.general = library.LLTokenizer(_Tokens(tokens, ends[0], self.write), eos_token=list(ends))
        self.json = self.general.with_slices(library.LLTokenizer.json_slices())

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
        return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[: self.size])


class _Tokens:
    """What llguidance reads from a tokenizer."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    special_token_ids = ()

    def __init__(self, tokens: Sequence[bytes], end: int, write: Any):
        self.tokens, self.eos_token_id, self._write = tokens, end, write

    def __call__(self, text: str | bytes) -> list[int]:
        return self._write(text if isinstance(text, str) else text.decode())
