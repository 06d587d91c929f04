"""What each family's folders mean: control tokens, prefixes, tiktoken files, words that end in </w>; damaged files."""

import json
import os
import random
from pathlib import Path

import made
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import NASTY, assert_same, write

from garrulax.hub.tokenizers import JsonTokenizer, SentencePieceTokenizer, StreamDecoder, load_tokenizer
from garrulax.hub.tokenizers.ranks import PATTERN, read_ranks, tokenizer_from_ranks

DATA = os.environ.get("GARRULAX_DATA")
real_files = pytest.mark.skipif(DATA is None, reason="set GARRULAX_DATA to a folder with real tokenizer files")

# -- tiktoken files ---------------------------------------------------------------------------------------------------


def trained(folder, **files):
    return load_tokenizer(write(folder, tokenizer__model=made.ranks(made.trained_ranks()), **files))


def test_ranks_agree_with_tiktoken():
    import tiktoken

    table = read_ranks(made.ranks(made.trained_ranks(700)))
    ours, theirs = (
        tokenizer_from_ranks(table),
        tiktoken.Encoding("t", pat_str=PATTERN, mergeable_ranks=table, special_tokens={}),
    )
    draw = random.Random(0)
    letters = "aeStTrvmLd'’ \t\r\n.,-=_<|>[]()0123éß\u017f\u212a🙂\u200d你\u00a0\u3000\u0301 def  return argument"
    texts = ["".join(draw.choices(letters, k=draw.randint(1, 60))) for _ in range(2000)]
    for text in [made.TEXT, NASTY, *texts]:
        assert ours.encode(text).ids == theirs.encode_ordinary(text)


def test_what_a_tiktoken_file_means(tmp_path, table):
    llama = trained(tmp_path / "a", config__json={"model_type": "llama"})
    assert (llama.vocab, llama.bos, llama.eos, llama.pad) == (656, 400, 401, 404)
    assert llama.prefix == (400,)
    assert [llama.specials[f"<|{name}|>"] for name in ("eot_id", "image", "reserved_special_token_245")] == [
        409,
        411,
        655,
    ]
    llama.save(tmp_path / "b")
    assert_same(load_tokenizer(tmp_path / "b"), llama)
    assert not (tmp_path / "b" / "tokenizer.model").exists()
    first = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}
    listed = {400 + i: f"<|{first.get(i, f'reserved_special_token_{i}')}|>" for i in range(256)}
    listed = {str(i): {"content": content, "special": True} for i, content in listed.items()}
    older = trained(
        tmp_path / "c", config__json={"model_type": "llama"}, tokenizer_config__json={"added_tokens_decoder": listed}
    )
    assert (older.specials["<|reserved_special_token_4|>"], older.pad, older.vocab) == (404, None, 656)
    older.save(tmp_path / "c2")
    assert_same(load_tokenizer(tmp_path / "c2"), older)
    glm = trained(tmp_path / "d", tokenizer_config__json={"tokenizer_class": "ChatGLM4Tokenizer"})
    assert glm.prompt("") == [402, 404]
    glm.save(tmp_path / "e")
    assert_same(load_tokenizer(tmp_path / "e"), glm)
    plain = trained(
        tmp_path / "f", added_tokens__json={"<|end|>": 400}, tokenizer_config__json={"eos_token": "<|end|>"}
    )
    assert (plain.eos, plain.prefix, plain.chat_format) == (400, (), None)
    with pytest.raises(
        ValueError, match=r"400 ranks the control tokens are not known: list them in added_tokens\.json"
    ):
        trained(tmp_path / "g")
    table("LLaMA 1/2/3", "tokenizer", "SentencePiece, tiktoken")


def test_damaged_tiktoken_files(tmp_path):
    good = made.ranks(made.trained_ranks())
    lines = good.splitlines(keepends=True)
    for content, said in [
        (good[:-3], "ranks of 400 tokens are not 0 to 399"),
        (b"".join(lines[:-1]) + lines[-1].split()[0], "line 400 is not a base64 token"),
        (b"".join(lines[:300]) + b"!!! 300\n", "line 301 is not a base64 token"),
        (b"".join(lines[:100] + lines[101:]), "ranks of 399 tokens are not 0 to 398"),
        (made.ranks(made.trained_ranks()[1:]), "1 single bytes, such as"),
    ]:
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(ValueError, match=f"cannot read the tokenizer .*{said}"):
            load_tokenizer(tmp_path)


