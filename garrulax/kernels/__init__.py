"""Layer 1: masks, and `attention`, one function that picks the implementation."""

from garrulax.kernels import masks
from garrulax.kernels.attention import attention
from garrulax.kernels.mask import All, And, Band, Bits, KRange, Mask, Not, Or, Rule, Same, Within
from garrulax.kernels.masks import causal, packed, padded, prefix

__all__ = [
    "All",
    "And",
    "Band",
    "Bits",
    "KRange",
    "Mask",
    "Not",
    "Or",
    "Rule",
    "Same",
    "Within",
    "attention",
    "causal",
    "masks",
    "packed",
    "padded",
    "prefix",
]
