"""Floating-point operations of training, and the peak rates of known devices."""

import jax

from garrulax.core.config import ModelConfig
from garrulax.models.summary import flops_per_token

#: Peak FLOP/s of dense bfloat16 matrix products of one device, from the makers' data sheets.
_PEAKS = {
    "TPU v4": 275e12,
    "TPU v4 lite": 138e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
}


def train_flops_per_token(config: ModelConfig, window: int) -> int:
    """FLOPs of forward and backward pass per token: 6 N + 12 L H C T (Chowdhery et al. 2022, appendix B).

    N is the number of weights that a token is multiplied by, with the output projection. Attention counts all pairs of
    tokens, also those that a causal mask hides. Recomputation by remat is not counted.

    Args:
        config: Of the model.
        window: T, tokens in a row.
    """
    return 3 * flops_per_token(config, window)


def peak_flops(device: jax.Device) -> float | None:
    """Peak FLOP/s of bfloat16 matrix products on this kind of device; None if unknown, as for CPUs."""
    kind = device.device_kind
    known = [name for name in _PEAKS if kind.startswith(name)]
    return _PEAKS[max(known, key=len)] if known else None
