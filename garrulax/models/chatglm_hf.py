"""The config.json formats and tensor names of ChatGLM2, ChatGLM3 and GLM-4, for models/chatglm.py.

Sources: configuration_chatglm.py beside the published checkpoints; transformers 5.23.0, configuration_{glm,glm4}.py.
"""

import dataclasses
import math
import types
from typing import Any

from garrulax.core.config import check_flags, check_positive, check_sizes
from garrulax.core.hf import HFConfig, claimant
from garrulax.layers.rope import Rope
from garrulax.layers.rope_hf import rope_from_hf, rope_to_hf

#: The one value that a dialect's config.json can say of settings that others leave open.
FIXED: dict[str, dict[str, Any]] = {
    "chatglm": {"rotary": 0.5, "activation": "silu", "tied": False, "output_norms": False},
    "glm": {"residual_dropout": 0.0, "residual_after_norm": False, "output_norms": False},
    "glm4": {"residual_dropout": 0.0, "residual_after_norm": False, "output_norms": True},
}

#: Names of tensors in a checkpoint.
_CHATGLM_NAMES = {
    "prefix": "transformer.", "layer": "transformer.encoder.layers.{}.",
    "tokens": "transformer.embedding.word_embeddings.weight", "norm": "transformer.encoder.final_layernorm",
    "head": "transformer.output_layer.weight", "out": "self_attention.dense.weight",
    "gate_up": "mlp.dense_h_to_4h.weight", "down": "mlp.dense_4h_to_h.weight",
}  # fmt: skip
_GLM_NAMES = {
    "prefix": "model.", "layer": "model.layers.{}.", "tokens": "model.embed_tokens.weight", "norm": "model.norm",
    "head": "lm_head.weight", "out": "self_attn.o_proj.weight", "gate_up": "mlp.gate_up_proj.weight",
    "down": "mlp.down_proj.weight",
}  # fmt: skip
NAMES = {"chatglm": _CHATGLM_NAMES, "glm": _GLM_NAMES, "glm4": _GLM_NAMES}


def check_dialect(c: Any) -> None:
    """Raises ValueError for an unknown dialect and for a setting that the config's dialect cannot say."""
    if c.dialect not in FIXED:
        raise ValueError(f"unknown dialect {c.dialect!r}: choose from {', '.join(FIXED)}")
    for name, value in FIXED[c.dialect].items():
        if getattr(c, name) != value:
            raise ValueError(f"dialect {c.dialect!r} cannot say {name}={getattr(c, name)!r} (only {value!r})")
    if c.dialect == "chatglm":
        rope_ratio(c.rope)
    elif c.eos is None:
        raise ValueError(f"dialect {c.dialect!r} cannot say eos=None: there it stands for GLM-4's three")


def projections(c: Any) -> dict[str, tuple[str, tuple[int, ...], tuple | None]]:
    """Where query, key and value of a Config lie: the stored tensor, how its rows are split, what of them to take."""
    H, K, C = c.heads, c.kv_heads, c.head_dim
    if c.dialect != "chatglm":
        counts = {"query": H, "key": K, "value": K}
        return {name: (f"self_attn.{name[0]}_proj", (count, C), None) for name, count in counts.items()}
    fused = "self_attention.query_key_value"
    if K == H:  # head by head, each with its query, key and value
        return {name: (fused, (H, 3, C), (None, i)) for i, name in enumerate(("query", "key", "value"))}
    parts = {"query": (0, H), "key": (H, H + K), "value": (H + K, H + 2 * K)}
    return {name: (fused, (H + 2 * K, C), (part,)) for name, part in parts.items()}


