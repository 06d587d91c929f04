"""GGUF files against the reference cases of which they are made (every architecture), the numbers of the package gguf
(every type of tensor, tests/oracles/gguf_blocks.npz) and the tokenizers of which they are made; and damaged files."""

import dataclasses
import json
import random
import struct

import gguf_files
import jax
import jax.numpy as jnp
import made
import numpy as np
import pytest
from oracle import FOLDER, arrays, config, params, relative_error
from test_hub import assert_same_bytes
from test_hub_fuzz import damaged, survives

import garrulax as gx
from garrulax import hub, models
from garrulax.cli import main
from garrulax.cli import models as commands
from garrulax.core.coded import Coded
from garrulax.hub.gguf.blocks import FORMATS
from garrulax.hub.tokenizers import JsonTokenizer, SentencePieceTokenizer

pytestmark = pytest.mark.usefixtures("quick_compilation")

BLOCKS = np.load(FOLDER / "gguf_blocks.npz")
KINDS = {kind.name: number for number, kind in FORMATS.items()}


def written(path, content):
    path.write_bytes(content)
    return path


# -- Settings and tensors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", gguf_files.ARCHITECTURES)
def test_a_gguf_file_is_the_checkpoint_that_it_was_made_of(case, tmp_path):
    model = gx.load(written(tmp_path / "m.gguf", gguf_files.file_of(case)))
    assert_same_bytes(model.params, params(case))
    ours, theirs = dataclasses.asdict(model.config), dataclasses.asdict(config(case))
    names = {"mlp_width"} if theirs["mlp_width"] is None else set()  # None stands for 4 width
    names |= {"rope"} if case == "llama3" else set()  # its scaling is a tensor: see below
    names |= {"embedding_dropout", "attention_dropout", "residual_dropout"} & ours.keys()  # no file says those
    names |= {"eos", "bos"} if case == "chatglm3" else set()
    assert {k: v for k, v in ours.items() if k not in names} == {k: v for k, v in theirs.items() if k not in names}
    assert hub.load_config(tmp_path) == model.config  # a folder with one file and no config.json


@pytest.mark.parametrize("original", [8192, 4096])
def test_rope_factors_in_a_tensor(original, tmp_path):
    """LLaMA 3.1's formula is recognised (its original context is 8,192); other divisors are kept as they are."""
    case = "llama3"
    theta = config(case).rope.theta
    frequencies = theta ** (-np.arange(0, 8, 2) / 8)
    rope = dataclasses.replace(config(case).rope, original_context=original)
    smooth = np.clip((original * frequencies / (2 * np.pi) - rope.low) / (rope.high - rope.low), 0, 1)
    factors = np.float32(1 / ((1 - smooth) / rope.factor + smooth))
    content = gguf_files.file(gguf_files.metadata_of(case), gguf_files.stored_of(case) | {"rope_freqs.weight": factors})
    model = gx.load(written(tmp_path / "m.gguf", content))
    assert (model.config.rope == rope) == (original == 8192)
    ours, theirs = (
        gx.forward(model.params, arrays(case)["input_ids"], c)[0]
        for c in (model.config, dataclasses.replace(model.config, rope=rope))
    )
    assert relative_error(ours, theirs) < 1e-5


def first_layer(leaf):
    return jax.tree.map(lambda x: np.asarray(x)[0], leaf)


