"""ChatGLM2, ChatGLM3 and GLM-4: padded batches and official fixtures, config.json in three dialects, exports."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import CHATGLM, FOLDER, arrays, config, params, raw_config, relative_error, weights

import garrulax as gx
from garrulax import models
from garrulax.core import spec
from garrulax.kernels import masks
from garrulax.layers.rope import Rope

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONTRACT = 2e-6
forward = jax.jit(gx.forward, static_argnums=2)


@pytest.mark.parametrize("case", CHATGLM)
def test_left_padded_rows_equal_those_of_the_original_code(case, table):
    z = arrays(case)
    valid = jnp.asarray(z["pad_attention_mask"])
    tokens, positions = jnp.asarray(z["input_ids"]), jnp.asarray(z["pad_position_ids"])
    logits, _ = forward(params(case), tokens, config(case), mask=masks.padded(valid), positions=positions)
    real = np.asarray(valid, bool)
    error = relative_error(np.asarray(logits)[real], z["pad_logits"][real])
    table("ChatGLM2/3-6B", "padded", error)
    assert error <= CONTRACT


@pytest.mark.parametrize("case", CHATGLM)
def test_chatglm3_computes_what_chatglm2_does(case):
    """The two codes gave the same numbers, so that what the other tests show of one holds for both."""
    other = case.replace("2", "3")
    a, b = arrays(case), arrays(other)
    assert a.files == b.files
    assert all(np.array_equal(a[name], b[name]) for name in a.files)
    assert weights(case).read_bytes() == weights(other).read_bytes()
    assert models.chatglm.from_hf(raw_config(other)["config"]) == config(case)


@pytest.mark.parametrize(("fixture", "eps"), [("cpp_glm2", 1e-5), ("cpp_glm3", 1e-5), ("cpp_glm4", 1.5625e-7)])
def test_hidden_states_of_the_official_fixtures(fixture, eps, table):
    """Three tokens at once and two in the cache, through one layer (li-plus/chatglm.cpp tests/data)."""
    z = np.load(FOLDER / f"{fixture}.npz")
    c = models.chatglm.Config(
        vocab=5, width=32, layers=1, heads=8, kv_heads=2, mlp_width=48, norm_eps=eps, eos=None
    )  # fmt: skip

    def one(s):
        if s.name == "transformer.output_layer.weight":
            return jnp.zeros(s.shape)  # the fixtures have no head
        stored = [z[name.removeprefix("transformer.")] for name in s.names]
        parts = [s.layout.read(x) for x in stored]
        return jnp.asarray(np.stack(parts) if s.layers else parts[0])

    p = spec.map_specs(one, models.chatglm.parameters(c))
    cache = gx.cache_for(p, c, 1, 8)
    for i in (1, 2, 3):
        x, cache = models.hidden(p, jnp.asarray(z[f"x{i}"]), c, cache=cache)
        error = relative_error(x[0], z[f"y{i}"])
        table("GLM-4" if fixture == "cpp_glm4" else "ChatGLM2/3-6B", "cached", error)
        assert error <= CONTRACT


# -- config.json ------------------------------------------------------------------------------------------------------

#: What the files of ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B-chat say.
CHATGLM2 = json.loads("""{
  "_name_or_path": "THUDM/chatglm2-6b", "model_type": "chatglm", "architectures": ["ChatGLMModel"],
  "auto_map": {"AutoConfig": "configuration_chatglm.ChatGLMConfig"}, "add_bias_linear": false, "add_qkv_bias": true,
  "apply_query_key_layer_scaling": true, "apply_residual_connection_post_layernorm": false, "attention_dropout": 0.0,
  "attention_softmax_in_fp32": true, "bias_dropout_fusion": true, "ffn_hidden_size": 13696,
  "fp32_residual_connection": false, "hidden_dropout": 0.0, "hidden_size": 4096, "kv_channels": 128,
  "layernorm_epsilon": 1e-05, "multi_query_attention": true, "multi_query_group_num": 2, "num_attention_heads": 32,
  "num_layers": 28, "original_rope": true, "padded_vocab_size": 65024, "post_layer_norm": true, "rmsnorm": true,
  "seq_length": 32768, "use_cache": true, "torch_dtype": "float16", "transformers_version": "4.27.1",
  "tie_word_embeddings": false, "eos_token_id": 2, "pad_token_id": 0
}""")
CHATGLM3 = CHATGLM2 | {"_name_or_path": "THUDM/chatglm3-6b", "seq_length": 8192}
GLM4 = CHATGLM2 | {
    "_name_or_path": "THUDM/glm-4-9b-chat", "classifier_dropout": None, "eos_token_id": [151329, 151336, 151338],
    "layernorm_epsilon": 1.5625e-07, "num_hidden_layers": 40, "num_layers": 40, "pad_token_id": 151329,
    "padded_vocab_size": 151552, "rope_ratio": 500, "seq_length": 131072, "vocab_size": 151552,
}  # fmt: skip
GLM4_0414 = {
    "architectures": ["Glm4ForCausalLM"], "model_type": "glm4", "attention_bias": True, "attention_dropout": 0.0,
    "eos_token_id": [151329, 151336, 151338], "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
    "initializer_range": 0.02, "intermediate_size": 13696, "max_position_embeddings": 32768, "num_attention_heads": 32,
    "num_hidden_layers": 40, "num_key_value_heads": 2, "pad_token_id": 151329, "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "tie_word_embeddings": False, "vocab_size": 151552,
}  # fmt: skip
#: The original GLM and ChatGLM-6B share the model types.
GLM_10B = models.glm.to_hf(gx.preset("glm-10b"))
CHATGLM1 = {
    "model_type": "chatglm", "architectures": ["ChatGLMModel"], "hidden_size": 4096, "inner_hidden_size": 16384,
    "layernorm_epsilon": 1e-05, "max_sequence_length": 2048, "num_attention_heads": 32, "num_layers": 28,
    "position_encoding_2d": True, "vocab_size": 130528,
}  # fmt: skip


@pytest.mark.parametrize(
    ("raw", "preset"),
    [(CHATGLM2, "chatglm2-6b"), (CHATGLM3, "chatglm3-6b"), (GLM4, "glm-4-9b-chat"), (GLM4_0414, "glm-4-9b-0414")],
)
def test_published_files_give_their_presets(raw, preset):
    assert models.chatglm.from_hf(raw) == gx.preset(preset)
    assert preset != "chatglm3-6b" or gx.preset(preset).eos == (2, 64795, 64797)  # </s>, <|user|>, <|observation|>


@pytest.mark.parametrize("raw", [CHATGLM2, CHATGLM3, GLM4, GLM4_0414])
def test_families_of_the_same_model_type_are_told_apart(raw):
    """Whatever their order: nobody else claims these files, and these claim no others."""
    claims = [m.__name__ for m in models.FAMILIES if any(dialect.claims(raw) for dialect in m.DIALECTS)]
    assert claims == ["chatglm"]
    for other in (GLM_10B, CHATGLM1):
        assert not any(dialect.claims(other) for dialect in models.chatglm.DIALECTS)


@pytest.mark.parametrize(
    ("changes", "rope"),
    [
        ({"rope_ratio": 50}, Rope(kind="linear", factor=50.0)),
        ({"rope_ratio": 50, "_name_or_path": "THUDM/chatglm3-6b-32k"}, Rope(theta=500_000.0)),
        ({"rope_ratio": 16, "_name_or_path": "mine", "rope_scaling": {"type": "linear", "factor": 16}},
         Rope(kind="linear", factor=16)),
        ({"rope_ratio": 16, "_name_or_path": "mine", "rope_theta": 160000}, Rope(theta=160_000.0)),
        ({"rope_ratio": 1}, Rope()),
    ],
)  # fmt: skip
def test_what_a_rope_ratio_means(changes, rope):
    """ChatGLM2-6B-32k's code divides the positions by it, that of its successors multiplies the base."""
    c = models.chatglm.from_hf(CHATGLM2 | changes)
    assert c.rope == rope
    assert models.chatglm.from_hf(models.chatglm.to_hf(c)) == c
    assert models.chatglm.to_hf(c)["rope_ratio"] == pytest.approx(changes["rope_ratio"])