CHATGLM = HFConfig(
    model_type="chatglm",
    architecture="ChatGLMModel",
    fields={
        "vocab": ("padded_vocab_size", "vocab_size"),
        "context": "seq_length",
        "width": "hidden_size",
        "layers": ("num_layers", "num_hidden_layers"),
        "heads": "num_attention_heads",
        "kv_heads": "multi_query_group_num",
        "head_dim": "kv_channels",
        "mlp_width": "ffn_hidden_size",
        "norm_eps": "layernorm_epsilon",
        "attention_dropout": "attention_dropout",
        "residual_dropout": "hidden_dropout",
        "qkv_bias": "add_qkv_bias",
        "residual_after_norm": "apply_residual_connection_post_layernorm",
        "init_std": "initializer_range",
        "bos": "bos_token_id",
        "eos": "eos_token_id",
        "pad": "pad_token_id",
        "multi_query_attention": "multi_query_attention",
        "rope_ratio": "rope_ratio",
    },
    defaults={
        "context": 2048,
        "kv_heads": 1,
        "norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "residual_dropout": 0.0,
        "qkv_bias": False,
        "residual_after_norm": False,
        "init_std": 0.02,
        "bos": None,
        "eos": None,
        "pad": None,
        "multi_query_attention": False,
        "rope_ratio": 1.0,
    },
    optional=frozenset({"bos", "eos", "pad"}),
    fixed={
        "add_bias_linear": False, "fp32_residual_connection": False, "original_rope": True, "post_layer_norm": True,
        "pre_seq_len": None, "quantization_bit": 0, "rmsnorm": True,
    },
    ignored=frozenset({
        "apply_query_key_layer_scaling", "attention_softmax_in_fp32", "bias_dropout_fusion",  # change no result
        "prefix_projection",  # of pre_seq_len
        "rope_scaling", "rope_theta",  # read by `_chatglm_rope`
        "tie_word_embeddings", "add_cross_attention", "cross_attention_hidden_size", "tie_encoder_decoder",  # unused
    }),
    marker="padded_vocab_size",  # ChatGLM-6B says model_type chatglm as well
)  # fmt: skip

GLM = HFConfig(
    model_type="glm",
    architecture="GlmForCausalLM",
    fields={
        "vocab": "vocab_size",
        "context": "max_position_embeddings",
        "width": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "mlp_width": "intermediate_size",
        "activation": "hidden_act",
        "norm_eps": "rms_norm_eps",
        "attention_dropout": "attention_dropout",
        "qkv_bias": "attention_bias",
        "tied": "tie_word_embeddings",
        "init_std": "initializer_range",
        "bos": "bos_token_id",
        "eos": "eos_token_id",
        "pad": "pad_token_id",
    },
    defaults={
        "context": 131072,
        "kv_heads": 2,
        "head_dim": 128,
        "activation": "silu",
        "norm_eps": 1.5625e-7,
        "attention_dropout": 0.0,
        "qkv_bias": True,
        "tied": False,
        "init_std": 0.02,
        "bos": None,
        "eos": (151329, 151336, 151338),
        "pad": 151329,
    },
    optional=frozenset({"bos", "pad"}),
    ignored=frozenset({"partial_rotary_factor", "rope_parameters", "rope_scaling", "rope_theta"}),  # by `_glm_rope`
    marker="num_key_value_heads",  # the original GLM says model_type glm as well
)

DIALECTS = (CHATGLM, GLM, dataclasses.replace(GLM, model_type="glm4", architecture="Glm4ForCausalLM", marker=None))
CHATGLM3_EOS = (2, 64795, 64797)  # </s>, <|user|>, <|observation|>


