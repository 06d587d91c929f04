"""Tokenizers in SentencePiece `.model` files."""

import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from garrulax.core.text import whole_characters
from garrulax.hub.tokenizers.base import Tokenizer, sha256
from garrulax.hub.tokenizers.token_config import extra_tokens, flag, role_ids

SPACE = "\u2581"  # SentencePiece's visible space
#: Appended to a model, these bytes set add_dummy_prefix=False: field 3 (normalizer_spec) of the protobuf, with field 3
#: in it. Parsers merge a message that occurs twice (protobuf.dev/programming-guides/encoding).
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model with its control tokens, and perhaps further control tokens outside of the model.

    Args:
        model: Content of a `.model` file.
        specials: Text -> id of further control tokens, usually with ids after those of the model.
        config: Content of tokenizer_config.json, which may name bos, eos, pad and further control tokens.
        offset: Added to every id of the model; the ids below stand for nothing (GLM-130B's pictures).
        origins: Key of `config` -> name of the file that has it, for messages. Where it is not given,
            tokenizer_config.json.

    Raises:
        ValueError: A setting in `config` has a value of the wrong kind.
    """

    file = "tokenizer.model"  # the name under which `save` writes the model

    def __init__(
        self,
        model: bytes,
        specials: dict[str, int] | None = None,
        config: dict[str, Any] | None = None,
        offset: int = 0,
        origins: Mapping[str, str] | None = None,
    ):
        self._model, self._offset = model, offset
        self.config = dict(config or {})
        self._sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        if not flag(self.config, "add_prefix_space", default=True):
            self._sp = self._without_dummy
        size = self._sp.vocab_size()
        pieces = {self._sp.id_to_piece(i): i + offset for i in range(size)}
        controls = {content: i for content, i in pieces.items() if self._sp.is_control(i - offset)}
        unknown = self._sp.unk_id() + offset
        extra = {content: pieces[content] for content in extra_tokens(self.config) if content in pieces}
        self.specials = controls | {c: i for c, i in (extra | (specials or {})).items() if i != unknown}
        self.vocab = max([size + offset, *(i + 1 for i in self.specials.values())])
        self._controls = {i: content for content, i in self.specials.items()}
        self._forgeable = self._controls.keys() & (set(pieces.values()) - set(controls.values()))
        own = {"bos": self._sp.bos_id(), "eos": self._sp.eos_id(), "pad": self._sp.pad_id()}
        named = role_ids(self.config, pieces | self.specials, origins)
        roles = {role: i + offset for role, i in own.items() if i >= 0} | named
        self.bos, self.eos, self.pad = (roles.get(role) for role in ("bos", "eos", "pad"))
        # LLaMA's own tokenizer class adds bos unless the file says otherwise.
        is_llama = str(self.config.get("tokenizer_class", "")).startswith("Llama")
        if self.bos is not None and flag(self.config, "add_bos_token", default=is_llama):
            self.prefix = (self.bos,)
        self._restarts_after_specials = self.config.get("legacy", True)  # as in transformers
        self.strips_space = self._sp.encode("a", out_type=str)[0].startswith(SPACE)
        # The library reads U+2581 as a space. If the model has byte pieces, U+2581 is encoded with these instead, so
        # that the round trip is exact.
        in_bytes = [self._sp.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        self._space_ids = [i + offset for i in in_bytes] if all(map(self._sp.is_byte, in_bytes)) else None

    @functools.cached_property
    def _without_dummy(self) -> sentencepiece.SentencePieceProcessor:
        """The model for texts that continue others: it puts no dummy space in front."""
        return sentencepiece.SentencePieceProcessor(model_proto=self._model + _NO_DUMMY_PREFIX)

    def encode_batch(self, texts: Sequence[str], *, start: bool = True) -> list[list[int]]:
        """`encode` of every text, on all cores. A model without byte pieces maps unknown characters to its <unk>."""
        sp = self._sp if start or not self.strips_space else self._without_dummy
        texts = list(map(whole_characters, texts))
        threads = min(len(texts), os.cpu_count() or 1) or 1
        encoded = sp.encode([self._prepare(text) for text in texts], num_threads=threads)
        if self._offset:
            encoded = [[i + self._offset for i in ids] for ids in encoded]
        return [self._repair(text, ids, start) for text, ids in zip(texts, encoded, strict=True)]

    def _prepare(self, text: str) -> str:
        """The text that the model reads; subclasses replace characters."""
        return text

    def _repair(self, text: str, ids: list[int], start: bool) -> list[int]:
        """`ids`, or the ids of the text in parts if it contains U+2581 or spells a control token."""
        if self._space_ids is not None and not self.strips_space and SPACE in text:
            first, *rest = self.encode_batch(text.split(SPACE))
            return first + [token for part in rest for token in (*self._space_ids, *part)]
        if self._forgeable.isdisjoint(ids):
            return ids
        forged = next(self._controls[i] for i in ids if i in self._forgeable)
        cuts = [match.start() + len(forged) // 2 for match in re.finditer(re.escape(forged), text)]
        # The model may normalise other letters, such as full-width ones, to those of the token. Then no cut is found:
        # halve the text until the token no longer appears.
        return self._encode_parts(text, cuts or [len(text) // 2], start)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a piece; for the unknown token those of U+FFFD."""
        if not 0 <= token - self._offset < self._sp.vocab_size() or token in self._controls:
            return b""
        token -= self._offset
        if self._sp.is_unknown(token):
            return "\ufffd".encode()
        piece = self._sp.id_to_piece(token)
        return bytes([int(piece[3:5], 16)]) if self._sp.is_byte(token) else self._text_of(piece).encode()

    def _text_of(self, piece: str) -> str:
        return piece.replace(SPACE, " ")

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the model, tokenizer_config.json and added_tokens.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / self.file).write_bytes(self._model)
        (folder / "added_tokens.json").write_text(json.dumps(self.specials, ensure_ascii=False) + "\n", "utf-8")
        self._save_config(folder)

    @property
    def fingerprint(self) -> str:
        """A sha256 of the model and the control tokens."""
        return sha256(self._model, self.specials)
