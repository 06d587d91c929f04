"""Tokenizers that the Hugging Face `tokenizers` library runs, and a tokenizer of plain bytes."""

import copy
import functools
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from garrulax.core.text import whole_characters
from garrulax.hub.tokenizers.base import Tokenizer, sha256
from garrulax.hub.tokenizers.interface import GPT_SPECIALS, Span
from garrulax.hub.tokenizers.token_config import extra_tokens, role_ids

EOS_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")  # eos, if the files do not name it


class JsonTokenizer(Tokenizer):
    """A tokenizer of the Hugging Face `tokenizers` library, as stored in tokenizer.json.

    Args:
        tokenizer: The library's object; its padding and truncation are switched off.
        config: Content of tokenizer_config.json, which may name bos, eos, pad and further control tokens.
        origins: Key of `config` -> name of the file that has it, for messages. Where it is not given,
            tokenizer_config.json.

    Raises:
        ValueError: A token in `config` is not a text, or the decoder is of type CTC.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        config: dict[str, Any] | None = None,
        origins: Mapping[str, str] | None = None,
    ):
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # the text of a control token is plain text
        self._tokenizer = tokenizer
        self.config = dict(config or {})
        ids = tokenizer.get_vocab(with_added_tokens=True)
        self.specials = {t.content: i for i, t in sorted(tokenizer.get_added_tokens_decoder().items()) if t.special}
        named = role_ids(self.config, ids, origins)
        eos = next((self.specials[name] for name in EOS_NAMES if name in self.specials), None)
        self.bos, self.eos = named.get("bos"), named.get("eos", eos)
        self.pad = named.get("pad", self.specials.get("[PAD]"))
        contents = {i: content for content, i in ids.items()}
        self.specials |= {contents[i]: i for i in (self.bos, self.eos, self.pad) if i is not None}
        self.specials |= {content: ids[content] for content in extra_tokens(self.config) if content in ids}
        self.vocab = max(ids.values(), default=-1) + 1
        unknown = getattr(tokenizer.model, "unk_token", None)  # plain text may encode to it
        self._controls = {i for content, i in self.specials.items() if content != unknown}

        self.prefix = tuple(_prefix_ids(_part(tokenizer.post_processor)))
        steps = {step["type"]: step for step in _steps(_part(tokenizer.decoder), "decoders")}
        if "CTC" in steps:
            raise ValueError("tokenizer.json has a decoder of type CTC, which Garrulax cannot stream")
        self._word_end = steps["BPEDecoder"]["suffix"] if "BPEDecoder" in steps else None
        self.spaces_words = self._word_end is not None
        self._byte_of = byte_alphabet() if "ByteLevel" in steps else None
        self._byte_fallback = "ByteFallback" in steps
        # Other decoders may treat the first token of a text differently. So `_decoded` decodes a token together with an
        # ordinary token before it, the anchor, and removes the text of the anchor: letters, or any token that has text.
        self._anchor = None if self._byte_of or self._word_end else self._find_anchor(sorted(contents))
        decoded = ((i, self._decoded(i)) for i in (() if self._anchor is None else sorted(contents)))
        spaced = next((i for i, text in decoded if text.startswith(b" ") and text.strip()), None)
        self.strips_space = spaced is not None and not tokenizer.decode([spaced]).startswith(" ")

    def _find_anchor(self, ids: list[int]) -> int | None:
        texts = {i: self._tokenizer.decode([i]).strip() for i in ids if i not in self._controls}
        letters = (i for i, text in texts.items() if text.isalpha())
        return next(itertools.chain(letters, (i for i, text in texts.items() if text)), None)

    @functools.cached_property
    def _without_dummy(self) -> tokenizers.Tokenizer:
        """The tokenizer for texts that continue others: it puts no dummy space in front."""
        settings = _settings(self._tokenizer)
        changed = _without_dummy_space(settings)
        if changed == settings:
            return self._tokenizer
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(changed | {"model": _model(self._tokenizer)}))
        tokenizer.encode_special_tokens = True
        return tokenizer

    @functools.cached_property
    def _with_specials(self) -> tokenizers.Tokenizer:
        """The tokenizer for texts of templates: it reads control tokens."""
        tokenizer = _with_shared_model(self._tokenizer)
        tokenizer.encode_special_tokens = False
        return tokenizer

    def encode_batch(self, texts: Sequence[str], *, start: bool = True) -> list[list[int]]:
        """`encode` of every text, on all cores. Raises ValueError that names characters missing in the vocabulary."""
        tokenizer = self._tokenizer if start else self._without_dummy
        texts = list(map(whole_characters, texts))
        try:
            encoded = [e.ids for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        except Exception as error:  # the library raises nothing more specific
            known = tokenizer.get_vocab()
            missing = sorted({c for text in texts for c in text if c not in known})
            named = f"characters {missing[:8]} are not in its vocabulary" if missing else str(error)
            raise ValueError(f"the tokenizer cannot encode this text: {named}") from error
        return [self._repair(text, ids, start) for text, ids in zip(texts, encoded, strict=True)]

    def _repair(self, text: str, ids: list[int], start: bool) -> list[int]:
        """`ids`, or if the text spells control tokens, the ids of the text cut in the middle of each of them."""
        if self._controls.isdisjoint(ids):
            return ids
        encoding = (self._tokenizer if start else self._without_dummy).encode(text, add_special_tokens=False)
        spans = [span for token, span in zip(encoding.ids, encoding.offsets, strict=True) if token in self._controls]
        return self._encode_parts(text, [(a + b) // 2 for a, b in spans], start)

    def find_specials(self, text: str) -> list[Span]:
        """Places where `text` spells control tokens, by the rules of the file: some include the spaces around them."""
        encoding = self._with_specials.encode(text, add_special_tokens=False)
        found = zip(encoding.ids, encoding.offsets, strict=True)
        return [(*span, token) for token, span in found if token in self._controls]

    def encode_with_specials(self, text: str, spans: Sequence[Span]) -> list[int]:
        """Ids of a text in which only `spans` are control tokens.

        If the text spells no others, the library encodes it in one call, as transformers does.
        """
        if self.find_specials(text) == list(spans):
            return self._with_specials.encode(text, add_special_tokens=False).ids
        return super().encode_with_specials(text, spans)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token, as the decoder in the file gives them."""
        content = self._tokenizer.id_to_token(token)
        if content is None or token in self._controls:
            return b""
        if self._byte_of is not None:
            table = self._byte_of
            return bytes(table[c] for c in content) if all(c in table for c in content) else content.encode()
        if self._word_end is not None:
            return content.replace(self._word_end, " ").encode()
        if self._byte_fallback and len(content) == 6 and content.startswith("<0x"):
            return bytes([int(content[3:5], 16)])
        return self._decoded(token)

    def _decoded(self, token: int) -> bytes:
        """The bytes of a token that follows another one, by the decoder in the file."""
        if self._anchor is None or token in self._controls:
            return b""
        before = self._tokenizer.decode([self._anchor])
        return self._tokenizer.decode([self._anchor, token], skip_special_tokens=False)[len(before) :].encode()

    def save(self, folder: str | os.PathLike) -> None:
        """Writes tokenizer.json and tokenizer_config.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._tokenizer.save(str(folder / "tokenizer.json"))
        except Exception as error:  # tokenizers raises bare ones
            raise OSError(f"{folder / 'tokenizer.json'} cannot be written: {error}") from error
        self._save_config(folder, {"tokenizer_class": "PreTrainedTokenizerFast"})

    @property
    def fingerprint(self) -> str:
        """A sha256 of the whole tokenizer.json."""
        return sha256(self._tokenizer.to_str().encode(), self.specials)


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as ids 0..255, control tokens from 256 on. Needs no training and encodes any text.

    `save` writes a byte-level tokenizer.json, which loads as a `JsonTokenizer` with the same ids.

    Args:
        specials: Texts of the control tokens.

    Example:
        >>> from garrulax.hub.tokenizers import ByteTokenizer
        >>> tokenizer = ByteTokenizer()
        >>> tokenizer.encode("né"), tokenizer.eos
        ([110, 195, 169], 256)
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
        return [list(whole_characters(text).encode()) for text in texts]

    def token_bytes(self, token: int) -> bytes:
        """The byte itself."""
        return bytes([token]) if token < 256 else b""

    def save(self, folder: str | os.PathLike) -> None:
        """Writes tokenizer.json and tokenizer_config.json."""
        tokenizer = tokenizers.Tokenizer(models.BPE(vocab=byte_alphabet(), merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(list(self.specials))
        JsonTokenizer(tokenizer, self.token_names() | self.config).save(folder)

    @property
    def fingerprint(self) -> str:
        """A sha256 of the control tokens."""
        return sha256(b"bytes", self.specials)


def byte_alphabet() -> dict[str, int]:
    """Character -> byte: the printable character that GPT-2's files write for each byte (openai/gpt-2 encoder.py)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


