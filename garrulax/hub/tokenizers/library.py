"""Tokenizers of the Hugging Face `tokenizers` library, and plain bytes."""

import copy
import functools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from garrulax.hub.tokenizers.base import (
    GPT_SPECIALS,
    Span,
    Tokenizer,
    named_ids,
    save_config,
    sha256,
    token_names,
)

EOS_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")  # for files that do not say which token ends a text


class JsonTokenizer(Tokenizer):
    """A tokenizer of the Hugging Face `tokenizers` library, as stored in tokenizer.json.

    Args:
      tokenizer: the library's object; padding and truncation settings in it are switched off.
      config: the content of tokenizer_config.json: names bos, eos and pad.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, config: dict[str, Any] | None = None):
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # the text of a special token is text
        self._tokenizer = tokenizer
        self.config = dict(config or {})
        ids = tokenizer.get_vocab(with_added_tokens=True)
        self.specials = {t.content: i for i, t in sorted(tokenizer.get_added_tokens_decoder().items()) if t.special}
        named = named_ids(self.config, ids)
        eos = next((self.specials[name] for name in EOS_NAMES if name in self.specials), None)
        self.bos, self.eos = named.get("bos"), named.get("eos", eos)
        self.pad = named.get("pad", self.specials.get("[PAD]"))
        contents = {i: content for content, i in ids.items()}
        self.specials |= {contents[i]: i for i in (self.bos, self.eos, self.pad) if i is not None}
        self.vocab = max(ids.values(), default=-1) + 1
        unknown = getattr(tokenizer.model, "unk_token", None)  # does come out of text
        self._controls = {i for content, i in self.specials.items() if content != unknown}

        settings = _settings(tokenizer)
        self.prefix = tuple(_prefix(settings["post_processor"]))
        parts = {part["type"]: part for part in _parts(settings["decoder"], "decoders")}
        if "CTC" in parts:
            raise ValueError("tokenizer.json has a decoder of type CTC, which Garrulax cannot stream")
        self._word_end = parts["BPEDecoder"]["suffix"] if "BPEDecoder" in parts else None
        self.spaces_words = self._word_end is not None
        self._byte_level = byte_alphabet() if "ByteLevel" in parts else None
        self._byte_fallback = "ByteFallback" in parts
        # Other decoders are asked: the text of a token is what it adds behind an ordinary one, the anchor.
        ordinary = (i for i in sorted(contents) if i not in self._controls and tokenizer.decode([i]).strip().isalpha())
        self._anchor = None if self._byte_level or self._word_end else next(ordinary, None)
        spaced = next((i for i in sorted(contents) if self._added(i).startswith(b" ") and self._added(i).strip()), None)
        self.strips_space = spaced is not None and not tokenizer.decode([spaced]).startswith(" ")

    @functools.cached_property
    def _inside(self) -> tokenizers.Tokenizer:
        """The tokenizer for texts that continue others: without a dummy space in front."""
        settings = _settings(self._tokenizer)
        continuing = _without_prefix(settings)
        if continuing == settings:
            return self._tokenizer
        inside = tokenizers.Tokenizer.from_str(json.dumps(continuing | {"model": _model(self._tokenizer)}))
        inside.encode_special_tokens = True
        return inside

    @functools.cached_property
    def _reading(self) -> tokenizers.Tokenizer:
        """The tokenizer for texts of templates: it reads control tokens."""
        reading = copy.deepcopy(self._tokenizer)
        reading.encode_special_tokens = False
        return reading

    def encode_batch(self, texts: Sequence[str], *, start: bool = True) -> list[list[int]]:
        """`encode` of every text, on all cores. ValueError that names the characters which the vocabulary lacks."""
        tokenizer = self._tokenizer if start else self._inside
        try:
            encoded = [e.ids for e in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
        except Exception as error:  # the library raises nothing more specific
            known = tokenizer.get_vocab()
            missing = sorted({c for text in texts for c in text if c not in known})
            named = f"characters {missing[:8]} are not in its vocabulary" if missing else str(error)
            raise ValueError(f"the tokenizer cannot encode this text: {named}") from error
        return [self._repair(text, ids, start) for text, ids in zip(texts, encoded, strict=True)]

    def _repair(self, text: str, ids: list[int], start: bool) -> list[int]:
        """`ids`, unless the text spells a control token: then its two halves are encoded apart."""
        if self._controls.isdisjoint(ids):
            return ids
        encoding = (self._tokenizer if start else self._inside).encode(text, add_special_tokens=False)
        spans = [span for token, span in zip(encoding.ids, encoding.offsets, strict=True) if token in self._controls]
        return self._encode_parts(text, [(a + b) // 2 for a, b in spans], start)

    def spelled(self, text: str) -> list[Span]:
        """Where `text` spells control tokens, by the file's own rules: some swallow the spaces around them."""
        encoding = self._reading.encode(text, add_special_tokens=False)
        found = zip(encoding.ids, encoding.offsets, strict=True)
        return [(*span, token) for token, span in found if token in self._controls]

    def encode_around(self, text: str, spans: Sequence[Span]) -> list[int]:
        """Ids of a text in which only `spans` are control tokens.

        Where the text spells no others the library encodes it as a whole, which is what transformers does.
        """
        if self.spelled(text) == list(spans):
            return self._reading.encode(text, add_special_tokens=False).ids
        return super().encode_around(text, spans)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token as the file's own decoder shows it."""
        content = self._tokenizer.id_to_token(token)
        if content is None or token in self._controls:
            return b""
        if self._byte_level is not None:
            table = self._byte_level
            return bytes(table[c] for c in content) if all(c in table for c in content) else content.encode()
        if self._word_end is not None:
            return content.replace(self._word_end, " ").encode()
        if self._byte_fallback and len(content) == 6 and content.startswith("<0x"):
            return bytes([int(content[3:5], 16)])
        return self._added(token)

    def _added(self, token: int) -> bytes:
        if self._anchor is None or token in self._controls:
            return b""
        before = self._tokenizer.decode([self._anchor])
        return self._tokenizer.decode([self._anchor, token], skip_special_tokens=False)[len(before) :].encode()

    def save(self, folder: str | os.PathLike) -> None:
        """Writes tokenizer.json and tokenizer_config.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._tokenizer.save(str(folder / "tokenizer.json"))
        save_config(folder, self, {"tokenizer_class": "PreTrainedTokenizerFast"})

    @property
    def fingerprint(self) -> str:
        """A sha256 of the whole tokenizer.json."""
        return sha256(self._tokenizer.to_str().encode(), self.specials)


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as ids 0..255, `specials` from 256 on. Needs no training and encodes any text.

    What it saves is a byte-level tokenizer.json, which loads as a `JsonTokenizer` with the same ids.
    """

    def __init__(self, specials: Sequence[str] = GPT_SPECIALS):
        self.specials = {content: 256 + i for i, content in enumerate(specials)}
        self.vocab = 256 + len(specials)
        self.bos = None
        self.eos = self.specials.get("<|endoftext|>")
        self.pad = self.eos
        self.config = {}

    def encode_batch(self, texts: Sequence[str], *, start: bool = True) -> list[list[int]]:
        """The bytes of every text."""
        return [list(text.encode()) for text in texts]

    def token_bytes(self, token: int) -> bytes:
        """The byte itself."""
        return bytes([token]) if token < 256 else b""

    def save(self, folder: str | os.PathLike) -> None:
        """Writes tokenizer.json and tokenizer_config.json."""
        tokenizer = tokenizers.Tokenizer(models.BPE(vocab=byte_alphabet(), merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(list(self.specials))
        JsonTokenizer(tokenizer, token_names(self) | self.config).save(folder)

    @property
    def fingerprint(self) -> str:
        """A sha256 of the control tokens."""
        return sha256(b"bytes", self.specials)


def byte_alphabet() -> dict[str, int]:
    """The printable character that GPT-2's files write for each byte (openai/gpt-2 encoder.py), and the byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


# -- What a tokenizer.json says ---------------------------------------------------------------------------------------


def _settings(tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    return {key: value for key, value in json.loads(tokenizer.to_str()).items() if key != "model"}


def _model(tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    return json.loads(tokenizer.to_str())["model"]


def _parts(step: dict[str, Any] | None, many: str) -> list[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer, post-processor or decoder, which may be a sequence."""
    return [] if step is None else step[many] if step["type"] == "Sequence" else [step]


def _prefix(post_processor: dict[str, Any] | None) -> Iterator[int]:
    """The ids that the file puts before a text."""
    for part in _parts(post_processor, "processors"):
        if part["type"] in ("BertProcessing", "RobertaProcessing"):
            yield part["cls"][1]
        for piece in part.get("single", ()):
            if "SpecialToken" not in piece:
                break
            yield from part["special_tokens"][piece["SpecialToken"]["id"]]["ids"]


def _without_prefix(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without a space put before every text: by Prepend, Metaspace or ByteLevel."""
    settings = copy.deepcopy(settings)
    for part in _parts(settings["normalizer"], "normalizers"):
        if part["type"] == "Prepend":
            part["prepend"] = ""
    for part in _parts(settings["pre_tokenizer"], "pretokenizers"):
        if part["type"] == "Metaspace":
            part["prepend_scheme"] = "never"
        elif part["type"] == "ByteLevel":
            part["add_prefix_space"] = False
    return settings
