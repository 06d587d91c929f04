"""Log-probabilities of given tokens, the one quantity of a model that preference and policy losses need.

Letters: B rows, T tokens, V vocabulary. Everything is aligned to targets: index t speaks of the token that the logits
at t predict, as in `train.objectives`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from garrulax import models
from garrulax.core.config import ModelConfig
from garrulax.core.einsum import like_tokens
from garrulax.core.spec import Tree
from garrulax.train.objectives import Batch, mask_of, negative_log_likelihood


def token_logprobs(
    params: Tree,
    batch: Batch,
    config: ModelConfig,
    key: jax.Array | None = None,
    *,
    temperature: float = 1.0,
    **options: Any,
) -> jax.Array:
    """The log-probability of every target.

    Args:
        params: Of the model.
        batch: Tokens and targets, int32 [B, T]; positions, rank and segment as in `train.objectives`.
        config: Of the model.
        key: PRNG key for dropout; None is without dropout.
        temperature: That the targets were sampled at; the logits are divided by it.
        **options: Passed on to `garrulax.forward`.

    Returns:
        Nats, [B, T], in at least float32; the caller applies the mask.
    """
    logits, _ = models.forward(
        params, batch["tokens"], config, positions=batch.get("positions"), mask=mask_of(batch), key=key, **options
    )
    return logprobs_of(logits, batch["targets"], temperature)


def logprobs_of(logits: jax.Array, targets: jax.Array, temperature: float = 1.0) -> jax.Array:
    """log softmax(logits / temperature)[target], in at least float32.

    Args:
        logits: [B, T, V].
        targets: int32 [B, T].
        temperature: Greater than 0.

    Returns:
        Nats, [B, T].
    """
    scaled = logits if temperature == 1 else logits / temperature
    # Where the vocabulary is split over `tensor`, the tokens of the logits are not; the result's are, as the targets'.
    return like_tokens(-negative_log_likelihood(scaled, like_tokens(targets, logits)), targets)


def sequence_logprobs(logprobs: jax.Array, mask: jax.Array, *, mean: bool = False) -> jax.Array:
    """The log-probability of each completion.

    Args:
        logprobs: Of the targets, [..., T].
        mask: 1 (or True) at targets of the completion, its end token included, and 0 at others, [..., T].
        mean: Divide by the number of tokens; a completion without tokens gives 0.

    Returns:
        Nats, [...].
    """
    mask = mask.astype(logprobs.dtype)
    total = jnp.sum(logprobs * mask, axis=-1)
    return total / jnp.maximum(jnp.sum(mask, axis=-1), 1) if mean else total


def entropy(logits: jax.Array) -> jax.Array:
    """Entropy of softmax(logits), [..., V], in nats, [...]."""
    logp = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.sum(jnp.exp(logp) * logp, axis=-1)
