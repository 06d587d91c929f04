"""The least time of each part of a training step: operations over the peak, bytes over the bandwidth.

With N weights that multiply a token, L layers of H heads of width C, B x T tokens, V words, P parameters:

- products: 6 N FLOPs a token; recomputation is not counted;
- attention: 14 H C FLOPs a pair of tokens that attend, and layer: 4 forward and 10 backward;
- elementwise: bytes of activations in bfloat16, each read and written once where a fusion begins or ends: a token and
  layer 20 D (two norms and residual sums, both directions), 8 F (activation; 12 F where it is gated) and 8 (H + K) C
  (rotary embedding; none for learned positions), with D the width, F that of the feed-forward part, K key heads;
- loss: 4 bytes a logit: read once, and the gradient written once, in bfloat16;
- optimizer: 32 bytes a parameter for AdamW (gradient twice, for its norm; parameter and two moments read and written),
  24 for the matrices that Muon updates, and its five Newton-Schulz iterations of 4 m² n + 2 m³ FLOPs for m x n, m <= n
  (as they are published: iterating on the m x m products alone, or using their symmetry, takes less than this);
- copies: none are needed.
"""

import math
from typing import Any

from garrulax import models
from garrulax.core import spec
from garrulax.models.summary import matmul_parameters


def floors(config: Any, tokens: int, pairs: int, optimizer: str, peak: float, bandwidth: float) -> dict[str, float]:
    """Milliseconds a step of each part.

    Args:
        config: Of the model.
        tokens: Of a batch.
        pairs: Of tokens that attend, over the rows of the batch.
        optimizer: "adamw" or "muon".
        peak: FLOP/s.
        bandwidth: Bytes/s.
    """
    heads = config.heads * config.head_dim
    specs = spec.named_specs(models.parameters(config))
    rotated = 0 if "positions" in specs else heads + config.kv_heads * config.head_dim
    feed = math.prod(specs["blocks/mlp/up"].layer_shape) // config.width
    gated = any(name.endswith("mlp/gate") for name in specs)
    activations = 2 * (10 * config.width + (6 if gated else 4) * feed + 4 * rotated)
    work = {
        "products": 6 * matmul_parameters(config) * tokens / peak,
        "attention": 14 * heads * pairs * config.layers / peak,
        "elementwise": activations * tokens * config.layers / bandwidth,
        "loss": 4 * tokens * config.vocab / bandwidth,
        "optimizer": _optimizer(specs, optimizer, peak, bandwidth),
        "copies": 0.0,
    }
    return {part: 1e3 * seconds for part, seconds in work.items()}


def _optimizer(specs: dict[str, Any], optimizer: str, peak: float, bandwidth: float) -> float:
    seconds = 0.0
    for s in specs.values():
        size = math.prod(s.shape)
        if optimizer != "muon" or s.role != "matrix":
            seconds += 32 * size / bandwidth
            continue
        sides = math.prod(s.layer_shape[: s.inputs]), math.prod(s.layer_shape[s.inputs :])
        m, n = min(sides), max(sides)
        seconds += 24 * size / bandwidth + (s.layers or 1) * 5 * (4 * m**2 * n + 2 * m**3) / peak
    return seconds
