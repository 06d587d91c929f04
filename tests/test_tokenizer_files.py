"""Tokenizer files as people have them: names without ids, tokens listed elsewhere, flags, marks, half characters."""

import json
import logging

import made
import pytest

from garrulax.hub.tokenizers import ByteTokenizer, JsonTokenizer, SentencePieceTokenizer, load_tokenizer


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / name.replace("__", ".")).write_bytes(content)
    return folder


KINDS = {
    "sentencepiece": lambda folder: write(folder, tokenizer__model=made.pieces()),
    "tokenizer.json": lambda folder: write(folder, tokenizer__json=made.byte_level_bpe().to_str().encode()),
    "vocab.json": lambda folder: made.byte_level_bpe().model.save(str(write(folder))) and folder,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_without_an_id_is_ignored_with_a_note(tmp_path, kind, caplog):
    folder = KINDS[kind](tmp_path / "a")
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        names = {"pad_token": {"content": "<pad>"}, "eos_token": "<nowhere>", "unk_token": "<none>"}
        (folder / file).write_text(json.dumps(names | {"additional_special_tokens": ["<gone>", {"content": "<x>"}]}))
        with caplog.at_level(logging.WARNING):
            tokenizer = load_tokenizer(folder)
        assert tokenizer.pad is None
        assert f"{file} names pad_token '<pad>', which has no id" in caplog.text
        caplog.clear()
        assert tokenizer.decode(tokenizer.encode("a <pad> <gone>")) == "a <pad> <gone>"
        (folder / file).unlink()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file", ["tokenizer_config.json", "added_tokens.json"])
def test_tokens_listed_beside_any_file(tmp_path, kind, file):
    folder = KINDS[kind](tmp_path / "a")
    listed = {"<pad>": 400}
    decoder = {"400": {"content": "<pad>", "special": True}}
    (folder / file).write_text(json.dumps(listed if file == "added_tokens.json" else {"added_tokens_decoder": decoder}))
    (folder / "special_tokens_map.json").write_text('{"pad_token": "<pad>"}')
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.pad, tokenizer.vocab, tokenizer.specials["<pad>"]) == (400, 401, 400)
    assert 400 not in tokenizer.encode("<pad>")
    tokenizer.save(tmp_path / "b")
    assert load_tokenizer(tmp_path / "b").pad == 400


def test_ids_that_tokenizer_json_cannot_have_are_left_out(tmp_path, caplog):
    folder = KINDS["tokenizer.json"](tmp_path / "a")
    decoder = {"450": {"content": "<far>", "special": True}, "5": {"content": "def", "special": True},
               "400": {"content": "<word>", "special": False}}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    tokenizer = load_tokenizer(folder)
    assert "token '<far>' is left out" in caplog.text
    assert "<far>" not in tokenizer.specials
    assert tokenizer.encode("a <word>")[-1] == 400
    assert tokenizer.decode([400]) == "<word>"


def test_additional_special_tokens_are_control_tokens(tmp_path):
    library = made.byte_level_bpe()
    library.add_tokens(["<|im_end|>"])
    for extra in ("additional_special_tokens", "extra_special_tokens"):
        tokenizer = JsonTokenizer(made.hf.Tokenizer.from_str(library.to_str()), {extra: ["<|im_end|>", "<none>"]})
        assert tokenizer.specials["<|im_end|>"] == 400
        assert 400 not in tokenizer.encode("a <|im_end|>")
        assert tokenizer.decode(tokenizer.encode("a <|im_end|>")) == "a <|im_end|>"


