"""Quantised parameters as tensors of a folder: in compressed-tensors' format, or in our own.

compressed-tensors is read by transformers, vLLM and others. It has integers of 4 and 8 bits, float8 and MXFP4 in linear
layers; embeddings are written as plain numbers there. Our own format has every `Quantised` as it is.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from garrulax.core import spec
from garrulax.core.coded import Coded
from garrulax.core.codes import E2M1
from garrulax.core.quantised import Quantised
from garrulax.hub.entries import Entries, WholeTensor
from garrulax.hub.quantised.parameters import output_rows

FORMATS = ("compressed-tensors", "garrulax")
OWN_METHOD = "garrulax"
FIELDS = ("codes", "scale", "offset", "order", "factors")
#: What compressed-tensors says of activations that are rounded to int8 with a scale for each row of them.
ROUNDED_ROWS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}

#: Path of a parameter -> its leaf, or a list with that of each layer.
Named = Mapping[str, Any]


def own_entries(found: Named) -> tuple[Entries, dict[str, Any]]:
    """The tensors of quantised parameters in our own format, `{path}.codes` and so on, and the keys of config.json."""
    entries: Entries = {}
    forms = {}
    for path, leaf in found.items():
        many = isinstance(leaf, list)
        for name, one in [(f"{path}/{i}", x) for i, x in enumerate(leaf)] if many else [(path, leaf)]:
            forms[name] = {
                "kind": one.form.kind, "bits": one.form.bits, "group": one.form.group, "values": one.form.values,
                "activations": one.form.activations,
                "fields": [end for end in FIELDS if getattr(one, end) is not None],
                "zero_scales": int((np.asarray(one.scale) == 0).sum()),  # some formats have groups of zeros
            }  # fmt: skip
            for end in forms[name]["fields"]:
                array = getattr(one, end)
                make = functools.partial(np.asarray, array)
                entries[f"{name}.{end}"] = WholeTensor(tuple(array.shape), np.dtype(array.dtype), make)
    return entries, {"quantization_config": {"quant_method": OWN_METHOD, "weights": forms}}


def compressed_entries(named: Mapping[str, spec.ParamSpec], found: Named) -> tuple[Entries, dict[str, Any]]:
    """The tensors of quantised matrices in compressed-tensors' format, and the keys of config.json.

    Raises:
        ValueError: A matrix is of a form that the format does not have, or there are several forms.
    """
    stored: dict[str, list[tuple[spec.ParamSpec, Any, int | None]]] = {}
    for path, leaf in found.items():
        s = named[path]
        for i, name in enumerate(s.names):
            stored.setdefault(name, []).append((s, leaf, i if s.layers else None))
    schemes: list[dict[str, Any]] = []
    entries: Entries = {}
    for name, parts in stored.items():
        leaves = [leaf if i is None else leaf[i] for _, leaf, i in parts]
        scheme = _scheme(leaves, name)
        schemes += [scheme] if scheme not in schemes else []
        outputs = sum(leaf.form.outputs for leaf in leaves)
        rows = [rows for s, _, _ in parts if (rows := output_rows(s)) is not None]
        for end, (dtype, shape) in _layout(scheme, leaves[0], outputs).items():
            make = functools.partial(_stored_array, end, scheme["weights"], leaves, rows)
            entries[f"{name.removesuffix('.weight')}.{end}"] = WholeTensor(shape, np.dtype(dtype), make)
    if len(schemes) > 1:
        raise ValueError("compressed-tensors cannot hold several forms: write the format 'garrulax'")
    quantised = {name.removesuffix(".weight") for name in stored}
    every = {n.removesuffix(".weight") for s in named.values() if s.role != "vector" for n in s.names}
    ignored = sorted({"lm_head", *every} - quantised)
    (scheme,) = schemes
    weights = {**scheme["weights"], "observer": "minmax", "dynamic": False}
    return entries, {
        "quantization_config": {
            "quant_method": "compressed-tensors", "format": scheme["format"], "quantization_status": "compressed",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"], "weights": weights, "input_activations": scheme["input_activations"],
                    "output_activations": None, "format": scheme["format"],
                }
            },
            "ignore": ignored, "kv_cache_scheme": None, "global_compression_ratio": None,
        }
    }  # fmt: skip


def _scheme(leaves: list[Quantised], name: str) -> dict[str, Any]:
    """The format and the settings of a stored matrix. Raises ValueError if compressed-tensors has none."""
    w, f = leaves[0], leaves[0].form
    shared = all(dataclasses.replace(x.form, outer=()) == dataclasses.replace(f, outer=()) for x in leaves)
    alike = shared and len({x.offset is None for x in leaves}) == 1
    reason = None
    if not alike:
        reason = "its parts are quantised in different forms"
    elif w.factors is not None:
        reason = "it has factors of its inputs (AWQ)"
    elif any(x.order is not None for x in leaves):
        reason = "its inputs are in an order of their own (act-order)"
    elif w.scale.shape[-1] > 1 and w.scale.shape[-1] * f.group != f.inputs:
        reason = f"groups of {f.group} do not divide its {f.inputs} inputs"
    elif w.offset is not None and not np.issubdtype(w.offset.dtype, np.integer):
        reason = "its groups have minima in place of zero points"
    elif f.kind == "table" and (f.values != E2M1 or f.group != 32):
        reason = f"{f.name} is not one of its formats"
    elif f.kind == "e4m3" and w.scale.shape[-1] > 1:
        reason = "float8 has a scale a row there"
    if reason:
        raise ValueError(f"compressed-tensors cannot hold {name}: {reason}; write it in the format 'garrulax'")
    channel = w.scale.shape[-1] == 1
    settings = {
        "num_bits": f.bits, "type": "int" if f.kind == "int" else "float", "symmetric": w.offset is None,
        "strategy": "channel" if channel else "group", "group_size": None if channel else f.group,
    }  # fmt: skip
    if f.kind == "table":
        name, settings = "mxfp4-pack-quantized", settings | {"scale_dtype": "torch.uint8"}
    elif f.kind == "e4m3":
        name = "float-quantized"
    else:
        name = "int-quantized" if f.bits == 8 and w.offset is None else "pack-quantized"
    return {"format": name, "weights": settings, "input_activations": ROUNDED_ROWS if f.activations else None}


def _layout(scheme: dict[str, Any], leaf: Quantised, outputs: int) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """dtype and shape of the tensors of a stored matrix, by the end of their name."""
    f, groups = leaf.form, leaf.scale.shape[-1]
    words = -(-f.inputs * f.bits // 32)
    found: dict[str, tuple[Any, tuple[int, ...]]]
    if scheme["format"] == "pack-quantized":
        found = {"weight_packed": (np.int32, (outputs, words)), "weight_shape": (np.int64, (2,))}
        if leaf.offset is not None:
            found["weight_zero_point"] = (np.int32, (-(-outputs * f.bits // 32), groups))
    elif scheme["format"] == "mxfp4-pack-quantized":
        return {"weight_packed": (np.uint8, (outputs, f.inputs // 2)), "weight_scale": (np.uint8, (outputs, groups))}
    else:
        found = {"weight": (np.int8 if f.kind == "int" else ml_dtypes.float8_e4m3fn, (outputs, f.inputs))}
    return found | {"weight_scale": (np.float32, (outputs, groups))}


def _stored_array(end: str, settings: dict[str, Any], leaves: list[Quantised], rows: list[np.ndarray]) -> np.ndarray:
    """One tensor of a stored matrix, from its parts and their rows in it."""
    parts = [Coded.of(leaf) for leaf in leaves]
    back = np.argsort(np.concatenate(rows))
    codes, scale = (np.concatenate([getattr(p, what) for p in parts])[back] for what in ("codes", "scale"))
    if end == "weight_scale" and settings["type"] == "float" and settings["num_bits"] == 4:
        return (np.log2(scale.astype(np.float32)) + 127).astype(np.uint8)
    if end == "weight_scale":
        return scale.astype(np.float32)
    if end == "weight_shape":
        return np.asarray(codes.shape, np.int64)
    if end == "weight":
        return codes if settings["type"] == "int" else codes.view(ml_dtypes.float8_e4m3fn)
    if end == "weight_zero_point":
        zeros = np.concatenate([p.offset for p in parts if p.offset is not None])[back]
        return np.ascontiguousarray(_words(np.ascontiguousarray(zeros.T), settings["num_bits"]).T)
    if settings["type"] == "float":
        return codes[:, ::2] | codes[:, 1::2] << 4
    return _words(codes, settings["num_bits"])


def _words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [n, m] as fields of 32-bit words, lowest bits first: int32 [n, words]."""
    count = 32 // bits
    padded = np.pad(codes.view(np.uint8), ((0, 0), (0, -codes.shape[1] % count)))
    octets = padded if bits == 8 else padded[:, ::2] | padded[:, 1::2] << 4
    return np.ascontiguousarray(octets).view(np.int32)
