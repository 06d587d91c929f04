"""The interface of all tokenizers, and decoding as a stream."""

import codecs
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

GPT_SPECIALS = ("<|endoftext|>",)
GLM_SPECIALS = (
    "<|endoftext|>",  # end of document, and padding
    "[CLS]",
    "[MASK]",  # a blank of a few tokens
    "[sMASK]",  # a blank of whole sentences
    "[gMASK]",  # a long blank, usually the rest of the text
    "<|startofpiece|>",  # starts the input of every filled span
    "<|endofpiece|>",  # ends the targets of every filled span
    "[dBLOCK]",  # hides single input tokens of a span
)

Message = Mapping[str, Any]  # {"role": "user", "content": "..."}
Span = tuple[int, int, int]  # start and end of a control token in a text, and its id


class Tokenizer(Protocol):
    """Text to ids and back.

    Attributes:
      vocab: number of ids; every id is in 0 .. vocab - 1 (some ids may stand for nothing).
      bos, eos, pad: the ids that begin a text, end a text (document separator) and fill batches, or None.
      specials: content -> id of the control tokens, which never come out of `encode`.
      prefix, suffix: ids that models of this tokenizer expect around a prompt (`prompt` adds them, `encode` never).
      ends: ids besides eos that end an answer in a conversation.
      config: what tokenizer_config.json says, perhaps with the Jinja source `chat_template`.
      chat_format: name of a conversation's format that is known without a template (`chat.FORMATS`), or None.
      strips_space: whether the first token of a text drops one leading space (SentencePiece's dummy prefix).
      spaces_words: whether a token that ends a word ends in a space, shown only where a word follows (GPT-1).
    """

    vocab: int
    bos: int | None
    eos: int | None
    pad: int | None
    specials: dict[str, int]
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()
    config: dict[str, Any]
    chat_format: str | None = None
    strips_space: bool = False
    spaces_words: bool = False
    _pieces_start: bool = True  # whether a piece of text behind a control token begins as a text does

    def encode(self, text: str, *, start: bool = True) -> list[int]:
        """Ids of a plain text; never control tokens. ValueError if the vocabulary cannot express the text.

        `start=False` says that the text continues an earlier one: it gets no dummy space in front.
        """
        return self.encode_batch([text], start=start)[0]

    def encode_batch(self, texts: Sequence[str], *, start: bool = True) -> list[list[int]]:
        """`encode` of every text, on all cores where the library can."""
        ...

    def prompt(self, text: str) -> list[int]:
        """The ids from which a model continues a text: `encode` between `prefix` and `suffix`."""
        return [*self.prefix, *self.encode(text), *self.suffix]

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        template: str | None = None,
        **variables: Any,
    ) -> list[int]:
        """The ids of a conversation, ready for the model to answer. No message can forge control tokens.

        Args:
          messages: `{"role": "user", "content": "..."}` in the order in which they were said.
          add_generation_prompt: end with what begins an answer.
          template: a format by name (`chat.FORMATS`) or Jinja source; by default the folder's own: its Jinja
            `chat_template`, or else the published format of its family.
          variables: further variables of a Jinja template, such as `tools`.

        Raises ValueError for no messages, an unknown role, and where there is no template; ImportError where a Jinja
        template needs jinja2 (extra `chat`).
        """
        from garrulax.hub.tokenizers import chat

        return chat.apply(self, messages, add_generation_prompt, template, variables)

    def spelled(self, text: str) -> list[Span]:
        """Where `text` spells control tokens. For texts of templates, not of users."""
        longest_first = sorted(filter(None, self.specials), key=len, reverse=True)
        if not longest_first:
            return []
        found = re.finditer("|".join(map(re.escape, longest_first)), text)
        return [(*match.span(), self.specials[match[0]]) for match in found]

    def encode_around(self, text: str, spans: Sequence[Span]) -> list[int]:
        """Ids of a text in which only `spans` are control tokens, and all between them is plain text."""
        ids, at = [], 0
        for start, end, token in [*spans, (len(text), len(text), None)]:
            ids += self.encode(text[at:start], start=at == 0 or self._pieces_start) if start > at else []
            ids += [] if token is None else [token]
            at = end
        return ids

    def _encode_parts(self, text: str, cuts: Sequence[int], start: bool) -> list[int]:
        """Encodes the pieces between `cuts` apart: a control token's text, cut in two, is not that token."""
        ends = [0, *cuts, len(text)]
        parts = [text[a:b] for a, b in itertools.pairwise(ends)]
        if not cuts or not all(parts):
            raise ValueError(f"the tokenizer maps the text {text[:20]!r} to a control token")
        rest = self.encode_batch(parts[1:], start=False)
        return list(itertools.chain(self.encode(parts[0], start=start), *rest))

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes that a token stands for (perhaps part of a character); b"" for control tokens."""
        ...

    def decode(self, tokens: Iterable[int], *, start: bool = True) -> str:
        """The text of `tokens`, without control tokens; bytes that are not UTF-8 become U+FFFD.

        `start=False` says that the tokens continue an earlier text, so that a leading space is kept.
        Raises ValueError for an id outside 0 .. vocab - 1.
        """
        stream = self.stream(start=start)
        return stream.push(tokens) + stream.flush()

    def stream(self, *, start: bool = True) -> "StreamDecoder":
        """A decoder for ids that arrive one by one; `start` as in `decode`."""
        return StreamDecoder(self, start=start)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes files that `load_tokenizer(folder)` and other libraries read."""
        ...

    @property
    def fingerprint(self) -> str:
        """A sha256 of everything that decides how text is encoded."""
        ...


