"""Tokenizers: exact round trips, control tokens that text cannot forge, streaming; real files where at hand."""

import base64
import os
from pathlib import Path

import pytest
import sentencepiece
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from made import TEXT, byte_level_bpe

from garrulax.hub.tokenizer_training import train_chars, train_sentencepiece
from garrulax.hub.tokenizers import (
    GLM_SPECIALS,
    ByteTokenizer,
    JsonTokenizer,
    SentencePieceTokenizer,
    StreamDecoder,
    load_tokenizer,
)

TRICKY = "  two  spaces\n\n\ttab \u2581 metaspace\r\n emoji 🙂👩‍👩‍👧 你好 \0 é\ufffd<|endoftext|>[MASK] \u2581\u2581"

DATA = os.environ.get("GARRULAX_DATA")
real_files = pytest.mark.skipif(DATA is None, reason="set GARRULAX_DATA to a folder with real tokenizer files")


def wordpiece():
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "##o", "world", "hell", ",", "[", "]", "mask"]
    tokenizer = hf.Tokenizer(hf.models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = hf.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = hf.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = hf.decoders.WordPiece()
    tokenizer.add_special_tokens(pieces[:5])
    return tokenizer


def llama_style_bpe():
    """What the `tokenizers` conversion of LLaMA's SentencePiece model looks like, in small."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *"▁abcdehlorw</s>"]
    pieces += ["▁w", "▁wo", "ab", "</", "</s"]
    ids = {p: i for i, p in enumerate(dict.fromkeys(pieces))}
    merges = [("▁", "w"), ("▁w", "o"), ("a", "b"), ("<", "/"), ("</", "s"), ("</s", ">")]
    tokenizer = hf.Tokenizer(hf.models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = hf.normalizers.Sequence([hf.normalizers.Prepend("▁"), hf.normalizers.Replace(" ", "▁")])
    tokenizer.decoder = hf.decoders.Sequence(
        [hf.decoders.Replace("▁", " "), hf.decoders.ByteFallback(), hf.decoders.Fuse(), hf.decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = hf.processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    return tokenizer


TOKENIZERS = {
    "bytes": ByteTokenizer(GLM_SPECIALS),
    "bpe": train_sentencepiece([TEXT], vocab=400, specials=GLM_SPECIALS),
    "unigram": train_sentencepiece([TEXT], vocab=400, model_type="unigram"),
    "json bpe": JsonTokenizer(byte_level_bpe()),
    "llama json": JsonTokenizer(llama_style_bpe(), {"bos_token": "<s>", "eos_token": "</s>"}),
    "wordpiece": JsonTokenizer(wordpiece()),
    "chars": train_chars(TEXT + TRICKY, specials=GLM_SPECIALS),
}
EXACT = ["bytes", "bpe", "unigram", "json bpe", "llama json", "chars"]
ANY_TEXT = ["bytes", "bpe", "unigram", "json bpe"]


@pytest.mark.parametrize("name", [n for n in EXACT if n != "llama json"])
def test_round_trip(name):
    tokenizer = TOKENIZERS[name]
    for text in ("", " ", "\n", TEXT, TRICKY):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_batch([TEXT, TRICKY, ""]) == [tokenizer.encode(t) for t in (TEXT, TRICKY, "")]


def test_a_vocabulary_without_letters_has_text():
    tokenizer = train_chars("12 + 3 = 15\n")
    assert tokenizer.decode(tokenizer.encode("3 + 12 = 15\n")) == "3 + 12 = 15\n"


@pytest.mark.parametrize("name", ANY_TEXT)
@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])) | st.text("\u2581 \n\t<>|[]MASKé🙂你"))
def test_round_trip_of_any_text(name, text):
    tokenizer = TOKENIZERS[name]
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_text_never_encodes_to_control_tokens(name):
    tokenizer = TOKENIZERS[name]
    assert tokenizer.specials
    controls = set(tokenizer.specials.values()) - {tokenizer.specials.get("[UNK]"), tokenizer.specials.get("<unk>")}
    for content in tokenizer.specials:
        text = f"{content}{content} {content}"
        if name == "chars":
            text = "".join(c for c in text if c in TEXT + TRICKY)
        ids = tokenizer.encode(text * 50)
        assert controls.isdisjoint(ids)
        if name in ANY_TEXT:
            assert tokenizer.decode(ids) == text * 50


@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_control_tokens_decode_to_nothing(name):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode("hello")
    controls = [i for content, i in tokenizer.specials.items() if content not in ("[UNK]", "<unk>")]
    assert tokenizer.decode([*controls, *ids, *controls]) == tokenizer.decode(ids) == "hello"


@pytest.mark.parametrize("name", list(TOKENIZERS))
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_streaming_equals_decoding_at_once(name, data):
    """Any ids at all, in any portions: also bytes that are not UTF-8, and text of multi-byte characters."""
    tokenizer = TOKENIZERS[name]
    some = st.lists(st.integers(0, tokenizer.vocab - 1), max_size=20)
    if name in ANY_TEXT:
        some = some | st.text("🙂é你aé ").map(tokenizer.encode)
    portions = data.draw(st.lists(some, max_size=8))
    stream = StreamDecoder(tokenizer)
    text = "".join(map(stream.push, portions)) + stream.flush()
    assert text == tokenizer.decode(i for portion in portions for i in portion)


def test_streaming_holds_back_unfinished_characters():
    for name in ANY_TEXT:
        tokenizer = TOKENIZERS[name]
        stream, pushed = StreamDecoder(tokenizer), []
        for token in tokenizer.encode("a🙂b"):
            pushed.append(stream.push([token]))
        assert "".join(pushed) == "a🙂b"
        assert "\ufffd" not in "".join(pushed)
    stream = StreamDecoder(ByteTokenizer())
    assert [stream.push([b]) for b in "🙂".encode()] == ["", "", "", "🙂"]
    assert stream.push([0xF0]) == ""
    assert stream.flush() == "\ufffd"


def test_decoding_agrees_with_the_tokenizers_library():
    for name in ("json bpe", "llama json", "wordpiece", "chars"):
        ours = TOKENIZERS[name]
        for text in ("hello world, a b", "abba wor ld" * 3, "hell"):
            ids = ours.encode(text)
            assert ids == ours._tokenizer.encode(text, add_special_tokens=False).ids
            # False, because otherwise the library hides [UNK]; we show it.
            assert ours.decode(ids) == ours._tokenizer.decode(ids, skip_special_tokens=False)


def test_a_continuation_keeps_its_leading_space():
    tokenizer = TOKENIZERS["llama json"]
    ids = tokenizer.encode("ab world")
    world = [i for i in ids if tokenizer.token_bytes(i).startswith(b" wo")]
    assert tokenizer.decode(ids) == "ab world"
    assert tokenizer.decode(world) == "wo"
    assert tokenizer.decode(world, start=False) == " wo"


@pytest.mark.parametrize("name", [n for n in TOKENIZERS if n != "bytes"])
def test_save_and_load(name, tmp_path):
    tokenizer = TOKENIZERS[name]
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    for field in ("vocab", "bos", "eos", "pad", "specials", "prefix", "suffix", "strips_space", "fingerprint"):
        assert getattr(loaded, field) == getattr(tokenizer, field), field
    assert loaded.encode("hello world") == tokenizer.encode("hello world")
    loaded.save(tmp_path / "again")
    for file in ("tokenizer_config.json", "tokenizer.json", "tokenizer.model"):
        assert (tmp_path / file).exists() == (tmp_path / "again" / file).exists()
        if (tmp_path / file).exists():
            assert (tmp_path / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def test_saved_bytes_load_as_the_same_ids(tmp_path):
    tokenizer = ByteTokenizer(GLM_SPECIALS)
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.encode(TRICKY) == tokenizer.encode(TRICKY) == list(TRICKY.encode())
    assert (loaded.specials, loaded.vocab, loaded.eos, loaded.pad) == (tokenizer.specials, 264, 256, 256)
    assert loaded.decode([0xC3, 257, 0xA9, 0xFF]) == tokenizer.decode([0xC3, 257, 0xA9, 0xFF]) == "é\ufffd"


def test_specials_beside_and_inside_a_sentencepiece_model(tmp_path):
    model = train_sentencepiece([TEXT], vocab=400, specials=("<|endoftext|>", "[MASK]"))._model
    inside = sentencepiece.SentencePieceProcessor(model_proto=model).piece_to_id("def")
    (tmp_path / "spiece.model").write_bytes(model)
    (tmp_path / "added_tokens.json").write_text('{"<|user|>": 405}')
    (tmp_path / "tokenizer_config.json").write_text(
        '{"bos_token": {"content": "[MASK]"}, "eos_token": "<|user|>", "pad_token": "<unk>", "add_bos_token": true,'
        f' "chat_template": "kept", "added_tokens_decoder": {{"{inside}": {{"content": "def", "special": true}}}}}}'
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.specials == {"<|endoftext|>": 1, "[MASK]": 2, "<|user|>": 405, "def": inside}
    assert (tokenizer.vocab, tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.prefix) == (406, 2, 405, 0, (2,))
    text = "def a\ndef b <|user|>"
    assert {405, inside}.isdisjoint(tokenizer.encode(text))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([405, 403, inside]) == "", "control tokens, and an id that stands for nothing"
    assert tokenizer.encode_batch([]) == []
    tokenizer.save(tmp_path / "saved")
    assert '"chat_template": "kept"' in (tmp_path / "saved" / "tokenizer_config.json").read_text()
    assert load_tokenizer(tmp_path / "saved").specials == tokenizer.specials


def test_json_settings_that_would_falsify_text_are_off(tmp_path):
    tokenizer = byte_level_bpe()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded.decode(loaded.encode(TEXT)) == TEXT
    assert len(loaded.encode("a")) == 1
    assert loaded.eos == loaded.specials["<|endoftext|>"]


def test_gpt2_and_bert_files(tmp_path):
    trained = byte_level_bpe()
    trained.model.save(str(tmp_path))
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode(TEXT) == trained.encode(TEXT).ids
    assert tokenizer.specials == {"<|endoftext|>": 0}
    assert (tokenizer.bos, tokenizer.eos) == (0, 0)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"merges\.txt"):
        load_tokenizer(tmp_path)

    bert = tmp_path / "bert"
    bert.mkdir()
    (bert / "vocab.txt").write_text("\n".join(wordpiece().id_to_token(i) for i in range(13)))
    (bert / "added_tokens.json").write_text('{"<|endofpiece|>": 14, "<|startofpiece|>": 13}')
    tokenizer = load_tokenizer(bert)
    assert tokenizer.encode("Hello, WORLD[MASK]<|endofpiece|>")[:7] == [5, 9, 7, 10, 12, 11, 1]
    assert (tokenizer.specials["[MASK]"], tokenizer.specials["<|endofpiece|>"], tokenizer.pad) == (4, 14, 0)
    (bert / "added_tokens.json").write_text('{"<|endofpiece|>": 77}')
    with pytest.raises(ValueError, match=r"cannot read .*endofpiece.* would have id 13, but its file says 77"):
        load_tokenizer(bert)


def test_training_is_deterministic_and_gives_the_specials():
    first, second = (train_sentencepiece([TEXT, TRICKY], vocab=420, specials=GLM_SPECIALS) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert list(first.specials.items()) == [(content, i + 1) for i, content in enumerate(GLM_SPECIALS)]
    assert (first.vocab, first.eos, first.pad, first.bos) == (420, 1, 1, None)
    assert len(first.encode(TEXT)) < len(TEXT) / 2
    assert [first.token_bytes(i) for i in first.encode("\n\n\t")] == [b"\n", b"\n", b"\t"]
    other = train_sentencepiece([TEXT], vocab=420, specials=("[PAD]", "[MASK]"))
    assert (other.eos, other.pad) == (None, other.specials["[PAD]"])
    chars = train_chars("hello", specials=("<|endoftext|>",))
    assert chars.encode("hole") == [1, 3, 2, 0]
    assert (chars.vocab, chars.eos, chars.pad) == (5, 4, 4)


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"supports a vocabulary of at most \d+, not 5000"):
        train_sentencepiece(["a few words only"], vocab=5000)
    with pytest.raises(ValueError, match="vocabulary of 100 is too small"):
        train_sentencepiece([TEXT], vocab=100)
    with pytest.raises(ValueError, match="corpus is empty"):
        train_sentencepiece([])
    with pytest.raises(ValueError, match="corpus is empty"):
        train_chars("")
    with pytest.raises(ValueError, match="'bpe' or 'unigram'"):
        train_sentencepiece([TEXT], model_type="word")
    with pytest.raises(ValueError, match=r"characters \['Z', 'é'\] are not in its vocabulary"):
        train_chars("hello").encode("helloZé")
    with pytest.raises(ValueError, match="two characters or more"):
        train_chars("hello", specials=("x",))
    with pytest.raises(ValueError, match="token id -1 is out of range"):
        ByteTokenizer(GLM_SPECIALS).decode([-1])

    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"expected tokenizer\.json"):
        load_tokenizer(tmp_path)
    for name, content in [("tokenizer.json", b"{}"), ("tokenizer.model", b"nonsense"), ("tokens.csv", b"a")]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"cannot read the tokenizer .*{name}"):
            load_tokenizer(tmp_path / name)
    ranks = b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256))
    (tmp_path / "tokenizer.model").write_bytes(ranks)
    with pytest.raises(ValueError, match="tiktoken"):
        load_tokenizer(tmp_path / "tokenizer.model")
    ByteTokenizer().save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": ["</s>"]}')
    with pytest.raises(ValueError, match="eos_token is not a text but"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_tokenizer(tmp_path)


@real_files
@pytest.mark.parametrize(
    ("folder", "ids", "vocab"),
    [
        ("gpt2", [15496, 995], 50257),
        ("llama2", [15043, 3186], 32000),
        ("bert-uncased", [7592, 2088], 30522),
        ("glm-chinese", [712, 25708, 17487], 50011),
    ],
)
def test_real_files(folder, ids, vocab):
    tokenizer = load_tokenizer(Path(DATA) / "tokenizers" / folder)
    assert tokenizer.encode("Hello world") == ids
    assert tokenizer.vocab == vocab
    assert tokenizer.decode(ids).lower() == "hello world"
    if folder in ("gpt2", "llama2"):
        assert tokenizer.decode(tokenizer.encode(TEXT + " 🙂 你好")) == TEXT + " 🙂 你好"
    if folder == "llama2":
        library = sentencepiece.SentencePieceProcessor(model_file=str(Path(DATA) / "tokenizers/llama2/tokenizer.model"))
        assert isinstance(tokenizer, SentencePieceTokenizer)
        for text in (" a", "  b\n c", "x 🙂 你", TEXT):
            assert tokenizer.encode(text) == library.encode(text)
            assert tokenizer.decode(library.encode(text)) == library.decode(library.encode(text))
