"""Quantised models: rounding to nearest, GPTQ, AWQ and SmoothQuant."""

from garrulax.quantisation.model import MatrixError, dequantise, quantise

__all__ = ["MatrixError", "dequantise", "quantise"]