def test_flags_of_vocab_and_merges(tmp_path):
    """As transformers 5.23 (tests/parity): a space in front, and bos in front of a prompt."""
    folder = KINDS["vocab.json"](tmp_path / "a")
    plain = load_tokenizer(folder)
    flags = folder / "tokenizer_config.json"
    flags.write_text('{"add_prefix_space": true}')
    spaced = load_tokenizer(folder)
    assert spaced.prompt("def") == plain.prompt(" def") != plain.prompt("def")
    assert spaced.encode("def", start=False) == plain.encode("def")
    flags.write_text('{"add_bos_token": true, "bos_token": "<|endoftext|>", "add_eos_token": true}')
    assert load_tokenizer(folder).prompt("def") == [0, *plain.encode("def")]
    load_tokenizer(folder).save(tmp_path / "b")
    assert load_tokenizer(tmp_path / "b").prompt("def") == [0, *plain.encode("def")]
    flags.write_text('{"add_bos_token": true, "tokenizer_class": "GPT2Tokenizer"}')  # whose bos is <|endoftext|>
    assert load_tokenizer(folder).prompt("def") == [0, *plain.encode("def")]
    assert load_tokenizer(folder).bos == 0
    flags.write_text('{"add_bos_token": true, "bos_token": null}')
    assert load_tokenizer(folder).prompt("def") == plain.encode("def")
    bad = {'"add_bos_token": 5': "must be true or false", '"add_bos_token": true, "bos_token": "<x>"': "needs a bos_to"}
    for entries, words in bad.items():
        flags.write_text(f"{{{entries}}}")
        with pytest.raises(ValueError, match=f"tokenizer_config.json: add_bos_token {words}"):
            load_tokenizer(folder)
    flags.write_text('{"add_prefix_space": "yes"}')
    with pytest.raises(ValueError, match="add_prefix_space must be true or false, not 'yes'"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("named", "model_type", "reads_flag"),
    [
        ("GPT2Tokenizer", None, True), ("GPTNeoXTokenizerFast", "llama", True), ("Qwen2Tokenizer", None, True),
        (None, "gpt2", True), (None, "gpt_neox", True), ("PreTrainedTokenizerFast", "qwen2", True),
        ("PreTrainedTokenizerFast", "gpt2", False), (None, None, False), (None, "llama", False),
    ],
)  # fmt: skip
def test_the_space_in_front_beside_tokenizer_json(tmp_path, named, model_type, reads_flag):
    """As transformers 5.23 (tests/parity): some classes put the flag in the place of what tokenizer.json says."""
    config = {} if named is None else {"tokenizer_class": named}
    folder = write(tmp_path, config__json={} if model_type is None else {"model_type": model_type})
    for in_file in (False, True):
        library = made.byte_level_bpe()
        library.pre_tokenizer = made.hf.pre_tokenizers.ByteLevel(add_prefix_space=in_file)
        for flag in ({}, {"add_prefix_space": False}, {"add_prefix_space": True}):
            write(folder, tokenizer__json=library.to_str().encode(), tokenizer_config__json=config | flag)
            spaced = flag.get("add_prefix_space", False) if reads_flag else in_file
            tokenizer = load_tokenizer(folder)
            assert tokenizer.encode("Hello") == tokenizer.encode(" Hello" if spaced else "Hello", start=False)
            assert (tokenizer.encode("Hello") == tokenizer.encode(" Hello")) == spaced


