"""config.json of 110 published models (config_files.json): which are read, as what, and which keys are refused.

`parameters` are transformers' counts (tests/parity/test_published.py); `preset` is the preset that a file describes.
"""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from test_hub import assert_same_bytes, folder_of, hf_config, tensors

import garrulax as gx
from garrulax import cli, models
from garrulax.hub.reading import family_of, parse_config

FILES = json.loads((Path(__file__).parent / "config_files.json").read_text())
#: Names of keys that the error of a refused file must give.
REASONS = {
    "bitnet-b1.58-3b": "input_bits=8 is not implemented: the weights are quantised",
    "chatglm-6b-int4": "quantization_bit=4 is not implemented: the weights are quantised",
    "gpt2-2019": "unknown keys shared_attention, shared_module",
    "gte-qwen2-1.5b-instruct": "unknown keys is_causal=False",
    "made-llama-key-bias": "unknown keys bias=True",
    "thebloke-llama-2-7b-chat-gptq": r"the weights are quantised \(gptq, 4 bits\)",
}

pytestmark = pytest.mark.usefixtures("quick_compilation")


def read(raw):
    return family_of(raw).from_hf(raw)


def test_published_files_are_read_or_refused():
    assert {name for name, row in FILES.items() if row["expected"] == "refused"} == REASONS.keys()
    for name, row in FILES.items():
        if name in REASONS:
            with pytest.raises(ValueError, match=REASONS[name]) as caught:
                read(row["config"])
            assert "\n" not in str(caught.value)
            continue
        c = read(row["config"])
        assert gx.count(c) == row.get("parameters", gx.count(c)), name
        if "preset" in row:
            assert c == gx.preset(row["preset"]), name


def test_warnings_of_published_files(caplog):
    """One line each, for keys that are skipped and for code that is not run; nothing for most files."""
    warned = {}
    for name, row in FILES.items():
        if name not in REASONS:
            caplog.clear()
            read(row["config"])
            warned[name] = caplog.messages
    assert {name for name, lines in warned.items() if lines} == {
        "falcon-11b", "falcon-7b-instruct-saved", "llama-2-7b-pruned-sparsity-key", "superhot-13b-8k-fp16",
        "yarn-llama-2-7b-64k",
    }  # fmt: skip
    assert warned["llama-2-7b-pruned-sparsity-key"] == ["config.json of a llama has keys that are not read: sparsity"]
    assert warned["superhot-13b-8k-fp16"] == [
        "config.json of a llama names code of its own (modelling_llama), which is not run: the model is computed as a "
        "LlamaForCausalLM"
    ]


