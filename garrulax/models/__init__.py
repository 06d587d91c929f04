"""Language models: one file a family (`contract.py` says which names it has), and what all families have in common.

A family's formats of config.json stand beside it in a second file, `*_hf.py`, where they are many.
"""

from garrulax.core.config import ModelConfig
from garrulax.models.contract import Family, register
from garrulax.models.forward_pass import (
    blanks,
    cache_for,
    check_cache,
    count,
    default_cache,
    forward,
    hidden,
    init,
    parameters,
    unstack,
)
from garrulax.models.registry import FAMILIES, family, preset, presets

__all__ = [
    "FAMILIES",
    "Family",
    "ModelConfig",
    "blanks",
    "cache_for",
    "check_cache",
    "count",
    "default_cache",
    "family",
    "forward",
    "hidden",
    "init",
    "parameters",
    "preset",
    "presets",
    "register",
    "unstack",
]
