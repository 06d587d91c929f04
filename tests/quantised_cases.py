"""Quantised matrices packed by other people's code (tests/oracles/quantised.npz), and model folders that hold them.

Made with GPTQModel, AutoGPTQ, AutoAWQ, bitsandbytes 0.50.2, compressed-tensors 0.20.0, DeepSeek's and ChatGLM's own
kernels and IST-DASLab's GPTQ. A key is `<case>.<tensor>`; `weight` is the dequantised matrix [outputs, inputs] in
float32 by the owner's code. float8 is stored as its bits.
"""

import json
import pathlib

import numpy as np

ORACLES = pathlib.Path(__file__).parent / "oracles"
ARRAYS = np.load(ORACLES / "quantised.npz")
SETTINGS = json.loads((ORACLES / "quantised.json").read_text())["cases"]
F8 = "F8_E4M3"
#: Largest difference, relative to the largest weight, where the owner's code rounds to 16 bits.
TOLERANCE = {"bnb.nf4_float16_24x96": 1e-3, "bnb.nf4_nested_bfloat16_160x256": 4e-3, "ct.nvfp4": 2**-8}
FOLDERS = [
    case for case in SETTINGS
    if case.startswith(("gptq_v", "awq.", "bnb.", "ct.", "deepseek")) and case != "bnb.nf4_float32_10x40"
]  # fmt: skip


def arrays(case):
    return {key[len(case) + 1 :]: ARRAYS[key] for key in ARRAYS.files if key.rpartition(".")[0] == case}


def parts(case):
    """The stored tensors of a linear layer by the end of their name, and quantization_config."""
    found, settings = arrays(case), SETTINGS[case]
    del found["weight"]
    if case.startswith("gptq"):
        return found, {"quant_method": "gptq", **settings}
    if case.startswith("awq"):
        return found, {"quant_method": "awq", **settings}
    if case == "bnb.int8":
        found["weight"] = found.pop("weight_i8")
        return found, {"quant_method": "bitsandbytes", "load_in_8bit": True}
    if case.startswith("bnb"):
        found = {f"weight.{end.replace('/', '.')}": array for end, array in found.items()}
        found["weight"] = found.pop("weight.weight_packed")
        return found, {"quant_method": "bitsandbytes", "load_in_4bit": True}
    if case.startswith("deepseek"):
        found["weight"] = (F8, found.pop("weight_f8"))
        return found, {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    if "stored_weight" in found:
        array = found.pop("stored_weight")
        found["weight"] = array if array.dtype == np.int8 else (F8, array)
    if case == "ct.nvfp4":
        found["weight_scale"] = (F8, found["weight_scale"])
    groups = {"group_0": {"targets": ["Linear"], "weights": settings["scheme"]}}
    return found, {"quant_method": "compressed-tensors", "format": settings["format"], "config_groups": groups}


def write_tensors(path, tensors):
    """A safetensors file of arrays, or of pairs (dtype, array)."""
    names = {"float32": "F32", "float16": "F16", "int8": "I8", "uint8": "U8", "int32": "I32", "int64": "I64"}
    header, data = {}, []
    for name, tensor in tensors.items():
        kind, array = tensor if isinstance(tensor, tuple) else (names[str(tensor.dtype)], tensor)
        begin = sum(map(len, data))
        data.append(np.ascontiguousarray(array).tobytes())
        header[name] = {"dtype": kind, "shape": array.shape, "data_offsets": (begin, begin + len(data[-1]))}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data))


HEADS = {24: (3, 8), 40: (5, 8), 32: (2, 16), 64: (4, 16), 200: (10, 20), 160: (8, 20), 16: (2, 8)}


def folder(path, case, change=lambda tensors, config: None):
    """A LLaMA of one layer, all of whose matrices with the case's shape are the case's."""
    outputs, inputs = ARRAYS[f"{case}.weight"].shape
    heads, head_dim = HEADS[outputs]
    own, quantization = parts(case)
    h, rng = "model.layers.0.", np.random.default_rng(0)

    def plain(*shape):
        return rng.normal(size=shape).astype(np.float16)

    tensors = {
        "model.embed_tokens.weight": plain(11, inputs), "lm_head.weight": plain(11, inputs),
        "model.norm.weight": plain(inputs), h + "input_layernorm.weight": plain(inputs),
        h + "post_attention_layernorm.weight": plain(inputs), h + "self_attn.o_proj.weight": plain(inputs, outputs),
        h + "mlp.down_proj.weight": plain(inputs, outputs),
    }  # fmt: skip
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        tensors |= {f"{h}{name}.{end}": array for end, array in own.items()}
    config = {
        "model_type": "llama", "vocab_size": 11, "hidden_size": inputs, "num_hidden_layers": 1, "head_dim": head_dim,
        "num_attention_heads": heads, "num_key_value_heads": heads, "intermediate_size": outputs, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64, "quantization_config": quantization,
    }  # fmt: skip
    change(tensors, config)
    write_tensors(path / "model.safetensors", tensors)
    (path / "config.json").write_text(json.dumps(config))
    return path
