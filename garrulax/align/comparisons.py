"""Losses of reward models, on the rewards of answers that people have ranked.

Letters: P prompts, K answers of a prompt.
"""

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid

from garrulax.core.dtypes import at_least_float32

NO_ANSWER = 2**30  # rank of a place without an answer


def kway_loss(rewards: jax.Array, counts: jax.Array | None = None, *, ranks: jax.Array | None = None) -> jax.Array:
    """The loss of InstructGPT's reward model (Ouyang et al. 2022, eq. 1), over all pairs of answers to a prompt.

    Every prompt has the same weight, whatever the number of its pairs. Answers of the same rank are no pair.

    Args:
        rewards: Of the answers, [P, K]; best first, unless `ranks` is given.
        counts: Number of answers of each prompt, which come first in its row, int32 [P]; None means K.
        ranks: int32 [P, K], smaller is better, `NO_ANSWER` where there is none. Instead of `counts`.

    Returns:
        Nats, a scalar: the mean over the prompts that have a pair; 0 if none has.
    """
    means, some = kway_losses(rewards, counts, ranks=ranks)
    return jnp.sum(means) / jnp.maximum(jnp.sum(some.astype(means.dtype)), 1)


def kway_losses(
    rewards: jax.Array, counts: jax.Array | None = None, *, ranks: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """As `kway_loss`, of each prompt [P]; and whether it has a pair, bool [P] (its loss is 0 if not)."""
    rewards = rewards.astype(at_least_float32(rewards.dtype))
    better = pairs(rewards.shape, counts, ranks=ranks)
    losses = jnp.where(better, -log_sigmoid(rewards[:, :, None] - rewards[:, None, :]), 0)
    number = jnp.sum(better.astype(rewards.dtype), axis=(1, 2))
    return jnp.sum(losses, axis=(1, 2)) / jnp.maximum(number, 1), number > 0


def pairs(shape: tuple[int, ...], counts: jax.Array | None = None, *, ranks: jax.Array | None = None) -> jax.Array:
    """Marks the pairs (i, j) of answers of which i is better than j: bool [P, K, K].

    The arguments are those of `kway_loss`.

    Raises:
        ValueError: If both `counts` and `ranks` are given.
    """
    if ranks is None:
        ranks = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32)[None], shape)
        if counts is not None:
            ranks = jnp.where(ranks < counts[:, None], ranks, NO_ANSWER)
    elif counts is not None:
        raise ValueError("give either the counts of answers that are ordered best first, or ranks")
    there = ranks < NO_ANSWER
    return (ranks[:, :, None] < ranks[:, None, :]) & there[:, :, None] & there[:, None, :]


def pair_loss(
    chosen: jax.Array, rejected: jax.Array, *, margin: jax.Array | float = 0.0, centring: float = 0.0
) -> jax.Array:
    """-log sigmoid(chosen - rejected - margin) of each pair, plus `centring` times (chosen + rejected)^2.

    Args:
        chosen: Rewards of the preferred answers, [N].
        rejected: Of the others, [N].
        margin: By how much the rewards should differ, [N] or a scalar (Touvron et al. 2023, section 3.2.2).
        centring: Weight of a term that keeps rewards around 0 (Eisenstein et al. 2023).

    Returns:
        Nats, [N].
    """
    return -log_sigmoid(chosen - rejected - margin) + centring * (chosen + rejected) ** 2


def pick_best(rewards: jax.Array, best: jax.Array) -> jax.Array:
    """Cross entropy of the softmax over K rewards [P, K] with the best answer, int32 [P]: nats, [P] (Ziegler 2019)."""
    return -jnp.take_along_axis(jax.nn.log_softmax(rewards, axis=-1), best[:, None], axis=-1)[:, 0]