@pytest.mark.parametrize("kind", [name for name in KINDS if f"{name}.data" in BLOCKS])
def test_blocks(kind, tmp_path, monkeypatch):
    """A row of the embedding, the rows of a permuted matrix and those of a transposed one are the package's numbers."""
    data, weight = BLOCKS[f"{kind}.data"], BLOCKS[f"{kind}.weight"]
    wide = {"width": 512, "layers": 1, "heads": 2, "kv_heads": 1, "mlp_width": 256, "vocab": 6}
    c = models.llama.Config(**wide, tied=True, context=16)
    rng, bytes_of = np.random.default_rng(0), FORMATS[KINDS[kind]].bytes * 512 // FORMATS[KINDS[kind]].values

    def tensor(rows):
        chosen = rng.integers(0, len(data), rows)
        values[rows] = weight[chosen]
        return KINDS[kind], (rows, 512), data[chosen].tobytes()

    values = {}
    ones, flat = np.ones(512, np.float32), np.zeros((512, 256), np.float32)
    stored = {
        "token_embd.weight": tensor(6), "blk.0.attn_q.weight": tensor(512), "output_norm.weight": ones,
        "blk.0.attn_norm.weight": ones, "blk.0.ffn_norm.weight": ones, "blk.0.attn_output.weight": np.eye(512),
        "blk.0.attn_k.weight": flat.T, "blk.0.attn_v.weight": flat.T, "blk.0.ffn_gate.weight": flat.T,
        "blk.0.ffn_up.weight": tensor(256), "blk.0.ffn_down.weight": flat,
    }  # fmt: skip
    assert data.shape[1] == bytes_of
    metadata = {
        "general.architecture": "llama", "llama.context_length": 16, "llama.embedding_length": 512,
        "llama.block_count": 1, "llama.feed_forward_length": 256, "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1, "llama.attention.layer_norm_rms_epsilon": 1e-6,
    }  # fmt: skip
    path = written(tmp_path / "m.gguf", gguf_files.file(metadata, stored))
    p, kept = gx.load(path, dtype="float32").params, gx.load(path).params
    assert hub.load_config(path) == dataclasses.replace(c, bos=None, eos=None)
    query = values[512].reshape(2, 128, 2, 512).swapaxes(1, 2).reshape(2, 256, 512)
    block = p["blocks"]
    np.testing.assert_array_equal(p["tokens"], values[6])
    np.testing.assert_array_equal(block["attention"]["query"][0], query.transpose(2, 0, 1))
    np.testing.assert_array_equal(block["mlp"]["up"][0], values[256].T)
    if FORMATS[KINDS[kind]].codes is not None:
        for leaf, plain in ((kept["tokens"], values[6]), (first_layer(kept["blocks"]["mlp"]["up"]), values[256])):
            np.testing.assert_array_equal(Coded.of(leaf).numbers(), plain)
        rows = Coded.of(first_layer(kept["blocks"]["attention"]["query"])).numbers()
        np.testing.assert_array_equal(rows, query.reshape(512, 512))
    half = gx.load(path, dtype="bfloat16").params
    np.testing.assert_array_equal(half["tokens"], jnp.asarray(values[6], jnp.bfloat16))
    assert {x.dtype for x in jax.tree.leaves(half)} == {jnp.dtype("bfloat16")}
    if kind == "Q4_1":  # commands read a small file as float32, and keep the codes of others
        for most, expected in ((path.stat().st_size, p), (path.stat().st_size - 1, kept)):
            monkeypatch.setattr(commands, "SMALL", most)
            assert jax.tree.structure(commands.load(str(path)).params) == jax.tree.structure(expected)
    sharded = gx.load(path, dtype="float32", mesh=gx.make_mesh("fsdp=4,tensor=2")).params
    np.testing.assert_array_equal(sharded["blocks"]["attention"]["query"], block["attention"]["query"])


def test_plain_types_and_parts(tmp_path):
    """F16, BF16 and F64 matrices; and a model that is split into two files."""
    stored, metadata = gguf_files.stored_of("llama_gqa"), gguf_files.metadata_of("llama_gqa")
    kinds = {1: np.float16, 30: jnp.bfloat16, 28: np.float64}
    for number, dtype in kinds.items():
        plain = {k: (number, x.shape, x.astype(dtype).tobytes()) if x.ndim == 2 else x for k, x in stored.items()}
        p = gx.load(written(tmp_path / f"{number}.gguf", gguf_files.file(metadata, plain))).params
        np.testing.assert_array_equal(p["head"], stored["output.weight"].astype(dtype).astype(np.float32))
    names = list(stored)
    for i, part in enumerate((names[:9], names[9:])):
        split = {"split.no": i, "split.count": 2, "split.tensors.count": len(names)}
        content = gguf_files.file((metadata if i == 0 else {}) | split, {name: stored[name] for name in part})
        written(tmp_path / f"m-{i + 1:05d}-of-00002.gguf", content)
    assert_same_bytes(gx.load(tmp_path / "m-00001-of-00002.gguf").params, params("llama_gqa"))
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(FileNotFoundError, match=r"one of 2 files, and m-00002-of-00002\.gguf"):
        gx.load(tmp_path / "m-00001-of-00002.gguf")
    with pytest.raises(ValueError, match=r"has 4 GGUF files \(1\.gguf, 28\.gguf"):
        gx.load(tmp_path)


