"""Kernels that were interpreted and compiled ahead of time, but have never run on a device."""
