"""LLaMA's kin: Mistral, Qwen 2 and Baichuan. Windows, ALiBi, the normalised head, and the dialects of config.json."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import FOLDER, arrays, config, params, relative_error
from safetensors.numpy import load_file

import garrulax as gx
from garrulax import models
from garrulax.core import spec
from garrulax.kernels import masks
from garrulax.layers.norms import unit_norm
from garrulax.layers.rope import Rope
from garrulax.models import llama

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONTRACT = 2e-6
BAICHUAN = ("baichuan7b", "baichuan13b", "baichuan2_7b_composite", "baichuan2_13b")
SIZES = {"vocab": 40, "context": 16, "width": 8, "layers": 3, "heads": 2, "kv_heads": 2, "mlp_width": 12}
forward = jax.jit(gx.forward, static_argnums=2)


@pytest.mark.parametrize("case", BAICHUAN)
def test_left_padding_as_in_the_original_code(case, table):
    """Of its padding rows only the embedding is defined: compared are those of tokens."""
    z = arrays(case)
    valid = z["pad_attention_mask"]
    positions = jnp.asarray(np.maximum(valid.cumsum(1) - 1, 0))
    tokens, mask = jnp.asarray(z["input_ids"]), masks.padded(jnp.asarray(valid))
    logits, _ = forward(params(case), tokens, config(case), mask=mask, positions=positions)
    error = relative_error(logits[valid == 1], z["pad_logits"][valid == 1])
    table("Baichuan2" if "2" in case else "Baichuan", "padded", error)
    assert error <= CONTRACT


@pytest.mark.parametrize(("case", "positions"), [("cpp_baichuan7b", "rope"), ("cpp_baichuan13b", "alibi")])
def test_hidden_states_of_the_official_code(case, positions):
    """One layer of eight heads, made by the authors' code for chatglm.cpp: a prompt, then two cached steps."""
    z = np.load(FOLDER / f"{case}.npz")
    c = llama.Config(
        vocab=5, context=64, width=32, layers=1, heads=8, kv_heads=8, mlp_width=96, positions=positions,
        dialect="baichuan",
    )  # fmt: skip
    specs = {k: v for k, v in llama.parameters(c).items() if k != "head"}

    def one(s):
        parts = [s.layout.read(z[name.removeprefix("model.")]) for name in s.names]
        return jnp.asarray(np.stack(parts) if s.layers else parts[0])

    weights = spec.map_specs(one, specs)
    cache = gx.cache_for(weights, c, 1, 8)
    for i in (1, 2, 3):
        x, cache = models.hidden(weights, jnp.asarray(z[f"x{i}"]), c, cache=cache)
        assert relative_error(x[0], z[f"y{i}"]) <= CONTRACT


def test_a_window_changes_nothing_that_fits_into_it():
    """Mistral's case has the weights of llama_gqa and a window of 4: self and three before."""
    z = arrays("mistral")
    tokens = jnp.asarray(z["input_ids"])
    wide = dataclasses.replace(config("mistral"), window=tokens.shape[1])
    full, _ = forward(params("mistral"), tokens, wide)
    assert relative_error(full[:, :4], z["logits"][:, :4]) <= CONTRACT
    assert relative_error(full[:, 4], z["logits"][:, 4]) > 1000 * CONTRACT
    assert relative_error(full, arrays("llama_gqa")["logits"]) <= CONTRACT


