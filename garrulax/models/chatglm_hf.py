"""The config.json formats and tensor names of ChatGLM2, ChatGLM3 and GLM-4, for models/chatglm.py.

Sources: configuration_chatglm.py beside the published checkpoints; transformers 5.23.0, configuration_{glm,glm4}.py.
"""

import dataclasses
import math
from typing import Any

from garrulax.core.config import Flag, Positive, Size, check_value
from garrulax.core.hf import HFConfig, find_format, key
from garrulax.layers.rope import Rope
from garrulax.layers.rope_hf import partial_rope_from_hf, rope_from_hf, rope_to_hf

#: Settings that have only one value in a dialect.
FIXED: dict[str, dict[str, Any]] = {
    "chatglm": {"rotary": 0.5, "activation": "silu", "tied": False, "output_norms": False},
    "glm": {"residual_dropout": 0.0, "residual_after_norm": False, "output_norms": False},
    "glm4": {"residual_dropout": 0.0, "residual_after_norm": False, "output_norms": True},
}

#: Names of tensors in a checkpoint.
_CHATGLM_NAMES = {
    "prefix": "transformer.", "layer": "transformer.encoder.layers.{}.",
    "tokens": "transformer.embedding.word_embeddings.weight", "norm": "transformer.encoder.final_layernorm",
    "head": "transformer.output_layer.weight", "out": "self_attention.dense",
    "gate_up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h",
}  # fmt: skip
_GLM_NAMES = {
    "prefix": "model.", "layer": "model.layers.{}.", "tokens": "model.embed_tokens.weight", "norm": "model.norm",
    "head": "lm_head.weight", "out": "self_attn.o_proj", "gate_up": "mlp.gate_up_proj", "down": "mlp.down_proj",
}  # fmt: skip
NAMES = {"chatglm": _CHATGLM_NAMES, "glm": _GLM_NAMES, "glm4": _GLM_NAMES}


def check_dialect(c: Any) -> None:
    """Checks that the config.json of a Config's dialect can express its settings.

    Raises:
        ValueError: The dialect is unknown, or cannot express a setting.
    """
    if c.dialect not in FIXED:
        raise ValueError(f"unknown dialect {c.dialect!r}: choose from {', '.join(FIXED)}")
    for name, value in FIXED[c.dialect].items():
        if getattr(c, name) != value:
            raise ValueError(f"dialect {c.dialect!r} cannot say {name}={getattr(c, name)!r} (only {value!r})")
    if c.dialect == "chatglm":
        rope_ratio(c.rope)
    elif c.eos is None:
        raise ValueError(f"dialect {c.dialect!r} cannot say eos=None: there it stands for GLM-4's three")


def projections(c: Any) -> dict[str, tuple[str, str, dict[str, Any]]]:
    """Name, layout and part of the tensors of query, key and value, as `core.spec.Declare.linear` takes them.

    The letter N stands for all heads of a tensor that holds query, key and value one after another.
    """
    H, K = c.heads, c.kv_heads
    if c.dialect != "chatglm":
        letters = {"query": "H", "key": "K", "value": "K"}
        return {key: (f"self_attn.{key[0]}_proj", f"({n} C) D -> D {n} C", {}) for key, n in letters.items()}
    fused = "self_attention.query_key_value"
    if K == H:  # query, key and value of a head lie side by side
        letters = {"query": "H", "key": "K", "value": "K"}
        return {key: (fused, f"({n} three C) D -> D {n} C", {"three": i}) for i, (key, n) in enumerate(letters.items())}
    return {
        "query": (fused, "(N C) D -> D H C", {"N": slice(0, H)}),
        "key": (fused, "(N C) D -> D K C", {"N": slice(H, H + K)}),
        "value": (fused, "(N C) D -> D K C", {"N": slice(H + K, H + 2 * K)}),
    }


CHATGLM = HFConfig(
    model_type="chatglm",
    architecture="ChatGLMModel",
    fields={
        "vocab": key("padded_vocab_size", "vocab_size"),
        "context": key("seq_length", default=2048),
        "width": key("hidden_size"),
        "layers": key("num_layers", "num_hidden_layers"),
        "heads": key("num_attention_heads"),
        "kv_heads": key("multi_query_group_num", default=1),
        "head_dim": key("kv_channels"),
        "mlp_width": key("ffn_hidden_size"),
        "norm_eps": key("layernorm_epsilon", default=1e-5),
        "attention_dropout": key("attention_dropout", default=0.0),
        "residual_dropout": key("hidden_dropout", default=0.0),
        "qkv_bias": key("add_qkv_bias", default=False),
        "residual_after_norm": key("apply_residual_connection_post_layernorm", default=False),
        "init_std": key("initializer_range", default=0.02),
        "bos": key("bos_token_id", default=None, null=True),
        "eos": key("eos_token_id", default=None, null=True),
        "pad": key("pad_token_id", default=None, null=True),
        "multi_query_attention": key("multi_query_attention", default=False),
        "rope_ratio": key("rope_ratio", default=1.0),
    },
    fixed={
        "add_bias_linear": False, "fp32_residual_connection": False, "original_rope": True, "post_layer_norm": True,
        "pre_seq_len": None, "quantization_bit": 0, "rmsnorm": True,
    },
    ignored=frozenset({
        "apply_query_key_layer_scaling", "attention_softmax_in_fp32", "bias_dropout_fusion",  # change no result
        "prefix_projection",  # of pre_seq_len
        "rope_scaling", "rope_theta",  # read by `_chatglm_rope`
        "tie_word_embeddings", "add_cross_attention", "cross_attention_hidden_size",  # unused
    }),
    remote=True,
    marker="padded_vocab_size",  # ChatGLM-6B says model_type chatglm as well
)  # fmt: skip

