"""Estimates of memory and time for `garrulax info`: of training, before a run begins, and of generating."""

import dataclasses
import math
import time

import jax
import jax.numpy as jnp
import numpy as np

from garrulax import models
from garrulax.core.config import ModelConfig
from garrulax.core.spec import Tree
from garrulax.models.summary import bytes_of
from garrulax.train.activations import outputs_per_token, saved_per_token
from garrulax.train.flops import peak_flops, train_flops_per_token
from garrulax.train.optimizers import make_optimizer
from garrulax.train.settings import Settings
from garrulax.train.state import abstract_state

#: Share of the rate of a large matrix product that training steps are taken to reach. Two CPU cores reached 0.49 with
#: SmolLM2-135M in float32, and less with smaller models; accelerators were not measured.
EFFICIENCY = 0.4
#: Memory of the program itself: Python, JAX, the compiled step and evaluation. The run above had 1.0 GiB beside the
#: other parts.
PROGRAM = 2**30
#: The same while generating on a CPU: Python, JAX, the tokenizer, and compiling. SmolLM2-135M took 0.5 GiB beside the
#: parameters and the cache, of which 0.2 were there before it was loaded and 0.2 came with compiling; others differ
#: with the number of layers and tokens.
GENERATING = 2**29


@dataclasses.dataclass(frozen=True)
class Costs:
    """Bytes and floating-point operations of a training run on one device.

    Attributes:
        parameters: Bytes.
        gradients: Bytes.
        optimizer: Bytes of the optimizer's state.
        copies: Bytes of the parameters in the dtype of the computation, if it is another one.
        activations: Bytes that the backward pass reads, without the logits.
        logits: Bytes of the logits and their gradient.
        save: Bytes of the copy of the state that is written in the background.
        flops: Of one step.
    """

    parameters: int
    gradients: int
    optimizer: int
    copies: int
    activations: int
    logits: int
    save: int
    flops: int

    @property
    def memory(self) -> int:
        """Bytes at the most: all but `save` in a step, which may go on while a checkpoint is written."""
        return (
            self.parameters + self.gradients + self.optimizer + self.copies + self.activations + self.logits + self.save
        )


def training_costs(config: ModelConfig, settings: Settings) -> Costs:
    """The costs of a run; arithmetic on shapes, which allocates nothing.

    Args:
        config: Of the model.
        settings: Of the run; uses batch, accumulation, window, optimizer, weights, precision and remat.
    """
    state = abstract_state(config, make_optimizer(settings, models.parameters(config)), dtype=settings.weights)
    count = models.count(config)
    tokens = settings.batch // settings.accumulation * settings.window
    size = jnp.dtype(settings.precision).itemsize
    parameters, optimizer = bytes_of(count, settings.weights), _bytes(state.opt_state)
    return Costs(
        parameters=parameters,
        gradients=bytes_of(count, "float32" if settings.accumulation > 1 else settings.weights),
        optimizer=optimizer,
        copies=0 if settings.precision == settings.weights else bytes_of(count, settings.precision),
        activations=tokens * size * saved_per_token(config, settings.remat),
        logits=tokens * config.vocab * (4 + size),
        save=parameters + optimizer,
        flops=settings.batch * settings.window * train_flops_per_token(config, settings.window),
    )


def reading_bytes(config: ModelConfig, tokens: int) -> int:
    """Bytes in float32 that reading a prompt takes for a moment beside the cache, roughly.

    That is what one layer computes, twice over. XLA's plans on CPUs lie between 0.4 and 1.4 times that.

    Args:
        config: Of the model.
        tokens: Length of the prompt, of which no logits are computed.
    """
    return tokens * 4 * 2 * outputs_per_token(config)


def measured_rate(dtype: str) -> float:
    """FLOP/s of a product of two square matrices of a dtype on the first device, measured in about a second."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        product(x, x).block_until_ready()
        seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / float(np.median(seconds))


def device_rate(dtype: str) -> tuple[float, str]:
    """FLOP/s of matrix products on the first device, and where the number is from: its data sheet, or measured."""
    device = jax.devices()[0]
    known = peak_flops(device) if dtype == "bfloat16" else None
    if known is not None:
        return known, f"the peak rate of {device.device_kind}"
    return measured_rate(dtype), f"matrix products in {dtype}, measured now on {device.device_kind}"


def _bytes(tree: Tree) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
