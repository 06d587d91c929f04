"""Every field of every Config matters or is refused; parameter counts; config.json there and back."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from entry import ELSEWHERE, SIZES
from registry import FAMILIES

import garrulax as gx
from garrulax import models
from garrulax.core import spec
from garrulax.layers import rope as ropes
from garrulax.layers.rope import Rope

FIELDS = [(family, field.name) for family, e in FAMILIES.items() for field in dataclasses.fields(e.config)]

pytestmark = pytest.mark.usefixtures("quick_compilation")


def behaviour(c):
    """Everything that a config decides: count, initial values, logits in training. Nothing is compiled as a whole:
    that would take longer than to run it."""
    params = spec.init(models.parameters(c), jax.random.key(0))
    tokens = jnp.arange(20).reshape(2, 10)
    logits, _ = gx.forward(gx.unstack(params), tokens, c, key=jax.random.key(1))
    return gx.count(c), [np.asarray(x) for x in [*jax.tree.leaves(params), logits]]


@functools.cache
def base_behaviour(c):
    return behaviour(c)


@pytest.mark.parametrize(("family", "name"), FIELDS)
def test_every_field_changes_the_result(family, name):
    """Parameters, initial values or logits; or the field is listed as one that other packages read."""
    base, changed = FAMILIES[family].changed(name)
    count, values = behaviour(changed)
    base_count, base_values = base_behaviour(base)
    same = (
        count == base_count
        and [v.shape for v in values] == [v.shape for v in base_values]
        and all(map(np.array_equal, values, base_values))
    )
    listed = name in (*ELSEWHERE, *FAMILIES[family].elsewhere)
    assert same == listed, f"{family}.Config.{name} {'matters but is listed' if listed else 'changes nothing'}"


@pytest.mark.parametrize(("family", "name"), FIELDS)
def test_every_field_survives_config_json(family, name):
    """Written and read back it is equal, and what is written differs from what the base writes."""
    base, c = FAMILIES[family].changed(name)
    module = models.family(c)
    written = json.loads(json.dumps(module.to_hf(c)))
    assert written != json.loads(json.dumps(module.to_hf(base)))
    assert module.from_hf(written) == c


@pytest.mark.parametrize("preset", gx.presets())
def test_presets_survive_config_json(preset):
    c = gx.preset(preset)
    module = models.family(c)
    assert module.from_hf(json.loads(json.dumps(module.to_hf(c)))) == c


ROPES = {
    "default": Rope(theta=50.0),
    "linear": Rope(kind="linear", factor=2.0),
    "dynamic": Rope(kind="dynamic", factor=2.0, original_context=16),
    "yarn": Rope(kind="yarn", factor=2.0, original_context=1024, beta_fast=8.0, beta_slow=2.0),
    "longrope": Rope(
        kind="longrope", factor=2.0, original_context=8, short_factors=tuple(1 + i / 10 for i in range(16)),
        long_factors=tuple(2 + i for i in range(16)),
    ),
    "llama3": Rope(kind="llama3", factor=2.0, original_context=64, low=1.0, high=4.0),
}  # fmt: skip
ROPE_CHANGES = {
    "theta": 900.0, "factor": 3.0, "original_context": 700, "low": 1.5, "high": 5.0, "beta_fast": 16.0,
    "beta_slow": 1.5, "truncate": False, "attention_factor": 1.3, "short_factors": (1.5,) * 16,
    "long_factors": (2.5,) * 16,
}  # fmt: skip


def angles(rope):
    lengths = jnp.array([6, 20])
    positions = jnp.broadcast_to(jnp.arange(6), (2, 6))
    return np.stack(ropes.cos_sin(rope, positions, 32, lengths, jnp.float32))


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("name", ROPE_CHANGES)
def test_every_rope_field_changes_the_angles_or_is_refused(kind, name):
    rope, changes = ROPES[kind], {name: ROPE_CHANGES[name]}
    if name == "theta" or name in ropes.USED[kind]:
        assert not np.array_equal(angles(rope), angles(dataclasses.replace(rope, **changes)))
    else:
        with pytest.raises(ValueError, match=f"does not use {name}="):
            dataclasses.replace(rope, **changes)


def test_yarn_scales_by_both_mscales_or_neither():
    """As in the reference code, one alone does nothing; so one alone is refused."""
    rope = dataclasses.replace(ROPES["yarn"], mscale=0.7, mscale_all_dim=0.3)
    for name in ("mscale", "mscale_all_dim"):
        assert not np.array_equal(angles(rope), angles(dataclasses.replace(rope, **{name: 0.5})))
        with pytest.raises(ValueError, match="mscale"):
            dataclasses.replace(ROPES["yarn"], **{name: 0.7})
    with pytest.raises(ValueError, match="attention_factor"):
        dataclasses.replace(rope, attention_factor=1.1)


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("dialect", ["both", "rope_parameters", "rope_scaling", "type"])
def test_every_rope_survives_config_json_in_every_dialect(kind, dialect):
    c = dataclasses.replace(FAMILIES["llama"].config, rope=ROPES[kind], head_dim=32)
    raw = json.loads(json.dumps(models.llama.to_hf(c)))
    if dialect == "rope_parameters":
        del raw["rope_scaling"], raw["rope_theta"]
    if dialect in ("rope_scaling", "type"):
        del raw["rope_parameters"]
    if dialect == "type" and raw["rope_scaling"]:
        raw["rope_scaling"]["type"] = raw["rope_scaling"].pop("rope_type")
    assert models.llama.from_hf(raw) == c


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"rope_type": "linear"}}, "linear.*lacks factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor, high_freq_factor"),
        ({"rope_scaling": {"rope_type": "so", "factor": 8.0}}, "'so' is not implemented"),
        (
            {"rope_scaling": {"type": "su", "factor": 8.0}},
            "'longrope' .'su' in the file, its older name. lacks short_f",
        ),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 3.0}}, "does not use beta_fast"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "stretch": True}}, "unknown keys stretch"),
        ({"rope_parameters": {"rope_theta": 5.0}, "rope_theta": 6.0}, "two values of rope_theta: 5.0, 6.0"),
        (
            {
                "rope_parameters": {"rope_type": "linear", "factor": 2.0},
                "rope_scaling": {"type": "linear", "factor": 3.0},
            },
            "disagree",
        ),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 9}},
            "dynamic RoPE starts from max_position_embeddings",
        ),
        ({"sliding_window": 4, "logit_scale": 2.0}, "unknown keys logit_scale, sliding_window"),
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        ({"num_key_value_heads": 0}, "kv_heads=0"),
        ({"num_hidden_layers": -1}, "layers=-1"),
        ({"num_attention_heads": 3}, "heads 3 is not a multiple of kv_heads 2"),
        ({"vocab_size": "40"}, "vocab='40'"),
        ({"rms_norm_eps": 0}, "norm_eps=0"),
        ({"initializer_range": -0.1}, "init_std=-0.1"),
        ({"attention_dropout": 1.0}, "attention_dropout=1.0"),
        ({"tie_word_embeddings": "no"}, "tied='no'"),
        ({"eos_token_id": [2, -1]}, "eos="),
        ({"head_dim": 3}, "head_dim 3 must be even"),
        ({"head_dim": 0}, "head_dim=0 must be a whole number of at least 1"),
        ({"rope_theta": True}, "rope_theta=True must be a number"),
        ({"rope_parameters": 0}, "RoPE settings must be an object, not 0"),
        ({"rope_scaling": {"type": "longrope", "short_factor": 1, "long_factor": 1}}, "short_factor must be a list"),
        ({"hidden_act": "swiglu"}, "unknown activation 'swiglu'"),
    ],
)
def test_a_llama_config_json_that_cannot_be_is_refused_by_name(changes, message):
    c = dataclasses.replace(FAMILIES["llama"].config, head_dim=0)
    raw = {k: v for k, v in models.llama.to_hf(c).items() if k not in ("rope_theta", "rope_scaling", "rope_parameters")}
    with pytest.raises(ValueError, match=message):
        models.llama.from_hf(raw | changes)


def test_gpt2_config_json():
    gpt2 = models.gpt.Config(**SIZES)
    raw = models.gpt.to_hf(gpt2)
    with pytest.raises(ValueError, match="add_cross_attention=True is not implemented"):
        models.gpt.from_hf(raw | {"add_cross_attention": True})
    with pytest.raises(ValueError, match="n_embd=8 and hidden_size=9 disagree"):
        models.gpt.from_hf(raw | {"hidden_size": 9})
    with pytest.raises(ValueError, match="mlp_width=0"):
        models.gpt.from_hf(raw | {"n_inner": 0})
    absent = {k: v for k, v in raw.items() if k not in ("eos_token_id", "n_inner", "layer_norm_epsilon")}
    assert models.gpt.from_hf(absent) == dataclasses.replace(gpt2, eos=50256)
    assert models.gpt.from_hf(raw | {"eos_token_id": None}).eos is None
    assert models.gpt.from_hf(raw | {"eos_token_id": [1, 2]}).eos == (1, 2)


def test_glm_config_json_without_control_tokens():
    """The published files leave them to the tokenizer: known for published sizes, required for others."""
    raw = models.glm.to_hf(gx.preset("glm-10b"))
    bare = {k: v for k, v in raw.items() if not k.endswith("_token_id")}
    assert models.glm.from_hf(bare) == gx.preset("glm-10b")
    with pytest.raises(ValueError, match="unpublished size must give eos_token_id"):
        models.glm.from_hf(bare | {"num_layers": 3})
    with pytest.raises(ValueError, match="relative_encoding=True is not implemented"):
        models.glm.from_hf(raw | {"relative_encoding": True})


def test_chatglm_6b_config_json():
    """As published in April and in March 2023, and as transformers saves it."""
    raw = {
        "architectures": ["ChatGLMModel"], "auto_map": {}, "bos_token_id": 130004, "eos_token_id": 130005,
        "mask_token_id": 130000, "gmask_token_id": 130001, "pad_token_id": 3, "hidden_size": 4096,
        "inner_hidden_size": 16384, "layernorm_epsilon": 1e-05, "max_sequence_length": 2048, "model_type": "chatglm",
        "num_attention_heads": 32, "num_layers": 28, "position_encoding_2d": True, "torch_dtype": "float16",
        "transformers_version": "4.23.1", "use_cache": True, "vocab_size": 130528,
    }  # fmt: skip
    read = models.glm130b.from_hf
    assert read(raw) == read(raw | {"quantization_bit": 0, "pre_seq_len": None, "prefix_projection": False})
    assert read(raw) == gx.preset("chatglm-6b")
    first = {"bos_token_id": 150004, "eos_token_id": 150005, "pad_token_id": 20003, "vocab_size": 150528}
    first = {k: v for k, v in (raw | first).items() if k not in ("mask_token_id", "gmask_token_id")}
    assert read(first) == gx.preset("chatglm-6b-v0")
    assert gx.count(dataclasses.replace(read(raw), tied=False)) == 6_707_929_088
    assert gx.count(dataclasses.replace(read(first), tied=False)) == 6_871_769_088
    for changes, message in (
        ({"quantization_bit": 4}, "quantization_bit=4 is not implemented"),
        ({"pre_seq_len": 128}, "pre_seq_len=128 is not implemented"),
        ({"image_length": 32}, "unknown keys image_length"),
        ({"num_attention_heads": 3}, "width 4096 is not a multiple of heads 3"),
        ({"num_attention_heads": 2048}, "head width 2 must be a multiple of 4"),
    ):
        with pytest.raises(ValueError, match=message):
            read(raw | changes)
    with pytest.raises(ValueError, match=r"alpha_layers=3: the code of ChatGLM-6B has 28.* set dialect='glm-130b'"):
        gx.preset("chatglm-6b", alpha_layers=3)


@pytest.mark.parametrize("family", [name for name, entry in FAMILIES.items() if entry.foreign])
def test_another_family_s_config_json_is_not_read_as_one_s_own(family):
    entry = FAMILIES[family]
    module = models.family(entry.config)
    with pytest.raises(ValueError, match=f"model_type={entry.foreign!r} is not of this family"):
        module.from_hf(module.to_hf(entry.config) | {"model_type": entry.foreign})


@pytest.mark.parametrize(
    ("family", "name", "value"), [("glm", "eos", (1, 2)), ("glm130b", "mask", (3,)), ("llama", "bos", (1, 2))]
)
def test_only_ends_of_text_may_be_several(family, name, value):
    with pytest.raises(ValueError, match=rf"{name}=\(.*must be a token id of at least 0$"):
        dataclasses.replace(FAMILIES[family].config, **{name: value})


def test_presets_name_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'gpt2-medium'"):
        gx.preset("gpt2-medum")
    with pytest.raises(ValueError, match="no field 'widht'; did you mean 'width'"):
        gx.preset("gpt2", widht=3)


def test_a_changed_preset_has_heads_of_its_new_width():
    assert gx.preset("llama-7b", width=256, heads=4, kv_heads=4).head_dim == 64
    assert gx.preset("llama-7b", width=256, heads=4, kv_heads=4, head_dim=32).head_dim == 32
    assert gx.preset("llama3-8b", layers=2).head_dim == 128


COUNTS = {name: count for entry in FAMILIES.values() for name, count in entry.counts.items()}
UNPUBLISHED = {name for name in gx.presets() if "tiny" in name}  # ours: there is nothing to compare with


def test_parameter_counts(table):
    """The published models, as instantiated by the reference code; nothing is allocated here."""
    before = len(jax.live_arrays())
    assert {name: gx.count(gx.preset(name)) for name in gx.presets() if name not in UNPUBLISHED} == COUNTS
    assert len(jax.live_arrays()) == before
    for entry in FAMILIES.values():
        if len(entry.rows) == 1:
            table(entry.rows[0], "presets", len(entry.counts))
    for name in ("gpt2", "glm-10b", "llama3.2-1b", "llama3.1-405b"):
        c = gx.preset(name)
        shapes = jax.eval_shape(lambda key, c=c: spec.init(models.parameters(c), key), jax.random.key(0))
        assert sum(x.size for x in jax.tree.leaves(shapes)) == COUNTS[name]