# -- The content of tokenizer.json ------------------------------------------------------------------------------------


def _with_shared_model(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A copy with the same model, if its added tokens then have the same ids; else a whole one, which takes longer."""
    added = tokenizer.get_added_tokens_decoder()
    twin = tokenizers.Tokenizer(tokenizer.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if getattr(tokenizer, part) is not None:
            setattr(twin, part, getattr(tokenizer, part))
    twin.add_tokens([token for _, token in sorted(added.items())])
    return twin if twin.get_added_tokens_decoder() == added else copy.deepcopy(tokenizer)


def _part(part: Any) -> dict[str, Any] | None:
    """A normalizer, pre-tokenizer, post-processor or decoder as tokenizer.json has it; None for none."""
    return None if part is None else json.loads(part.__getstate__())  # to_str would write the whole vocabulary too


def _settings(tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    return {key: value for key, value in json.loads(tokenizer.to_str()).items() if key != "model"}


def _model(tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    return json.loads(tokenizer.to_str())["model"]


def _steps(step: dict[str, Any] | None, many: str) -> list[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer, post-processor or decoder; a Sequence lists them under key `many`."""
    return [] if step is None else step[many] if step["type"] == "Sequence" else [step]


def _prefix_ids(post_processor: dict[str, Any] | None) -> Iterator[int]:
    """The ids that the post-processor puts before a text."""
    for step in _steps(post_processor, "processors"):
        if step["type"] in ("BertProcessing", "RobertaProcessing"):
            yield step["cls"][1]
        for piece in step.get("single", ()):
            if "SpecialToken" not in piece:
                break
            yield from step["special_tokens"][piece["SpecialToken"]["id"]]["ids"]


def _without_dummy_space(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without the steps that put a space before every text: Prepend, Metaspace, ByteLevel."""
    settings = copy.deepcopy(settings)
    for step in _steps(settings["normalizer"], "normalizers"):
        if step["type"] == "Prepend":
            step["prepend"] = ""
    for step in _steps(settings["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "Metaspace":
            step["prepend_scheme"] = "never"
        elif step["type"] == "ByteLevel":
            step["add_prefix_space"] = False
    return settings
