"""The memory of quantised weights, before there are any."""

import math

import jax.numpy as jnp

from garrulax.core import spec
from garrulax.core.config import ModelConfig
from garrulax.models import parameters
from garrulax.quantisation.grid import GROUPS, TABLE_GROUPS


def planned_bytes(
    config: ModelConfig, kind: str, group: int | None = None, tables: str | None = "int8", beside: str = "float32"
) -> int:
    """Bytes of the parameters of a model after `gx.quantise`; arithmetic on shapes.

    Scales are counted as float16 where groups are shorter than a row, as they are unless weights are tiny or huge.

    Args:
        config: Of the model.
        kind: As in `gx.quantise`.
        group: As there.
        tables: As there.
        beside: Dtype of what is not quantised.
    """
    plain = jnp.dtype(beside).itemsize
    kept = {"head"} if getattr(config, "normalized_head", False) else set()

    def one(path: str, s: spec.ParamSpec) -> int:
        table = s.role == "embedding"
        if s.role == "vector" or path in kept or (table and tables is None):
            return math.prod(s.shape) * plain
        form = (tables or "") if table else kind
        inputs = math.prod(s.layer_shape[1:] if table else s.layer_shape[: s.inputs])
        size = TABLE_GROUPS.get(form, -1) if table else GROUPS[form] if group is None else group
        size = inputs if size == -1 else min(size, inputs)
        groups, bits = -(-inputs // size), 4 if form.endswith("4") else 8
        size += size % 2 if bits == 4 else 0
        scale = 2 if size < inputs else 4
        factors = 4 * inputs * (s.layers or 1) if table and form == "int8" else 0
        return math.prod(s.shape) // inputs * groups * (size * bits // 8 + scale) + factors

    return sum(one(path, s) for path, s in spec.named_specs(parameters(config)).items())