# -- Tokenizers -------------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|bot|>{% endif %}"
)
CONTROLS = ("<|endoftext|>", "<|user|>", "<|end|>", "<|bot|>")


def bpe_metadata(rule, **more):
    inner = json.loads(made.byte_level_bpe(specials=CONTROLS).to_str())["model"]
    tokens = sorted(inner["vocab"], key=inner["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": rule,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in CONTROLS else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in inner["merges"]],
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.chat_template": TEMPLATE,
        **more,
    }


def load_tokenizer(path, metadata):
    return gx.load(written(path / "m.gguf", gguf_files.file_of("llama_gqa", metadata))).tokenizer


def test_byte_level_bpe(tmp_path):
    tokenizer = load_tokenizer(tmp_path, bpe_metadata("gpt-2"))
    original = JsonTokenizer(made.byte_level_bpe(specials=CONTROLS), {"eos_token": "<|end|>", "bos_token": CONTROLS[0]})
    made.assert_same(tokenizer, original)
    assert tokenizer.encode("<|user|>") == original.encode("<|user|>")  # plain text
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hi <|end|>"}])
    assert ids == [1, *tokenizer.encode("Hi <|end|>"), 2, 3]
    tokenizer.save(tmp_path / "saved")
    made.assert_same(gx.hub.tokenizers.load_tokenizer(tmp_path / "saved"), tokenizer)


@pytest.mark.parametrize(
    ("rule", "words"),
    [  # how "It'S 1234 naïve!\n\n  x" is cut, by the regular expressions of llama-vocab.cpp
        ("gpt-2", ["It", "'", "S", " 1234", " naïve", "!", "\n\n ", " x"]),
        ("smollm", ["It", "'", "S", " ", "1", "2", "3", "4", " naïve", "!", "\n\n ", " x"]),
        ("llama-bpe", ["It", "'S", " ", "123", "4", " naïve", "!\n\n", " ", " x"]),
        ("qwen2", ["It", "'S", " ", "1", "2", "3", "4", " naïve", "!\n\n", " ", " x"]),
        ("tekken", ["It", "'S", " ", "1", "2", "3", "4", " naïve", "!\n\n", " ", " x"]),
        ("falcon", ["It", "'", "S", " ", "123", "4", " naïve", "!", "\n\n ", " x"]),
    ],
)
def test_rules_by_which_words_are_cut(rule, words, tmp_path):
    tokenizer = load_tokenizer(tmp_path, bpe_metadata(rule))
    found = tokenizer._tokenizer.pre_tokenizer.pre_tokenize_str("It'S 1234 naïve!\n\n  x")
    assert [tokenizer._tokenizer.decoder.decode([word]) for word, _ in found] == words


@pytest.mark.parametrize(
    ("rule", "explicit", "starts"),
    [("llama-bpe", None, True), ("gpt-2", True, True), ("llama-bpe", False, False), ("gpt-2", None, False)],
)
def test_whether_texts_begin_with_bos(rule, explicit, starts, tmp_path):
    more = {} if explicit is None else {"tokenizer.ggml.add_bos_token": explicit}
    tokenizer = load_tokenizer(tmp_path, bpe_metadata(rule, **more))
    assert tokenizer.prompt("def")[: len(tokenizer.prefix)] == list(tokenizer.prefix) == [0] * starts


