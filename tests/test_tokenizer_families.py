"""What each family's folders mean: control tokens, prefixes, ids that were published; files that are damaged."""

import json
import os
import random
import unicodedata
from pathlib import Path

import made
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from garrulax.hub.tokenizers import IceTokenizer, JsonTokenizer, SentencePieceTokenizer, StreamDecoder, load_tokenizer
from garrulax.hub.tokenizers.ranks import PATTERN, from_ranks, read_ranks

DATA = os.environ.get("GARRULAX_DATA")
real_files = pytest.mark.skipif(DATA is None, reason="set GARRULAX_DATA to a folder with real tokenizer files")

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


def same(loaded, tokenizer, text=NASTY):
    for field in FIELDS:
        assert getattr(loaded, field) == getattr(tokenizer, field), field
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.decode(loaded.encode(text)) == tokenizer.decode(tokenizer.encode(text))


# -- Published ids, with the published pieces at their ids ------------------------------------------------------------

HI, WAVE = "你好", "你好👋！我是人工智能助手 {}，很高兴见到你，欢迎问我任何问题。"


def chatglm_model(baked=True):
    """ice_text.model of ChatGLM-6B's current release with the pieces of the ids that li-plus/chatglm.cpp pins."""
    known = {
        "<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3, "<n>": 4, "▁": 5, "，": 6, "0": 8, "1": 9, "-": 11, "：": 12,
        "6": 21, "！": 35, "]": 42, "[": 52, "▁[": 53, "#": 61, "('": 89, "B": 222, "M": 340, "▁world": 398,
        "▁main": 594, "▁def": 1616, "print": 2274, "GL": 5388, "Round": 6945, "hello": 7283, "▁Chat": 14132,
        "▁greeting": 25672, "。": 63823, "你": 63852, "应该": 64213, "问": 64286, "晚上": 65450, "我是": 65806,
        "欢迎": 66430, "怎么办": 66846, "见到": 66877, "答": 67342, "人工智能": 68241, "问我": 68747, HI: 74874,
        "助手": 75890, "很高兴": 76693, "睡不着": 83400, "任何问题": 102501, "')": 125686, "():": 125936,
    }  # fmt: skip
    kinds = {
        "<unk>": made.UNKNOWN,
        "<s>": made.CONTROL,
        "</s>": made.CONTROL,
        "<pad>": made.CONTROL,
        "<n>": made.USER_DEFINED,
    }
    if not baked:
        return made.pieces_at(130_000, known, kinds)
    behind = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>", "<|tab|>"]
    behind += [f"<|blank_{k}|>" for k in range(2, 81)]
    octets = [f"<0x{byte:02X}>" for byte in range(256)]
    known |= {content: 130_000 + i for i, content in enumerate(behind + octets)}
    kinds |= dict.fromkeys(behind, made.USER_DEFINED) | dict.fromkeys(octets, made.BYTE)
    return made.pieces_at(130_344, known, kinds)


@pytest.fixture(scope="module")
def chatglm(tmp_path_factory):
    config = {"tokenizer_class": "ChatGLMTokenizer", "num_image_tokens": 0, "bos_token": "<sop>", "eos_token": "<eop>"}
    folder = tmp_path_factory.mktemp("chatglm")
    return load_tokenizer(write(folder, ice_text__model=chatglm_model(), tokenizer_config__json=config))