# -- The other kinds --------------------------------------------------------------------------------------------------


def test_gpt1(tmp_path, table):
    tokenizer = load_tokenizer(made.gpt1(tmp_path / "a"))
    assert isinstance(tokenizer, JsonTokenizer)
    library = made.hf.Tokenizer.from_str(tokenizer._tokenizer.to_str())
    for text in ("Hello World", "The  def\nreturn, argument!", "argument", "Naïve"):
        ids = tokenizer.encode(text)
        assert ids == tokenizer.encode(text.lower().replace("\n", " ")) == library.encode(text).ids
        assert tokenizer.decode(ids) == library.decode(ids, skip_special_tokens=False)
    assert tokenizer.encode("🙂") == [0]
    stream = StreamDecoder(tokenizer)
    assert [stream.push([i]) for i in tokenizer.encode("return other")] == ["return", " other"]
    assert tokenizer.decode(tokenizer.encode("other"), start=False) == " other"
    assert (tokenizer.bos, tokenizer.eos, tokenizer.prefix, tokenizer.specials) == (None, None, (), {})
    tokenizer.save(tmp_path / "b")
    assert_same(load_tokenizer(tmp_path / "b"), tokenizer)
    tasks = {"_start_": tokenizer.vocab, "_delimiter_": tokenizer.vocab + 1, "_classify_": tokenizer.vocab + 2}
    (tmp_path / "a" / "added_tokens.json").write_text(json.dumps(tasks))
    assert load_tokenizer(tmp_path / "a").specials == tasks
    table("GPT-1", "tokenizer", "BPE")
    for row in ("GPT-2", "GPT-3"):
        table(row, "tokenizer", "BPE")


def test_glm_command_tokens(tmp_path, table):
    model = made.pieces()
    folder = write(tmp_path / "a", tokenizer__model=model)
    assert load_tokenizer(folder).specials.keys() == {"<s>", "</s>"}, "only the published name says what it is"
    (folder / "tokenizer.model").rename(folder / "cog-pretrain.model")
    chinese = load_tokenizer(folder)
    names = (
        "<|endoftext|>",
        "[SEP]",
        "[CLS]",
        "[MASK]",
        "[UNK]",
        "<|startofpiece|>",
        "<|endofpiece|>",
        "[sMASK]",
        "[gMASK]",
    )
    assert [chinese.specials[name] - 400 for name in names] == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    assert (chinese.eos, chinese.pad, chinese.prefix, chinese.vocab) == (400, 400, (402,), 411)
    chinese.save(tmp_path / "b")
    assert_same(load_tokenizer(tmp_path / "b"), chinese)
    unfixed = {"<|startofpiece|>": 406, "<|endofpiece|>": 407, "[gMASK]": 407, "[sMASK]": 408}
    (folder / "added_tokens.json").write_text(json.dumps(unfixed))
    collided = load_tokenizer(folder)
    assert collided.specials["[gMASK]"] == collided.specials["<|endofpiece|>"] == 407

    bpe = tmp_path / "bpe"
    bpe.mkdir()
    made.byte_level_bpe().model.save(str(bpe))
    english = load_tokenizer(write(bpe, tokenizer_config__json={"tokenizer_class": "GLMGPT2Tokenizer"}))
    names = (
        "<|startofpiece|>",
        "<|endofpiece|>",
        "[CLS]",
        "[MASK]",
        "[SEP]",
        "[UNK]",
        "[gMASK]",
        "[sMASK]",
        "[dBLOCK]",
    )
    assert [english.specials[name] for name in names] == list(range(400, 409))
    assert (english.eos, english.pad, english.prefix) == (0, 0, (402,))
    english.save(tmp_path / "c")
    assert_same(load_tokenizer(tmp_path / "c"), english)

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello"]
    files = {"vocab__txt": "\n".join(words).encode(), "tokenizer_config__json": {"tokenizer_class": "GLMBertTokenizer"}}
    bert = load_tokenizer(write(tmp_path / "bert", **files))
    assert (bert.specials["<|startofpiece|>"], bert.specials["<|endofpiece|>"], bert.eos, bert.pad) == (6, 7, 0, 0)
    assert bert.prompt("Hello") == [2, 5]

    vocab = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3} | {c: 4 + i for i, c in enumerate(made.byte_alphabet())}
    files = {"vocab__json": vocab, "merges__txt": b"#version: 0.2\n"}
    roberta = load_tokenizer(
        write(tmp_path / "roberta", **files, tokenizer_config__json={"tokenizer_class": "GLMRobertaTokenizer"})
    )
    assert (roberta.eos, roberta.pad, roberta.prefix, roberta.specials["<|endofpiece|>"]) == (2, 1, (0,), 261)
    assert {0, 1, 2}.isdisjoint(roberta.encode("<s></s><pad>"))
    table("GLM", "tokenizer", "BPE, WordPiece, SentencePiece")