def sentencepiece_metadata(model):
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = range(sp.vocab_size())
    kinds = [(sp.is_unknown, 2), (sp.is_control, 3), (sp.is_unused, 5), (sp.is_byte, 6)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [sp.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [sp.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": [next((kind for is_kind, kind in kinds if is_kind(i)), 1) for i in ids],
        "tokenizer.ggml.bos_token_id": sp.bos_id(),
        "tokenizer.ggml.eos_token_id": sp.eos_id(),
        "tokenizer.ggml.unknown_token_id": sp.unk_id(),
    }


@pytest.mark.parametrize("dummy", [True, False])
def test_sentencepiece(dummy, tmp_path):
    model = made.pieces(add_dummy_prefix=dummy)
    more = {"tokenizer.ggml.add_space_prefix": dummy}
    tokenizer = load_tokenizer(tmp_path, sentencepiece_metadata(model) | more)
    made.assert_same(tokenizer, SentencePieceTokenizer(model, config={"tokenizer_class": "LlamaTokenizer"}))
    assert tokenizer.prompt("def")[0] == tokenizer.bos == 1


def test_all_ends_of_a_turn_end_a_text(tmp_path):
    more = {"tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.eot_token_id": 2, "tokenizer.ggml.eom_token_id": 3}
    assert gx.load(written(tmp_path / "m.gguf", gguf_files.file_of("llama_gqa", more))).config.eos == (0, 2, 3)


# -- Commands ---------------------------------------------------------------------------------------------------------


def test_convert_writes_a_folder_and_info_describes_the_file(tmp_path, capsys):
    metadata = bpe_metadata("llama-bpe")
    path = written(tmp_path / "m.gguf", gguf_files.file_of("llama_gqa", metadata))
    assert main(["convert", str(path), str(tmp_path / "out")]) == 0
    model, out = gx.load(path), gx.load(tmp_path / "out")
    assert out.config == model.config
    assert_same_bytes(out.params, model.params)
    made.assert_same(out.tokenizer, model.tokenizer)
    assert out.tokenizer.config["chat_template"] == TEMPLATE
    assert main(["info", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "llama family" in shown
    assert "F32    30 tensors" in shown


# -- Damaged and foreign files ----------------------------------------------------------------------------------------


def changed(metadata):
    return gguf_files.file(gguf_files.metadata_of("llama_gqa") | metadata, gguf_files.stored_of("llama_gqa"))


def lacking(*names):
    stored = {name: x for name, x in gguf_files.stored_of("llama_gqa").items() if name not in names}
    return gguf_files.file(gguf_files.metadata_of("llama_gqa"), stored)


def with_tensor(name, x):
    return gguf_files.file(gguf_files.metadata_of("llama_gqa"), gguf_files.stored_of("llama_gqa") | {name: x})


WHOLE = gguf_files.file_of("llama_gqa")
FOREIGN = {
    "not a GGUF file": b"PK\3\4" + WHOLE,
    "version 1 is not read": WHOLE[:4] + struct.pack("<I", 1) + WHOLE[8:],
    "big-endian machines": WHOLE[:4] + struct.pack(">I", 3) + WHOLE[8:],
    "half a download": WHOLE[: len(WHOLE) // 2],
    "cannot hold 18,446,744,073,709,551,615 tensors": WHOLE[:8] + b"\xff" * 8 + WHOLE[16:],
    "cannot hold 1,000,000,000 metadata": WHOLE[:16] + struct.pack("<Q", 10**9) + WHOLE[24:],
    "'mamba', which is not implemented": changed({"general.architecture": "mamba"}),
    "its metadata lack general.architecture": gguf_files.file({}, gguf_files.stored_of("llama_gqa")),
    "tokenizer.ggml.eos_token_id='2', which is no id from 0 to": changed({"tokenizer.ggml.eos_token_id": "2"}),
    "tokenizer.ggml.bos_token_id=-2, which is no id": changed({"tokenizer.ggml.bos_token_id": -2}),
    "tokenizer.ggml.padding_token_id=99999, which": changed({"tokenizer.ggml.padding_token_id": 99_999}),
    "tokenizer.ggml.eot_token_id=True, which": changed({"tokenizer.ggml.eot_token_id": True}),
    "tokenizer.ggml.eom_token_id=a list of 2, which": changed({"tokenizer.ggml.eom_token_id": [1, 2]}),
    "tokenizer.ggml.unknown_token_id=400, which": changed(
        bpe_metadata("gpt-2") | {"tokenizer.ggml.unknown_token_id": 400}
    ),
    "mixture of experts": changed({"llama.expert_count": 8}),
    "lack llama.block_count": gguf_files.file({"general.architecture": "llama"}, gguf_files.stored_of("llama_gqa")),
    "2,000,000,000 layers": changed({"llama.block_count": 2_000_000_000}),
    "llama.block_count=x": changed({"llama.block_count": "x"}),
    "not implemented: llama.logit_scale": changed({"llama.logit_scale": 2.0}),
    "'longrope' is not implemented": changed({"llama.rope.scaling.type": "longrope"}),
    "attention.causal=false": changed({"llama.attention.causal": False}),
    "general.type='adapter': the file holds no model": changed({"general.type": "adapter"}),
    "heads 5 is not a multiple": changed({"llama.attention.head_count": 5}),
    r"1 missing \(blk.2.ffn_up.weight\)": lacking("blk.2.ffn_up.weight"),
    r"1 unknown \(blk.0.ssm_a\)": with_tensor("blk.0.ssm_a", np.zeros(3)),
    r"of another shape \(output_norm.weight is \(31,\), not \(32,\)": with_tensor("output_norm.weight", np.zeros(31)),
    "type IQ2_XXS, which is not implemented": with_tensor("x.weight", (16, (256,), b"")),
    "cannot have the shape": with_tensor("x.weight", (2, (33,), b"")),
    "general.alignment=33": changed({"general.alignment": 33}),
    "kind 'bert' are not implemented": changed({"tokenizer.ggml.model": "bert"}),
    "pre='poro-chat' is not implemented": changed(bpe_metadata("poro-chat")),
    "a number for each of": changed(bpe_metadata("gpt-2") | {"tokenizer.ggml.token_type": [1, 2]}),
    "is in tokenizer.ggml.tokens twice": changed(bpe_metadata("gpt-2") | {"tokenizer.ggml.tokens": ["a"] * 400}),
}


def test_a_factor_that_is_switched_off(tmp_path):
    content = changed({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0})
    assert gx.load_config(written(tmp_path / "m.gguf", content)).rope.kind == "default"


@pytest.mark.parametrize("none", [-1, 0xFFFFFFFF])
def test_ids_that_stand_for_no_token(none, tmp_path):
    """As in llama.cpp, whose ids have 32 bits."""
    ids = {f"tokenizer.ggml.{role}_token_id": none for role in ("bos", "eos", "padding", "unknown")}
    content = changed(bpe_metadata("gpt-2") | ids | {"tokenizer.ggml.eot_token_id": 7})
    model = gx.load(written(tmp_path / "m.gguf", content))
    assert (model.config.bos, model.config.eos) == (None, 7)
    assert (model.tokenizer.bos, model.tokenizer.pad) == (None, None)


def test_ignored_keys_of_the_metadata(tmp_path, capsys):
    path = written(tmp_path / "m.gguf", changed({"llama.logit_scale": 2.0}))
    model = gx.load(path, ignore=["llama.logit_scale"])
    assert_same_bytes(model.params, params("llama_gqa"))
    assert gx.load_config(path, ignore=["llama.logit_scale"]) == model.config
    assert main(["info", str(path), "--ignore", "llama.logit_scale"]) == 0
    assert "all that config.json asks for is there" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match=r"'logit_scale', which is no key of the metadata of .*m.gguf.*llama.logit_scale"
    ):
        gx.load(path, ignore=["logit_scale"])


@pytest.mark.parametrize("message", FOREIGN)
def test_files_that_are_refused(message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        gx.load(written(tmp_path / "m.gguf", FOREIGN[message]))
    assert len(str(caught.value).splitlines()) == 1


def test_names_given_twice_and_overlaps(tmp_path):
    entry = gguf_files.text("general.name") + gguf_files.value("a")
    pair = b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + entry + entry
    bad = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2) + b"\xff\xfe" + gguf_files.value("a")
    both = gguf_files.file({}, {"a.weight": np.zeros(8, np.float32), "b.weight": np.zeros(8, np.float32)})
    overlap = both.replace(struct.pack("<IQ", 0, 32), struct.pack("<IQ", 0, 0))
    named_twice = both.replace(b"b.weight", b"a.weight")
    for content, message in ((pair, "given twice"), (bad, "not UTF-8"), (overlap, "overlaps"), (named_twice, "twice")):
        with pytest.raises(ValueError, match=message):
            gx.load(written(tmp_path / "m.gguf", content))


def test_damaged_files(tmp_path):
    gx.load(written(tmp_path / "m.gguf", gguf_files.file_of("llama_gqa", bpe_metadata("gpt-2"))))
    original = (tmp_path / "m.gguf").read_bytes()
    outcomes = []
    for seed in range(100):
        (tmp_path / "m.gguf").write_bytes(damaged(original, random.Random(seed)))
        try:
            outcomes.append(survives(gx.load, tmp_path))
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {str(error)[:500]}") from error
    assert not all(outcomes)
