"""Held-out loss, perplexity and bits per byte."""

import dataclasses
import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from garrulax.core.config import ModelConfig
from garrulax.core.spec import Tree
from garrulax.train.batches import HostBatch, on_devices
from garrulax.train.objectives import Objective
from garrulax.train.step import compute_dtype, should_unroll


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        loss: Mean negative log-likelihood, nats per token.
        tokens: Number of predicted tokens.
        bytes: Size of the text that they stand for, 0 if unknown.
        reward: Mean reward of what the model writes, in reinforcement learning, where `loss` is minus that; else None.
    """

    loss: float
    tokens: int
    bytes: float
    reward: float | None = None

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Total negative log-likelihood in bits divided by the bytes of the text: comparable across tokenizers."""
        return self.loss * self.tokens / math.log(2) / self.bytes if self.bytes else None


def make_evaluate(
    config: ModelConfig, objective: Objective, *, mesh: Mesh | None = None, precision: str = "float32"
) -> Callable[..., Evaluation]:
    """Makes the function `evaluate(params, batches, tokens=0) -> Evaluation`, which runs without dropout.

    `batches` are host batches from `Data.held_out`; `tokens` stops the evaluation after so many predicted tokens, 0
    takes all batches. Totals are summed in float64.

    Args:
        config: Of the model.
        objective: To evaluate.
        mesh: Of the parameters; None is one device.
        precision: Dtype of the computation, a name in `settings.PRECISIONS`.
    """

    @jax.jit
    def totals(params, batch):
        loss, aux = objective(compute_dtype(params, precision), batch, config, None, unroll=should_unroll(config))
        return loss * aux["tokens"], aux["tokens"], jnp.sum(batch["bytes"])

    def evaluate(params: Tree, batches: Iterable[HostBatch], tokens: int = 0) -> Evaluation:
        nll = count = size = 0.0
        for batch in batches:
            n, c, s = jax.device_get(totals(params, on_devices(batch, mesh)))
            nll, count, size = nll + float(n), count + float(c), size + float(s)
            if tokens and count >= tokens:
                break
        if not count:
            raise ValueError("the held-out text has no token to predict: use more text")
        return Evaluation(nll / count, round(count), size)

    return evaluate
