"""config.json of the GPTs: four formats, and what each of them can say.

Source: transformers 5.23.0, configuration_{gpt2,openai,gpt_neo}.py, for keys and for the defaults of absent ones.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from garrulax.core.hf import HFConfig, Key, find_format, key
from garrulax.core.hf_keys import is_width_over_heads

GPT2 = HFConfig(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    fields={
        "vocab": key("vocab_size"),
        "context": key("n_positions", "max_position_embeddings"),
        "width": key("n_embd", "hidden_size"),
        "layers": key("n_layer", "num_hidden_layers"),
        "heads": key("n_head", "num_attention_heads"),
        "mlp_width": key("n_inner", default=None),
        "activation": key("activation_function", default="gelu_new"),
        "norm_eps": key("layer_norm_epsilon", default=1e-5),
        "embedding_dropout": key("embd_pdrop", default=0.1),
        "attention_dropout": key("attn_pdrop", default=0.1),
        "residual_dropout": key("resid_pdrop", default=0.1),
        "tied": key("tie_word_embeddings", default=True),
        "scale_attention": key("scale_attn_weights", default=True),
        "scale_by_layer": key("scale_attn_by_inverse_layer_idx", default=False),
        "init_std": key("initializer_range", default=0.02),
        "bos": key("bos_token_id", default=50256, null=True),
        "eos": key("eos_token_id", default=50256, null=True),
    },
    fixed={"add_cross_attention": False},
    pinned={"head_dim": is_width_over_heads},
    ignored=frozenset({
        "n_ctx", "n_special", "reorder_and_upcast_attn", "summary_activation", "summary_first_dropout",
        "summary_proj_to_labels", "summary_type", "summary_use_proj",
    }),
)  # fmt: skip


def _like_gpt2(
    model_type: str, architecture: str, fields: Mapping[str, Key], without: tuple[str, ...] = ()
) -> HFConfig:
    """GPT-2's format with other keys for some fields, and without some."""
    kept = {name: k for name, k in GPT2.fields.items() if name not in without}
    return dataclasses.replace(GPT2, model_type=model_type, architecture=architecture, fields={**kept, **fields})


GPT1 = _like_gpt2(
    "openai-gpt",
    "OpenAIGPTLMHeadModel",
    {
        "activation": key("afn", default="gelu"),
        "bos": key("bos_token_id", default=None, null=True),
        "eos": key("eos_token_id", default=None, null=True),
    },
    without=("mlp_width", "scale_attention", "scale_by_layer"),
)

#: Our own format, since no GPT-3 was published. The tensors are those of a GPT-2.
GPT3 = _like_gpt2(
    "gpt3",
    "GPT3LMHeadModel",
    {
        "band": key("attention_band"),
        "band_stride": key("attention_band_stride"),
        "band_parity": key("attention_band_parity"),
    },
)
GPT3 = dataclasses.replace(GPT3, remote=True)

NEO = _like_gpt2(
    "gpt_neo",
    "GPTNeoForCausalLM",
    {
        "context": key("max_position_embeddings"),
        "width": key("hidden_size"),
        "layers": key("num_layers", "num_hidden_layers"),
        "heads": key("num_heads", "num_attention_heads"),
        "mlp_width": key("intermediate_size", default=None),
        "embedding_dropout": key("embed_dropout", default=0.0),
        "attention_dropout": key("attention_dropout", default=0.0),
        "residual_dropout": key("resid_dropout", default=0.0),
        "band": key("window_size", default=256),
    },
    without=("scale_attention", "scale_by_layer"),
)
NEO = dataclasses.replace(NEO, ignored=NEO.ignored | {"attention_types", "attention_layers"})  # read by `_bands`

DIALECTS = (GPT2, GPT1, GPT3, NEO)

#: Settings for which a dialect has no key, with the value that its models have.
_IMPLIED: dict[str, dict[str, Any]] = {
    "openai-gpt": {
        "mlp_width": None, "qkv_bias": True, "scale_attention": True, "scale_by_layer": False, "band": 0,
    },
    "gpt_neo": {"scale_attention": False, "scale_by_layer": False, "band_stride": 0},
}  # fmt: skip
_MOST = 10_000  # layers whose kinds are written out in a list: a damaged number must not fill the memory
#: GPT-1's names of activations: its "gelu" is the tanh approximation.
_AFN = {"gelu": "gelu_new", "relu": "relu", "silu": "silu", "swish": "swish"}


def check_dialect(c: Any) -> None:
    """Checks that the config.json of a `gpt.Config`'s dialect can express its settings.

    Raises:
        ValueError: It cannot express one.
    """
    for name, value in _IMPLIED.get(c.dialect, {}).items():
        if getattr(c, name) != value:
            raise ValueError(f"dialect {c.dialect!r} cannot say {name}={getattr(c, name)!r}, only {value!r}")
    if c.dialect == GPT1.model_type and c.activation not in _AFN.values():
        raise ValueError(
            f"dialect {c.dialect!r} cannot say activation={c.activation!r}, only {', '.join(_AFN.values())}"
        )


def read(raw: dict[str, Any]) -> dict[str, Any]:
    """Fields of a `gpt.Config` from a parsed config.json of one of `DIALECTS`.

    Raises:
        ValueError: As `core.hf.HFConfig.read`, and for GPT-Neo layers that are neither all global nor alternately
            global and local.
    """
    dialect = find_format(DIALECTS, raw)
    fields = dialect.read(raw)
    if dialect is GPT1:
        if fields["activation"] not in _AFN:
            raise ValueError(f"config.json: afn={fields['activation']!r} is not implemented (only {', '.join(_AFN)})")
        return fields | {"activation": _AFN[fields["activation"]], "post_norm": True}
    if dialect is NEO:
        return fields | {"qkv_bias": False, "scale_attention": False} | _bands(raw, fields["layers"], fields["band"])
    return fields


def write(c: Any) -> dict[str, Any]:
    """The config.json of a `gpt.Config`, in its dialect."""
    dialect = next(d for d in DIALECTS if d.model_type == c.dialect)
    out = dialect.write(c)
    if dialect is GPT1:
        out["afn"] = next(name for name, activation in _AFN.items() if activation == c.activation)
    if dialect is NEO:
        kinds = _kinds(c.layers, c.band, c.band_parity)
        out |= {"attention_types": [[kinds, 1]], "attention_layers": kinds}
    return out


def _bands(raw: dict[str, Any], layers: int, window: int) -> dict[str, int]:
    """band and band_parity of GPT-Neo's attention_types, pairs of a list of kinds and how often it is repeated."""
    types = raw.get("attention_types") or [[["global", "local"], 12]]
    try:
        fits = sum(len(group) * times for group, times in types) == layers <= _MOST
        kinds = [kind for group, times in types for kind in group * times] if fits else []
    except (TypeError, ValueError):
        kinds = []
    band, parity = (window, kinds.index("local") % 2) if "local" in kinds else (0, 1)
    if not kinds or kinds != _kinds(layers, band, parity) or raw.get("attention_layers", kinds) != kinds:
        raise ValueError(
            f"config.json: attention_types={types!r} is not implemented for {layers} layers and window_size={window} "
            "(only global, or alternately global and local)"
        )
    return {"band": band, "band_parity": parity}


def _kinds(layers: int, band: int, parity: int) -> list[str]:
    return ["local" if band and i % 2 == parity else "global" for i in range(layers)]
