"""SentencePiece models."""

import functools
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from garrulax.hub.tokenizers.base import Tokenizer, named_ids, save_config, sha256

SPACE = "\u2581"  # SentencePiece's visible space
#: Bytes that, behind a model, say add_dummy_prefix=False: field 3 (normalizer_spec) of the protobuf holds field 3.
#: Parsers merge a message that comes twice (protobuf.dev/programming-guides/encoding).
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, with control tokens of its own and perhaps `specials` outside of it.

    Args:
      model: the content of a `.model` file.
      specials: content -> id of further control tokens (models that put them behind the SentencePiece vocabulary).
      config: the content of tokenizer_config.json: names bos, eos and pad where the model does not.
      offset: ids in front of the model's, which stand for nothing (GLM-130B's pictures).
    """

    file = "tokenizer.model"  # what `save` calls the model

    def __init__(
        self,
        model: bytes,
        specials: dict[str, int] | None = None,
        config: dict[str, Any] | None = None,
        offset: int = 0,
    ):
        self._model, self._offset = model, offset
        self.config = dict(config or {})
        self._sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        size = self._sp.vocab_size()
        pieces = {self._sp.id_to_piece(i): i + offset for i in range(size)}
        controls = {content: i for content, i in pieces.items() if self._sp.is_control(i - offset)}
        unknown = self._sp.unk_id() + offset
        self.specials = controls | {content: i for content, i in (specials or {}).items() if i != unknown}
        self.vocab = max([size + offset, *(i + 1 for i in self.specials.values())])
        self._controls = {i: content for content, i in self.specials.items()}
        self._forgeable = self._controls.keys() & (set(pieces.values()) - set(controls.values()))
        own = {"bos": self._sp.bos_id(), "eos": self._sp.eos_id(), "pad": self._sp.pad_id()}
        roles = {role: i + offset for role, i in own.items() if i >= 0} | named_ids(self.config, pieces | self.specials)
        self.bos, self.eos, self.pad = (roles.get(role) for role in ("bos", "eos", "pad"))
        # LLaMA's own tokenizer class adds bos unless the file says otherwise.
        is_llama = str(self.config.get("tokenizer_class", "")).startswith("Llama")
        if self.bos is not None and self.config.get("add_bos_token", is_llama):
            self.prefix = (self.bos,)
        self._pieces_start = self.config.get("legacy", True)  # as in transformers
        self.strips_space = self._sp.encode("a", out_type=str)[0].startswith(SPACE)
        # The library reads U+2581 as a space. Where it can be spelled in bytes it is, so that the round trip is exact.
        spelled = [self._sp.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        self._spell = [i + offset for i in spelled] if all(map(self._sp.is_byte, spelled)) else None

    @functools.cached_property
    def _inside(self) -> sentencepiece.SentencePieceProcessor:
        """The model for texts that continue others: without a dummy space in front."""
        return sentencepiece.SentencePieceProcessor(model_proto=self._model + _NO_DUMMY_PREFIX)

    def encode_batch(self, texts: Sequence[str], *, start: bool = True) -> list[list[int]]:
        """`encode` of every text, on all cores; what a model without byte pieces does not know becomes its unknown."""
        sp = self._sp if start or not self.strips_space else self._inside
        threads = min(len(texts), os.cpu_count() or 1) or 1
        encoded = sp.encode([self._prepare(text) for text in texts], num_threads=threads)
        if self._offset:
            encoded = [[i + self._offset for i in ids] for ids in encoded]
        return [self._repair(text, ids, start) for text, ids in zip(texts, encoded, strict=True)]

    def _prepare(self, text: str) -> str:
        return text

    def _repair(self, text: str, ids: list[int], start: bool) -> list[int]:
        """`ids`, unless the text holds U+2581 or spells a control token: then the text is encoded in parts."""
        if self._spell is not None and not self.strips_space and SPACE in text:
            first, *rest = self.encode_batch(text.split(SPACE))
            return first + [token for part in rest for token in (*self._spell, *part)]
        if self._forgeable.isdisjoint(ids):
            return ids
        forged = next(self._controls[i] for i in ids if i in self._forgeable)
        cuts = [match.start() + len(forged) // 2 for match in re.finditer(re.escape(forged), text)]
        # Spelled otherwise, in full-width letters say, which the model reads as these: halve until it does not.
        return self._encode_parts(text, cuts or [len(text) // 2], start)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a piece; those of U+FFFD for the unknown token."""
        if not 0 <= token - self._offset < self._sp.vocab_size() or token in self._controls:
            return b""
        token -= self._offset
        if self._sp.is_unknown(token):
            return "\ufffd".encode()
        piece = self._sp.id_to_piece(token)
        return bytes([int(piece[3:5], 16)]) if self._sp.is_byte(token) else self._shown(piece).encode()

    def _shown(self, piece: str) -> str:
        return piece.replace(SPACE, " ")

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the model, tokenizer_config.json and added_tokens.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / self.file).write_bytes(self._model)
        (folder / "added_tokens.json").write_text(json.dumps(self.specials, ensure_ascii=False) + "\n", "utf-8")
        save_config(folder, self)

    @property
    def fingerprint(self) -> str:
        """A sha256 of the model and the control tokens."""
        return sha256(self._model, self.specials)
