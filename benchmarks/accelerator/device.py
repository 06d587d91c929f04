"""The accelerator that JAX uses in this process. As a program it reports its name."""

import sys

import jax

from accelerator.workers import emit


class NoGPU(RuntimeError):
    """JAX finds no accelerator here: what it would measure is the CPU."""


def accelerator() -> str:
    """The name of the first device.

    Raises:
        NoGPU: It is a CPU, or there is none.
    """
    try:
        device = jax.devices()[0]
    except (RuntimeError, AssertionError) as error:  # JAX_PLATFORMS=cuda without a GPU, or without the CUDA build
        raise NoGPU(_advice((str(error).splitlines() or ["JAX_PLATFORMS names what is not there"])[0])) from error
    if device.platform == "cpu":
        raise NoGPU(_advice("it has only the CPU"))
    return device.device_kind


def _advice(reason: str) -> str:
    return (
        f"jax {jax.__version__} of {sys.executable} finds no GPU: {reason}. Install the CUDA build of jax on a machine"
        " with an NVIDIA GPU (pip install 'jax[cuda13]'), or name a Python that has it: make gpu GPU_PYTHON=python3."
        " Tiny sizes run on a CPU: python benchmarks/gpu.py --tiny"
    )


if __name__ == "__main__":
    try:
        emit("device", accelerator(), "")
    except NoGPU as error:
        raise SystemExit(f"NoGPU: {error}") from None
