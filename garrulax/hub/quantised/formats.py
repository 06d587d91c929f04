"""The formats of quantised matrices in checkpoints: each becomes a `Coded`.

A function takes the stored tensors of one linear layer by the end of their name, the layer's name for messages, and the
settings of config.json. What the formats are is written in the documentation page on quantised models; the sources are
IST-DASLab/gptq, AutoGPTQ and GPTQModel, casper-hansen/AutoAWQ, bitsandbytes, vllm-project/compressed-tensors,
deepseek-ai/DeepSeek-V3 and the code in ChatGLM's model folders.
"""

import json
import logging
import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from garrulax.core.coded import Coded
from garrulax.core.codes import E2M1
from garrulax.hub.quantised.unpacking import awq_fields, fields, nibbles

_log = logging.getLogger("garrulax")

Parts = Mapping[str, np.ndarray]  # end of the name -> array; float8 as uint8


def gptq(parts: Parts, name: str, settings: Mapping[str, Any]) -> Coded:
    """GPTQ, version 1 ("gptq", where one is subtracted from the zero points) and 2 ("gptq_v2"); 2, 3, 4, 8 bits."""
    bits = settings["bits"]
    scale = np.ascontiguousarray(parts["scales"].T)  # [outputs, groups]
    codes = np.ascontiguousarray(fields(np.ascontiguousarray(parts["qweight"].T), bits))
    zeros = fields(parts["qzeros"], bits)[:, : len(scale)]
    inputs, count = codes.shape[1], scale.shape[1]
    group = inputs if settings["group_size"] in (-1, None) else settings["group_size"]
    _check(name, "qzeros", zeros.shape, (count, len(scale)))
    _check(name, "qweight", codes.shape, (len(scale), inputs))
    if count != -(-inputs // group):
        raise ValueError(f"{name}.scales has {count} groups, but {inputs} inputs in groups of {group} have others")
    zeros = _zero_points(zeros, name, settings)
    groups = parts.get("g_idx")
    if groups is not None:
        _check(name, "g_idx", groups.shape, (inputs,))
        if groups.min() < 0 or groups.max() >= count:
            raise ValueError(f"{name}.g_idx names groups outside of 0..{count - 1}")
        if np.array_equal(groups, np.arange(inputs) // group):
            groups = None
    wide = 4 if bits <= 4 else 8
    if bits == wide and (zeros == 1 << (bits - 1)).all():  # symmetric
        codes = codes if bits == 4 else (codes ^ np.uint8(128)).view(np.int8)
        return Coded(codes, scale, None, group, groups, bits=wide)
    return Coded(codes, scale, np.ascontiguousarray(zeros.T), group, groups, bits=wide)


def _zero_points(stored: np.ndarray, name: str, settings: Mapping[str, Any]) -> np.ndarray:
    """The zero points [groups, outputs] of a GPTQ file.

    Its first version stores them less 1. Where the numbers show another version than config.json says, they decide.
    """
    bits, labelled = settings["bits"], settings.get("checkpoint_format") or "gptq"
    middle = 1 << (bits - 1)
    first = labelled != "gptq_v2"
    if settings.get("sym"):
        if not np.isin(stored, (middle - 1, middle)).all() or len(np.unique(stored)) > 1:
            raise ValueError(
                f"{name}.qzeros are those of no version: config.json says sym=true, so that all should be {middle - 1} "
                f"(gptq) or {middle} (gptq_v2), but they are {stored.min()} to {stored.max()}"
            )
        if (stored.flat[0] == middle - 1) != first:
            _log.warning(
                "%s.qzeros are of the other version than config.json says (%s): read by the data", name, labelled
            )
            first = not first
    elif first and bits == 4 and _overflown(stored):
        _log.warning(
            "%s.qzeros may be damaged: zero points of 0 were stored as 15, which AutoGPTQ's packer then writes over "
            "all later ones of a word; quantise again with checkpoint_format gptq_v2", name
        )  # fmt: skip
    if not first:
        return stored
    return stored + np.uint8(1) if bits == 3 else stored + np.uint8(1) & np.uint8((1 << bits) - 1)


def _overflown(stored: np.ndarray) -> bool:
    """Whether a word of eight fields has a 15 and after it only 15s, at least two."""
    whole = stored[:, : stored.shape[1] // 8 * 8].reshape(-1, 8)
    return bool((whole[:, -2:] == 15).all(axis=1).any())


def awq(parts: Parts, name: str, settings: Mapping[str, Any]) -> Coded:
    """AutoAWQ's "gemm" layout, 4 bits."""
    codes = np.ascontiguousarray(awq_fields(parts["qweight"]).T)
    zeros = np.ascontiguousarray(awq_fields(parts["qzeros"]).T)
    scale = np.ascontiguousarray(parts["scales"].T)
    group = codes.shape[1] if settings["group_size"] == -1 else settings["group_size"]
    _check(name, "qzeros", zeros.shape, (len(codes), -(-codes.shape[1] // group)))
    _check(name, "scales", scale.shape, zeros.shape)
    return Coded(codes, scale, None if (zeros == 8).all() else zeros, group)


def bnb_int8(parts: Parts, name: str, settings: Mapping[str, Any]) -> Coded:
    """bitsandbytes, 8 bits: SCB is the largest number of each row."""
    codes = parts["weight"]
    if parts.get("weight_format", np.zeros(1)).any():
        raise ValueError(
            f"{name}.weight_format is not 0 (row-major), which is not implemented: save it with newer code"
        )
    _check(name, "SCB", parts["SCB"].shape, (len(codes),))
    return Coded(codes, parts["SCB"][:, None] / np.float32(127), None, codes.shape[1], bits=8)


def bnb_4bit(parts: Parts, name: str, settings: Mapping[str, Any]) -> Coded:
    """bitsandbytes, 4 bits (NF4, FP4): blocks of the flattened matrix, perhaps with quantised scales."""
    key = next((end for end in parts if end.startswith("weight.quant_state.")), None)
    if key is None:
        raise ValueError(f"{name} lacks weight.quant_state.bitsandbytes__nf4")
    state = json.loads(parts[key].tobytes())
    outputs, inputs = state["shape"]
    block, table = state["blocksize"], parts["weight.quant_map"]
    codes = nibbles(parts["weight"].reshape(-1), high_first=True)[: outputs * inputs].reshape(outputs, inputs)
    absmax = parts["weight.absmax"]
    if "weight.nested_absmax" in parts:
        outer = np.repeat(parts["weight.nested_absmax"], state["nested_blocksize"])[: len(absmax)]
        absmax = parts["weight.nested_quant_map"][absmax] * outer + np.float32(state["nested_offset"])
    _check(name, "absmax", absmax.shape, (-(-outputs * inputs // block),))
    group = math.gcd(block, inputs)  # a block may go over the end of a row
    starts = np.arange(0, outputs * inputs, group).reshape(outputs, -1)
    scale = absmax.astype(np.float32)[starts // block]
    if group % 2:
        raise ValueError(f"{name} has {inputs} inputs, an odd number: its blocks are not implemented")
    return Coded(codes, scale, None, group, kind="table", values=tuple(map(float, table)))


def chatglm(parts: Parts, name: str, settings: Mapping[str, Any]) -> Coded:
    """ChatGLM's own 4 and 8 bits: a scale a row; the high half of a byte is the even input, in two's complement."""
    codes, scale = parts["weight"], parts["weight_scale"]
    _check(name, "weight_scale", scale.shape, (len(codes),))
    if settings["bits"] == 4:
        codes = nibbles(codes, high_first=True) ^ np.uint8(8)
    return Coded(codes, scale[:, None], None, codes.shape[1], bits=settings["bits"])


def fp8(parts: Parts, name: str, settings: Mapping[str, Any]) -> Coded:
    """float8_e4m3fn with a scale for all, a row, or a block of rows and inputs; `weight_scale_inv` is a factor too."""
    codes = parts["weight"]
    if np.isin(codes & 127, 127).any():
        raise ValueError(f"{name}.weight holds NaN")
    end = "weight_scale_inv" if "weight_scale_inv" in parts else "weight_scale"
    scale, (outputs, inputs) = parts[end], codes.shape
    if scale.dtype == np.uint8:
        scale = _e8m0(scale)
    scale = scale.astype(np.float32)
    if scale.size == 1:
        return Coded(
            codes, np.broadcast_to(scale.reshape(1, 1), (outputs, 1)).copy(), None, inputs, kind="e4m3", bits=8
        )
    block = settings.get("block")
    if block is None:
        _check(name, end, scale.reshape(len(scale), -1).shape, (outputs, 1))
        return Coded(codes, scale.reshape(outputs, 1), None, inputs, kind="e4m3", bits=8)
    down, across = block
    _check(name, end, scale.shape, (-(-outputs // down), -(-inputs // across)))
    return Coded(codes, scale[np.arange(outputs) // down], None, across, kind="e4m3", bits=8)


def packed_int(parts: Parts, name: str, settings: Mapping[str, Any]) -> Coded:
    """compressed-tensors "pack-quantized": integers along the inputs of a row, lowest bits first."""
    bits, scale = settings["bits"], parts["weight_scale"]
    outputs, inputs = (int(n) for n in parts["weight_shape"])
    codes = fields(parts["weight_packed"], bits)[:, :inputs]
    _check(name, "weight_packed", codes.shape, (outputs, inputs))
    group = settings.get("group") or inputs
    scale = np.broadcast_to(scale.reshape(1, 1), (outputs, 1)) if scale.size == 1 else scale
    _check(name, "weight_scale", scale.shape, (outputs, -(-inputs // group)))
    groups = parts.get("weight_g_idx")
    if groups is not None and (groups.min() < 0 or np.array_equal(groups, np.arange(inputs) // group)):
        groups = None
    zeros = parts.get("weight_zero_point")
    if zeros is not None:  # packed along the outputs, with the middle added as to the codes
        zeros = np.ascontiguousarray(fields(np.ascontiguousarray(zeros.T), bits)[:, :outputs].T)
        _check(name, "weight_zero_point", zeros.shape, scale.shape)
    elif bits == 8:
        codes = (codes ^ np.uint8(128)).view(np.int8)
    return Coded(codes, np.ascontiguousarray(scale), zeros, group, groups, bits=bits)


def plain_int(parts: Parts, name: str, settings: Mapping[str, Any]) -> Coded:
    """compressed-tensors "int-quantized": int8; with activations that are rounded for each token, W8A8."""
    codes, scale = parts["weight"], parts["weight_scale"]
    group = settings.get("group") or codes.shape[1]
    scale = np.broadcast_to(scale.reshape(1, 1), (len(codes), 1)) if scale.size == 1 else scale
    _check(name, "weight_scale", scale.shape, (len(codes), -(-codes.shape[1] // group)))
    zeros = parts.get("weight_zero_point")
    if zeros is None or not zeros.any():
        rounded = settings.get("activations", 0) if scale.shape[1] == 1 else 0
        return Coded(codes, np.ascontiguousarray(scale), None, group, bits=8, activations=rounded)
    return Coded(
        codes, np.ascontiguousarray(scale), np.broadcast_to(zeros, scale.shape).astype(np.int16), group, bits=8
    )


def packed_float(parts: Parts, name: str, settings: Mapping[str, Any]) -> Coded:
    """compressed-tensors "mxfp4-pack-quantized" and "nvfp4-pack-quantized": numbers of 4 bits, low half first."""
    codes, scale = nibbles(parts["weight_packed"], high_first=False), parts["weight_scale"]
    if "weight_global_scale" in parts:
        scale = scale.view(ml_dtypes.float8_e4m3fn).astype(np.float32) / parts["weight_global_scale"].astype(np.float32)
        group = 16
    else:
        scale, group = _e8m0(scale), 32
    _check(name, "weight_scale", scale.shape, (len(codes), -(-codes.shape[1] // group)))
    return Coded(codes, scale, None, group, kind="table", values=E2M1)


def mxfp4_experts(blocks: np.ndarray, scales: np.ndarray) -> list[Coded]:
    """The experts of gpt-oss: uint8 blocks [experts, outputs, groups, 16] and scales [experts, outputs, groups]."""
    codes = nibbles(blocks, high_first=False).reshape(*blocks.shape[:2], -1)
    return [Coded(c, _e8m0(s), None, 32, kind="table", values=E2M1) for c, s in zip(codes, scales, strict=True)]


def _e8m0(bits: np.ndarray) -> np.ndarray:
    """The powers of two of bytes with a bias of 127."""
    return np.ldexp(np.float32(1), bits.astype(np.int32) - 127)


def _check(name: str, end: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if tuple(shape) != tuple(wanted):
        raise ValueError(f"{name}.{end} does not fit the codes: it is for {tuple(shape)}, not {tuple(wanted)}")


def check_scales(coded: Coded, name: str, zeros: bool) -> Coded:
    """The same matrix. Raises ValueError if a scale is not finite, or zero where the format never writes zeros."""
    wide = coded.scale.astype(np.float32)
    if not np.isfinite(wide).all() or (coded.offset is not None and not np.isfinite(coded.offset).all()):
        raise ValueError(f"{name} has a scale that is not finite: the checkpoint is damaged")
    if not zeros and not wide.all():
        raise ValueError(f"{name} has a scale of zero: the checkpoint is damaged")
    return coded