@pytest.mark.parametrize("case", ["baichuan7b", "baichuan2_7b_composite"])
def test_baichuan_7b_exported_as_llama(case, tmp_path):
    """The same tree under LLaMA's names, a normalised head folded: what transformers' own class then loads."""
    weights, c = llama.fold_head(params(case), config(case))
    assert not c.normalized_head
    c = dataclasses.replace(c, dialect="llama")
    logits, _ = forward(weights, jnp.asarray(arrays(case)["input_ids"]), c)
    assert relative_error(logits, arrays(case)["logits"]) <= CONTRACT
    gx.save(gx.Model(c, weights), tmp_path / "m")
    raw = json.loads((tmp_path / "m/config.json").read_text())
    assert (raw["model_type"], raw["architectures"]) == ("llama", ["LlamaForCausalLM"])
    packed, split = load_file(FOLDER / f"{case}_s0.safetensors"), load_file(tmp_path / "m/model.safetensors")
    rows = [split[f"model.layers.2.self_attn.{name}_proj.weight"] for name in "qkv"]
    np.testing.assert_array_equal(np.concatenate(rows), packed["model.layers.2.self_attn.W_pack.weight"])
    again = gx.load(tmp_path / "m")
    assert again.config == c
    jax.tree.map(np.testing.assert_array_equal, again.params, weights)


def test_folding_the_head():
    weights, c = params("baichuan2_13b"), config("baichuan2_13b")
    folded, plain = llama.fold_head(weights, c)
    np.testing.assert_allclose(np.linalg.norm(folded["head"], axis=1), 1, rtol=1e-6)
    assert folded["blocks"] is weights["blocks"]
    assert llama.fold_head(folded, plain) == (folded, plain)  # nothing is left to fold
    assert relative_error(folded["head"], weights["head"]) > 0.1


def test_unit_norm():
    x = jnp.asarray([[3.0, 4.0], [0.0, 0.0], [0.0, 1e-13]])
    np.testing.assert_allclose(unit_norm(x, 1e-12), [[0.6, 0.8], [0, 0], [0, 0.1]], rtol=1e-6)
    assert np.isfinite(jax.grad(lambda x: unit_norm(x, 1e-12).sum())(x)).all()
    assert unit_norm(x.astype(jnp.bfloat16), 1e-12).dtype == jnp.bfloat16


# -- config.json ------------------------------------------------------------------------------------------------------

BARE = {
    "vocab_size": 40, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2}


def bare(model_type, **keys):
    return llama.from_hf({"model_type": model_type, **BARE, **keys})


def test_absent_keys_have_the_values_of_transformers():
    """MistralConfig and Qwen2Config of transformers 5.23.0; Baichuan as Baichuan-7B's configuration class."""
    c = llama.Config(**SIZES)
    assert bare("llama") == dataclasses.replace(c, context=2048)
    with pytest.raises(ValueError, match="heads 2 is not a multiple of kv_heads 8"):
        bare("mistral")
    assert bare("mistral", num_attention_heads=8, head_dim=2).kv_heads == 8
    assert bare("mistral", num_key_value_heads=None).kv_heads == 2
    assert bare("mistral", **GROUPED) == dataclasses.replace(c, context=131072, window=4096, dialect="mistral")
    assert bare("mistral", **GROUPED, sliding_window=None).window == 0
    with pytest.raises(ValueError, match="heads 2 is not a multiple of kv_heads 32"):
        bare("qwen2")
    qwen2 = dataclasses.replace(c, context=32768, qkv_bias=True, bos=None, eos=None, dialect="qwen2")
    assert bare("qwen2", **GROUPED) == qwen2
    assert bare("qwen2", **GROUPED, use_sliding_window=False, sliding_window=4, max_window_layers=1) == qwen2
    assert bare("qwen2", **GROUPED, use_sliding_window=True) == qwen2  # from layer 28 of 3 on
    assert bare("baichuan", max_position_embeddings=16) == dataclasses.replace(c, dialect="baichuan")


def qwen2(**keys):
    return bare("qwen2", **GROUPED, **keys)


