"""Writes small GGUF files, as convert_hf_to_gguf.py of ggml-org/llama.cpp orders and names the tensors.

tests/oracles/gguf_names.json has the names that the package gguf gives to the tensors of each reference case (layer 0).
"""

import json
import re
import struct

import numpy as np
from oracle import FOLDER, config, raw_config, tensors

NAMES = json.loads((FOLDER / "gguf_names.json").read_text())
ARCHITECTURES = {
    "llama_gqa": "llama", "llama_tied": "llama", "llama_linear": "llama", "llama_yarn": "llama", "llama3": "llama",
    "mistral": "llama", "qwen2": "qwen2", "gpt2": "gpt2", "falcon7b": "falcon", "falcon40b": "falcon",
    "falcon11b": "falcon", "gpt_neox": "gptneox", "glm": "chatglm", "glm4": "glm4", "chatglm3": "chatglm",
}  # fmt: skip


def value(x):
    """A metadata value with its type."""
    if isinstance(x, bool):
        return struct.pack("<IB", 7, x)
    if isinstance(x, int):
        return struct.pack("<Ii" if x < 0 else "<II", 5 if x < 0 else 4, x)
    if isinstance(x, float):
        return struct.pack("<If", 6, x)
    if isinstance(x, str):
        return struct.pack("<I", 8) + text(x)
    kinds = {bool: (7, "?"), int: (5, "<i4"), float: (6, "<f4"), str: (8, None)}
    kind, dtype = kinds[type(x[0])]
    content = b"".join(map(text, x)) if dtype is None else np.array(x, dtype).tobytes()
    return struct.pack("<IIQ", 9, kind, len(x)) + content


def text(x):
    content = x.encode()
    return struct.pack("<Q", len(content)) + content


def file(metadata, stored, version=3, alignment=32):
    """The content of a file. `stored`: name -> array in float32, or (number of the type, shape, bytes)."""
    entries, data = [], b""
    for name, x in stored.items():
        kind, shape, content = x if isinstance(x, tuple) else (0, x.shape, np.ascontiguousarray(x, "<f4").tobytes())
        data += b"\0" * (-len(data) % alignment)
        sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        entries.append(text(name) + sizes + struct.pack("<IQ", kind, len(data)))
        data += content
    pairs = b"".join(text(key) + value(x) for key, x in metadata.items())
    header = b"GGUF" + struct.pack("<IQQ", version, len(stored), len(metadata)) + pairs + b"".join(entries)
    return header + b"\0" * (-len(header) % alignment) + data


def metadata_of(case):
    """The metadata of a reference case, without a tokenizer."""
    raw, a = raw_config(case)["config"], ARCHITECTURES[case]

    def first(*names):
        return next(raw[name] for name in names if raw.get(name) is not None)

    width = first("hidden_size", "n_embd")
    heads = first("num_attention_heads", "n_head")
    rope = raw.get("rope_parameters") or {}
    found = {
        "general.architecture": a,
        f"{a}.context_length": first("max_position_embeddings", "n_positions", "seq_length"),
        f"{a}.embedding_length": width,
        f"{a}.block_count": first("num_hidden_layers", "n_layer", "num_layers"),
        f"{a}.feed_forward_length": raw.get("intermediate_size") or raw.get("ffn_hidden_size") or 4 * width,
        f"{a}.attention.head_count": heads,
    }
    found |= {f"{a}.rope.freq_base": float(rope.get("rope_theta", 10_000))} if a != "gpt2" else {}
    for key in ("rms_norm_eps", "layernorm_epsilon"):
        found |= {f"{a}.attention.layer_norm_rms_epsilon": raw[key]} if key in raw else {}
    for key in ("layer_norm_epsilon", "layer_norm_eps"):
        found |= {f"{a}.attention.layer_norm_epsilon": raw[key]} if key in raw else {}
    kv = raw.get("num_key_value_heads") or raw.get("multi_query_group_num") or raw.get("num_kv_heads")
    if a == "falcon" and raw["multi_query"] and not raw["new_decoder_architecture"]:
        kv = 1
    found |= {f"{a}.attention.head_count_kv": kv} if kv else {}
    if "partial_rotary_factor" in rope or case == "chatglm3":
        found[f"{a}.rope.dimension_count"] = int(width // heads * rope.get("partial_rotary_factor", 0.5))
    if rope.get("rope_type") in ("linear", "yarn"):
        found |= {f"{a}.rope.scaling.type": rope["rope_type"], f"{a}.rope.scaling.factor": rope["factor"]}
    if rope.get("rope_type") == "yarn":
        found[f"{a}.rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    if a == "gptneox":
        found[f"{a}.use_parallel_residual"] = raw["use_parallel_residual"]
    if raw.get("sliding_window"):
        found[f"{a}.attention.sliding_window"] = raw["sliding_window"]
    eos = raw.get("eos_token_id")
    roles = {"eos": eos[0], "eot": eos[1]} if isinstance(eos, list) else {"eos": eos}
    roles |= {"bos": raw.get("bos_token_id"), "padding": raw.get("pad_token_id")}
    return found | {f"tokenizer.ggml.{role}_token_id": i for role, i in roles.items() if i is not None}


def stored_of(case):
    """The tensors of a reference case under the names and in the order of a GGUF file, float32."""
    a, metadata = ARCHITECTURES[case], metadata_of(case)
    heads = metadata[f"{a}.attention.head_count"]
    kv = metadata.get(f"{a}.attention.head_count_kv", heads)
    names = NAMES[case if case in NAMES else "llama_gqa"]
    found = {}
    for name, x in tensors(case).items():
        layer = re.search(r"\.(\d+)\.", name)
        ours = names.get(re.sub(r"\.\d+\.", ".0.", name, count=1))
        if ours is None or (ours == "output.weight" and config(case).tied):
            continue
        ours = ours.replace("blk.0.", f"blk.{layer[1]}.") if layer else ours
        if a == "llama" and (".attn_q." in ours or ".attn_k." in ours):
            n = heads if ".attn_q." in ours else kv
            x = x.reshape(n, 2, x.shape[0] // n // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
        elif a == "gptneox" and ".attn_qkv." in ours:
            x = x.reshape(heads, 3, -1, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)
        elif a == "falcon" and ".attn_qkv." in ours:
            grouped = x.reshape(kv, heads // kv + 2, -1, x.shape[-1])
            q, k, v = grouped[:, :-2], grouped[:, -2], grouped[:, -1]
            x = np.concatenate([part.reshape(-1, x.shape[-1]) for part in (q, k, v)])
        elif a == "gpt2" and re.search(r"(attn_qkv|attn_output|ffn_up|ffn_down)\.weight", ours):
            x = x.T
        found[ours] = x
    return found


def file_of(case, metadata=(), **options):
    """The GGUF file of a reference case, perhaps with further metadata."""
    return file(metadata_of(case) | dict(metadata), stored_of(case), **options)