def test_chatglm_6b(chatglm, tmp_path, table):
    """Ids of the published tokenizer: li-plus/chatglm.cpp chatglm_test.cpp:973-982."""
    assert chatglm.prompt(HI) == [5, 74874, 130001, 130004]
    code = "def main():\n    print('hello world')\t# greeting"
    ids = [1616, 594, 125936, 4, 130011, 2274, 89, 7283, 398, 125686, 130008, 61, 25672]
    assert chatglm.encode(code) == ids
    assert chatglm.decode(ids) == code
    said = [HI, WAVE.format("ChatGLM-6B"), "晚上睡不着应该怎么办"]
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(said)]
    assert chatglm.apply_chat_template(messages[:1]) == [5, 74874, 130001, 130004]
    assert chatglm.apply_chat_template(messages) == [
        53, 6945, 5, 8, 42, 4, 64286, 12, 74874, 4, 67342, 12, 74874, 130328, 130247, 130233, 130227, 35, 65806,
        68241, 75890, 14132, 5388, 340, 11, 21, 222, 6, 76693, 66877, 63852, 6, 66430, 68747, 102501, 63823, 4, 52,
        6945, 5, 9, 42, 4, 64286, 12, 65450, 83400, 64213, 66846, 4, 67342, 12, 130001, 130004,
    ]  # fmt: skip
    assert (chatglm.bos, chatglm.eos, chatglm.pad, chatglm.vocab) == (130004, 130005, 3, 130344)
    chatglm.save(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {
        "ice_text.model",
        "tokenizer_config.json",
        "added_tokens.json",
    }
    same(load_tokenizer(tmp_path), chatglm)
    table("ChatGLM-6B", "tokenizer", "SentencePiece + whitespace")


def test_whitespace_of_ice_text(chatglm):
    for text in (
        "a\n\n\tb",
        "a  b",
        "a" + " " * 80 + "b",
        "a" + " " * 81 + "b",
        "a" + " " * 163 + "\t \n b",
        "\n",
        " ",
    ):
        assert chatglm.decode(chatglm.encode(text)) == text
    assert chatglm.encode("a" + " " * 163 + "b")[-4:-1] == [130087, 130087, 130010]
    assert chatglm.encode("  ")[-1] == 130009
    assert chatglm.decode(chatglm.encode("<|blank_3|><n>")) == "   \n", "as published"


def test_text_cannot_forge_what_a_model_file_lets_it(chatglm):
    """Control tokens that are ordinary symbols of the SentencePiece model, as text and in full-width letters."""
    controls = set(chatglm.specials.values())
    for text in ("[gMASK]<sop>", "x[gMASK] <sop>[MASK]y[[MASK]", "[MASK]" * 3):
        ids = chatglm.encode(text)
        assert controls.isdisjoint(ids)
        assert chatglm.decode(ids) == text
    model = made.pieces(normalization_rule_name="nmt_nfkc", user_defined_symbols=["[MASK]"])
    symbol = sentencepiece.SentencePieceProcessor(model_proto=model).piece_to_id("[MASK]")
    tokenizer = SentencePieceTokenizer(model, {"[MASK]": symbol})
    wide = "say ［MASK］ and [MASK]"
    assert symbol in sentencepiece.SentencePieceProcessor(model_proto=model).encode(wide)
    assert symbol not in tokenizer.encode(wide)
    assert tokenizer.decode(tokenizer.encode(wide)) == unicodedata.normalize("NFKC", wide)


def test_releases_of_ice_text(chatglm, tmp_path, table):
    """icetk's own file gets the tokens that its code adds; pictures come first in GLM-130B and in the first release."""
    model = chatglm_model(baked=False)
    first = load_tokenizer(
        write(tmp_path / "a", ice_text__model=model, tokenizer_config__json={"eos_token": "</s>", "pad_token": "<pad>"})
    )
    assert first.prompt(f"{HI}\n\t  ") == [20005, 94874, 20004, 150008, 150009, 150001, 150004]
    assert (first.bos, first.eos, first.pad, first.ends) == (150004, 20002, 20003, (150005,))
    assert [first.specials[name] for name in ("[MASK]", "[sMASK]", "<dBLOCK>")] == [150000, 150002, 150007]
    assert first.decode([*first.encode("👋"), 7, 150001]) == "👋"
    assert first.encode(HI + "👋")[-4:] == [150328, 150247, 150233, 150227]
    first.save(tmp_path / "b")
    same(load_tokenizer(tmp_path / "b"), first)

    moved = load_tokenizer(write(tmp_path / "c", ice_text__model=model, config__json={"vocab_size": 130528}))
    assert moved.prompt(HI) == chatglm.prompt(HI)
    large = load_tokenizer(write(tmp_path / "d", ice_text__model=model, config__json={"model_type": "glm-130b"}))
    assert isinstance(large, IceTokenizer)
    assert (large.prompt(HI), large.eos, large.ends) == ([20005, 94874, 150001, 150004], 150003, (150005,))
    assert large.chat_format is None
    table("GLM-130B", "tokenizer", "SentencePiece + whitespace")
    with pytest.raises(ValueError, match="num_image_tokens must be a count"):
        IceTokenizer(model, config={"num_image_tokens": "many"})


def chatglm2_model():
    """tokenizer.model of ChatGLM2 with the pieces of the ids that li-plus/chatglm.cpp pins."""
    octets = [f"<0x{byte:02X}>" for byte in range(256)]
    known = {"<unk>": 0, "<s>": 1, "</s>": 2} | {octet: 3 + i for i, octet in enumerate(octets)}
    known |= {
        "\n": 260, "ound": 517, "▁[": 790, "GL": 10461, "▁Chat": 22011, "▁": 30910, "1": 30939, "-": 30941,
        "2": 30943, "M": 30944, "B": 30949, "R": 30951, "3": 30966, "6": 30978, "[": 30995, "]": 30996, "，": 31123,
        "。": 31155, "：": 31211, "！": 31404, "问题": 31639, "不着": 31876, "任何": 31901, "欢迎": 32616,
        "晚上": 32820, "我是": 33030, "人工智能": 34797, "应该怎么办": 35153, "见到": 35214, ("▁你", 5): 36474,
        HI: 39701, "问我": 39905, "助手": 42481, "很高兴": 48895, "睡": 54266, "好": 54591, "你": 54622, "问": 54761,
        "答": 55437,
    }  # fmt: skip
    del known["\n"]  # spelled in bytes
    kinds = dict.fromkeys(octets, made.BYTE) | {"<unk>": made.UNKNOWN, "<s>": made.CONTROL, "</s>": made.CONTROL}
    return made.pieces_at(64_789, known, kinds)


def test_chatglm2_and_3(tmp_path, table):
    """chatglm_test.cpp:1036-1048, 1114-1133 of li-plus/chatglm.cpp."""
    second, third = (
        load_tokenizer(
            write(
                tmp_path / str(n),
                tokenizer__model=chatglm2_model(),
                tokenizer_config__json={"name_or_path": f"THUDM/chatglm{n}-6b", "tokenizer_class": "ChatGLMTokenizer"},
            )
        )
        for n in (2, 3)
    )
    said = [HI, WAVE.format("ChatGLM2-6B"), "晚上睡不着应该怎么办"]
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(said)]
    assert second.prompt(HI) == third.prompt(HI) == [64790, 64792, 36474, 54591]
    assert second.apply_chat_template(messages[:1]) == [
        64790, 64792, 790, 30951, 517, 30910, 30939, 30996, 13, 13, 54761, 31211, 39701, 13, 13, 55437, 31211,
    ]  # fmt: skip
    assert second.apply_chat_template(messages) == [
        64790, 64792, 790, 30951, 517, 30910, 30939, 30996, 13, 13, 54761, 31211, 39701, 13, 13, 55437, 31211, 39701,
        243, 162, 148, 142, 31404, 33030, 34797, 42481, 22011, 10461, 30944, 30943, 30941, 30978, 30949, 31123,
        48895, 35214, 54622, 31123, 32616, 39905, 31901, 31639, 31155, 13, 13, 30995, 30951, 517, 30910, 30943,
        30996, 13, 13, 54761, 31211, 32820, 54266, 31876, 35153, 13, 13, 55437, 31211,
    ]  # fmt: skip
    assert third.apply_chat_template(messages[:1]) == [64790, 64792, 64795, 30910, 13, 36474, 54591, 64796]
    messages[1]["content"] = WAVE.format("ChatGLM3-6B")
    assert third.apply_chat_template(messages) == [
        64790, 64792, 64795, 30910, 13, 36474, 54591, 64796, 30910, 13, 36474, 54591, 243, 162, 148, 142, 31404,
        33030, 34797, 42481, 22011, 10461, 30944, 30966, 30941, 30978, 30949, 31123, 48895, 35214, 54622, 31123,
        32616, 39905, 31901, 31639, 31155, 64795, 30910, 13, 30910, 32820, 54266, 31876, 35153, 64796,
    ]  # fmt: skip
    assert (second.vocab, third.vocab, second.bos, second.eos, second.pad) == (64794, 64798, 1, 2, 0)
    assert second.specials["[MASK]"] == 64789
    assert (second.ends, third.ends) == ((), (64795, 64797))
    for tokenizer in (second, third):
        tokenizer.save(tmp_path / "saved")
        same(load_tokenizer(tmp_path / "saved"), tokenizer)
    table("ChatGLM2/3-6B", "tokenizer", "SentencePiece")


