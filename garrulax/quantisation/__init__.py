"""Quantised models: rounding to nearest, GPTQ and AWQ."""

from garrulax.quantisation.model import MatrixError, dequantise, quantise, quantise_with_errors

__all__ = ["MatrixError", "dequantise", "quantise", "quantise_with_errors"]