def read(raw: dict) -> dict[str, Any]:
    """Fields of the Config of a parsed config.json with model_type chatglm (ChatGLM2 and after), glm or glm4.

    Raises ValueError as `core.hf.HFConfig.read` and `layers.rope_hf.rope_from_hf` do, and where rope_ratio may mean
    two things.
    """
    dialect = claimant(DIALECTS, raw)
    fields = dialect.read(raw) | {"dialect": dialect.model_type}
    check_sizes(types.SimpleNamespace(**fields), "head_dim")  # in a Config 0 stands for width / heads
    if dialect is not CHATGLM:
        settings, rotary = _glm_rope(raw, fields["context"])
        return fields | {"rope": settings, "rotary": rotary, "output_norms": dialect.model_type == "glm4"}
    grouped, ratio = fields.pop("multi_query_attention"), fields.pop("rope_ratio")
    check_flags(types.SimpleNamespace(multi_query_attention=grouped), "multi_query_attention")
    if grouped and fields["kv_heads"] == fields["heads"]:  # laid out as no published file is, nor is it written
        raise ValueError("config.json: multi_query_attention with a multi_query_group_num for every head")
    if not grouped:
        fields["kv_heads"] = fields["heads"]
    if "chatglm3" in _name(raw) and fields["eos"] == 2:  # its file leaves the others to the code
        fields["eos"] = CHATGLM3_EOS
    return fields | {"rope": _chatglm_rope(raw, ratio, fields["context"])}


def write(c: Any) -> dict[str, Any]:
    """The config.json of `c` in its dialect, with the RoPE settings of transformers in both their formats."""
    if c.dialect != "chatglm":
        out = next(d for d in DIALECTS if d.model_type == c.dialect).write(c) | rope_to_hf(c.rope, c.context)
        out["rope_parameters"] |= {"partial_rotary_factor": c.rotary}
        return out | {"partial_rotary_factor": c.rotary}
    more = {"multi_query_attention": c.kv_heads != c.heads, "rope_ratio": rope_ratio(c.rope)}
    out = CHATGLM.write(types.SimpleNamespace(**vars(c), **more)) | {"tie_word_embeddings": False}
    which = rope_to_hf(c.rope, c.context)
    return out | {key: which[key] for key in ("rope_theta", "rope_scaling")}


def _name(raw: dict) -> str:
    return str(raw.get("_name_or_path")).lower()


def rope_ratio(settings: Rope) -> float:
    """The rope_ratio of a ChatGLM config.json. Raises ValueError for settings that it cannot say."""
    if settings.kind == "default":
        return settings.theta / 10_000
    if settings.kind == "linear" and settings.theta == 10_000:
        return settings.factor
    raise ValueError(f"dialect 'chatglm' cannot say RoPE kind {settings.kind!r} with theta {settings.theta}")


def _chatglm_rope(raw: dict, ratio: Any, context: int) -> Rope:
    """What rope_ratio means: ChatGLM3's and GLM-4's code multiplies the base by it, ChatGLM2-6B-32k's divides the
    positions. Their keys are the same: the name tells, or rope_theta and rope_scaling, which the code does not read."""
    check_positive(types.SimpleNamespace(rope_ratio=ratio), "rope_ratio")
    if raw.get("rope_theta") or raw.get("rope_scaling"):
        settings = rope_from_hf(raw, context)
        if not math.isclose(rope_ratio(settings), ratio):
            raise ValueError(f"config.json: rope_ratio={ratio} and rope_theta or rope_scaling disagree")
        return settings
    if ratio == 1:
        return Rope()
    if "chatglm2" in _name(raw):
        return Rope(kind="linear", factor=float(ratio))
    if ratio == 16 and "chatglm3" not in _name(raw):
        raise ValueError(
            "config.json: rope_ratio=16 divides the positions in ChatGLM2-6B-32k and multiplies the base elsewhere: "
            'add "rope_scaling": {"type": "linear", "factor": 16} or "rope_theta": 160000'
        )
    return Rope(theta=10_000.0 * ratio)


def _glm_rope(raw: dict, context: int) -> tuple[Rope, float]:
    """Rotary settings and the share of a head that they turn, which stands in one of them or at the top."""
    key, cleaned = "partial_rotary_factor", dict(raw)
    found = [raw.get(key)]
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(raw.get(name), dict):
            cleaned[name] = {k: v for k, v in raw[name].items() if k != key}
            found.append(raw[name].get(key))
    shares = [share for share in found if share is not None] or [0.5]
    if any(share != shares[0] for share in shares):
        raise ValueError(f"config.json gives two values of {key}: {', '.join(map(str, shares))}")
    return rope_from_hf(cleaned, context), shares[0]
