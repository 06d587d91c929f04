"""config.json of LLaMA and its kin: one dialect a model_type, each with settings that it cannot say.

Sources: transformers 5.23.0, configuration_{llama,mistral,qwen2}.py, for keys and for the defaults of absent ones;
configuration_baichuan.py beside the published checkpoints (Baichuan has no class in transformers). The fields are
those of `garrulax.models.llama.Config`.
"""

from collections.abc import Callable
from typing import Any

from garrulax.core.config import Count, Size, check_value
from garrulax.core.hf import HFConfig, find_format, key
from garrulax.core.hf_keys import Pin
from garrulax.layers.rope import Rope
from garrulax.layers.rope_hf import base_in, rope_from_hf, rope_to_hf

_FIELDS = {
    "vocab": key("vocab_size"),
    "context": key("max_position_embeddings"),
    "width": key("hidden_size"),
    "layers": key("num_hidden_layers"),
    "heads": key("num_attention_heads"),
    "mlp_width": key("intermediate_size"),
    "activation": key("hidden_act", default="silu"),
    "norm_eps": key("rms_norm_eps", default=1e-6),
    "tied": key("tie_word_embeddings", default=False),
    "init_std": key("initializer_range", default=0.02),
    "bos": key("bos_token_id", default=1, null=True),
    "eos": key("eos_token_id", default=2, null=True),
}
_GROUPED = {
    **_FIELDS,
    "kv_heads": key("num_key_value_heads", default=None),  # as many as heads
    "head_dim": key("head_dim", default=0),
    "attention_dropout": key("attention_dropout", default=0.0),
}
_ROPE = {"rope_theta", "rope_scaling", "rope_parameters"}  # read by `rope_from_hf`


def _alike(kind: Callable[[dict[str, Any]], str]) -> Pin:
    """The pin of layer_types: every layer of one kind, which follows from the other fields."""

    def holds(kinds: Any, c: Any, raw: Any) -> bool:
        return isinstance(kinds, list) and len(kinds) == c["layers"] and {*map(str, kinds)} == {kind(c)}

    return holds


#: Keys of other classes and tools.
_PINNED: dict[str, Any] = {
    "activation": lambda value, c, raw: value in ("swiglu", "silu") and c["activation"] == "silu",
    "alibi": False,
    "bias": False,
    "partial_rotary_factor": lambda value, c, raw: value == 1,
    "rotary_emb_base": lambda value, c, raw: value == base_in(raw),
    "rotary_pct": lambda value, c, raw: value == 1,
    "use_bias": False,
}