DECODER = "added_tokens_decoder"
WRONG = {
    r"tokenizer_config\.json: pad_token is not a text but 5": {"tokenizer_config": {"pad_token": 5}},
    r"special_tokens_map\.json: eos_token is not a text but \['a'": {"special_tokens_map": {"eos_token": ["a"]}},
    r"json: bos_token is not a text but \{'id': 1": {"tokenizer_config": {"bos_token": {"id": 1}}},
    r"json: tokenizer_class is not a text but \[\]": {"tokenizer_config": {"tokenizer_class": []}},
    r"json: additional_special_tokens is not a list of texts but 'x'": {
        "tokenizer_config": {"additional_special_tokens": "x"}
    },
    r"tokenizer_config\.json: added_tokens_decoder has the key 'x'": {"tokenizer_config": {DECODER: {"x": {}}}},
    r"tokenizer_config\.json: added_tokens_decoder has at 5 no object": {"tokenizer_config": {DECODER: {"5": "<a>"}}},
    r"tokenizer_config\.json: added_tokens_decoder is not an object": {"tokenizer_config": {DECODER: [5]}},
    r"tokenizer_config\.json: added_tokens_decoder names '<a>' or its id 6 twice": {
        "tokenizer_config": {DECODER: {"5": {"content": "<a>"}, "6": {"content": "<a>"}}}
    },
    r"added_tokens\.json: '<a>' has no id but 'b'": {"added_tokens": {"<a>": "b"}},
    r"'<a>' has the id 400 in tokenizer_config\.json, but 401 in added_tokens\.json; correct or remove": {
        "tokenizer_config": {DECODER: {"400": {"content": "<a>"}}}, "added_tokens": {"<a>": 401},
    },
    r"the id 400 is '<a>' in tokenizer_config\.json, but '<b>' in added_tokens\.json": {
        "tokenizer_config": {DECODER: {"400": {"content": "<a>"}}}, "added_tokens": {"<b>": 400},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def pieces():
    return made.pieces()


@pytest.mark.parametrize("message", WRONG)
def test_wrong_values_beside_a_tokenizer(tmp_path, message, pieces):
    files = {f"{name}__json": content for name, content in WRONG[message].items()}
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(write(tmp_path, tokenizer__model=pieces, **files))
    assert "tokenizer.model" not in str(error.value), "the file beside it is to blame"
    assert "\n" not in str(error.value)


def test_two_texts_of_one_id_in_added_tokens_json_are_no_contradiction(tmp_path, pieces):
    """As in GLM's Chinese models."""
    decoder = {"400": {"content": "<b>", "special": True}}
    folder = write(tmp_path, tokenizer__model=pieces, added_tokens__json={"<a>": 400, "<b>": 400})
    write(folder, tokenizer_config__json={DECODER: decoder})
    assert load_tokenizer(folder).specials.items() >= {"<a>": 400, "<b>": 400}.items()


def test_text_that_is_not_utf8_names_its_file(tmp_path, pieces):
    folder = write(tmp_path / "a", tokenizer__model=pieces)
    template = folder / "additional_chat_templates" / "rag.jinja"
    template.parent.mkdir()
    template.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"rag\.jinja is not UTF-8 \(byte 3\)") as error:
        load_tokenizer(folder)
    assert "tokenizer.model" not in str(error.value)
    folder = KINDS["vocab.json"](tmp_path / "b")
    (folder / "merges.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"merges\.txt is not UTF-8"):
        load_tokenizer(folder)


def test_sentencepiece_without_a_dummy_space():
    plain = SentencePieceTokenizer(made.pieces())
    bare = SentencePieceTokenizer(made.pieces(), config={"add_prefix_space": False})
    assert bare.encode("def a") == plain.encode("def a", start=False) != plain.encode("def a")
    for text in ("def a", " def", "\u2581 a"):
        assert bare.decode(bare.encode(text)) == text


def test_flags_of_bert(tmp_path):
    words = b"\n".join([b"[UNK]", b"Caf\xc3\xa9", b"cafe", b"[SEP]", b"[CLS]"])
    folder = write(tmp_path / "a", vocab__txt=words, tokenizer_config__json={"do_lower_case": False})
    assert load_tokenizer(folder).encode("Caf\u00e9") == [1]
    write(folder, tokenizer_config__json={"do_lower_case": True})
    assert load_tokenizer(folder).encode("Caf\u00e9") == [2]
    write(folder, tokenizer_config__json={"do_basic_tokenize": False})
    with pytest.raises(ValueError, match="do_basic_tokenize=false is not implemented"):
        load_tokenizer(folder)


def test_byte_order_marks(tmp_path):
    mark = b"\xef\xbb\xbf"
    for kind in KINDS:
        folder = KINDS[kind](tmp_path / kind)
        want = load_tokenizer(folder).encode(made.TEXT)
        write(folder, tokenizer_config__json={}, added_tokens__json={})
        for file in folder.iterdir():
            if file.suffix != ".model":
                file.write_bytes(mark + file.read_bytes())
        assert load_tokenizer(folder).encode(made.TEXT) == want
    folder = write(tmp_path / "bert", vocab__txt=mark + b"hello\n[UNK]\n[SEP]\n[CLS]\n")
    assert load_tokenizer(folder).encode("hello") == [0]
    ranks = made.ranks(made.trained_ranks())
    folder = write(tmp_path / "ranks", tokenizer__model=mark + ranks, config__json={"model_type": "llama"})
    assert load_tokenizer(folder).decode(load_tokenizer(folder).encode("a b")) == "a b"


@pytest.mark.parametrize(
    "tokenizer",
    [ByteTokenizer(), SentencePieceTokenizer(made.pieces()), JsonTokenizer(made.byte_level_bpe())],
    ids=lambda t: type(t).__name__,
)
def test_half_a_character_is_read_as_the_replacement(tokenizer):
    for text, whole in (("a \ud83d", "a \ufffd"), ("\ude00\ud83d b", "\ufffd\ufffd b"), ("\ud83d\ude00", "\U0001f600")):
        assert tokenizer.encode(text) == tokenizer.encode(whole)
        assert tokenizer.encode_batch([text, "x"]) == tokenizer.encode_batch([whole, "x"])
        assert tokenizer.prompt(text) == tokenizer.prompt(whole)
        assert tokenizer.decode(tokenizer.encode(text)) == whole


def test_rows_that_pad_the_embedding_decode_to_nothing():
    assert ByteTokenizer().decode([97, 257, 10**9, 98]) == "ab"
