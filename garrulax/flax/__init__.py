"""Floor 4: any configuration as a Flax module, for programs that are built of those. Nothing imports it but you.

    from garrulax.flax import linen_module, nnx_module, params_of

    model = nnx_module(config, params=params)           # flax.nnx: holds its parameters
    logits, _ = model(tokens)

    model = linen_module(config)                        # flax.linen: is given them
    logits, _ = model.apply({"params": params}, tokens)

Both are `garrulax.forward` behind another door. Parameters pass in and out as the very arrays that they are, under
the names that they have in the tree of `garrulax.init`. Linen and NNX are imported on first use, each for itself.
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
