"""How a checkpoint says that its weights are quantised, and the readers of each format."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from garrulax.core.coded import Coded
from garrulax.hub.files import is_file
from garrulax.hub.json_files import read_object
from garrulax.hub.quantised import formats
from garrulax.hub.quantised.writing import ROUNDED_ROWS

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Scheme:
    """One format, with the settings of a checkpoint.

    Attributes:
        name: Of the format.
        read: Reads a matrix: (stored arrays by the end of their name, name of the layer, settings) -> its codes.
        marker: The end of a name by which a quantised layer is known.
        main: The end of the name of the codes.
        ends: Ends of the names of all its tensors; those of `needed` must be there.
        needed: See above.
        shape: [outputs, inputs] from the shapes of the codes and the marker's tensor.
        settings: Numbers of config.json that `read` needs.
        dropped: Ends of the names of tensors that change nothing here, such as scales of activations.
        zero_scales: Whether a scale of zero is a group of zeros and no damage.
    """

    name: str
    read: Callable[[Mapping[str, np.ndarray], str, Mapping[str, Any]], Coded]
    marker: str
    main: str
    ends: tuple[str, ...]
    needed: tuple[str, ...]
    shape: Callable[[Shape, Shape], tuple[int, int]]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dropped: tuple[str, ...] = ("input_scale", "output_scale", "input_global_scale", "k_scale", "v_scale")
    zero_scales: bool = False


def take_scheme(raw: Mapping[str, Any], folder: Path) -> tuple[dict[str, Any], Scheme | None]:
    """config.json without its quantisation, and the quantisation if it is one that is read.

    Args:
        raw: The parsed config.json.
        folder: The folder, for older GPTQ checkpoints, which have a file of their own.

    Raises:
        ValueError: A setting of a known format is not implemented; the message names it.
    """
    kept = dict(raw)
    bits = raw.get("quantization_bit")
    if raw.get("model_type") == "chatglm" and bits in (4, 8):
        if raw.get("quantization_embeddings"):
            raise ValueError("config.json: quantization_embeddings=true is not implemented: take the folder without")
        del kept["quantization_bit"]
        kept.pop("quantization_embeddings", None)
        return kept, _chatglm(bits)
    key = next((k for k in ("quantization_config", "compression_config") if isinstance(raw.get(k), Mapping)), None)
    settings = raw[key] if key else None
    if settings is None and is_file(folder / "quantize_config.json"):
        settings = {"quant_method": "gptq", **read_object(folder / "quantize_config.json")}
    make = _METHODS.get(settings.get("quant_method")) if settings else None
    if settings is None or make is None:
        return kept, None
    if key:
        del kept[key]
    return kept, make(settings)


def _refuse(what: str, value: Any, known: str) -> ValueError:
    return ValueError(
        f"config.json: quantised weights with {what}={value!r} are not implemented ({known}): take the checkpoint from "
        "which they were made, and quantise it with gx.quantise"
    )


def _gptq(s: Mapping[str, Any]) -> Scheme:
    if s.get("bits") not in (2, 3, 4, 8):
        raise _refuse("bits", s.get("bits"), "GPTQ: 2, 3, 4 and 8 are")
    if (s.get("checkpoint_format") or "gptq") not in ("gptq", "gptq_v2"):
        raise _refuse("checkpoint_format", s["checkpoint_format"], "GPTQ: gptq and gptq_v2 are")
    bits = s["bits"]
    return Scheme(
        f"GPTQ, {bits} bits", formats.gptq, "qweight", "qweight", ("qweight", "qzeros", "scales", "g_idx"),
        ("qweight", "qzeros", "scales"), lambda main, _: (main[1], main[0] * 32 // bits),
        {"bits": bits, "group_size": s.get("group_size", -1), "sym": s.get("sym", False),
         "checkpoint_format": s.get("checkpoint_format")},
    )  # fmt: skip


def _awq(s: Mapping[str, Any]) -> Scheme:
    if (s.get("bits") or s.get("w_bit")) != 4:
        raise _refuse("bits", s.get("bits"), "AWQ: only 4 is")
    if str(s.get("version", "gemm")).lower() != "gemm":
        raise _refuse("version", s["version"], "AWQ: only 'gemm' is")
    return Scheme(
        "AWQ, 4 bits", formats.awq, "qweight", "qweight", ("qweight", "qzeros", "scales"),
        ("qweight", "qzeros", "scales"), lambda main, _: (main[1] * 8, main[0]),
        {"group_size": s.get("group_size") or s.get("q_group_size") or -1},
    )  # fmt: skip


def _bitsandbytes(s: Mapping[str, Any]) -> Scheme:
    if s.get("load_in_4bit") or s.get("_load_in_4bit"):
        ends = ("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map")
        return Scheme(
            "bitsandbytes, 4 bits", formats.bnb_4bit, "weight.absmax", "weight", ends, ends[:3],
            lambda main, _: (main[0], main[1]), zero_scales=True,
        )  # fmt: skip
    return Scheme(
        "bitsandbytes, 8 bits", formats.bnb_int8, "SCB", "weight", ("weight", "SCB", "weight_format"),
        ("weight", "SCB"), lambda main, _: (main[0], main[1]), zero_scales=True,
    )  # fmt: skip


def _fp8(s: Mapping[str, Any]) -> Scheme:
    if s.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        raise _refuse("fmt", s["fmt"], "float8: e4m3 is")
    block = s.get("weight_block_size")
    marker = "weight_scale_inv" if block else "weight_scale"
    return Scheme(
        "float8", formats.fp8, marker, "weight", ("weight", marker), ("weight", marker),
        lambda main, _: (main[0], main[1]), {"block": tuple(block) if block else None},
    )  # fmt: skip


def _chatglm(bits: int) -> Scheme:
    return Scheme(
        f"ChatGLM, {bits} bits", formats.chatglm, "weight_scale", "weight", ("weight", "weight_scale"),
        ("weight", "weight_scale"), lambda main, _: (main[0], main[1] * 8 // bits), {"bits": bits},
    )  # fmt: skip


_PACKED = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx", "weight_global_scale")


def _compressed_tensors(s: Mapping[str, Any]) -> Scheme:
    groups = [g for g in (s.get("config_groups") or {}).values() if g.get("weights")]
    weights = [g["weights"] for g in groups]
    if not weights or any(w != weights[0] for w in weights):
        raise _refuse("config_groups", list(s.get("config_groups") or {}), "compressed-tensors: one for all weights is")
    if (s.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise _refuse("sparsity_config", s["sparsity_config"].get("format"), "compressed-tensors: dense is")
    found, w = str(s.get("format") or groups[0].get("format")), weights[0]
    settings = {"bits": w.get("num_bits"), "group": w.get("group_size"), "block": w.get("block_structure")}
    rounded = groups[0].get("input_activations") or {}
    settings["activations"] = 8 if ROUNDED_ROWS.items() <= rounded.items() else 0
    if settings["group"] == -1 or w.get("strategy") in ("channel", "tensor"):
        settings["group"] = None
    if isinstance(settings["block"], str):
        settings["block"] = [int(n) for n in re.findall(r"\d+", settings["block"])]
    name = f"compressed-tensors, {found}"
    same = ("weight", "weight_scale", "weight_zero_point")
    if found == "pack-quantized" and settings["bits"] in (4, 8):
        return Scheme(
            name, formats.packed_int, "weight_packed", "weight_packed", _PACKED, _PACKED[:3], _wider(1), settings
        )
    if found == "int-quantized" and settings["bits"] == 8:
        return Scheme(name, formats.plain_int, "weight_scale", "weight", same, same[:2], _wider(1), settings)
    if found in ("float-quantized", "naive-quantized") and (w.get("type"), settings["bits"]) == ("float", 8):
        return Scheme(name, formats.fp8, "weight_scale", "weight", same[:2], same[:2], _wider(1), settings)
    if found in ("mxfp4-pack-quantized", "nvfp4-pack-quantized"):
        return Scheme(name, formats.packed_float, "weight_packed", "weight_packed", _PACKED, _PACKED[:2], _wider(2))
    raise _refuse("format", f"{found}, {settings['bits']} bits", "compressed-tensors: pack, int, float-quantized are")


def _wider(factor: int) -> Callable[[Shape, Shape], tuple[int, int]]:
    return lambda main, _: (main[0], main[1] * factor)


_METHODS: dict[Any, Callable[[Mapping[str, Any]], Scheme]] = {
    "gptq": _gptq, "awq": _awq, "bitsandbytes": _bitsandbytes, "fp8": _fp8, "compressed-tensors": _compressed_tensors,
}  # fmt: skip