def test_layer_types_of_qwen2():
    full, sliding = "full_attention", "sliding_attention"
    one = {"use_sliding_window": True, "sliding_window": 4, "layer_types": [full, sliding, sliding]}
    assert (qwen2(**one).window, qwen2(**one).window_from) == (4, 1)
    assert qwen2(**one | {"max_window_layers": 2}) == qwen2(**one)  # layer_types decide, as in transformers
    assert qwen2(**one | {"layer_types": [sliding] * 3}).window_from == 0
    assert qwen2(**one | {"layer_types": [full] * 3}) == qwen2()
    for kinds in ([sliding, full, full], [full, sliding], [full] * 4, [full, full, "chunked_attention"], "full", []):
        with pytest.raises(ValueError, match="layer_types must name 3 layers, full_attention first"):
            qwen2(**one | {"layer_types": kinds})
    with pytest.raises(ValueError, match="layer_types has sliding_attention, but no use_sliding_window"):
        qwen2(**one | {"use_sliding_window": False})


BAICHUAN2_7B = {  # what the configuration class of Baichuan2-7B writes
    "_from_model_config": True, "architectures": ["BaichuanForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_baichuan.BaichuanConfig"}, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008,
    "max_position_embeddings": 4096, "model_max_length": 4096, "model_type": "baichuan", "num_attention_heads": 32,
    "num_hidden_layers": 32, "pad_token_id": 0, "rms_norm_eps": 1e-06, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.29.2", "use_cache": True, "vocab_size": 125696,
    "z_loss_weight": 0,
}  # fmt: skip


def test_published_config_json_of_baichuan():
    """Rotary positions where there is a max_position_embeddings, else ALiBi; a normalised head where there is a
    z_loss_weight or Baichuan 2's vocabulary."""
    assert llama.from_hf(BAICHUAN2_7B) == gx.preset("baichuan2-7b")
    raw = {k: v for k, v in BAICHUAN2_7B.items() if k != "z_loss_weight"}
    assert llama.from_hf(raw) == gx.preset("baichuan2-7b")
    assert llama.from_hf(raw | {"vocab_size": 64000}) == gx.preset("baichuan-7b")
    assert llama.from_hf(BAICHUAN2_7B | {"vocab_size": 64000}).normalized_head
    assert not llama.from_hf(BAICHUAN2_7B | {"normalized_head": False}).normalized_head
    sizes = {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "intermediate_size": 13696}
    del raw["max_position_embeddings"]
    assert llama.from_hf(raw | sizes) == gx.preset("baichuan2-13b")
    assert llama.from_hf(raw | sizes | {"vocab_size": 64000}) == gx.preset("baichuan-13b")
    assert llama.to_hf(gx.preset("baichuan-7b"))["architectures"] == ["BaiChuanForCausalLM"]
    for name in ("baichuan-13b", "baichuan2-7b", "baichuan2-13b"):
        assert llama.to_hf(gx.preset(name))["architectures"] == ["BaichuanForCausalLM"]


def test_published_config_json_of_mistral_and_qwen2():
    raw = {
        "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "use_cache": True, "vocab_size": 32000,
    }  # fmt: skip
    assert llama.from_hf(raw) == gx.preset("mistral-7b")
    v2 = raw | {"rope_theta": 1000000.0, "sliding_window": None, "attention_dropout": 0.0}
    assert llama.from_hf(v2) == gx.preset("mistral-7b-v0.2")
    assert llama.from_hf(v2 | {"vocab_size": 32768}) == gx.preset("mistral-7b-v0.3")
    raw = {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
        "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
        "max_position_embeddings": 131072, "max_window_layers": 24, "model_type": "qwen2", "num_attention_heads": 14,
        "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
        "sliding_window": 131072, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
    }  # fmt: skip
    assert llama.from_hf(raw) == gx.preset("qwen2-0.5b")


