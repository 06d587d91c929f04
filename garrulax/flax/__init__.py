"""Layer 4: any configuration as a Flax module, for programs built of such modules. No other package imports it.

    from garrulax.flax import linen_module, nnx_module, params_of

    model = nnx_module(config, params=params)           # flax.nnx: the module holds its parameters
    logits, _ = model(tokens)

    model = linen_module(config)                        # flax.linen: parameters are an argument
    logits, _ = model.apply({"params": params}, tokens)

Both call `garrulax.forward`. The parameters of a module are those of `garrulax.init`: the same arrays (no copies) under
the same names. Linen and NNX are imported on first use, and using one does not import the other.
"""

import importlib
from typing import Any

_HOME = {"linen_module": "linen", "logical_axes": "linen", "nnx_module": "nnx", "params_of": "nnx"}

__all__ = ["linen_module", "logical_axes", "nnx_module", "params_of"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'garrulax.flax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"garrulax.flax.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
