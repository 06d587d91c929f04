"""The base class of all tokenizers, and a decoder for ids that arrive one by one."""

import abc
import codecs
import hashlib
import itertools
import json
import os
import re
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

from garrulax.hub.tokenizers import chat
from garrulax.hub.tokenizers.interface import Message, Span


class Tokenizer(abc.ABC):
    """Text to ids and back.

    Attributes:
        vocab: Number of ids; every id is in 0 .. vocab - 1 (some ids may stand for nothing).
        bos: Id that begins a text, or None.
        eos: Id that ends a text and separates documents, or None.
        pad: Id that fills batches, or None.
        specials: Text -> id of the control tokens, which `encode` never returns.
        prefix: Ids that models of this tokenizer expect before a prompt; `prompt` adds them, `encode` never.
        suffix: Ids that they expect after a prompt.
        ends: Ids besides eos that the code of the family says end an answer; `answer_ends` are all that do.
        config: Content of tokenizer_config.json, perhaps with the Jinja source `chat_template`.
        chat_format: Name of the published chat format of the family (`chat.FORMATS`), or None.
        strips_space: Whether decoding drops one leading space from the first token of a text (SentencePiece puts a
            dummy space before every text).
        spaces_words: Whether a token that ends a word includes a space, which is shown only if a word follows (GPT-1).
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
    _restarts_after_specials: bool = True  # whether text after a control token gets a dummy space, like a new text

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str], *, start: bool = True) -> list[list[int]]:
        """`encode` of every text, on all cores where the library can."""

    @abc.abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes of a token (perhaps only a part of a character); b"" for control tokens."""

    @abc.abstractmethod
    def save(self, folder: str | os.PathLike) -> None:
        """Writes files that `load_tokenizer(folder)` and other libraries read."""

    @property
    @abc.abstractmethod
    def fingerprint(self) -> str:
        """A sha256 of everything that decides how text is encoded."""

    def encode(self, text: str, *, start: bool = True) -> list[int]:
        """Ids of a plain text; never control tokens.

        Half a character (a lone surrogate, as JSON may hold) is read as U+FFFD, like bytes that are not UTF-8.

        Args:
            text: The text.
            start: False if the text continues an earlier one; it then gets no dummy space in front.

        Raises:
            ValueError: The vocabulary cannot express the text.
        """
        return self.encode_batch([text], start=start)[0]

    def prompt(self, text: str) -> list[int]:
        """The ids from which a model continues a text: `encode` between `prefix` and `suffix`.

        An eos is never among them, not even if tokenizer_config.json says `add_eos_token`: it would end the text.
        """
        return [*self.prefix, *self.encode(text), *self.suffix]

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool | None = None,
        *,
        template: str | None = None,
        tokenize: Literal[True] = True,
        continue_final_message: bool | str = False,
        **variables: Any,
    ) -> list[int]: ...

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool | None = None,
        *,
        template: str | None = None,
        tokenize: Literal[False],
        continue_final_message: bool | str = False,
        **variables: Any,
    ) -> str: ...

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool | None = None,
        *,
        template: str | None = None,
        tokenize: bool = True,
        continue_final_message: bool | str = False,
        **variables: Any,
    ) -> list[int] | str:
        """The ids of a conversation, ready for the model to answer. No message can forge control tokens.

        Args:
            messages: `{"role": "user", "content": "..."}`, oldest first.
            add_generation_prompt: Whether to append the tokens that begin an answer; None does so unless
                `continue_final_message` is given.
            template: Name of one of the folder's templates or of a published format (`chat.FORMATS`), or Jinja source.
                By default the template "default" of the folder ("tool_use" if there is one and `tools` are given), or
                else the published format of its family.
            tokenize: False returns the text of the conversation, with its control tokens spelled out. It is for
                reading: `encode`, and `generate` of a text, take the control tokens in it for plain text.
            continue_final_message: Ends where the last message ends, so that the model continues this message. True, or
                the key of the message's text if it is not "content".
            variables: Further variables of a Jinja template, such as `tools` and `documents`.

        Raises:
            ValueError: There are no messages, a role is unknown, there is no template, or an argument of transformers'
                method that is not implemented, such as `return_tensors`.
            ImportError: A Jinja template needs jinja2 (extra `chat`).
        """
        conversation = chat.conversation_of(
            messages, add_generation_prompt, template, continue_final_message, variables
        )
        return (chat.conversation_ids if tokenize else chat.conversation_text)(self, conversation)

    @property
    def has_chat_format(self) -> bool:
        """Whether the folder has a chat template, or its family a published chat format."""
        return bool(self.chat_format or chat.named_templates(self.config.get("chat_template")))

    @property
    def answer_ends(self) -> tuple[int, ...]:
        """Ids that end an answer in a conversation; () without a chat format.

        They are eos, `ends`, and the control token that the chat template writes behind an answer. `garrulax.generate`
        ends a text at each of them.
        """
        if not self.has_chat_format:
            return ()
        key = (json.dumps(self.config.get("chat_template")), self.chat_format)
        known = _ANSWER_ENDS.setdefault(self, {})
        if key not in known:
            known[key] = chat.answer_ends(self)
        return tuple(dict.fromkeys((*(() if self.eos is None else (self.eos,)), *self.ends, *known[key])))

    def find_specials(self, text: str) -> list[Span]:
        """Places where `text` spells control tokens. For the texts of templates, never for those of users."""
        longest_first = sorted(filter(None, self.specials), key=len, reverse=True)
        if not longest_first:
            return []
        found = re.finditer("|".join(map(re.escape, longest_first)), text)
        return [(*match.span(), self.specials[match[0]]) for match in found]

    def encode_with_specials(self, text: str, spans: Sequence[Span]) -> list[int]:
        """Ids of a text in which only `spans` are control tokens; everything between them is plain text."""
        ids, at = [], 0
        for start, end, token in [*spans, (len(text), len(text), None)]:
            if start > at:
                ids += self.encode(text[at:start], start=at == 0 or self._restarts_after_specials)
            ids += [] if token is None else [token]
            at = end
        return ids

    def decode(self, tokens: Iterable[int], *, start: bool = True) -> str:
        """The text of `tokens`, without control tokens; bytes that are not UTF-8 become U+FFFD.

        Ids from `vocab` on have no text: they are rows that only pad a model's embedding.

        Args:
            tokens: Ids.
            start: False if the tokens continue an earlier text; a leading space is then kept.

        Raises:
            ValueError: An id is negative.
        """
        stream = self.stream(start=start)
        return stream.push(tokens) + stream.flush()

    def stream(self, *, start: bool = True) -> "StreamDecoder":
        """A decoder for ids that arrive one by one; `start` as in `decode`."""
        return StreamDecoder(self, start=start)

    def token_names(self) -> dict[str, str]:
        """bos_token, eos_token and pad_token as tokenizer_config.json has them."""
        names = {i: content for content, i in self.specials.items()}
        roles = {"bos_token": self.bos, "eos_token": self.eos, "pad_token": self.pad}
        return {role: names[i] for role, i in roles.items() if i in names}

    def _save_config(self, folder: Path, defaults: Mapping[str, Any] | None = None) -> None:
        """Writes tokenizer_config.json: `config` as loaded, with the present bos, eos and pad."""
        config = {**(defaults or {}), **self.config, **self.token_names()}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")

    def _encode_parts(self, text: str, cuts: Sequence[int], start: bool) -> list[int]:
        """Encodes the parts between `cuts` separately: cut in two, the text of a control token is not that token."""
        ends = [0, *cuts, len(text)]
        parts = [text[a:b] for a, b in itertools.pairwise(ends)]
        if not cuts or not all(parts):
            raise ValueError(f"the tokenizer maps the text {text[:20]!r} to a control token")
        rest = self.encode_batch(parts[1:], start=False)
        return list(itertools.chain(self.encode(parts[0], start=start), *rest))