@pytest.mark.parametrize(
    ("raw", "changes", "message"),
    [
        (CHATGLM2, {"quantization_bit": 4}, "quantization_bit=4 is not implemented"),
        (CHATGLM2, {"pre_seq_len": 128}, "pre_seq_len=128 is not implemented"),
        (CHATGLM2, {"add_bias_linear": True}, "add_bias_linear=True is not implemented"),
        (CHATGLM2, {"rmsnorm": False}, "rmsnorm=False is not implemented"),
        (CHATGLM2, {"post_layer_norm": False}, "post_layer_norm=False is not implemented"),
        (CHATGLM2, {"num_hidden_layers": 29}, "num_layers=28 and num_hidden_layers=29 disagree"),
        (CHATGLM2, {"vocab_size": 64794}, "padded_vocab_size=65024 and vocab_size=64794 disagree"),
        (CHATGLM2, {"multi_query_group_num": 3}, "heads 32 is not a multiple of kv_heads 3"),
        (CHATGLM2, {"multi_query_group_num": 32}, "multi_query_group_num for every head"),
        (CHATGLM2, {"multi_query_attention": 2}, "multi_query_attention=2 must be true or false"),
        (CHATGLM2, {"kv_channels": 2}, "rotary=0.5 must rotate an even part of head_dim 2"),
        (CHATGLM2, {"rope_ratio": "8"}, "rope_ratio='8' must be a number"),
        (CHATGLM2, {"rope_ratio": 8, "rope_theta": 10000}, "rope_ratio=8 and rope_theta or rope_scaling disagree"),
        (CHATGLM2, {"rope_ratio": 16, "_name_or_path": "mine"}, "rope_ratio=16 divides the positions in"),
        (CHATGLM2, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'chatglm' cannot say RoPE kind 'dynamic'"),
        (CHATGLM2, {"hidden_size": None}, "lacks 'hidden_size'"),
        (CHATGLM2, {"sliding_window": 4}, "unknown keys sliding_window"),
        (GLM4_0414, {"partial_rotary_factor": 0.12}, "rotary=0.12 must rotate"),
        (GLM4_0414, {"partial_rotary_factor": 1.5}, "rotary=1.5 must rotate"),
        (GLM4_0414, {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}},
         "two values of partial_rotary_factor: 0.5, 0.25"),
        (GLM4_0414, {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "'linear' lacks factor"),
        (GLM4_0414, {"mlp_bias": True}, "unknown keys mlp_bias"),
    ],
)  # fmt: skip
def test_a_config_json_that_cannot_be_is_refused_by_name(raw, changes, message):
    with pytest.raises(ValueError, match=message):
        models.chatglm.from_hf(raw | changes)


def test_glm_settings_in_old_and_new_places():
    raw = models.chatglm.to_hf(dataclasses.replace(config("glm"), rotary=1.0, rope=Rope(theta=900.0)))
    old = {k: v for k, v in raw.items() if k != "rope_parameters"}
    new = {k: v for k, v in raw.items() if k not in ("partial_rotary_factor", "rope_theta", "rope_scaling")}
    neither = {k: v for k, v in new.items() if k != "rope_parameters"}
    assert models.chatglm.from_hf(old) == models.chatglm.from_hf(new) == models.chatglm.from_hf(raw)
    assert models.chatglm.from_hf(new).rope == Rope(theta=900.0)
    assert models.chatglm.from_hf(new).rotary == 1.0
    assert models.chatglm.from_hf(neither) == config("glm")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dialect": "glm3"}, "unknown dialect 'glm3': choose from chatglm, glm, glm4"),
        ({"dialect": "glm", "eos": None}, "'glm' cannot say eos=None"),
        ({"dialect": "glm", "residual_after_norm": True}, "'glm' cannot say residual_after_norm=True"),
        ({"dialect": "glm", "residual_dropout": 0.1}, "'glm' cannot say residual_dropout=0.1"),
        ({"dialect": "glm4"}, "'glm4' cannot say output_norms=False"),
        ({"output_norms": True}, "'chatglm' cannot say output_norms=True"),
        ({"tied": True}, "'chatglm' cannot say tied=True"),
        ({"rope": Rope(theta=5e5, kind="linear", factor=2.0)}, "cannot say RoPE kind 'linear' with theta 500000.0"),
    ],
)
def test_a_dialect_refuses_what_it_cannot_say(changes, message):
    with pytest.raises(ValueError, match=message):
        gx.preset("chatglm2-6b", **changes)


