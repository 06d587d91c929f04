"""Objectives: `loss(params, batch, config, key, **options) -> (scalar, metrics)`.

A batch is a dict of arrays: tokens and targets int32 [B, T], weights float32 [B, T] (0 where nothing is predicted), and
where the objective has them positions (int32 [B, T] or [B, 2, T]) and the mask streams rank and segment int32 [B, T].
The scalar is a mean; metrics["tokens"] is what it is a mean over, so that micro-batches can be weighed by it. key
gives dropout, None none. options go to `garrulax.forward` (remat, unroll). An objective of your own with the same
signature goes into `step.make_train_step` as it is.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from garrulax import models
from garrulax.core.spec import Tree
from garrulax.kernels.mask import Mask

Batch = dict[str, jax.Array]
Objective = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


def causal_lm(
    params: Tree, batch: Batch, config: Any, key: jax.Array | None = None, **options: Any
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean negative log-likelihood (nats) of the targets, each predicted from the tokens up to its own position.

    Rows may be packed: the batch's streams say so (`mask_of`).
    """
    return _token_loss(params, batch, config, key, options)


def blank_infilling(
    params: Tree, batch: Batch, config: Any, key: jax.Array | None = None, **options: Any
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean negative log-likelihood (nats) of the blanks' tokens, given the text around them (Du et al. 2022, eq. 1).

    Raises ValueError for a batch without the positions and ranks that tell the blanks from the text.
    """
    missing = {"positions", "rank"} - batch.keys()
    if missing:
        raise ValueError(f"a batch for blank infilling lacks {' and '.join(sorted(missing))}")
    return _token_loss(params, batch, config, key, options)


OBJECTIVES: dict[str, Objective] = {"causal": causal_lm, "infill": blank_infilling}


def objective_name(wanted: str | None, config: Any) -> str:
    """`wanted`, or where that is None what the family of `config` was made for."""
    return wanted or models.family(config).OBJECTIVE or "causal"


def mask_of(batch: Batch) -> Mask | None:
    """The mask of a batch from its streams; None, which is causal, where it has none."""
    if "rank" not in batch and "segment" not in batch:
        return None
    index = jnp.zeros_like(batch["tokens"]) + jnp.arange(batch["tokens"].shape[1], dtype=jnp.int32)
    return Mask({"rank": batch.get("rank", index), "segment": batch.get("segment", jnp.zeros_like(index))})


def negative_log_likelihood(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log softmax(logits)[target], in at least float32. logits: [..., V]; targets: int32 [...].

    The target's logit is picked by a sum over the vocabulary, which compiles to one fused reduction and, unlike a
    gather, allows the vocabulary to be sharded.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    hit = jnp.arange(logits.shape[-1], dtype=targets.dtype) == targets[..., None]
    return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(hit, logits, 0), axis=-1)


def _token_loss(params, batch, config, key, options):
    positions, mask = batch.get("positions"), mask_of(batch)
    logits, _ = models.forward(params, batch["tokens"], config, positions=positions, mask=mask, key=key, **options)
    nll = negative_log_likelihood(logits, batch["targets"])
    weights = batch["weights"].astype(nll.dtype)
    tokens = jnp.sum(weights)
    return jnp.sum(nll * weights) / jnp.maximum(tokens, 1), {"tokens": tokens}