GLM = HFConfig(
    model_type="glm",
    architecture="GlmForCausalLM",
    fields={
        "vocab": key("vocab_size"),
        "context": key("max_position_embeddings", default=131072),
        "width": key("hidden_size"),
        "layers": key("num_hidden_layers"),
        "heads": key("num_attention_heads"),
        "kv_heads": key("num_key_value_heads", default=2),
        "head_dim": key("head_dim", default=128),
        "mlp_width": key("intermediate_size"),
        "activation": key("hidden_act", default="silu"),
        "norm_eps": key("rms_norm_eps", default=1.5625e-7),
        "attention_dropout": key("attention_dropout", default=0.0),
        "qkv_bias": key("attention_bias", default=True),
        "tied": key("tie_word_embeddings", default=False),
        "init_std": key("initializer_range", default=0.02),
        "bos": key("bos_token_id", default=None, null=True),
        "eos": key("eos_token_id", default=(151329, 151336, 151338)),
        "pad": key("pad_token_id", default=151329, null=True),
    },
    ignored=frozenset({"partial_rotary_factor", "rope_parameters", "rope_scaling", "rope_theta"}),
    pinned={"rope_interleaved": True, "mlp_bias": False, "bias": False},
    marker="num_key_value_heads",  # the original GLM says model_type glm as well
)

DIALECTS = (CHATGLM, GLM, dataclasses.replace(GLM, model_type="glm4", architecture="Glm4ForCausalLM", marker=None))
CHATGLM3_EOS = (2, 64795, 64797)  # </s>, <|user|>, <|observation|>


def read(raw: dict) -> dict[str, Any]:
    """Fields of a `chatglm.Config` from a parsed config.json with model_type chatglm (ChatGLM2 and after), glm or glm4.

    Raises:
        ValueError: As `core.hf.HFConfig.read` and `layers.rope_hf.rope_from_hf`, and where rope_ratio is ambiguous.
    """
    dialect = find_format(DIALECTS, raw)
    fields = dialect.read(raw) | {"dialect": dialect.model_type}
    check_value("head_dim", fields["head_dim"], Size)  # in a Config 0 stands for width / heads
    if dialect is not CHATGLM:
        settings, rotary = partial_rope_from_hf(raw, fields["context"], default=0.5)
        return fields | {"rope": settings, "rotary": rotary, "output_norms": dialect.model_type == "glm4"}
    grouped, ratio = fields.pop("multi_query_attention"), fields.pop("rope_ratio")
    check_value("multi_query_attention", grouped, Flag)
    if grouped and fields["kv_heads"] == fields["heads"]:  # laid out as no published file is, nor is it written
        raise ValueError("config.json: multi_query_attention with a multi_query_group_num for every head")
    if not grouped:
        fields["kv_heads"] = fields["heads"]
    if "chatglm3" in _name(raw) and fields["eos"] == 2:  # its file leaves the others to the code
        fields["eos"] = CHATGLM3_EOS
    return fields | {"rope": _chatglm_rope(raw, ratio, fields["context"])}


def write(c: Any) -> dict[str, Any]:
    """The config.json of a `chatglm.Config` in its dialect, with the RoPE settings in both notations."""
    if c.dialect != "chatglm":
        found = next(d for d in DIALECTS if d.model_type == c.dialect)
        return found.write(c) | rope_to_hf(c.rope, c.context, share=c.rotary)
    out = CHATGLM.write(c, multi_query_attention=c.kv_heads != c.heads, rope_ratio=rope_ratio(c.rope))
    settings = rope_to_hf(c.rope, c.context)
    return out | {"tie_word_embeddings": False} | {name: settings[name] for name in ("rope_theta", "rope_scaling")}


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
    """The rotary settings that rope_ratio stands for.

    The code of ChatGLM3 and GLM-4 multiplies the base by it, that of ChatGLM2-6B-32k divides the positions by it, under
    the same key. The model's name tells which, or rope_theta and rope_scaling, which the code itself does not read.
    """
    check_value("rope_ratio", ratio, Positive)
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
