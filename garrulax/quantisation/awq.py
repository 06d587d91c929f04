"""AWQ's scales of inputs (Lin et al. 2023, arXiv 2306.00978; casper-hansen/AutoAWQ).

Inputs with large activations matter more. Their weights are multiplied by a factor before they are rounded, so that
they lose less, and the activations are divided by it. AutoAWQ puts the division into the layer before; here the weight
keeps the factors, so that any matrix of any family can have them.
"""

from collections.abc import Sequence

import numpy as np

from garrulax.core.coded import Coded
from garrulax.quantisation.grid import in_groups

STEPS = 20  # of the search


def awq_grid(w: np.ndarray, bits: int, group: int, symmetric: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [rows, groups, group], scale and zero [rows, groups, 1] of AutoAWQ, whose ranges need not contain zero.

    Symmetric codes are in -8..7, others in 0..15 (of 4 bits).
    """
    groups = in_groups(w, group)
    top = (1 << bits) - 1
    if symmetric:
        scale = np.maximum(np.abs(groups).max(-1, keepdims=True), np.float32(1e-5)) / np.float32(top // 2)
        return np.clip(np.round(groups / scale), -(top // 2) - 1, top // 2), scale, np.zeros_like(scale)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    scale = np.maximum(high - low, np.float32(1e-5)) / np.float32(top)
    zero = np.clip(-np.round(low / scale), 0, top)
    return np.clip(np.round(groups / scale) + zero, 0, top), scale, zero


def awq_rounded(w: np.ndarray, bits: int, group: int, symmetric: bool) -> np.ndarray:
    """The numbers of the codes of `awq_grid`."""
    codes, scale, zero = awq_grid(w, bits, group, symmetric)
    return ((codes - zero) * scale).reshape(len(w), -1)[:, : w.shape[1]]


def awq_factors(
    weights: Sequence[np.ndarray], x: np.ndarray, bits: int, group: int, symmetric: bool = False, duo: bool = True
) -> np.ndarray:
    """The factors [inputs] of matrices that share their inputs, by a search for the least error of their outputs.

    Args:
        weights: float32 [outputs, inputs] each.
        x: float32 [rows, inputs], inputs of the calibration texts.
        bits: Of a code.
        group: Inputs that share a scale.
        symmetric: Whether zero is the middle of the codes.
        duo: Whether the sizes of the weights count besides those of the inputs.
    """
    every = np.concatenate(weights)
    groups = in_groups(every, group)
    relative = np.abs(groups) / (np.abs(groups).max(-1, keepdims=True) + np.float32(1e-6))
    w_mean = relative.reshape(len(every), -1)[:, : every.shape[1]].mean(0)
    x_mean = np.abs(x).mean(0)
    wanted = x @ every.T
    best, least = np.ones_like(x_mean), np.inf
    for step in range(STEPS):
        ratio = step / STEPS
        power = x_mean**ratio
        factors = np.maximum(power / (w_mean ** (1 - ratio) + 1e-4) if duo else power, 1e-4).astype(np.float32)
        factors /= np.sqrt(factors.max() * factors.min())
        factors[~np.isfinite(factors)] = 1
        rounded = awq_rounded(every * factors, bits, group, symmetric) / factors
        error = float(((x @ rounded.T - wanted) ** 2).mean())
        if error < least:
            best, least = factors, error
    return best


def awq_coded(w: np.ndarray, x: np.ndarray, bits: int, group: int, symmetric: bool) -> Coded:
    """A matrix with the factors that the search finds for it."""
    group = w.shape[1] if group == -1 else min(group, w.shape[1])
    factors = awq_factors([w], x, bits, group, symmetric)
    codes, scale, zero = awq_grid(w * factors, bits, group, symmetric)
    whole = codes.reshape(len(w), -1)[:, : w.shape[1]]
    if symmetric:
        whole = (whole + 8).astype(np.uint8) if bits == 4 else whole.astype(np.int8)
        return Coded(whole, scale[..., 0], None, group, bits=bits, factors=1 / factors)
    return Coded(
        whole.astype(np.uint8), scale[..., 0], zero[..., 0].astype(np.uint8), group, bits=bits, factors=1 / factors
    )