def test_baichuan(tmp_path, table):
    files = {"tokenizer__model": made.pieces(pad_id=3, user_defined_symbols=["<reserved_106>", "<reserved_107>"])}
    files["tokenizer_config__json"] = {"tokenizer_class": "BaichuanTokenizer", "add_bos_token": False}
    base = load_tokenizer(write(tmp_path / "base", **files))
    assert (base.prefix, base.pad, base.chat_format) == ((), 0, None)
    files["generation_config__json"] = {"user_token_id": 4, "assistant_token_id": 5, "eos_token_id": 2}
    chat = load_tokenizer(write(tmp_path / "chat", **files))
    hello = base.encode("hello")
    messages = [{"role": "system", "content": "hello"}, {"role": "user", "content": "hello <reserved_107>"}]
    ids = chat.apply_chat_template(messages)
    assert ids[: len(hello) + 1] == [*hello, 4]
    assert ids.count(5) == 1
    assert ids[-1] == 5
    chat.save(tmp_path / "saved")
    assert_same(load_tokenizer(tmp_path / "saved"), chat)
    assert load_tokenizer(tmp_path / "saved").apply_chat_template(messages) == ids
    for row in ("Baichuan", "Baichuan2"):
        table(row, "tokenizer", "SentencePiece")


def test_json_families(table):
    """Qwen2 and Falcon come as tokenizer.json, Mistral as that or as LLaMA's model."""
    tokenizer = JsonTokenizer(made.byte_level_bpe(specials=("<|endoftext|>", "<|im_start|>", "<|im_end|>")))
    assert tokenizer.decode(tokenizer.encode(NASTY)) == NASTY
    for row in ("Qwen2", "Falcon"):
        table(row, "tokenizer", "tokenizer.json")
    table("Mistral", "tokenizer", "SentencePiece, tokenizer.json")


def test_a_continuation_gets_no_dummy_space():
    llama = SentencePieceTokenizer(made.pieces())
    assert llama.token_bytes(llama.encode("def")[0])[:1] == b" "
    assert llama.decode(llama.encode("return", start=False), start=False) == "return"
    assert llama.decode(llama.encode("a") + llama.encode("b c", start=False)) == "ab c"
    tokenizer = made.hf.Tokenizer(made.hf.models.BPE({"▁": 0, "a": 1, "▁a": 2}, [("▁", "a")]))
    tokenizer.decoder = made.hf.decoders.Metaspace()
    for scheme in ("first", "always"):
        tokenizer.pre_tokenizer = made.hf.pre_tokenizers.Metaspace(prepend_scheme=scheme)
        json_one = JsonTokenizer(made.hf.Tokenizer.from_str(tokenizer.to_str()))
        assert (json_one.encode("a a"), json_one.encode("a a", start=False)) == ([2, 2], [1, 2])


NEW = {
    "ice": lambda folder: load_tokenizer(
        write(folder, ice_text__model=made.pieces(byte_fallback=False, pad_id=3, user_defined_symbols=["<n>"]))
    ),
    "ranks": lambda folder: trained(folder, config__json={"model_type": "llama"}),
    "gpt1": lambda folder: load_tokenizer(made.gpt1(folder)),
    "dummy": lambda folder: load_tokenizer(write(folder, tokenizer__model=made.pieces())),
}


@pytest.fixture(scope="module")
def new(tmp_path_factory):
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in NEW.items()}


@pytest.mark.parametrize("name", list(NEW))
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_streaming_equals_decoding_at_once(name, data, new):
    tokenizer = new[name]
    tokens = st.integers(0, tokenizer.vocab - 1) | st.sampled_from(tokenizer.encode("return other é🙂"))
    portions = data.draw(
        st.lists(st.lists(tokens, max_size=12) | st.text("🙂é你aé \n").map(tokenizer.encode), max_size=8)
    )
    start = data.draw(st.booleans())
    stream = tokenizer.stream(start=start)
    text = "".join(map(stream.push, portions)) + stream.flush()
    assert text == tokenizer.decode((i for portion in portions for i in portion), start=start)