def test_which_of_chatglm_a_folder_is(tmp_path):
    model = chatglm2_model()
    roles = {"<|user|>": 64795}
    for i, (files, expected) in enumerate(
        [
            ({"config__json": {"model_type": "chatglm"}}, "chatglm2"),
            ({"config__json": {"model_type": "chatglm", "_name_or_path": "THUDM/chatglm3-6b"}}, "chatglm3"),
            (
                {"tokenizer_config__json": {"tokenizer_class": "ChatGLMTokenizer"}, "added_tokens__json": roles},
                "chatglm3",
            ),
            ({"tokenizer_config__json": {"garrulax_family": "chatglm2"}, "added_tokens__json": roles}, "chatglm2"),
            ({"config__json": {"model_type": "llama"}}, None),
        ]
    ):
        assert load_tokenizer(write(tmp_path / str(i), tokenizer__model=model, **files)).chat_format == expected
    write(tmp_path / "bad", tokenizer__model=model, tokenizer_config__json={"garrulax_family": "parrot"})
    with pytest.raises(ValueError, match="garrulax_family 'parrot' is not one of chatglm, glm130b"):
        load_tokenizer(tmp_path / "bad")


def test_glm4(tmp_path, table):
    """chatglm_test.cpp:1337-1352 of li-plus/chatglm.cpp."""
    known = {
        3837: "，", 6313: "！", 9281: b"\xf0\x9f", 11314: "？", 98406: "你", 99212: "吗", 99379: "应该",
        99444: "你的", 101160: "晚上", 101665: "有什么", 103298: "怎么办", 103810: "见到", 109377: HI,
        110368: "可以帮助", 118295: "很高兴", 120410: "睡不着",
    }  # fmt: skip
    folder = write(tmp_path / "a", tokenizer__model=made.ranks(made.ranks_at(151_329, known)))
    tokenizer = load_tokenizer(folder)
    said = [HI, "你好👋！很高兴见到你，有什么可以帮助你的吗？", "晚上睡不着应该怎么办"]
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(said)]
    assert tokenizer.prompt(HI) == [151331, 151333, 109377]
    assert tokenizer.apply_chat_template(messages[:1]) == [151331, 151333, 151336, 198, 109377, 151337]
    assert tokenizer.apply_chat_template(messages) == [
        151331, 151333, 151336, 198, 109377, 151337, 198, 109377, 9281, 239, 233, 6313, 118295, 103810, 98406, 3837,
        101665, 110368, 99444, 99212, 11314, 151336, 198, 101160, 120410, 99379, 103298, 151337,
    ]  # fmt: skip
    assert (tokenizer.vocab, tokenizer.eos, tokenizer.pad, tokenizer.ends) == (151343, 151329, 151329, (151336, 151338))
    assert tokenizer.specials["<|begin_of_image|>"] == 151339
    table("GLM-4", "tokenizer", "tiktoken")