LLAMA = hf_config("llama_gqa") | {"architectures": ["LlamaForCausalLM"]}
MISTRAL = LLAMA | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 8}
MISTRAL = {k: v for k, v in MISTRAL.items() if k not in ("attention_bias", "mlp_bias")}
QWEN2 = {k: v for k, v in LLAMA.items() if k not in ("attention_bias", "mlp_bias")}
QWEN2 |= {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
FOREIGN = {"architectures": ["BitnetForCausalLM"]}
REMOTE = {"auto_map": {"AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}}
CHATGLM3 = FILES["chatglm3-6b"]["config"]
FALCON = FILES["falcon-40b"]["config"]
NEOX = models.gpt_neox.to_hf(gx.preset("pythia-14m"))


@pytest.mark.parametrize(
    ("raw", "keys"),
    [
        (LLAMA, {"is_llama_config": True, "rope_interleaved": False}),  # SmolLM2
        (LLAMA, {"activation": "swiglu", "tie_encoder_decoder": False, "_model_name_or_path": "x", "unk_token_id": 0}),
        (LLAMA, {"seq_length": 9, "internal_version": 2, "unsloth_version": "1", "neftune_noise_alpha": 5}),
        (LLAMA, {"use_flash_attn": True, "bad_words_id": [3], "sep_token": "x", "tokenizer_padding_side": "left"}),
        (LLAMA, {"rotary_emb_base": 10000, "rotary_pct": 1, "alibi": False, "bias": False, "resid_pdrop": 0.0}),
        (LLAMA, {"layer_types": ["full_attention"] * 3, "sliding_window": None, "max_window_layers": 28}),
        (LLAMA, {"sliding_window": 4096, "use_sliding_window": False, "logit_scale": None, "qkv_bias": False}),
        (LLAMA, {"quantization_config": None, "quantization": {}, "load_in_8bit": False, "quantization_bit": 0}),
        (LLAMA, {"quantization_config": {"load_in_4bit": False}, "_pre_quantization_dtype": "bfloat16"}),
        (LLAMA, {"is_causal": True, "add_cross_attention": False, "cross_attention_hidden_size": None}),
        (LLAMA, {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
        (LLAMA, {"architectures": None}), (LLAMA, {"architectures": "LLaMAForCausalLM"}),
        (LLAMA, FOREIGN | {"eos_token_ids": [1]}), (LLAMA, REMOTE | {"eos_token_ids": [1]}),
        (MISTRAL, {"attention_bias": False, "mlp_bias": False, "layer_types": ["sliding_attention"] * 3}),
        (MISTRAL | {"sliding_window": None}, {"layer_types": ["full_attention"] * 3}),
        (QWEN2, {"qkv_bias": True, "attention_bias": True, "use_mrope": None}),
        (CHATGLM3, {"bad_words_id": [1], "_from_model_config": True, "quantization_bit": None, "max_length": 8192}),
        (FALCON, {"head_dim": 64, "rotary": True, "rotary_emb_base": 10000.0}),
        (NEOX, {"head_dim": 32}),
    ],
)  # fmt: skip
def test_keys_that_say_what_is_computed_anyway(raw, keys, caplog):
    with_keys = read(raw | keys)
    skipped = [line for line in caplog.messages if "not read" in line]
    assert with_keys == read(raw)
    assert not skipped


@pytest.mark.parametrize(
    ("raw", "keys"),
    [
        (LLAMA, {"sparsity": 0.1}), (LLAMA, {"trained_by": "x", "group_size_ratio": 0.25}),
        (LLAMA, {"qk_norm_config": {}, "experts": []}), (QWEN2, {"recompute": False}), (FALCON, {"datasets": ["a"]}),
    ],
)  # fmt: skip
def test_other_keys_are_read_with_one_warning(raw, keys, caplog):
    assert read(raw | keys) == read(raw)
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert caplog.messages[0].endswith(f"has keys that are not read: {', '.join(sorted(keys))}")
    caplog.clear()
    for strange in (FOREIGN, REMOTE):
        with pytest.raises(ValueError, match=f"unknown keys {min(keys)}"):
            read(raw | keys | strange)


@pytest.mark.parametrize(
    ("raw", "key", "value"),
    [
        (LLAMA, "rope_interleaved", True), (LLAMA, "is_causal", False), (LLAMA, "is_causal", None),
        (LLAMA, "logit_scale", 2.0), (LLAMA, "qk_norm", True), (LLAMA, "use_qk_norm", 1), (LLAMA, "num_experts", 8),
        (LLAMA, "sliding_window", 4), (LLAMA, "residual_multiplier", 0.2), (LLAMA, "attn_logit_softcapping", 30.0),
        (LLAMA, "attn_logit_softcapping", 0.0), (MISTRAL, "final_logit_softcapping", 0.0),
        (LLAMA, "embedding_multiplier", 12), (LLAMA, "layer_types", ["full_attention"]), (LLAMA, "bias", True),
        (LLAMA, "rotary_emb_base", 5e5), (LLAMA, "partial_rotary_factor", 0.5), (LLAMA, "activation", "gelu"),
        (LLAMA, "qkv_bias", True), (LLAMA, "scaleEmbeddings", False), (LLAMA, "resid_pdrop", 0.1),
        (LLAMA, "rmsNormUnitOffset", True), (LLAMA, "use_ntk", True), (LLAMA, "block_configs", [{}]),
        (MISTRAL, "attention_bias", True), (MISTRAL, "layer_types", ["full_attention"] * 3),
        (QWEN2, "qkv_bias", False), (CHATGLM3, "sparsity", 0.1), (CHATGLM3, "future", None), (FALCON, "head_dim", 32),
        (FALCON, "rotary", False), (FALCON, "is_causal", 1),
        (LLAMA, "quantization_config", {"quant_method": "awq"}), (LLAMA, "quantization", {"bits": 4}),
        (LLAMA, "load_in_4bit", True), (LLAMA, "compression_config", {"format": "int-quantized"}), (LLAMA, "w_bit", 4),
    ],
)  # fmt: skip
def test_keys_that_may_change_what_is_computed_are_refused(raw, key, value, caplog):
    if (key, value) == ("is_causal", None):  # null stands for the default, but not where remote code may read it
        raw = raw | REMOTE
    with pytest.raises(ValueError, match=key) as caught:
        read(raw | {key: value})
    if "softcapping" in key:  # transformers divides by 0.0 too
        assert f"{key}={value} (only null is implemented)" in str(caught.value)
    assert "ignore=[" in str(caught.value)
    assert "--ignore" in str(caught.value)


def folder_with(path, **keys):
    folder = folder_of("llama_gqa", path)
    (folder / "config.json").write_text(json.dumps(LLAMA | keys))
    return folder


def test_ignored_keys_are_left_out(tmp_path, capsys):
    """`ignore` in Python, --ignore on the command line."""
    yarn = {"type": "yarn", "factor": 2.0, "stretch": 3}
    folder = folder_with(tmp_path / "m", logit_scale=2.0, rope_parameters=None, rope_scaling=yarn)
    names = ["logit_scale", "rope_scaling.stretch"]
    with pytest.raises(ValueError, match=r"unknown keys logit_scale: .* ignore=\['logit_scale'\] or --ignore"):
        gx.load(folder)
    with pytest.raises(ValueError, match=r'unknown keys stretch: .* ignore=\["rope_scaling\.stretch"'):
        gx.load(folder, ignore=names[:1])
    with pytest.raises(TypeError, match="ignore='logit_scale' must be a list"):
        gx.load_config(folder, ignore="logit_scale")
    model = gx.load(folder, ignore=names)
    assert model.config.rope.kind == "yarn"
    for wrong, near in (("logit_scales", "logit_scale"), ("rope_scaling.strech", "rope_scaling.stretch")):
        with pytest.raises(ValueError, match=f"'{wrong}', which is no key of .*config.json .the nearest is '{near}'"):
            gx.load(folder, ignore=(*names, wrong))
    assert gx.load_config(folder, ignore=names) == model.config
    plain = folder_with(
        tmp_path / "plain", rope_parameters=None, rope_scaling={"type": "yarn", "factor": 2.0, "finetuned": True}
    )
    assert gx.load_config(plain) == model.config

    linear = {"type": "linear", "factor": 2.0, "finetuned": False, "original_max_position_embeddings": 16}
    assert gx.load_config(folder_with(tmp_path / "linear", rope_parameters=None, rope_scaling=linear)).rope.factor == 2

    option = ["--ignore", ",".join(names)]
    assert cli.main(["info", str(folder)]) == 2
    assert cli.main(["info", str(folder), *option]) == 0
    assert "all that config.json asks for is there" in capsys.readouterr().out
    assert cli.main(["convert", str(folder), str(tmp_path / "out"), *option]) == 0
    assert_same_bytes(gx.load(tmp_path / "out").params, model.params)


VALUES = [0, "", "yarn", [], {}, [[]], {"a": {}}, float("nan"), 10**400, True, None, "a\nb"]


@pytest.mark.parametrize(
    "key",
    ["quantization_config", "architectures", "auto_map", "layer_types", "activation", "head_dim", "rotary_emb_base",
     "qkv_bias", "is_causal", "sliding_window", "max_window_layers", "surprise", "rope_scaling", "odd\x00"],
)  # fmt: skip
def test_values_of_any_kind_are_read_or_refused_in_one_line(key):
    for raw in (LLAMA, MISTRAL, QWEN2, FALCON):
        for value in VALUES:
            message = ""
            try:
                parse_config(raw | {key: value})
            except ValueError as error:
                message = str(error)
            assert "\n" not in message
            assert len(message) < 1000


@pytest.mark.parametrize(
    "name",
    ["rope.freqs", "model.rotary_emb.original_inv_freq", "model.layers.0.self_attn.rotary_emb.cos_cached",
     "model.layers.2.self_attn.rotary_emb.sin_cached", "model.layers.0.self_attn.rotary_emb.inv_freq"],
)  # fmt: skip
def test_rotary_tables_in_a_checkpoint_are_skipped(name, tmp_path):
    stored = tensors("llama_gqa")
    plain = gx.load(folder_of("llama_gqa", tmp_path / "plain", stored)).params
    table = {name: np.zeros((4, 8), np.float32)}
    assert_same_bytes(gx.load(folder_of("llama_gqa", tmp_path / "m", stored | table)).params, plain)
