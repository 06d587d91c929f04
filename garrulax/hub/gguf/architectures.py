"""Architectures of GGUF files: their metadata as a config.json, and their tensors as those of a checkpoint.

A GGUF file states the settings of a model under keys such as llama.block_count, and names its tensors alike in all
architectures. Both are translated into the form of the Hugging Face checkpoint of the same model, which the families
read. Sources: gguf-py/gguf/constants.py and tensor_mapping.py of ggml-org/llama.cpp for the names;
convert_hf_to_gguf.py for the order of rows; src/llama-model.cpp for the defaults of absent keys.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Raw = dict[str, Any]  # a parsed config.json
Shapes = Mapping[str, tuple[int, ...]]
#: Keys of an architecture that change nothing in what it computes.
_IGNORED = {"vocab_size", "tensor_data_layout", "expert_count", "expert_used_count", "rope.scaling.finetuned"}


class Settings:
    """The metadata of a file that belong to its architecture; remembers which were read.

    Args:
        metadata: All metadata of the file.
        shapes: The shapes of its tensors.
        path: The file, for messages.
    """

    def __init__(self, metadata: Mapping[str, Any], shapes: Shapes, path: object):
        self._metadata, self.shapes, self._path = metadata, shapes, path
        self.architecture = str(metadata.get("general.architecture"))
        self._seen = {f"{self.architecture}.{name}" for name in _IGNORED}
        if self._metadata.get(f"{self.architecture}.expert_count"):
            raise self.error("a mixture of experts is not implemented")
        if not self.get("attention.causal", bool, True):
            raise self.error("attention.causal=false, a model that also reads later tokens, is not implemented")
        kind = metadata.get("general.type", "model")
        if kind != "model":
            raise self.error(f"general.type={str(kind)[:40]!r}: the file holds no model")

    def error(self, problem: str) -> ValueError:
        """The error of a problem with the metadata."""
        return ValueError(f"{self._path} ({self.architecture}): {problem}")

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        """The value of an architecture's key. Raises ValueError if it is of another kind, or absent without default."""
        key = f"{self.architecture}.{name}"
        self._seen.add(key)
        value = self._metadata.get(key)
        if value is None:
            if default is None:
                raise self.error(f"the metadata lack {key}")
            return default
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():  # one number a layer
            value = value[0].item()
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
            raise self.error(f"the metadata have {key}={str(value)[:40]}, which should be one {kind.__name__}")
        return value

    def size(self, name: str, default: int | None = None) -> int:
        """A whole number that is a size."""
        value = self.get(name, int, default)
        if not 0 < value < 1 << 31 and value != default:
            raise self.error(f"the metadata have {self.architecture}.{name}={value}, which is no size")
        return value

    def rate(self, name: str, default: float | None = None) -> float:
        """A float. Files hold float32: the shortest decimal number that it stands for is meant."""
        value = float(str(np.float32(self.get(name, float, default))))
        if not math.isfinite(value):
            raise self.error(f"the metadata have {self.architecture}.{name}={value}")
        return value

    def check_all_read(self) -> None:
        """Raises ValueError that names keys of the architecture which have a value and were not read."""
        odd = [
            key
            for key, value in self._metadata.items()
            if key.startswith(f"{self.architecture}.") and key not in self._seen and _is_set(value)
        ]
        if odd:
            raise self.error(f"settings that are not implemented: {', '.join(odd[:8])}")


def _is_set(value: Any) -> bool:
    return bool(value.any()) if isinstance(value, np.ndarray) else bool(value)