@pytest.mark.parametrize(("row", "starts", "number"), [("ChatGLM2/3-6B", "chatglm", 4), ("GLM-4", "glm-4-", 3)])
def test_presets_are_counted(row, starts, number, table):
    assert len([name for name in models.chatglm.PRESETS if name.startswith(starts)]) == number
    table(row, "presets", number)


# -- Exports ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["chatglm2", "chatglm2_mha"])
def test_a_chatglm_exports_as_what_transformers_has_a_class_for_and_back(case, tmp_path):
    """The same parameters under other names; only the tensors are cut otherwise."""
    native = dataclasses.replace(config(case), dialect="glm", rope=Rope(kind="linear", factor=4.0))
    gx.save(gx.Model(native, params(case)), tmp_path / "glm")
    model = gx.load(tmp_path / "glm")
    assert model.config == native
    written = json.loads((tmp_path / "glm/config.json").read_text())
    assert (written["model_type"], written["architectures"]) == ("glm", ["GlmForCausalLM"])
    assert written["pad_token_id"] == 0  # the class's own default lies outside a smaller vocabulary
    back = model.replace(config=dataclasses.replace(native, dialect="chatglm"))
    gx.save(back, tmp_path / "chatglm")
    again = gx.load(tmp_path / "chatglm")
    assert again.config == dataclasses.replace(config(case), rope=native.rope)
    for x, y in zip(jax.tree.leaves(again.params), jax.tree.leaves(params(case)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_the_parameter_tree_does_not_depend_on_the_dialect():
    trees = []
    for dialect in ("chatglm", "glm"):
        named = spec.named_specs(models.chatglm.parameters(dataclasses.replace(config("chatglm2"), dialect=dialect)))
        trees.append({path: (s.shape, s.axes, s.role, s.inputs) for path, s in named.items()})
    assert trees[0] == trees[1]


def test_generation_goes_on_from_the_control_tokens():
    """Ids as ChatGLM's tokenizer gives them, [gMASK] sop first; a tuple of ids ends a text."""
    c = dataclasses.replace(config("chatglm2"), eos=None)
    model = types.SimpleNamespace(params=params("chatglm2"), config=c, tokenizer=None)
    free = gx.generate(model, [120, 121, 5, 6, 7], max_new_tokens=8, temperature=0).tokens
    assert len(free) == 8
    model.config = dataclasses.replace(c, eos=(free[3], 1))
    stopped = gx.generate(model, [120, 121, 5, 6, 7], max_new_tokens=8, temperature=0)
    end = next(i for i, token in enumerate(free) if token in model.config.eos)
    assert (stopped.finish_reason, stopped.tokens) == ("eos", free[: end + 1])
