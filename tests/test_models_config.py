"""Every field of every Config matters or is refused; parameter counts; config.json there and back."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import garrulax as gx
from garrulax import models
from garrulax.core import spec
from garrulax.layers import rope as ropes
from garrulax.layers.rope import Rope

SIZES = {"vocab": 40, "context": 16, "width": 8, "layers": 2, "heads": 2}
BASE = {
    "gpt": models.gpt.Config(**SIZES, band=4),
    "glm": models.glm.Config(**SIZES, mask=33, sentence_mask=34, generation_mask=35, sop=36, eop=37),
    "glm130b": models.glm130b.Config(**SIZES, mlp_width=12, positions_2d=False, dialect="glm-130b"),
    "llama": models.llama.Config(**SIZES, kv_heads=2, mlp_width=12, attention_dropout=0.1),
    "chatglm": models.chatglm.Config(**SIZES, head_dim=8, mlp_width=12, attention_dropout=0.1, residual_dropout=0.1),
    "falcon": models.falcon.Config(**SIZES, kv_heads=2, norms=2, attention_dropout=0.1, residual_dropout=0.1),
}
CHANGED = {
    "vocab": 41, "context": 17, "width": 12, "layers": 3, "heads": 1, "kv_heads": 1, "head_dim": 12, "mlp_width": 20,
    "activation": "relu", "norm_eps": 1e-2, "embedding_dropout": 0.4, "attention_dropout": 0.4, "residual_dropout": 0.4,
    "init_std": 0.03, "window": 3, "band": 3, "band_stride": 2, "band_parity": 0, "window_from": 1,
    "positions": "alibi", "dialect": "mistral",
    "rope": Rope(theta=50.0), "eos": 3, "bos": 4, "pad": 5, "cls": 6, "mask": 7, "sentence_mask": 8,
    "generation_mask": 9, "sop": 10, "eop": 11, "norms": 1, "rotary": 1.0, "alpha_layers": 3,
}  # fmt: skip
#: What must be said along with a field: in both configs that are compared, or in the changed one.
_BAICHUAN = {"dialect": "baichuan", "attention_dropout": 0.0}
_GLM = {"dialect": "glm", "residual_dropout": 0.0}
BOTH = {
    "window": {"dialect": "mistral"}, "window_from": {"dialect": "qwen2", "qkv_bias": True, "window": 3},
    "positions": _BAICHUAN, "normalized_head": _BAICHUAN, "chatglm.activation": _GLM, "chatglm.tied": _GLM,
    "chatglm.rotary": _GLM, "chatglm.output_norms": _GLM, "chatglm.dialect": _GLM,
}  # fmt: skip
ALONG = {
    "glm130b.dialect": {"dialect": "chatglm"},
    "qkv_bias": {"qkv_bias": True, "dialect": "qwen2"},
    "chatglm.qkv_bias": {"qkv_bias": False},
    "chatglm.output_norms": {"output_norms": True, "dialect": "glm4"},
    "chatglm.dialect": {"dialect": "chatglm"},
    "out_bias": {"qkv_bias": True, "out_bias": True},
    "gpt.qkv_bias": {"qkv_bias": False, "scale_attention": False},  # GPT-Neo
    "gpt.post_norm": {"post_norm": True, "band": 0},  # GPT-1
}
#: Fields that no number in the model depends on, and who reads them.
READ_ELSEWHERE = {
    "bos": "sampling and tokenizers", "eos": "sampling", "pad": "batching", "cls": "the data pipeline",
    "mask": "the data pipeline and fill", "sentence_mask": "the data pipeline", "generation_mask": "fill",
    "sop": "the data pipeline and fill", "eop": "fill", "llama.context": "sampling; rotary positions themselves go on",
    "dialect": "loading and saving", "chatglm.context": "sampling", "falcon.context": "sampling",
    "glm130b.context": "sampling",
}  # fmt: skip
FIELDS = [(family, field.name) for family, c in BASE.items() for field in dataclasses.fields(c)]


pytestmark = pytest.mark.usefixtures("quick_compilation")


def base(family, name):
    return dataclasses.replace(BASE[family], **said(BOTH, family, name))


def said(of, family, name):
    return of.get(f"{family}.{name}", of.get(name, {}))


def changed(family, name):
    c = base(family, name)
    if said(ALONG, family, name):
        return dataclasses.replace(c, **said(ALONG, family, name))
    value = not getattr(c, name) if isinstance(getattr(c, name), bool) else CHANGED[name]
    more = {}
    if name in ("width", "heads") and "kv_heads" in vars(c):
        more = {"kv_heads": 1, **({"head_dim": 0} if family == "llama" else {})}  # head_dim follows unless given
    return dataclasses.replace(c, **{name: value}, **more)


def behaviour(c):
    """Everything that a config decides: count, initial values, logits in training. Nothing is compiled as a whole:
    that would take longer than to run it."""
    params = spec.init(models.family(c).parameters(c), jax.random.key(0))
    tokens = jnp.arange(20).reshape(2, 10)
    logits, _ = gx.forward(gx.unstack(params), tokens, c, key=jax.random.key(1))
    return gx.count(c), [np.asarray(x) for x in [*jax.tree.leaves(params), logits]]


@functools.cache
def base_behaviour(c):
    return behaviour(c)


@pytest.mark.parametrize(("family", "name"), FIELDS)
def test_every_field_changes_the_result(family, name):
    c = changed(family, name)
    count, values = behaviour(c)
    base_count, base_values = base_behaviour(base(family, name))
    same = (
        count == base_count
        and [v.shape for v in values] == [v.shape for v in base_values]
        and all(map(np.array_equal, values, base_values))
    )
    assert same == (name in READ_ELSEWHERE or f"{family}.{name}" in READ_ELSEWHERE)


@pytest.mark.parametrize(("family", "name"), FIELDS)
def test_every_field_survives_config_json(family, name):
    """Written and read back it is equal, and what is written differs from what the base writes."""
    c, module = changed(family, name), models.family(BASE[family])
    written = json.loads(json.dumps(module.to_hf(c)))
    assert written != json.loads(json.dumps(module.to_hf(base(family, name))))
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
    return np.stack(ropes.table(rope, positions, 32, lengths, jnp.float32))


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
    c = dataclasses.replace(BASE["llama"], rope=ROPES[kind], head_dim=32)
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
        ({"rope_scaling": {"rope_type": "su", "factor": 8.0}}, "'su' is not implemented"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 3.0}}, "does not use beta_fast"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "finetuned": True}}, "unknown keys finetuned"),
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
    c = dataclasses.replace(BASE["llama"], head_dim=0)
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


@pytest.mark.parametrize(("family", "model_type"), [("gpt", "llama"), ("glm130b", "glm"), ("llama", "gpt2"),
                                                    ("chatglm", "gpt2"), ("falcon", None)])  # fmt: skip
def test_another_family_s_config_json_is_not_read_as_one_s_own(family, model_type):
    raw = models.family(BASE[family]).to_hf(BASE[family])
    with pytest.raises(ValueError, match=f"model_type={model_type!r} is not of this family"):
        models.family(BASE[family]).from_hf(raw | {"model_type": model_type})


@pytest.mark.parametrize(
    ("family", "name", "value"), [("glm", "eos", (1, 2)), ("glm130b", "mask", (3,)), ("llama", "bos", (1, 2))]
)
def test_only_ends_of_text_may_be_several(family, name, value):
    with pytest.raises(ValueError, match=rf"{name}=\(.*must be a token id of at least 0$"):
        dataclasses.replace(BASE[family], **{name: value})


def test_presets_name_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'gpt2-medium'"):
        gx.preset("gpt2-medum")
    with pytest.raises(ValueError, match="no field 'widht'; did you mean 'width'"):
        gx.preset("gpt2", widht=3)


def test_a_changed_preset_has_heads_of_its_new_width():
    assert gx.preset("llama-7b", width=256, heads=4, kv_heads=4).head_dim == 64
    assert gx.preset("llama-7b", width=256, heads=4, kv_heads=4, head_dim=32).head_dim == 32
    assert gx.preset("llama3-8b", layers=2).head_dim == 128


COUNTS = {
    "gpt1": 116_534_784, "gpt3-125m": 125_226_240, "gpt3-350m": 355_871_744, "gpt3-760m": 760_300_032,
    "gpt3-1.3b": 1_315_723_264, "gpt3-2.7b": 2_651_553_280, "gpt3-6.7b": 6_658_404_352, "gpt3-13b": 12_853_386_240,
    "gpt3-175b": 174_604_259_328,
    "gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200,
    "llama-7b": 6_738_415_616, "llama-13b": 13_015_864_320, "llama-33b": 32_528_943_616, "llama-65b": 65_285_660_672,
    "llama2-7b": 6_738_415_616, "llama2-13b": 13_015_864_320, "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248, "llama3-70b": 70_553_706_496, "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496, "llama3.1-405b": 405_853_388_800,
    "llama3-405b": 405_853_388_800, "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824, "llama3.3-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096, "mistral-7b-v0.2": 7_241_732_096, "mistral-7b-v0.3": 7_248_023_552,
    "qwen2-0.5b": 494_032_768, "qwen2-1.5b": 1_543_714_304, "qwen2-7b": 7_615_616_512, "qwen2-72b": 72_706_203_648,
    "baichuan-7b": 7_000_559_616, "baichuan-13b": 13_264_901_120, "baichuan2-7b": 7_505_973_248,
    "baichuan2-13b": 13_896_668_160,
    "glm-base": 109_338_624, "glm-large": 334_688_256, "glm-410m": 410_265_600, "glm-515m": 514_632_960,
    "glm-roberta": 354_873_344, "glm-large-chinese": 355_659_776, "glm-2b": 1_920_122_880,
    "glm-10b": 9_880_682_496, "glm-10b-chinese": 9_879_633_920,
    **dict.fromkeys(("chatglm2-6b", "chatglm2-6b-32k", "chatglm3-6b", "chatglm3-6b-32k"), 6_243_584_000),
    "glm-4-9b": 9_399_951_360, "glm-4-9b-chat": 9_399_951_360, "glm-4-9b-0414": 9_400_094_720,
    "falcon-7b": 6_921_720_704, "falcon-40b": 41_303_293_952, "falcon-180b": 178_557_088_768,
    "falcon-11b": 10_836_484_096, "falcon-rw-1b": 1_311_625_216,
    "glm-130b": 128_697_794_560, "chatglm-6b": 6_173_286_400, "chatglm-6b-v0": 6_255_206_400,
}  # fmt: skip
UNPUBLISHED = {name for name in gx.presets() if "tiny" in name}  # ours: there is nothing to compare with


def test_parameter_counts(table):
    """The published models, as instantiated by the reference code; nothing is allocated here."""
    before = len(jax.live_arrays())
    assert {name: gx.count(gx.preset(name)) for name in gx.presets() if name not in UNPUBLISHED} == COUNTS
    assert len(jax.live_arrays()) == before
    table("GLM", "presets", len(COUNTS.keys() & models.glm.PRESETS.keys()))
    for name in ("gpt2", "glm-10b", "llama3.2-1b", "llama3.1-405b"):
        c = gx.preset(name)
        shapes = jax.eval_shape(lambda key, c=c: spec.init(models.family(c).parameters(c), key), jax.random.key(0))
        assert sum(x.size for x in jax.tree.leaves(shapes)) == COUNTS[name]
