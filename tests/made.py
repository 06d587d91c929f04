"""Tokenizer files made for the tests: trained in a moment, or with known pieces at known ids."""

import base64
import io
import json
import struct
from pathlib import Path

import sentencepiece
import tokenizers as hf

from garrulax.hub.tokenizers.library import byte_alphabet

TEXT = Path(hf.__file__).with_name("__init__.py").read_text() + "".join(
    f"def function_{i}(argument, other=None):\n\tif argument:\n        return other  # naïve\n\n" for i in range(200)
)


def byte_level_bpe(size=400, specials=("<|endoftext|>",)):
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def gpt1(folder):
    """vocab.json and merges.txt in GPT-1's manner."""
    tokenizer = hf.Tokenizer(hf.models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.normalizer = hf.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = hf.pre_tokenizers.BertPreTokenizer()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.model.save(str(folder))
    return folder


def pieces(size=400, **changes):
    """A SentencePiece model as LLaMA's: a dummy space, bytes for what is unknown, <unk>, <s>, </s>."""
    model = io.BytesIO()
    settings = {
        "model_type": "bpe",
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "byte_fallback": True,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=model,
        vocab_size=size,
        minloglevel=2,
        **(settings | changes),
    )
    return model.getvalue()


def _field(number, content):
    size, prefix = len(content), [number << 3 | 2]
    while size > 127:
        prefix.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([*prefix, size]) + content


NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def pieces_at(size, known, kinds):
    """A SentencePiece unigram model of `size` pieces: `known` (content -> id), whose `kinds` differ from NORMAL where
    given, the rest unreachable. Longer pieces are likelier. Content may be (content, score)."""
    contents = {
        i: content if isinstance(content, tuple) else (content, len(content) ** 2) for content, i in known.items()
    }
    table = []
    for i in range(size):
        content, score = contents.get(i, (f"\x02{i}", -99))
        number = _field(1, content.encode()) + b"\x15" + struct.pack("<f", score)
        table.append(_field(1, number + bytes([0x18, kinds.get(content, NORMAL)])))
    fallback = b"\x98\x02\x01" if BYTE in kinds.values() else b""
    trainer = _field(2, b"\x18\x01" + fallback)  # model_type = UNIGRAM, byte_fallback
    return (
        b"".join(table) + trainer + _field(3, _field(1, b"identity") + b"\x20\x00")
    )  # remove_extra_whitespaces = false


def ranks(tokens):
    """A tiktoken file of these byte strings, in order."""
    return b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens))


def trained_ranks(size=400):
    """Byte strings of a small byte-level BPE."""
    table = byte_alphabet()
    vocab = byte_level_bpe(size, ()).get_vocab()
    return [bytes(table[c] for c in token) for token, _ in sorted(vocab.items(), key=lambda item: item[1])]


def ranks_at(size, known):
    """`size` byte strings: single bytes first, in GPT-2's order, `known` (id -> text or bytes) and, of its texts, the
    parts that merging needs; the rest unreachable."""
    tokens = dict(enumerate(bytes([byte]) for byte in byte_alphabet().values()))
    tokens |= {i: text.encode() if isinstance(text, str) else text for i, text in known.items()}
    texts = [text for text in known.values() if isinstance(text, str)]
    letters = [c.encode()[:n] for text in texts for c in text for n in range(2, len(c.encode()) + 1)]
    words = [text[:n].encode() for text in texts for n in range(2, len(text))]
    there = set(tokens.values())
    missing = [part for part in dict.fromkeys(letters + words) if part not in there]
    free = (i for i in range(size) if i not in tokens)
    tokens |= dict(zip(free, missing, strict=False))
    return [tokens.get(i, b"\xff\xfe" + i.to_bytes(3, "big")) for i in range(size)]


FIELDS = (
    "vocab",
    "bos",
    "eos",
    "pad",
    "specials",
    "prefix",
    "suffix",
    "ends",
    "chat_format",
    "strips_space",
    "spaces_words",
)
NASTY = "It's\u017f I'LL 'Ve  \u00a0 12345 3.14\t\r\n\n  x\u2028y é 🙂👩‍👩‍👧 你好 <|eot_id|> [gMASK]<sop> ...!!\n\n "


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        name = name.replace("__", ".")
        (folder / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


def assert_same(loaded, tokenizer, text=NASTY):
    for field in FIELDS:
        assert getattr(loaded, field) == getattr(tokenizer, field), field
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.decode(loaded.encode(text)) == tokenizer.decode(tokenizer.encode(text))