def _sizes(m: Settings) -> Raw:
    """The keys that most architectures share, under the names of most config.json."""
    if "token_embd.weight" not in m.shapes or len(m.shapes["token_embd.weight"]) != 2:
        raise m.error("there is no matrix token_embd.weight")
    layers = m.size("block_count")
    if layers > len(m.shapes):
        raise m.error(f"the metadata ask for {layers:,} layers, but there are {len(m.shapes):,} tensors")
    return {
        "vocab_size": m.shapes["token_embd.weight"][0],
        "max_position_embeddings": m.size("context_length"),
        "hidden_size": m.size("embedding_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": m.size("attention.head_count"),
        "tie_word_embeddings": "output.weight" not in m.shapes,
    }


def _head_dim(m: Settings, raw: Raw) -> int:
    """Width of a head: as stated, or width / heads."""
    width = m.size("attention.key_length", max(1, raw["hidden_size"] // raw["num_attention_heads"]))
    if m.size("attention.value_length", width) != width:
        raise m.error("heads whose values have another width than their keys are not implemented")
    return width


def _rope(m: Settings) -> Raw:
    """rope_theta and rope_scaling."""
    theta, kind = m.rate("rope.freq_base", 10_000.0), m.get("rope.scaling.type", str, "")
    factor = m.rate("rope.scaling.factor", m.rate("rope.scale_linear", 1.0))
    original = m.size("rope.scaling.original_context_length", m.size("context_length"))
    attention = m.rate("rope.scaling.attn_factor", 1.0) * m.rate("rope.scaling.yarn_attn_factor", 1.0)
    betas = {
        "beta_fast": m.rate("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": m.rate("rope.scaling.yarn_beta_slow", 1.0),
    }
    scaling: Raw | None = None
    if kind == "yarn" and factor > 0:
        m.get("rope.scaling.yarn_ext_factor", float, 1.0)
        scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original} | betas
        if attention != 1.0:
            scaling["attention_factor"] = attention * (0.1 * math.log(factor) + 1)
    elif kind == "linear" or (not kind and factor != 1.0):  # "none" switches the factor off
        scaling = {"rope_type": "linear", "factor": factor}
    elif kind not in ("", "none"):
        raise m.error(f"rope.scaling.type={kind[:40]!r} is not implemented (none, linear and yarn are)")
    return {"rope_theta": theta, "rope_scaling": scaling}


def _llama(m: Settings) -> Raw:
    raw = _sizes(m)
    window = m.size("attention.sliding_window", 0)
    biases = "blk.0.attn_q.bias" in m.shapes
    both = "blk.0.attn_output.bias" in m.shapes
    raw |= {
        "model_type": "mistral" if window else "qwen2" if biases and not both else "llama",
        "intermediate_size": m.size("feed_forward_length"),
        "num_key_value_heads": m.size("attention.head_count_kv", raw["num_attention_heads"]),
        "head_dim": _head_dim(m, raw),
        "rms_norm_eps": m.rate("attention.layer_norm_rms_epsilon"),
        **_rope(m),
    }
    if m.size("rope.dimension_count", raw["head_dim"]) != raw["head_dim"]:
        raise m.error("rotating a part of each head is not implemented")
    if window:
        return raw | {"sliding_window": window}
    if raw["model_type"] == "llama":
        return raw | {"attention_bias": biases, "mlp_bias": "blk.0.ffn_down.bias" in m.shapes}
    return raw


def _qwen2(m: Settings) -> Raw:
    return _llama(m) | {"model_type": "qwen2", "use_sliding_window": False}


def _gpt2(m: Settings) -> Raw:
    raw = _sizes(m)
    return {
        "model_type": "gpt2",
        "vocab_size": raw["vocab_size"],
        "n_positions": raw["max_position_embeddings"],
        "n_embd": raw["hidden_size"],
        "n_layer": raw["num_hidden_layers"],
        "n_head": raw["num_attention_heads"],
        "n_inner": m.size("feed_forward_length"),
        "layer_norm_epsilon": m.rate("attention.layer_norm_epsilon"),
        "tie_word_embeddings": raw["tie_word_embeddings"],
    }


def _falcon(m: Settings) -> Raw:
    raw = _sizes(m)
    kv_heads = m.size("attention.head_count_kv", raw["num_attention_heads"])
    norms = 2 if "blk.0.attn_norm_2.weight" in m.shapes else 1
    new = norms == 2 or 1 < kv_heads < raw["num_attention_heads"]
    m.size("rope.dimension_count", 1)
    return {
        **raw,
        "model_type": "falcon",
        "num_kv_heads": kv_heads,
        "ffn_hidden_size": m.size("feed_forward_length"),
        "layer_norm_epsilon": m.rate("attention.layer_norm_epsilon"),
        "parallel_attn": True,
        "new_decoder_architecture": new,
        "multi_query": kv_heads == 1,
        "num_ln_in_parallel_attn": norms if new else None,
        **_rope(m),
    }


def _gpt_neox(m: Settings) -> Raw:
    raw = _sizes(m)
    return {
        **raw,
        "model_type": "gpt_neox",
        "intermediate_size": m.size("feed_forward_length"),
        "layer_norm_eps": m.rate("attention.layer_norm_epsilon"),
        "use_parallel_residual": m.get("use_parallel_residual", bool, True),
        "attention_bias": "blk.0.attn_qkv.bias" in m.shapes,
        "partial_rotary_factor": m.size("rope.dimension_count", _head_dim(m, raw)) / _head_dim(m, raw),
        **_rope(m),
    }


def _glm(m: Settings) -> Raw:
    """GLM-4 and ChatGLM3: as transformers' Glm or Glm4, or with a fused query, key and value as the original code."""
    raw = _sizes(m)
    raw["head_dim"] = _head_dim(m, raw)
    rotated = m.size("rope.dimension_count", max(raw["head_dim"] // 2, 1)) / raw["head_dim"]
    kv_heads = m.size("attention.head_count_kv", raw["num_attention_heads"])
    eps, mlp_width, rope = m.rate("attention.layer_norm_rms_epsilon"), m.size("feed_forward_length"), _rope(m)
    if "blk.0.attn_qkv.weight" not in m.shapes:
        return {
            **raw,
            "model_type": "glm4" if m.architecture == "glm4" else "glm",
            "num_key_value_heads": kv_heads,
            "intermediate_size": mlp_width,
            "rms_norm_eps": eps,
            "attention_bias": "blk.0.attn_q.bias" in m.shapes,
            "partial_rotary_factor": rotated,
            **rope,
        }
    if raw["tie_word_embeddings"] or rotated != 0.5:
        raise m.error("a fused attn_qkv with a tied head, or with another share of rotated entries than a half")
    factor = 1.0 if rope["rope_scaling"] is None else rope["rope_scaling"]["factor"]
    return {
        "model_type": "chatglm",
        "padded_vocab_size": raw["vocab_size"],
        "seq_length": raw["max_position_embeddings"],
        "hidden_size": raw["hidden_size"],
        "num_layers": raw["num_hidden_layers"],
        "num_attention_heads": raw["num_attention_heads"],
        "multi_query_attention": True,
        "multi_query_group_num": kv_heads,
        "kv_channels": raw["head_dim"],
        "ffn_hidden_size": mlp_width,
        "layernorm_epsilon": eps,
        "add_qkv_bias": "blk.0.attn_qkv.bias" in m.shapes,
        "rope_ratio": rope["rope_theta"] / 10_000 if factor == 1 else factor,
        **rope,
    }


# -- Tensors ----------------------------------------------------------------------------------------------------------


def _pairs_to_halves(rows: int, heads: int) -> np.ndarray:
    """llama.cpp rotates neighbouring entries of a head, Hugging Face entries i and i + C/2: rows of query and key."""
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _llama_rows(name: str, rows: int, c: Any) -> np.ndarray | None:
    if ".attn_q." in name:
        return _pairs_to_halves(rows, c.heads)
    return _pairs_to_halves(rows, c.kv_heads) if ".attn_k." in name else None


def _neox_rows(name: str, rows: int, c: Any) -> np.ndarray | None:
    """Files have all queries, all keys, all values; checkpoints the three of one head after another."""
    return np.arange(rows).reshape(3, c.heads, -1).swapaxes(0, 1).reshape(-1) if ".attn_qkv." in name else None


def _falcon_rows(name: str, rows: int, c: Any) -> np.ndarray | None:
    """Files have all queries, all keys, all values; checkpoints after the queries of a group its key and its value."""
    if ".attn_qkv." not in name:
        return None
    width, queries = c.head_dim, c.heads * c.head_dim
    parts = np.split(np.arange(rows), [queries, queries + c.kv_heads * width])
    return np.concatenate([part.reshape(c.kv_heads, -1) for part in parts], axis=1).reshape(-1)


def _same_rows(name: str, rows: int, c: Any) -> np.ndarray | None:
    return None


_ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LLAMA_NAMES = {
    **_ENDS,
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_GLM_NAMES = {
    **{name: theirs for name, theirs in _LLAMA_NAMES.items() if name != "ffn_gate"},
    "ffn_up": "mlp.gate_up_proj",
    "post_attention_norm": "post_self_attn_layernorm", "post_ffw_norm": "post_mlp_layernorm",
}  # fmt: skip
_CHATGLM_NAMES = {
    "token_embd": "transformer.embedding.word_embeddings", "output_norm": "transformer.encoder.final_layernorm",
    "output": "transformer.output_layer", "attn_norm": "input_layernorm",
    "attn_qkv": "self_attention.query_key_value", "attn_output": "self_attention.dense",
    "ffn_norm": "post_attention_layernorm", "ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h",
}  # fmt: skip
_GPT2_NAMES = {
    "token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f",
    "output": "lm_head", "attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj",
}  # fmt: skip
_FALCON_NAMES = {
    "token_embd": "transformer.word_embeddings", "output_norm": "transformer.ln_f", "output": "lm_head",
    "attn_qkv": "self_attention.query_key_value", "attn_output": "self_attention.dense",
    "ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h",
}  # fmt: skip
_NEOX_NAMES = {
    "token_embd": "gpt_neox.embed_in", "output_norm": "gpt_neox.final_layer_norm", "output": "embed_out",
    "attn_norm": "input_layernorm", "attn_qkv": "attention.query_key_value", "attn_output": "attention.dense",
    "ffn_norm": "post_attention_layernorm", "ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h",
}  # fmt: skip


def _falcon_names(m: Settings) -> dict[str, str]:
    """The names of a Falcon. Falcon-40B has two norms, and GGUF files list the norm of the MLP first."""
    if "blk.0.attn_norm_2.weight" in m.shapes:
        return _FALCON_NAMES | {"attn_norm": "ln_mlp", "attn_norm_2": "ln_attn"}
    return _FALCON_NAMES | {"attn_norm": "input_layernorm"}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
        config: The config.json that settings stand for, without token ids.
        layer: Beginning of the names of a layer's tensors in a checkpoint.
        names: Name in a file -> name in a checkpoint, both without the layer and the ending.
        rows: (name in the file, rows, Config) -> for each row of the checkpoint's tensor its row in the file, or None.
        transposed: Tensors that a checkpoint has as [inputs, outputs].
    """

    config: Callable[[Settings], Raw]
    layer: Callable[[Settings], str]
    names: Callable[[Settings], Mapping[str, str]]
    rows: Callable[[str, int, Any], np.ndarray | None] = _same_rows
    transposed: tuple[str, ...] = ()


def _fixed(value: Any) -> Callable[[Settings], Any]:
    return lambda m: value


def _is_fused(m: Settings) -> bool:
    return "blk.0.attn_qkv.weight" in m.shapes


_GLM = Architecture(
    _glm,
    lambda m: "transformer.encoder.layers.{}." if _is_fused(m) else "model.layers.{}.",
    lambda m: _CHATGLM_NAMES if _is_fused(m) else _GLM_NAMES,
)
#: The architectures that can be read, by general.architecture.
ARCHITECTURES = {
    "llama": Architecture(_llama, _fixed("model.layers.{}."), _fixed(_LLAMA_NAMES), _llama_rows),
    "qwen2": Architecture(_qwen2, _fixed("model.layers.{}."), _fixed(_LLAMA_NAMES)),
    "gpt2": Architecture(
        _gpt2,
        _fixed("transformer.h.{}."),
        _fixed(_GPT2_NAMES),
        transposed=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
    ),
    "gptneox": Architecture(_gpt_neox, _fixed("gpt_neox.layers.{}."), _fixed(_NEOX_NAMES), _neox_rows),
    "falcon": Architecture(_falcon, _fixed("transformer.h.{}."), _falcon_names, _falcon_rows),
    "chatglm": _GLM,
    "glm4": _GLM,
}
