"""Floor 1: the mask algebra and attention. One function, `attention`, picks the implementation."""

from garrulax.kernels.attention import attention
from garrulax.kernels.mask import And, Band, Bits, KRange, Mask, Not, Or, Rule, causal, packed, padded, prefix

__all__ = [
    "And",
    "Band",
    "Bits",
    "KRange",
    "Mask",
    "Not",
    "Or",
    "Rule",
    "attention",
    "causal",
    "packed",
    "padded",
    "prefix",
]