@pytest.mark.parametrize("name", ["ice", "ranks", "dummy"])
@settings(max_examples=150, deadline=None)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581\0"))
    | st.text(" \n\t<|>[]MASKé🙂你")
)
def test_round_trip_of_any_text(name, text, new):
    tokenizer = new[name]
    ids = tokenizer.encode(text)
    assert set(tokenizer.specials.values()).isdisjoint(ids)
    if not (name == "ice" and ("<n>" in text or "<|" in text)):
        assert tokenizer.decode(ids) == text


def test_what_is_missing_or_wrong(tmp_path):
    write(tmp_path / "a", tokenizer_config__json={"tokenizer_class": "ParrotTokenizer"})
    with pytest.raises(FileNotFoundError, match=r"of class ParrotTokenizer: expected tokenizer\.json"):
        load_tokenizer(tmp_path / "a")
    write(tmp_path / "b", a__model=b"x", b__model=b"x")
    with pytest.raises(ValueError, match=r"several tokenizers \(a\.model, b\.model\)"):
        load_tokenizer(tmp_path / "b")
    write(tmp_path / "c", tokenizer__model=made.pieces(), added_tokens__json=["<s>"])
    with pytest.raises(ValueError, match=r"added_tokens\.json is not a JSON object"):
        load_tokenizer(tmp_path / "c")
    write(tmp_path / "d", tokenizer__model=made.pieces()[:900])
    with pytest.raises(ValueError, match=r"cannot read the tokenizer .*tokenizer\.model"):
        load_tokenizer(tmp_path / "d")
    made.gpt1(tmp_path / "e")
    whole = (tmp_path / "e" / "vocab.json").read_bytes()
    (tmp_path / "e" / "vocab.json").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cannot read the tokenizer .*vocab\.json is not valid JSON"):
        load_tokenizer(tmp_path / "e")


# -- Real files -------------------------------------------------------------------------------------------------------


@real_files
def test_real_gpt1():
    tokenizer = load_tokenizer(Path(DATA) / "tokenizers" / "gpt1")
    assert tokenizer.encode("Hello world") == tokenizer.encode("hello\n World") == [3570, 1276]
    assert (tokenizer.vocab, tokenizer.encode("你")) == (40478, [0])
    assert tokenizer.decode([3570, 1276]) == "hello world"


@real_files
def test_real_llama3():
    import tiktoken

    folder = Path(DATA) / "tokenizers" / "llama3"
    tokenizer = load_tokenizer(folder)
    assert tokenizer.prompt("Hello world") == [128000, 9906, 1917]
    assert (tokenizer.vocab, tokenizer.eos, tokenizer.pad, tokenizer.ends) == (128256, 128001, 128004, (128008, 128009))
    table = read_ranks((folder / "tokenizer.model").read_bytes())
    theirs = tiktoken.Encoding("l", pat_str=PATTERN, mergeable_ranks=table, special_tokens={})
    draw = random.Random(1)
    letters = "aeStTrvmLd'’ \t\r\n.,-=_<|>[]()0123éß\u017f\u212a🙂\u200d你好한\u00a0\u3000\u0301"
    texts = ["".join(draw.choices(letters, k=draw.randint(1, 80))) for _ in range(5000)]
    texts += ["".join(draw.choices(" \n\t\ra=-", k=draw.randint(1, 200))) for _ in range(5000)]
    for text in [made.TEXT, NASTY, *texts, *(f"a{chr(c)}1 {chr(c)}" for c in range(0, 0x30000, 7) if c >> 11 != 27)]:
        assert tokenizer.encode(text) == theirs.encode_ordinary(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


@real_files
def test_real_chinese_glm():
    tokenizer = load_tokenizer(Path(DATA) / "tokenizers" / "glm-chinese")
    names = ("<|endoftext|>", "[CLS]", "[MASK]", "<|startofpiece|>", "<|endofpiece|>", "[sMASK]", "[gMASK]")
    assert [tokenizer.specials[name] for name in names] == [50000, 50002, 50003, 50006, 50007, 50008, 50009]
    assert tokenizer.vocab == 50011
