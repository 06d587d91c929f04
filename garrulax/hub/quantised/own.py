"""Quantised parameters in our own format: `{path}.codes`, `{path}.scale` and so on, which `save` writes as they are."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from garrulax.core import spec
from garrulax.core.codes import Form
from garrulax.core.quantised import Quantised
from garrulax.hub.quantised.parameters import sides
from garrulax.hub.quantised.tensors import raw_array
from garrulax.hub.quantised.writing import FIELDS, OWN_METHOD
from garrulax.hub.tensors import StoredTensor

_KINDS = {("int", 4), ("int", 8), ("e4m3", 8), ("table", 4)}


@dataclasses.dataclass(frozen=True)
class OwnWeight:
    """A quantised parameter, or one layer of it.

    Attributes:
        form: Its static part.
        parts: The stored arrays, by the names of `core.quantised.Quantised`.
        name: Of the parameter.
        zero_scales: Number of scales that were zero when it was saved.
    """

    form: Form
    parts: Mapping[str, StoredTensor]
    name: str
    zero_scales: int

    def read(self, dtype: str) -> Quantised:
        """The weight of numpy arrays. Raises ValueError if a scale is not finite, or became zero."""
        arrays = {}
        for end in FIELDS:
            if end in self.parts:
                arrays[end] = raw_array(self.parts[end], f"{self.name}.{end}")
                if np.issubdtype(arrays[end].dtype, np.floating) and not np.isfinite(arrays[end]).all():
                    raise ValueError(f"{self.name}.{end} is not finite: the checkpoint is damaged")
        zeros = int((arrays["scale"] == 0).sum())
        if zeros != self.zero_scales:
            raise ValueError(
                f"{self.name}.scale has {zeros} zeros, but had {self.zero_scales} when it was saved: the checkpoint is "
                "damaged"
            )
        form = dataclasses.replace(self.form, dtype=dtype)
        return Quantised(**{end: arrays.get(end) for end in FIELDS}, form=form)  # type: ignore[arg-type]


Own = dict[str, OwnWeight | list[OwnWeight]]  # path of a parameter -> itself, or its layers


def take_own(
    raw: Mapping[str, Any], specs: spec.Tree, found: Mapping[str, StoredTensor]
) -> tuple[Own, dict[str, StoredTensor]]:
    """The quantised parameters of a folder in our own format, and its other tensors.

    Raises:
        ValueError: The tensors do not fit config.json.
    """
    named, rest = spec.named_specs(specs), dict(found)
    own: Own = {}
    for name, settings in raw["quantization_config"]["weights"].items():
        top, _, below = name.partition("/")
        number, _, short = below.partition("/")
        path = f"{top}/{short}" if top == "blocks" and number.isdigit() else name
        if path not in named:
            raise ValueError(f"config.json names a quantised parameter {name[:80]!r}, which this model does not have")
        s = named[path]
        parts = _parts(rest, name, settings["fields"])
        one = OwnWeight(_form(s, settings, name), parts, name, settings.get("zero_scales", 0))
        _check_shapes(s, one, stacked=bool(s.layers) and path == name)
        if path == name:
            own[name] = one
        else:
            layers = own.setdefault(path, [])
            assert isinstance(layers, list)
            layers.append(one)
    short_of = [p for p, layers in own.items() if isinstance(layers, list) and len(layers) != named[p].layers]
    if short_of:
        raise ValueError(f"{short_of[0]} is quantised in some layers only, which is not implemented")
    return own, rest


def is_own(raw: Mapping[str, Any]) -> bool:
    """Whether config.json says that the folder is in our own format."""
    settings = raw.get("quantization_config")
    return isinstance(settings, Mapping) and settings.get("quant_method") == OWN_METHOD


def _form(s: spec.ParamSpec, settings: Mapping[str, Any], name: str) -> Form:
    inner, outer = sides(s)
    kind, bits, group = settings["kind"], settings["bits"], settings["group"]
    rounded = settings.get("activations", 0)
    known = (kind, bits) in _KINDS and (rounded == 0 or (rounded, kind, bits, group) == (8, "int", 8, math.prod(inner)))
    if not known or type(group) is not int or group < 1 or len(settings["values"]) not in (0, 16):
        raise ValueError(
            f"config.json: {name} is quantised as {kind}, {bits} bits, group {group}: there is no such form"
        )
    values = tuple(settings["values"])
    return Form(kind, bits, group, inner, outer, s.role == "matrix", values=values, activations=rounded)


def _parts(rest: dict[str, StoredTensor], name: str, fields: list[str]) -> dict[str, StoredTensor]:
    missing = [end for end in {"codes", "scale", *fields} if f"{name}.{end}" not in rest]
    if missing:
        raise ValueError(f"{name}, which is quantised, lacks {', '.join(sorted(missing))}")
    return {end: rest.pop(f"{name}.{end}") for end in fields}


def _check_shapes(s: spec.ParamSpec, one: OwnWeight, stacked: bool) -> None:
    """Raises ValueError if an array of a parameter is not of the shape that its form gives."""
    f, lead = one.form, (s.layers,) if stacked else ()
    groups = -(-f.inputs // f.group)
    wanted = {
        "codes": (f.outputs, groups * f.group * f.bits // 8), "scale": (f.outputs, groups),
        "offset": (f.outputs, groups), "order": (groups * f.group,), "factors": (f.inputs,),
    }  # fmt: skip
    for end, tensor in one.parts.items():
        if tensor.shape != (*lead, *wanted[end]):
            raise ValueError(f"{one.name}.{end} is {tensor.shape}, not {(*lead, *wanted[end])}")


def read_own(own: OwnWeight | list[OwnWeight], dtype: str, plain: bool) -> Any:
    """The parameter: a `Quantised`, a list of those of the layers, or if `plain` an array."""
    if isinstance(own, list):
        layers = [one.read(dtype) for one in own]
        return np.stack([np.asarray(layer.dense()) for layer in layers]) if plain else layers
    leaf = own.read(dtype)
    return np.asarray(jax.jit(Quantised.dense)(leaf)) if plain else leaf
