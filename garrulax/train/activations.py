"""Numbers that the forward pass of training keeps for the backward pass."""

import math

from garrulax import models
from garrulax.core import spec
from garrulax.core.config import ModelConfig


def saved_per_token(config: ModelConfig, remat: str) -> int:
    """Numbers a token that the forward pass keeps for the backward pass.

    A product needs its input there, and what follows needs its output: for each weight [inputs, outputs] both are
    counted, and two more widths for the norms and the residual sum. With remat "dots" only the outputs are kept; with
    "full" the input of every layer, and one layer is computed again at a time.

    Args:
        config: Of the model.
        remat: none, dots or full.
    """
    outputs = outputs_per_token(config)
    both = outputs + sum(math.prod(s.layer_shape[: s.inputs]) for s in _matrices(config))
    layer = both + 2 * config.width
    if remat == "full":
        return config.layers * config.width + layer
    if remat == "dots":
        return config.layers * (outputs + config.width) + layer
    return config.layers * layer


def _matrices(config: ModelConfig) -> list[spec.ParamSpec]:
    """The weights of one layer's products."""
    specs = spec.named_specs(models.parameters(config))
    return [s for name, s in specs.items() if name.startswith("blocks/") and s.role == "matrix"]


def outputs_per_token(config: ModelConfig) -> int:
    """Numbers a token that the products with one layer's weights give."""
    return sum(math.prod(s.layer_shape[s.inputs :]) for s in _matrices(config))