LLAMA = HFConfig(
    model_type="llama",
    architecture="LlamaForCausalLM",
    fields={
        **_GROUPED,
        "context": key("max_position_embeddings", default=2048),
        "qkv_bias": key("attention_bias", default=False),
        "mlp_bias": key("mlp_bias", default=False),
    },
    # max_sequence_length: beside max_position_embeddings in early conversions of LLaMA-1
    ignored=frozenset({"max_sequence_length", *_ROPE}),
    pinned=_PINNED
    | {
        "layer_types": _alike(lambda c: "full_attention"),
        "max_window_layers": lambda value, c, raw: not raw.get("use_sliding_window"),  # of a Qwen 2 made into a LLaMA
        "qkv_bias": lambda value, c, raw: value == c["qkv_bias"],
        "sliding_window": lambda value, c, raw: raw.get("use_sliding_window") is False,
    },
)
MISTRAL = HFConfig(
    model_type="mistral",
    architecture="MistralForCausalLM",
    fields={
        **_GROUPED,
        "context": key("max_position_embeddings", default=131072),
        "kv_heads": key("num_key_value_heads", default=8, null=True),
        "window": key("sliding_window", default=4096, null=True),
    },
    ignored=frozenset(_ROPE),
    pinned=_PINNED
    | {
        "attention_bias": False,
        "layer_types": _alike(lambda c: "full_attention" if c["window"] is None else "sliding_attention"),
        "mlp_bias": False,
        "qkv_bias": False,
    },
)
QWEN2 = HFConfig(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    fields={
        **_GROUPED,
        "context": key("max_position_embeddings", default=32768),
        "kv_heads": key("num_key_value_heads", default=32, null=True),
        "window": key("sliding_window", default=4096, null=True),
        "window_from": key("max_window_layers", default=28),
        "bos": key("bos_token_id", default=None, null=True),
        "eos": key("eos_token_id", default=None, null=True),
    },
    fixed={"use_mrope": False},
    ignored=frozenset({"use_sliding_window", "layer_types", *_ROPE}),  # the first two are read by `_qwen2_window`
    pinned=_PINNED | {"attention_bias": True, "mlp_bias": False, "no_bias": True, "qkv_bias": True},
)
#: Keys that the remote code reads in training alone (z_loss_weight) or that transformers 4 writes for all classes.
_BAICHUAN_IGNORED = frozenset({"z_loss_weight", "add_cross_attention", "cross_attention_hidden_size"})
#: Baichuan with rotary positions: 7B, Baichuan2-7B (which has a model_max_length too).
BAICHUAN_ROPE = HFConfig(
    model_type="baichuan",
    architecture="BaiChuanForCausalLM",
    fields={**_FIELDS, "normalized_head": key("normalized_head", default=None)},
    ignored=_BAICHUAN_IGNORED | {"model_max_length"},
    remote=True,
    marker="max_position_embeddings",
)
#: Baichuan with ALiBi: 13B, Baichuan2-13B.
BAICHUAN_ALIBI = HFConfig(
    model_type="baichuan",
    architecture="BaichuanForCausalLM",
    fields={**BAICHUAN_ROPE.fields, "context": key("model_max_length")},
    ignored=_BAICHUAN_IGNORED,
    remote=True,
)

DIALECTS = (LLAMA, MISTRAL, QWEN2, BAICHUAN_ROPE, BAICHUAN_ALIBI)

BAICHUAN2_VOCAB = 125696


def _fixed(c: Any) -> dict[str, dict[str, Any]]:
    """For each dialect the settings that its config.json cannot express, with the one value that they have there."""
    rotary = {"positions": "rope", "normalized_head": False}
    unbiased = {"qkv_bias": False, "out_bias": False, "mlp_bias": False}
    whole = {"kv_heads": c.heads, "width": c.heads * c.head_dim}  # one W_pack [3 * width, width]
    return {
        "llama": {"window": 0, "out_bias": c.qkv_bias, **rotary},
        "mistral": {"window_from": 0, **unbiased, **rotary},
        "qwen2": {"qkv_bias": True, "out_bias": False, "mlp_bias": False, **rotary},
        "baichuan": {"window": 0, "rope": Rope(), "attention_dropout": 0.0, **whole, **unbiased},
    }


def check_dialect(c: Any) -> None:
    """Checks that the config.json of a `llama.Config`'s dialect can express its settings.

    Raises:
        ValueError: The dialect is unknown, or cannot express a setting; the message names the dialects that can.
    """
    fixed = _fixed(c)
    if c.dialect not in fixed:
        raise ValueError(f"unknown dialect {c.dialect!r}: choose from {', '.join(fixed)}")
    for field, only in fixed[c.dialect].items():
        value = getattr(c, field)
        if value != only:
            others = [name for name, settings in fixed.items() if settings.get(field, value) == value]
            hint = f" (dialect {' or '.join(others)} can)" if others else ""
            raise ValueError(f"dialect {c.dialect!r} cannot say {field}={value!r}, only {only!r}{hint}")