class StreamDecoder:
    """Turns ids that arrive one by one into text: `push` returns only finished characters.

    The pushed texts and `flush()` together equal `tokenizer.decode` of all the ids.

    >>> stream = StreamDecoder(ByteTokenizer())
    >>> [stream.push([token]) for token in "né".encode()]
    ['n', '', 'é']
    """

    def __init__(self, tokenizer: Any, *, start: bool = True):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip = start and tokenizer.strips_space
        self._spaces = tokenizer.spaces_words
        self._space_due = not start

    def push(self, tokens: Iterable[int]) -> str:
        """The characters that `tokens` finish. ValueError for an id outside the vocabulary."""
        pieces = []
        for token in map(int, tokens):
            if not 0 <= token < self._tokenizer.vocab:
                raise ValueError(
                    f"token id {token} is out of range: this tokenizer has ids 0..{self._tokenizer.vocab - 1}"
                )
            piece = self._tokenizer.token_bytes(token)
            if piece and self._strip:
                piece, self._strip = piece.removeprefix(b" "), False
            if piece and self._spaces:
                piece, ends_word = piece.removesuffix(b" "), piece.endswith(b" ")
                piece, self._space_due = b" " * self._space_due + piece, ends_word
            pieces.append(piece)
        return self._utf8.decode(b"".join(pieces))

    def flush(self) -> str:
        """What an unfinished character at the very end decodes to (U+FFFD), or ""."""
        return self._utf8.decode(b"", final=True)


# -- What the kinds of tokenizers share -------------------------------------------------------------------------------


def named_ids(config: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, int]:
    """The ids of bos, eos and pad that a tokenizer_config.json names; ValueError for a name without an id."""
    named = {}
    for role in ("bos", "eos", "pad"):
        content = content_of(config.get(f"{role}_token"))
        if content is None:
            continue
        if content not in ids:
            raise ValueError(f"tokenizer_config.json names {role}_token {content!r}, which the tokenizer does not have")
        named[role] = ids[content]
    return named


def content_of(entry: Any) -> str | None:
    """The text of a token in tokenizer_config.json, which stands there alone or with its settings."""
    return entry.get("content") if isinstance(entry, dict) else entry


def token_names(tokenizer: Tokenizer) -> dict[str, str]:
    """bos_token, eos_token and pad_token as tokenizer_config.json has them."""
    names = {i: content for content, i in tokenizer.specials.items()}
    roles = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos, "pad_token": tokenizer.pad}
    return {role: names[i] for role, i in roles.items() if i in names}


def save_config(folder: Path, tokenizer: Tokenizer, defaults: Mapping[str, Any] | None = None) -> None:
    """Writes tokenizer_config.json: what was loaded, with today's bos, eos and pad."""
    config = {**(defaults or {}), **tokenizer.config, **token_names(tokenizer)}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")


def sha256(content: bytes, specials: Mapping[str, int]) -> str:
    """The fingerprint of a tokenizer: of its file's content and its control tokens."""
    digest = hashlib.sha256(content)
    digest.update(json.dumps(specials, sort_keys=True).encode())
    return digest.hexdigest()