#: Tokenizer -> {its template and format: `chat.answer_ends`}, since writing a conversation takes milliseconds.
_ANSWER_ENDS: weakref.WeakKeyDictionary["Tokenizer", dict[tuple, tuple[int, ...]]] = weakref.WeakKeyDictionary()


class StreamDecoder:
    """Turns ids that arrive one by one into text: `push` returns only finished characters.

    The pushed texts and `flush()` together equal `tokenizer.decode` of all the ids.

    Example:
        >>> from garrulax.hub.tokenizers import ByteTokenizer
        >>> stream = ByteTokenizer().stream()
        >>> [stream.push([token]) for token in "né".encode()]
        ['n', '', 'é']
    """

    def __init__(self, tokenizer: Tokenizer, *, start: bool = True):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip = start and tokenizer.strips_space
        self._spaces = tokenizer.spaces_words
        self._space_due = not start

    def push(self, tokens: Iterable[int]) -> str:
        """The characters that `tokens` finish. Raises ValueError for a negative id."""
        pieces = []
        for token in map(int, tokens):
            if token < 0:
                raise ValueError(f"token id {token} is out of range: ids begin with 0")
            piece = self._tokenizer.token_bytes(token) if token < self._tokenizer.vocab else b""
            if piece and self._strip:
                piece, self._strip = piece.removeprefix(b" "), False
            if piece and self._spaces:  # hold back the space at the end of a word until another word follows
                piece, ends_word = piece.removesuffix(b" "), piece.endswith(b" ")
                piece, self._space_due = b" " * self._space_due + piece, ends_word
            pieces.append(piece)
        return self._utf8.decode(b"".join(pieces))

    def flush(self) -> str:
        """The replacement U+FFFD if the ids ended inside a character, or else ""."""
        return self._utf8.decode(b"", final=True)


def sha256(content: bytes, specials: Mapping[str, int]) -> str:
    """The fingerprint of a tokenizer: of its file's content and its control tokens."""
    digest = hashlib.sha256(content)
    digest.update(json.dumps(specials, sort_keys=True).encode())
    return digest.hexdigest()
