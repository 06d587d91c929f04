"""Mosaic GPU's interpreter, which runs kernels for GPUs on a CPU: shared memory, copies and barriers are simulated."""

import jax
import pytest


def interpreted():
    """A context in which kernels are interpreted. Skips the test where this jax's interpreter lacks what they use."""
    if jax.__version_info__ < (0, 11):
        pytest.skip("the interpreter of Mosaic GPU cannot load into a layout before jax 0.11")
    from jax._src.pallas.mosaic_gpu.interpret import params

    return params.force_gpu_interpret_mode(params.InterpretGPUParams())
