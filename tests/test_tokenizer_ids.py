"""Ids that the authors' tokenizers give, of models whose files are not public: the known pieces at their known ids."""

import unicodedata

import made
import pytest
import sentencepiece
from made import assert_same, write

from garrulax.hub.tokenizers import IceTokenizer, SentencePieceTokenizer, load_tokenizer

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
    assert_same(load_tokenizer(tmp_path), chatglm)
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


@pytest.mark.slow
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
    assert_same(load_tokenizer(tmp_path / "b"), first)

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
        assert_same(load_tokenizer(tmp_path / "saved"), tokenizer)
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
