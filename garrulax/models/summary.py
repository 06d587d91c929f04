"""The costs of a configuration: parameters by part, FLOPs a token, bytes. Arithmetic on the ParamSpec tree alone."""

import dataclasses
import math

import numpy as np

from garrulax import models
from garrulax.core import spec
from garrulax.core.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Summary:
    """Costs of one configuration.

    Attributes:
        parameters: Number of parameters.
        parts: Number of parameters of each part of the model; they sum to `parameters`.
        matmul_parameters: Parameters that multiply a token: matrices and the output embedding, not norms, biases or
            tables that are only looked up.
        forward_flops: Floating-point operations of the forward pass a token, at the full context.
        training_flops: The same of a training step.
        cache_values: Numbers cached a token.
    """

    parameters: int
    parts: dict[str, int]
    matmul_parameters: int
    forward_flops: int
    training_flops: int
    cache_values: int


def summarize(config: ModelConfig) -> Summary:
    """The `Summary` of a configuration."""
    specs = spec.named_specs(models.parameters(config))
    sizes = {name: math.prod(s.shape) for name, s in specs.items()}
    parts: dict[str, int] = {}
    for name, size in sizes.items():
        part = _part(name)
        parts[part] = parts.get(part, 0) + size
    forward = flops_per_token(config, config.context)
    return Summary(
        parameters=sum(sizes.values()),
        parts=parts,
        matmul_parameters=matmul_parameters(config),
        forward_flops=forward,
        training_flops=3 * forward,
        cache_values=2 * config.layers * config.kv_heads * config.head_dim,
    )


def _part(name: str) -> str:
    names = {"tokens": "token embedding", "positions": "position embedding", "span_positions": "position embedding",
             "head": "output head"}  # fmt: skip
    first, *rest = name.split("/")
    if first == "blocks":
        return {"attention": "attention", "mlp": "feed-forward"}.get(rest[0], "norms")
    return names.get(first, "norms" if first == "norm" else "other")


def matmul_parameters(config: ModelConfig) -> int:
    """Parameters that multiply every token: all matrices, and the embedding that gives the logits."""
    specs = spec.named_specs(models.parameters(config))
    matrices = sum(math.prod(s.shape) for s in specs.values() if s.role == "matrix")
    return matrices + math.prod(specs["tokens" if config.tied else "head"].shape)


def flops_per_token(config: ModelConfig, length: int) -> int:
    """Floating-point operations of the forward pass a token, in a text of `length` tokens.

    Two a parameter that multiplies the token, and in each layer 4 H C for every key attended to: scores, and their
    product with the values. Causal masks are not halved (Chowdhery et al. 2022, appendix B); windows and bands count
    only the keys that they leave. The backward pass costs twice as much again.
    """
    family = models.family(config)
    keys = sum(family.keys_attended(config, layer, length) for layer in range(config.layers))
    return 2 * matmul_parameters(config) + 4 * config.heads * config.head_dim * keys


def bytes_of(count: int, dtype: str) -> int:
    """Bytes of `count` numbers of a dtype such as float32 or bfloat16."""
    return count * (2 if dtype == "bfloat16" else np.dtype(dtype).itemsize)
