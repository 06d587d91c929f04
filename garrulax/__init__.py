"""Garrulax: language models in JAX as configurations, trees of parameters and pure functions.

    import jax, garrulax as gx

    config = gx.preset("gpt2")
    params = gx.init(config, jax.random.key(0))
    logits, _ = gx.forward(params, tokens, config)

Names are imported on first use, so that `import garrulax` costs next to nothing.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "preset": "garrulax.models",
    "presets": "garrulax.models",
    "init": "garrulax.models",
    "forward": "garrulax.models",
    "count": "garrulax.models",
    "unstack": "garrulax.models",
    "cache_for": "garrulax.models",
    "glitch_tokens": "garrulax.models.glitch",
    "MedusaHeads": "garrulax.models.medusa",
    "make_mesh": "garrulax.core.sharding",
    "Mask": "garrulax.kernels.mask",
    "load": "garrulax.hub",
    "load_config": "garrulax.hub",
    "save": "garrulax.hub",
    "Model": "garrulax.hub",
    "lora": "garrulax.hub.adapters",
    "merge": "garrulax.hub.adapters",
    "load_adapter": "garrulax.hub.adapters",
    "save_adapter": "garrulax.hub.adapters",
    "load_medusa": "garrulax.hub",
    "save_medusa": "garrulax.hub",
    "generate": "garrulax.sampling",
    "stream": "garrulax.sampling",
    "fill": "garrulax.sampling",
    "fill_stream": "garrulax.sampling",
    "Filled": "garrulax.sampling",
    "beam": "garrulax.sampling",
    "diverse_beam": "garrulax.sampling",
    "contrastive": "garrulax.sampling",
    "best_of": "garrulax.sampling",
    "prompt_lookup": "garrulax.sampling",
    "medusa": "garrulax.sampling.speculate",
    "draft": "garrulax.sampling",
    "window": "garrulax.sampling",
    "sinks": "garrulax.sampling",
    "blocks": "garrulax.sampling",
    "Completion": "garrulax.sampling",
    "watermark": "garrulax.sampling",
    "Watermark": "garrulax.sampling",
    "detect_watermark": "garrulax.sampling",
    "Detection": "garrulax.sampling",
    "Constraint": "garrulax.sampling.constrain",
    "json_schema": "garrulax.sampling.constrain",
    "regex": "garrulax.sampling.constrain",
    "grammar": "garrulax.sampling.constrain",
    "tool_call": "garrulax.sampling.constrain",
    "parse_tool_calls": "garrulax.sampling.constrain",
    "ToolCall": "garrulax.sampling.constrain",
    "score": "garrulax.evaluate",
    "Score": "garrulax.evaluate",
    "perplexity": "garrulax.evaluate",
    "Perplexity": "garrulax.evaluate",
    "choose": "garrulax.evaluate",
    "Choice": "garrulax.evaluate",
    "plan": "garrulax.planning.plan",
    "quantise": "garrulax.quantisation",
    "dequantise": "garrulax.quantisation",
    "train_medusa": "garrulax.train.train_medusa",
    "medusa_accuracy": "garrulax.train.train_medusa",
}

_PACKAGES = ("models", "layers", "kernels", "train", "align", "sampling", "evaluate", "quantisation", "hub", "planning")

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"garrulax.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'garrulax' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *_PACKAGES])