def read(raw: dict[str, Any]) -> dict[str, Any]:
    """Fields of a `llama.Config` from a parsed config.json, with RoPE settings in either notation.

    Raises:
        ValueError: As `core.hf.HFConfig.read` and `layers.rope_hf.rope_from_hf`, and for layer_types other than full
            attention first and then a sliding window.
    """
    hf = find_format(DIALECTS, raw)
    fields: dict[str, Any] = {**hf.read(raw), "dialect": hf.model_type}
    if raw.get("head_dim") is not None:
        check_value("config.json: head_dim", raw["head_dim"], Size)  # in a Config 0 stands for width / heads
    if fields.get("kv_heads") is None:
        fields["kv_heads"] = fields["heads"]
    if hf is LLAMA:
        fields["out_bias"] = fields["qkv_bias"]
    elif hf is MISTRAL:
        fields["window"] = 0 if fields["window"] is None else _checked("sliding_window", fields["window"], Size)
    elif hf is QWEN2:
        fields |= {"qkv_bias": True, **_qwen2_window(raw, fields)}
    else:
        positions = "alibi" if hf is BAICHUAN_ALIBI else "rope"
        return {**fields, "positions": positions, "normalized_head": _normalized_head(raw, fields)}
    return {**fields, "rope": rope_from_hf(raw, fields["context"])}


def write(c: Any) -> dict[str, Any]:
    """The config.json of a `llama.Config` in its dialect, with the RoPE settings of transformers 5 and of before."""
    if c.dialect == "baichuan":
        raw = (BAICHUAN_ALIBI if c.positions == "alibi" else BAICHUAN_ROPE).write(c)
        return raw | ({"architectures": ["BaichuanForCausalLM"], "z_loss_weight": 0} if c.normalized_head else {})
    raw = {"llama": LLAMA, "mistral": MISTRAL, "qwen2": QWEN2}[c.dialect].write(c)
    if c.dialect != "llama":
        raw["sliding_window"] = c.window or None
    if c.dialect == "qwen2":
        first = c.window_from if c.window else c.layers
        kinds = ["full_attention"] * first + ["sliding_attention"] * (c.layers - first)
        raw |= {"use_sliding_window": c.window > 0, "max_window_layers": first, "layer_types": kinds}
    return raw | rope_to_hf(c.rope, c.context)


def _qwen2_window(raw: dict[str, Any], fields: dict[str, Any]) -> dict[str, int]:
    """window and window_from as Qwen2Config decides: by layer_types where given, else by max_window_layers; a
    sliding_window counts only with use_sliding_window."""
    layers = _checked("num_hidden_layers", fields["layers"], Size)
    window = fields["window"] if raw.get("use_sliding_window") else None
    kinds = raw.get("layer_types")
    if kinds is None:
        first = layers if window is None else _checked("max_window_layers", fields["window_from"], Count)
    else:
        first = _full_layers(kinds, layers)
    if first >= layers:
        return {"window": 0, "window_from": 0}
    if window is None:
        raise ValueError("config.json: layer_types has sliding_attention, but no use_sliding_window and sliding_window")
    return {"window": _checked("sliding_window", window, Size), "window_from": first}


def _full_layers(kinds: Any, layers: int) -> int:
    """How many layers of full attention come before those with a window."""
    kinds = kinds if isinstance(kinds, list) else []
    first = next((i for i, kind in enumerate(kinds) if kind != "full_attention"), len(kinds))
    if len(kinds) != layers or any(kind != "sliding_attention" for kind in kinds[first:]):
        raise ValueError(
            f"config.json: layer_types must name {layers} layers, full_attention first and sliding_attention after"
            " them; other orders and kinds are not implemented"
        )
    return first


def _normalized_head(raw: dict[str, Any], fields: dict[str, Any]) -> Any:
    """Whether the rows of the head are normalised, as in Baichuan 2: as our own key says; in published files, which
    have none, by z_loss_weight, a key of Baichuan 2's configuration class alone, or by its vocabulary (or a larger)."""
    if fields["normalized_head"] is not None:
        return fields["normalized_head"]
    return "z_loss_weight" in raw or _checked("vocab_size", fields["vocab"], Size) >= BAICHUAN2_VOCAB


def _checked(key: str, value: Any, kind: Any) -> Any:
    check_value(f"config.json: {key}", value, kind)
    return value
