"""The tokenizer in the metadata of a GGUF file, as the library's object that reads the same text to the same ids.

Two kinds are read: byte-level BPE (`gpt2` in the file), which names the rule by which text is cut into words, and
SentencePiece's BPE (`llama`). Sources: src/llama-vocab.cpp of ggml-org/llama.cpp for the names of the rules; the
tokenizer.json of the models of which they are.
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from garrulax.hub.gguf.special_ids import special_id
from garrulax.hub.tokenizers import JsonTokenizer, SentencePieceTokenizer, Tokenizer, families

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of tokens, as SentencePiece numbers them
Step = pre_tokenizers.PreTokenizer

_WORDS = (  # contractions, a letter run with one sign before it, digits, signs with line ends, line ends, spaces
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(pattern: str) -> list[Step]:
    """Cuts by a regular expression, all of which the words are."""
    return [
        pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


def _gpt2() -> Step:
    """Cuts as GPT-2 does, by the expression that the library knows."""
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _falcon() -> list[Step]:
    threes = pre_tokenizers.Split(tokenizers.Regex("[0-9][0-9][0-9]"), "isolated")
    return [pre_tokenizers.Punctuation("contiguous"), _gpt2(), pre_tokenizers.Digits(False), threes]


#: Steps that cut a text into words, by the name of the rule; `_RULES` has the names.
_STEPS = {
    "gpt2": lambda: [_gpt2()],
    "digits": lambda: [pre_tokenizers.Digits(individual_digits=True), _gpt2()],
    "llama3": lambda: _split(_WORDS.format(digits="{1,3}")),
    "qwen2": lambda: _split(_WORDS.format(digits="")),
    "tekken": lambda: _split(_TEKKEN),
    "falcon": _falcon,
}
#: tokenizer.ggml.pre -> the rule.
_RULES = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais"), "gpt2"),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell", "command-r", "exaone", "minerva-7b"), "digits"),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "dbrx", "smaug-bpe"), "llama3"),
    **dict.fromkeys(("chatglm-bpe", "glm4"), "llama3"),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez"), "qwen2"),
    "tekken": "tekken",
    "falcon": "falcon",
}
_WHOLE_WORDS = {"llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken"}  # a word that is a token stays whole
_BEGINS = _WHOLE_WORDS  # texts begin with bos unless the file says otherwise
_COMPOSED = {"qwen2"}  # text is in the normal form NFC
#: Rules of files from before the key existed, by architecture.
_OLD_RULES = {"gpt2": "gpt-2", "gptneox": "olmo", "falcon": "falcon", "qwen2": "qwen2"}


def read_gguf_tokenizer(metadata: Mapping[str, Any], raw: Mapping[str, Any], path: Path) -> Tokenizer | None:
    """The tokenizer in the metadata of a GGUF file; None if there is none.

    Args:
        metadata: The metadata.
        raw: The config.json that they stand for.
        path: The file, for messages.

    Raises:
        ValueError: The tokenizer is of another kind, cuts words by an unknown rule, or is damaged.
    """
    kind = metadata.get("tokenizer.ggml.model", "none")
    if kind in ("none", "no_vocab"):
        return None
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"{path}: tokenizers of kind {str(kind)[:40]!r} are not implemented (only gpt2 and llama)")
    try:
        return (_bpe if kind == "gpt2" else _sentencepiece)(metadata, raw)
    except Exception as error:  # both libraries raise bare RuntimeError or Exception on damaged content
        raise ValueError(f"cannot read the tokenizer in {path}: {' '.join(str(error).split())}") from error


def _tokens(metadata: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """The tokens and their types."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise ValueError("there is no list tokenizer.ggml.tokens")
    types = metadata.get("tokenizer.ggml.token_type", np.full(len(tokens), NORMAL))
    if not isinstance(types, np.ndarray) or len(types) != len(tokens):
        raise ValueError(f"tokenizer.ggml.token_type should have a number for each of {len(tokens):,} tokens")
    return tokens, types.tolist()


def _config(metadata: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, Any]:
    """A tokenizer_config.json: names of bos, eos and pad, and the chat templates."""
    config: dict[str, Any] = {}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (token := special_id(metadata, key, len(tokens))) is not None:
            config[f"{role}_token"] = tokens[token]
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
    before, named = "tokenizer.chat_template.", []
    for key, value in metadata.items():
        if key.startswith(before) and isinstance(value, str):
            named.append({"name": key.removeprefix(before), "template": value})
    if named:
        named.insert(0, {"name": "default", "template": template or named[0]["template"]})
        config["chat_template"] = named
    return config


