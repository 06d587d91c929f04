"""Tokenizers: text to token ids and back, whatever the file format.

Three kinds with one interface, `Tokenizer`:

    SentencePieceTokenizer   a SentencePiece `.model` (LLaMA-1/2, GLM-Chinese, our own training)
    JsonTokenizer            a `tokenizer.json`, GPT-2's vocab.json + merges.txt, or BERT's vocab.txt
    ByteTokenizer            UTF-8 bytes, nothing to train

Two rules hold for all of them. *Control tokens cannot be forged*: `encode` reads plain text, so no text, not even the
text "<|endoftext|>", encodes to a control token; programs insert those by id, from `specials`. *Decoding is bytes*: a
token stands for a byte string, a text is the concatenation decoded as UTF-8; hence streaming and decoding at once give
the same text.
"""

import codecs
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from garrulax.hub.json_files import read_object

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

_EOS_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")  # for files that do not say which token ends a text
_SPACE = "\u2581"  # SentencePiece's visible space


class Tokenizer(Protocol):
    """Text to ids and back.

    Attributes:
      vocab: number of ids; every id is in 0 .. vocab - 1 (some ids may stand for nothing).
      bos, eos, pad: the ids that begin a text, end a text (document separator) and fill batches, or None.
      specials: content -> id of the control tokens, which never come out of `encode`.
      adds_bos: whether models of this tokenizer expect `bos` in front of a prompt (`encode` itself never adds it).
      strips_space: whether the first token of a text drops one leading space (SentencePiece's dummy prefix).
    """

    vocab: int
    bos: int | None
    eos: int | None
    pad: int | None
    specials: dict[str, int]
    adds_bos: bool
    strips_space: bool

    def encode(self, text: str) -> list[int]:
        """Ids of a plain text; never control tokens. ValueError if the vocabulary cannot express the text."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of every text, on all cores where the library can."""
        return [self.encode(text) for text in texts]

    def _encode_parts(self, text: str, cuts: list[int]) -> list[int]:
        """Encodes the pieces between `cuts` apart: a control token's text, cut in two, is not that token."""
        ends = [0, *cuts, len(text)]
        parts = [text[start:end] for start, end in itertools.pairwise(ends)]
        if not cuts or not all(parts):
            raise ValueError(f"the tokenizer maps the text {text[:20]!r} to a control token")
        return list(itertools.chain.from_iterable(self.encode_batch(parts)))

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

    def __init__(self, tokenizer: Tokenizer, *, start: bool = True):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip = start and tokenizer.strips_space

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
            pieces.append(piece)
        return self._utf8.decode(b"".join(pieces))

    def flush(self) -> str:
        """What an unfinished character at the very end decodes to (U+FFFD), or ""."""
        return self._utf8.decode(b"", final=True)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, with control tokens of its own and perhaps `specials` outside of it.

    Args:
      model: the content of a `.model` file.
      specials: content -> id of further control tokens (models that put them behind the SentencePiece vocabulary).
      config: the content of tokenizer_config.json: names bos, eos and pad where the model does not.
    """

    def __init__(self, model: bytes, specials: dict[str, int] | None = None, config: dict[str, Any] | None = None):
        self._model = model
        self._config = dict(config or {})
        self._sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        size = self._sp.vocab_size()
        controls = {self._sp.id_to_piece(i): i for i in range(size) if self._sp.is_control(i)}
        unknown = self._sp.unk_id()
        self.specials = controls | {content: i for content, i in (specials or {}).items() if i != unknown}
        self.vocab = max([size, *(i + 1 for i in self.specials.values())])
        self._controls = {i: content for content, i in self.specials.items()}
        self._forgeable = {i for i in self._controls if i < size and not self._sp.is_control(i)}
        pieces = {self._sp.id_to_piece(i): i for i in range(size)}
        own = {"bos": self._sp.bos_id(), "eos": self._sp.eos_id(), "pad": self._sp.pad_id()}
        named = _named(self._config, pieces | self.specials)
        self.bos, self.eos, self.pad = (named.get(k, own[k] if own[k] >= 0 else None) for k in ("bos", "eos", "pad"))
        # LLaMA's own tokenizer class adds bos unless the file says otherwise.
        is_llama = str(self._config.get("tokenizer_class", "")).startswith("Llama")
        self.adds_bos = self.bos is not None and bool(self._config.get("add_bos_token", is_llama))
        self.strips_space = self._sp.encode("a", out_type=str)[0].startswith(_SPACE)
        # The library reads U+2581 as a space. Where it can be spelled in bytes it is, so that the round trip is exact.
        spelled = [self._sp.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        self._spell = spelled if not self.strips_space and all(self._sp.is_byte(i) for i in spelled) else None

    def encode(self, text: str) -> list[int]:
        """Ids of a plain text; what a model without byte pieces does not know becomes its unknown token."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of every text, on all cores."""
        encoded = self._sp.encode(list(texts), num_threads=min(len(texts), os.cpu_count() or 1) or 1)
        return [self._repair(text, ids) for text, ids in zip(texts, encoded, strict=True)]

    def _repair(self, text: str, ids: list[int]) -> list[int]:
        """`ids`, unless the text holds U+2581 or spells a control token: then the text is encoded in parts."""
        if self._spell is not None and _SPACE in text:
            first, *rest = self.encode_batch(text.split(_SPACE))
            return first + [token for part in rest for token in (*self._spell, *part)]
        if self._forgeable.isdisjoint(ids):
            return ids
        forged = next(self._controls[i] for i in ids if i in self._forgeable)
        cuts = [match.start() + len(forged) // 2 for match in re.finditer(re.escape(forged), text)]
        return self._encode_parts(text, cuts)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a piece; those of U+FFFD for the unknown token."""
        if token >= self._sp.vocab_size() or token in self._controls:
            return b""
        if self._sp.is_unknown(token):
            return "\ufffd".encode()
        piece = self._sp.id_to_piece(token)
        return bytes([int(piece[3:5], 16)]) if self._sp.is_byte(token) else piece.replace(_SPACE, " ").encode()

    def save(self, folder: str | os.PathLike) -> None:
        """Writes tokenizer.model, tokenizer_config.json and added_tokens.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.model").write_bytes(self._model)
        _save_config(folder, self, self._config)

    @property
    def fingerprint(self) -> str:
        """A sha256 of the model and the control tokens."""
        return _sha256(self._model, self.specials)


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
        self._config = dict(config or {})
        ids = tokenizer.get_vocab(with_added_tokens=True)
        self.specials = {t.content: i for i, t in sorted(tokenizer.get_added_tokens_decoder().items()) if t.special}
        named = _named(self._config, ids)
        eos = next((self.specials[name] for name in _EOS_NAMES if name in self.specials), None)
        self.bos, self.eos = named.get("bos"), named.get("eos", eos)
        self.pad = named.get("pad", self.specials.get("[PAD]"))
        contents = {i: content for content, i in ids.items()}
        self.specials |= {contents[i]: i for i in (self.bos, self.eos, self.pad) if i is not None}
        self.vocab = max(ids.values()) + 1
        template = tokenizer.encode("", add_special_tokens=True).ids
        self.adds_bos = self.bos is not None and template[:1] == [self.bos]
        unknown = getattr(tokenizer.model, "unk_token", None)  # does come out of text
        self._controls = {i for content, i in self.specials.items() if content != unknown}

        kind = json.loads(tokenizer.to_str())["decoder"]
        kinds = {d["type"] for d in (kind or {}).get("decoders", [kind] if kind else [])}
        if "BPEDecoder" in kinds or "CTC" in kinds:
            raise ValueError(f"tokenizer.json has a decoder of type {', '.join(kinds)}, which Garrulax cannot stream")
        self._byte_level = _byte_alphabet() if "ByteLevel" in kinds else None
        self._byte_fallback = "ByteFallback" in kinds
        # Other decoders are asked: the text of a token is what it adds behind an ordinary one, the anchor.
        ordinary = (i for i in sorted(contents) if i not in self._controls and tokenizer.decode([i]).strip().isalpha())
        self._anchor = next(ordinary, None)
        spaced = next((i for i in sorted(contents) if self._added(i).startswith(b" ") and self._added(i).strip()), None)
        self.strips_space = spaced is not None and not tokenizer.decode([spaced]).startswith(" ")

    def encode(self, text: str) -> list[int]:
        """Ids of a plain text. ValueError that names the characters which the vocabulary lacks."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of every text, on all cores."""
        try:
            encoded = [e.ids for e in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
        except Exception as error:  # the library raises nothing more specific
            known = self._tokenizer.get_vocab()
            missing = sorted({c for text in texts for c in text if c not in known})
            named = f"characters {missing[:8]} are not in its vocabulary" if missing else str(error)
            raise ValueError(f"the tokenizer cannot encode this text: {named}") from error
        return [self._repair(text, ids) for text, ids in zip(texts, encoded, strict=True)]

    def _repair(self, text: str, ids: list[int]) -> list[int]:
        """`ids`, unless the text spells a control token: then its two halves are encoded apart."""
        if self._controls.isdisjoint(ids):
            return ids
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        spans = [span for token, span in zip(encoding.ids, encoding.offsets, strict=True) if token in self._controls]
        return self._encode_parts(text, [(start + end) // 2 for start, end in spans])

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token as the file's own decoder shows it."""
        content = self._tokenizer.id_to_token(token)
        if content is None or token in self._controls:
            return b""
        if self._byte_level is not None:
            table = self._byte_level
            return bytes(table[c] for c in content) if all(c in table for c in content) else content.encode()
        if self._byte_fallback and len(content) == 6 and content.startswith("<0x"):
            return bytes([int(content[3:5], 16)])
        return self._added(token)

    def _added(self, token: int) -> bytes:
        if self._byte_level is not None or self._anchor is None or token in self._controls:
            return b""
        before = self._tokenizer.decode([self._anchor])
        return self._tokenizer.decode([self._anchor, token], skip_special_tokens=False)[len(before) :].encode()

    def save(self, folder: str | os.PathLike) -> None:
        """Writes tokenizer.json and tokenizer_config.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._tokenizer.save(str(folder / "tokenizer.json"))
        _save_config(folder, self, {"tokenizer_class": "PreTrainedTokenizerFast"} | self._config)

    @property
    def fingerprint(self) -> str:
        """A sha256 of the whole tokenizer.json."""
        return _sha256(self._tokenizer.to_str().encode(), self.specials)


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
        self.adds_bos = False
        self.strips_space = False

    def encode(self, text: str) -> list[int]:
        """The bytes of the text."""
        return list(text.encode())

    def token_bytes(self, token: int) -> bytes:
        """The byte itself."""
        return bytes([token]) if token < 256 else b""

    def save(self, folder: str | os.PathLike) -> None:
        """Writes tokenizer.json and tokenizer_config.json."""
        tokenizer = tokenizers.Tokenizer(models.BPE(vocab=_byte_alphabet(), merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(list(self.specials))
        JsonTokenizer(tokenizer, _token_names(self)).save(folder)

    @property
    def fingerprint(self) -> str:
        """A sha256 of the control tokens."""
        return _sha256(b"bytes", self.specials)


# -- Loading ----------------------------------------------------------------------------------------------------------


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer in a file (`*.model`, `tokenizer.json`) or in a folder that holds one.

    A folder may hold tokenizer.json, tokenizer.model (or any single *.model), vocab.json with merges.txt, or vocab.txt.
    Names of bos, eos and pad come from tokenizer_config.json or special_tokens_map.json beside it, further control
    tokens from added_tokens.json; without them eos is the model's own, or a control token named like <|endoftext|>.

    Raises FileNotFoundError if there is none, ValueError if the file is not what its name says.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no tokenizer at {path}: no such file or folder")
    if path.is_file():
        return _load_file(path, path.parent)
    for name in ("tokenizer.json", "tokenizer.model"):
        if (path / name).exists():
            return _load_file(path / name, path)
    models_here = sorted(path.glob("*.model"))
    if len(models_here) == 1:
        return _load_file(models_here[0], path)
    for name in ("vocab.json", "vocab.txt"):
        if (path / name).exists():
            return _load_file(path / name, path)
    raise FileNotFoundError(
        f"no tokenizer in {path}: expected tokenizer.json, tokenizer.model, vocab.json with merges.txt, or vocab.txt"
    )


def _load_file(file: Path, folder: Path) -> Tokenizer:
    config = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
    added = _read_json(folder / "added_tokens.json")
    for token, entry in config.get("added_tokens_decoder", {}).items():
        if entry.get("special"):
            added[entry["content"]] = int(token)
    try:
        if file.suffix == ".model":
            content = file.read_bytes()
            if _is_tiktoken(content):
                raise ValueError("this is a tiktoken rank file; use the tokenizer.json of the same model")
            return SentencePieceTokenizer(content, added, config)
        if file.name == "vocab.json":
            tokenizer = _with_added(_gpt2(file, folder / "merges.txt"), added)
        elif file.name == "vocab.txt":
            tokenizer = _with_added(_bert(file, lowercase=config.get("do_lower_case", True)), added)
        elif file.suffix == ".json":
            tokenizer = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))  # holds its added tokens
        else:
            raise ValueError("unknown kind of file; expected *.model, tokenizer.json, vocab.json or vocab.txt")
        return JsonTokenizer(tokenizer, config)
    except FileNotFoundError:
        raise
    except Exception as error:  # both libraries raise bare RuntimeError or Exception on a damaged file
        raise ValueError(f"cannot read the tokenizer {file}: {' '.join(str(error).split())}") from error


def _with_added(tokenizer: tokenizers.Tokenizer, added: dict[str, int]) -> tokenizers.Tokenizer:
    """`tokenizer` with further control tokens, which must get the ids that the files give them."""
    for content, token in sorted(added.items(), key=lambda item: item[1]):
        tokenizer.add_special_tokens([content])
        if tokenizer.token_to_id(content) != token:
            raise ValueError(
                f"token {content!r} would have id {tokenizer.token_to_id(content)}, but its file says {token}"
            )
    return tokenizer


def _gpt2(vocab: Path, merges: Path) -> tokenizers.Tokenizer:
    """Byte-level BPE in the files that openai/gpt-2 published."""
    if not merges.exists():
        raise FileNotFoundError(f"no tokenizer: {vocab} needs a merges.txt beside it")
    tokenizer = tokenizers.Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([name for name in _EOS_NAMES if tokenizer.token_to_id(name) is not None])
    return tokenizer


def _bert(vocab: Path, lowercase: bool) -> tokenizers.Tokenizer:
    """WordPiece in the files that google-research/bert published (GLM-base and -large use them)."""
    wordpiece = tokenizers.BertWordPieceTokenizer(str(vocab), lowercase=lowercase)
    return tokenizers.Tokenizer.from_str(wordpiece.to_str())


def _read_json(path: Path) -> dict[str, Any]:
    return read_object(path) if path.exists() else {}


def _is_tiktoken(content: bytes) -> bool:
    """Whether a `.model` holds lines of `base64 rank` (LLaMA-3, GLM-4) and not a SentencePiece protobuf."""
    first = content[:256].split(b"\n")[0].split()
    return len(first) == 2 and first[0].isascii() and first[1].isdigit()


# -- Helpers ----------------------------------------------------------------------------------------------------------


def _named(config: dict[str, Any], ids: dict[str, int]) -> dict[str, int]:
    """The ids of bos, eos and pad that a tokenizer_config.json names; ValueError for a name without an id."""
    named = {}
    for role in ("bos", "eos", "pad"):
        entry = config.get(f"{role}_token")
        content = entry.get("content") if isinstance(entry, dict) else entry
        if content is None:
            continue
        if content not in ids:
            raise ValueError(f"tokenizer_config.json names {role}_token {content!r}, which the tokenizer does not have")
        named[role] = ids[content]
    return named


def _token_names(tokenizer: Tokenizer) -> dict[str, str]:
    names = {i: content for content, i in tokenizer.specials.items()}
    roles = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos, "pad_token": tokenizer.pad}
    return {role: names[i] for role, i in roles.items() if i in names}


def _save_config(folder: Path, tokenizer: Tokenizer, config: dict[str, Any]) -> None:
    """tokenizer_config.json: what was loaded, with today's bos, eos and pad; added_tokens.json where needed."""
    config = config | _token_names(tokenizer)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
    if isinstance(tokenizer, SentencePieceTokenizer):
        (folder / "added_tokens.json").write_text(json.dumps(tokenizer.specials, ensure_ascii=False) + "\n", "utf-8")


def _byte_alphabet() -> dict[str, int]:
    """The printable character that GPT-2's files write for each byte (openai/gpt-2 encoder.py), and the byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _sha256(content: bytes, specials: dict[str, int]) -> str:
    digest = hashlib.sha256(content)
    digest.update(json.dumps(specials, sort_keys=True).encode())
    return digest.hexdigest()