@pytest.mark.parametrize(
    ("model_type", "keys", "message"),
    [
        ("mistral", {"sliding_window": 0}, "sliding_window=0 must be a whole number of at least 1"),
        ("mistral", {"attention_bias": True}, "config.json of a mistral has unknown keys attention_bias"),
        ("mistral", {"layer_types": []}, "config.json of a mistral has unknown keys layer_types"),
        ("qwen2", {"use_mrope": True}, "use_mrope=True is not implemented"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": -4, "max_window_layers": 0}, "sliding_window=-4"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": "1"}, "max_window_layers='1'"),
        ("qwen2", {"use_sliding_window": True, "num_hidden_layers": "3"}, "num_hidden_layers='3'"),
        ("baichuan", {}, "of a baichuan lacks 'model_max_length'"),
        ("baichuan", {"model_max_length": 16, "rope_theta": 5.0}, "unknown keys rope_theta"),
        ("baichuan", {"model_max_length": 16, "normalized_head": 1}, "normalized_head=1 must be true or false"),
        ("baichuan", {"model_max_length": 16, "vocab_size": "40"}, "vocab_size='40'"),
    ],
)
def test_a_config_json_that_cannot_be_is_refused_by_name(model_type, keys, message):
    grouped = {} if model_type == "baichuan" else GROUPED
    with pytest.raises(ValueError, match=message):
        bare(model_type, **grouped, **keys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dialect": "gpt"}, "unknown dialect 'gpt': choose from llama, mistral, qwen2, baichuan"),
        ({"window": 4}, r"dialect 'llama' cannot say window=4, only 0 \(dialect mistral or qwen2 can\)"),
        ({"window": -1, "dialect": "mistral"}, "window=-1 must be a whole number of at least 0"),
        ({"window_from": 1, "dialect": "mistral"}, "window_from=1 does nothing without a window"),
        ({"window": 4, "window_from": 3, "dialect": "mistral"}, "window_from=3 leaves none of 3 layers"),
        ({"window": 4, "window_from": 1, "dialect": "mistral"}, r"cannot say window_from=1, only 0 .*qwen2"),
        ({"qkv_bias": True}, r"dialect 'llama' cannot say out_bias=False, only True"),
        ({"out_bias": True}, r"dialect 'llama' cannot say out_bias=True, only False$"),
        ({"qkv_bias": True, "dialect": "mistral"}, r"'mistral' cannot say qkv_bias=True.*\(dialect llama or qwen2 can"),
        ({"dialect": "qwen2"}, "dialect 'qwen2' cannot say qkv_bias=False, only True"),
        ({"mlp_bias": True, "dialect": "baichuan"}, r"cannot say mlp_bias=True, only False \(dialect llama can\)"),
        ({"normalized_head": True}, r"cannot say normalized_head=True.*\(dialect baichuan can\)"),
        ({"normalized_head": True, "tied": True, "dialect": "baichuan"}, "normalized_head and tied"),
        ({"positions": "learned"}, "unknown positions 'learned': choose from rope, alibi"),
        ({"positions": "alibi"}, r"cannot say positions='alibi'.*\(dialect baichuan can\)"),
        ({"positions": "alibi", "rope": Rope(theta=5.0), "dialect": "baichuan"}, "there are no rotary positions"),
        ({"rope": Rope(theta=5.0), "dialect": "baichuan"}, r"cannot say rope=.*\(dialect llama or mistral or qwen2"),
        ({"kv_heads": 1, "dialect": "baichuan"}, "cannot say kv_heads=1, only 2"),
        ({"head_dim": 6, "dialect": "baichuan"}, "cannot say width=8, only 12"),
        ({"window": 4, "dialect": "baichuan"}, "cannot say window=4"),
    ],
)  # fmt: skip
def test_what_a_dialect_cannot_say_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        llama.Config(**SIZES | changes)


@pytest.mark.parametrize(
    ("row", "beginning", "number"),
    [("LLaMA 1/2/3", "llama", 16), ("Mistral", "mistral-", 3), ("Qwen2", "qwen2-", 4), ("Baichuan", "baichuan-", 2),
     ("Baichuan2", "baichuan2-", 2)],
)  # fmt: skip
def test_presets(row, beginning, number, table):
    """Of published models; their exact sizes are tested with those of all families."""
    names = [name for name in gx.presets() if name.startswith(beginning) and "tiny" not in name]
    assert len(names) == number
    table(row, "presets", number)
