"""Objectives: functions `loss(params, batch, config, key, **options) -> (scalar, metrics)`.

    params: of the model.
    batch: a dict of arrays. Always tokens and targets, int32 [B, T], and weights, float32 [B, T], 0 where the loss
      ignores the target. Some objectives also have positions, int32 [B, T] or [B, 2, T], and the streams of the mask,
      rank and segment, int32 [B, T].
    config: of the model.
    key: PRNG key for dropout; None is without dropout.
    options: passed on to `garrulax.forward` (remat, unroll); and `extra`, the `Regularizers` of the training loss, only
      if the settings of a run ask for any.

The scalar is a mean, and metrics["tokens"] is the number of tokens in that mean: it is the weight of a micro-batch when
several are averaged. Any function with this signature can be given to `step.make_train_step`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from garrulax import models
from garrulax.core import spec
from garrulax.core.config import ModelConfig
from garrulax.core.dtypes import at_least_float32
from garrulax.core.einsum import like_tokens
from garrulax.core.spec import Tree
from garrulax.kernels.mask import Mask
from garrulax.train import token_loss
from garrulax.train.regularizers import Regularizers, regularized, shrunk

Batch = dict[str, jax.Array]
Objective = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


def causal_lm(
    params: Tree, batch: Batch, config: ModelConfig, key: jax.Array | None = None, **options: Any
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean negative log-likelihood (nats) of the targets, each predicted from the tokens up to its position.

    A row may have several documents: then the batch has the mask streams of `mask_of`.

    Args:
        params: Of the model.
        batch: Tokens, targets, weights; positions, rank and segment if rows are packed.
        config: Of the model.
        key: PRNG key for dropout; None is without dropout.
        **options: `extra` (`Regularizers`); others are passed on to `garrulax.forward`.

    Returns:
        The mean, and the metrics: tokens, the sum of the weights.
    """
    return _token_loss(params, batch, config, key, options)


def blank_infilling(
    params: Tree, batch: Batch, config: ModelConfig, key: jax.Array | None = None, **options: Any
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean negative log-likelihood (nats) of the tokens in the blanks (Du et al. 2022, eq. 1).

    Args:
        params: Of the model.
        batch: From `infill.infill_batch`.
        config: Of the model.
        key: PRNG key for dropout; None is without dropout.
        **options: `extra` (`Regularizers`); others are passed on to `garrulax.forward`.

    Returns:
        The mean, and the metrics: tokens, the sum of the weights.

    Raises:
        ValueError: If the batch has no positions or no rank.
    """
    missing = {"positions", "rank"} - batch.keys()
    if missing:
        raise ValueError(f"a batch for blank infilling lacks {' and '.join(sorted(missing))}")
    return _token_loss(params, batch, config, key, options)


def prefix_lm(
    params: Tree, batch: Batch, config: ModelConfig, key: jax.Array | None = None, **options: Any
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean negative log-likelihood (nats) of the targets after a prefix, whose tokens attend to one another.

    Args:
        params: Of the model.
        batch: With rank and segment, from `prompts.with_prefixes`.
        config: Of the model.
        key: PRNG key for dropout; None is without dropout.
        **options: Passed on to `garrulax.forward`.

    Returns:
        The mean, and the metrics: tokens, the sum of the weights.

    Raises:
        ValueError: If the batch has no rank.
    """
    if "rank" not in batch:
        raise ValueError("a batch for prefix LM lacks rank")
    return _token_loss(params, batch, config, key, options)


OBJECTIVES: dict[str, Objective] = {"causal": causal_lm, "prefix": prefix_lm, "infill": blank_infilling}


def objective_name(wanted: str | None, config: ModelConfig) -> str:
    """`wanted`, or if that is None the default objective of the config's family."""
    return wanted or models.family(config).OBJECTIVE


def mask_of(batch: Batch) -> Mask | None:
    """The mask of a batch, from its streams rank and segment; None, which means causal, if it has neither."""
    if "rank" not in batch and "segment" not in batch:
        return None
    index = jnp.zeros_like(batch["tokens"]) + jnp.arange(batch["tokens"].shape[1], dtype=jnp.int32)[None]
    return Mask({"rank": batch.get("rank", index), "segment": batch.get("segment", jnp.zeros_like(index))})


def negative_log_likelihood(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log softmax(logits)[target], in at least float32.

    Args:
        logits: [..., V], of any float dtype.
        targets: int32 [...].

    Returns:
        Nats, [...].
    """
    logits = logits.astype(at_least_float32(logits.dtype))
    # A masked sum picks the target's logit: XLA fuses it into one reduction and, unlike a gather, it works on a
    # sharded vocabulary.
    ids = jax.lax.expand_dims(jnp.arange(logits.shape[-1], dtype=targets.dtype), range(targets.ndim))
    is_target = ids == targets[..., None]  # [..., V]
    return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(is_target, logits, 0), axis=-1)


def _token_loss(params, batch, config, key, options):
    extra = options.pop("extra", Regularizers())
    spec.check_params(models.parameters(config), params)
    x, _ = models.hidden(
        shrunk(params, extra.embedding_shrink), batch["tokens"], config, positions=batch.get("positions"),
        mask=mask_of(batch), key=key, **options,
    )  # fmt: skip
    weights = batch["weights"].astype(at_least_float32(x.dtype))
    tokens = jnp.sum(weights)
    # With the parameters that do not shrink: a tied head gets its whole gradient.
    total = _weighted_loss(params, x, batch["targets"], weights, config, extra)
    return total / jnp.maximum(tokens, 1), {"tokens": tokens}


def _weighted_loss(params, x, targets, weights, config, extra):
    """The sum over tokens of weight times loss."""
    family = models.family(config)
    factors = family.logit_factors(params, x, config)
    if factors is not None and token_loss.supported(*factors):
        states, head = factors[0], jnp.asarray(factors[1])
        return token_loss.weighted_loss(states, head, targets, weights, extra)
    logits = family.logits(params, x, config)
    targets, weights = like_tokens(targets, logits), like_tokens(weights, logits)
    return jnp.sum(regularized(negative_log_likelihood(logits, targets), logits, extra) * weights)