def _bpe(metadata: Mapping[str, Any], raw: Mapping[str, Any]) -> Tokenizer:
    tokens, types = _tokens(metadata)
    rule = metadata.get("tokenizer.ggml.pre") or _OLD_RULES.get(str(metadata.get("general.architecture")), "none")
    if rule not in _RULES:
        raise ValueError(
            f"tokenizer.ggml.pre={str(rule)[:40]!r} is not implemented (there are {', '.join(_RULES)}): "
            "text would be cut into other words than in the training"
        )
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise ValueError("there is no list tokenizer.ggml.merges")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        raise ValueError("a token is in tokenizer.ggml.tokens twice")
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError("an entry of tokenizer.ggml.merges is not two parts with a space between them")
    bpe = models.BPE(vocabulary, pairs, ignore_merges=rule in _WHOLE_WORDS)
    tokenizer = tokenizers.Tokenizer(bpe)
    if rule in _COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_STEPS[_RULES[rule]]())
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, types, strict=True):
        if kind in (CONTROL, USER_DEFINED):
            tokenizer.add_tokens([tokenizers.AddedToken(token, special=kind == CONTROL, normalized=False)])
    config = _config(metadata, tokens)
    bos = config.get("bos_token")
    if bos is not None and metadata.get("tokenizer.ggml.add_bos_token", rule in _BEGINS):
        tokenizer.add_special_tokens([bos])
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", "$B"], special_tokens=[(bos, vocabulary[bos])]
        )
    controls = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    family = families.recognise("tokenizer.json", config, dict(raw), controls)
    return families.apply_family(
        JsonTokenizer(tokenizer, families.complete_config(family, config, {}, controls)), family
    )


def _sentencepiece(metadata: Mapping[str, Any], raw: Mapping[str, Any]) -> Tokenizer:
    tokens, types = _tokens(metadata)
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or len(scores) != len(tokens):
        raise ValueError(f"tokenizer.ggml.scores should have a number for each of {len(tokens):,} tokens")
    found = {key: special_id(metadata, key, len(tokens)) for key in ("unknown", "bos", "eos", "padding")}
    roles = {key: -1 if token is None else token for key, token in found.items()}
    unknown = roles["unknown"] if UNKNOWN not in types else types.index(UNKNOWN)
    dummy = metadata.get("tokenizer.ggml.add_space_prefix", True)
    model = _model_file(tokens, scores.tolist(), types, {**roles, "unknown": unknown}, bool(dummy))
    config = _config(metadata, tokens)
    controls = {token: i for i, token in enumerate(tokens) if types[i] == CONTROL}
    config |= {"tokenizer_class": "LlamaTokenizer", "add_bos_token": metadata.get("tokenizer.ggml.add_bos_token", True)}
    if raw.get("model_type") == "chatglm":
        config["tokenizer_class"] = "ChatGLMTokenizer"
    family = families.recognise("tokenizer.model", config, dict(raw), controls)
    config = families.complete_config(family, config, {}, controls)
    return families.apply_family(SentencePieceTokenizer(model, {}, config), family)


# -- SentencePiece's file, in the encoding of protobuf (protobuf.dev/programming-guides/encoding) ---------------------


def _model_file(
    tokens: Sequence[str], scores: Sequence[float], types: Sequence[int], roles: Mapping[str, int], dummy: bool
) -> bytes:
    """A SentencePiece .model (sentencepiece_model.proto) of BPE with these pieces.

    Args:
        tokens: The pieces.
        scores: The score of each.
        types: The type of each.
        roles: Id of unknown, bos, eos and padding; -1 for none.
        dummy: Whether a space is put before every text.
    """
    kinds = [kind if NORMAL <= kind <= BYTE else NORMAL for kind in types]
    if 0 <= roles["unknown"] < len(kinds):
        kinds[roles["unknown"]] = UNKNOWN
    pieces = b"".join(
        _message(1, _message(1, token.encode()) + b"\x15" + struct.pack("<f", score) + _number(3, kind))
        for token, score, kind in zip(tokens, scores, kinds, strict=True)
    )
    numbers = {3: 2, 4: len(tokens), 35: int(BYTE in kinds)}  # model_type BPE, vocab_size, byte_fallback
    numbers |= {40: roles["unknown"], 41: roles["bos"], 42: roles["eos"], 43: roles["padding"]}
    trainer = b"".join(_number(field, value) for field, value in numbers.items())
    normalizer = _message(1, b"identity") + _number(3, int(dummy)) + _number(4, 0) + _number(5, 1)
    return pieces + _message(2, trainer) + _message(3, normalizer)


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value % (1 << 64))


def _varint(value: int) -> bytes:
    """A whole number in groups of seven bits, the lowest first; the high bit of a byte says that another follows."""
    return bytes(_groups(value))


def _groups(value: int) -> Iterator[int]:
    while value > 127:
        yield value & 127 | 128
        value >>= 7
    yield value