# -- tiktoken files ---------------------------------------------------------------------------------------------------


def trained(folder, **files):
    return load_tokenizer(write(folder, tokenizer__model=made.ranks(made.trained_ranks()), **files))


def test_ranks_agree_with_tiktoken():
    import tiktoken

    table = read_ranks(made.ranks(made.trained_ranks(700)))
    ours, theirs = from_ranks(table), tiktoken.Encoding("t", pat_str=PATTERN, mergeable_ranks=table, special_tokens={})
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
    same(load_tokenizer(tmp_path / "b"), llama)
    assert not (tmp_path / "b" / "tokenizer.model").exists()
    first = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}
    listed = {400 + i: f"<|{first.get(i, f'reserved_special_token_{i}')}|>" for i in range(256)}
    listed = {str(i): {"content": content, "special": True} for i, content in listed.items()}
    older = trained(
        tmp_path / "c", config__json={"model_type": "llama"}, tokenizer_config__json={"added_tokens_decoder": listed}
    )
    assert (older.specials["<|reserved_special_token_4|>"], older.pad, older.vocab) == (404, None, 656)
    older.save(tmp_path / "c2")
    same(load_tokenizer(tmp_path / "c2"), older)
    glm = trained(tmp_path / "d", tokenizer_config__json={"tokenizer_class": "ChatGLM4Tokenizer"})
    assert glm.prompt("") == [402, 404]
    glm.save(tmp_path / "e")
    same(load_tokenizer(tmp_path / "e"), glm)
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
    same(load_tokenizer(tmp_path / "b"), tokenizer)
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
    same(load_tokenizer(tmp_path / "b"), chinese)
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
    same(load_tokenizer(tmp_path / "c"), english)

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
    same(load_tokenizer(tmp_path / "saved"), chat)
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
