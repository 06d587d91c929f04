"""Objectives (`train.objectives`) for pairs of answers, for reward models, and sums of two objectives.

A batch of pairs has tokens, targets and weights [B, 2, T], the chosen answer first, and perhaps reference, float32
[B, 2]: the log-probabilities of both answers under the reference, summed over tokens. weights is 1 at targets that
belong to the answer, its end token included. Prompt and answer stand at the left, padding at the right. Where answers
are blanks, positions, rank and segment are there too, of `rollouts.aligned`.

A batch of single answers, for KTO, has the same arrays: first the answer, then the answer to another prompt in its
place; and desirable, float32 [B], 1 or 0.

A batch of comparisons has tokens [P, K, T], length [P, K] and rank [P, K] (`comparisons.kway_loss`); length is the
number of tokens of prompt and answer, and the score is read at the last of them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from garrulax import models
from garrulax.align import comparisons, preference
from garrulax.align.logprobs import sequence_logprobs, token_logprobs
from garrulax.core.config import ModelConfig
from garrulax.core.spec import Tree
from garrulax.models.reward import scores
from garrulax.train.objectives import Batch, Objective, mask_of, negative_log_likelihood

PAIR_LOSSES = ("dpo", "ipo", "orpo", "simpo")


def pair_objective(loss: str = "dpo", *, nll_weight: float = 0.0, **knobs: Any) -> Objective:
    """The objective of a loss on pairs.

    The metrics say how the chosen answers fare against the rejected ones: accuracy (share of the pairs whose chosen
    answer has the greater reward), margin (mean difference of the rewards) and the mean log-probabilities. The reward
    is beta times the gain of log-probability over the reference, or for the losses without one beta times the mean
    log-probability of a token.

    Args:
        loss: One of `PAIR_LOSSES`.
        nll_weight: Weight of the negative log-likelihood of the chosen answer, per token, added to the loss (RPO).
        **knobs: Of the function of that name in `align.preference`, such as beta.

    Raises:
        ValueError: For another loss.
    """
    if loss not in PAIR_LOSSES:
        raise ValueError(f"loss={loss!r}: the losses on pairs are {', '.join(PAIR_LOSSES)}")
    with_reference, mean = loss in ("dpo", "ipo"), loss != "dpo"
    beta = knobs.get("beta", 2.0 if loss == "simpo" else 0.1)

    def objective(
        params: Tree, batch: Batch, config: ModelConfig, key: jax.Array | None = None, **options: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        rows = {name: x.reshape(-1, *x.shape[2:]) for name, x in batch.items() if name != "reference"}
        logprobs = token_logprobs(params, rows, config, key, **options)
        sums = sequence_logprobs(logprobs, rows["weights"]).reshape(-1, 2)
        lengths = jnp.maximum(jnp.sum(batch["weights"], axis=-1), 1)
        means = sums / lengths
        used = means if mean else sums
        if with_reference:
            reference = batch["reference"] / lengths if mean else batch["reference"]
            losses = getattr(preference, loss)(*used.T, *reference.T, **knobs)
            rewards = beta * (used - reference)
        else:
            losses = getattr(preference, loss)(*used.T, **({"nll": -means[:, 0]} if loss == "orpo" else {}), **knobs)
            rewards = beta * used
        if nll_weight:
            losses = losses - nll_weight * means[:, 0]
        chosen, rejected = rewards.T
        metrics = {
            "tokens": jnp.asarray(len(losses), losses.dtype),
            "accuracy": jnp.mean((chosen > rejected).astype(losses.dtype)),
            "margin": jnp.mean(chosen - rejected),
            "chosen_logprob": jnp.mean(sums[:, 0]),
            "rejected_logprob": jnp.mean(sums[:, 1]),
        }
        return jnp.mean(losses), metrics

    return objective


def kto_objective(*, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Objective:
    """The objective of `preference.kto`, whose estimate of the KL is the mean over the answers to other prompts.

    That mean is taken over a micro-batch, so that a batch in several of them has other values than in one. The metrics
    have kl, and margin: the mean reward of desirable answers less that of the others, 0 in a batch of one kind.

    Args:
        beta: Strength of the pull towards the reference.
        desirable_weight: Of desirable answers.
        undesirable_weight: Of the others.
    """

    def objective(
        params: Tree, batch: Batch, config: ModelConfig, key: jax.Array | None = None, **options: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        own, other = ({name: x[:, i] for name, x in batch.items() if x.ndim > 2} for i in (0, 1))
        policy = sequence_logprobs(token_logprobs(params, own, config, key, **options), own["weights"])
        frozen = jax.lax.stop_gradient(params)  # the estimate has no gradient: no backward pass through these rows
        mismatched = sequence_logprobs(token_logprobs(frozen, other, config, **options), other["weights"])
        reference, good = batch["reference"].astype(policy.dtype), batch["desirable"].astype(policy.dtype)
        kl = preference.kto_kl(mismatched, reference[:, 1])
        losses = preference.kto(
            policy, reference[:, 0], good > 0, kl, beta=beta, desirable_weight=desirable_weight,
            undesirable_weight=undesirable_weight,
        )  # fmt: skip
        rewards, bad = beta * (policy - reference[:, 0]), 1 - good
        means = [jnp.sum(rewards * x) / jnp.maximum(jnp.sum(x), 1) for x in (good, bad)]
        both = (jnp.sum(good) > 0) & (jnp.sum(bad) > 0)
        metrics = {
            "tokens": jnp.asarray(len(losses), losses.dtype),
            "kl": kl,
            "margin": jnp.where(both, means[0] - means[1], 0),
        }
        return jnp.mean(losses), metrics

    return objective


def reward_objective(*, centring: float = 0.0) -> Objective:
    """The objective of a reward model: `comparisons.kway_loss`, its weight in a mean the number of prompts.

    Args:
        centring: Weight of the mean square of the rewards, which keeps them around 0.
    """

    def objective(
        params: Tree, batch: Batch, config: ModelConfig, key: jax.Array | None = None, **options: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        prompts, answers, length = batch["tokens"].shape
        rewards = scores(
            params, batch["tokens"].reshape(-1, length), batch["length"].reshape(-1), config, key=key, **options
        ).reshape(prompts, answers)
        losses, some = comparisons.kway_losses(rewards, ranks=batch["rank"])
        count = jnp.sum(some.astype(losses.dtype))
        loss = jnp.sum(losses) / jnp.maximum(count, 1)
        if centring:
            there = (batch["rank"] < comparisons.NO_ANSWER).astype(rewards.dtype)
            loss = loss + centring * jnp.sum(there * rewards**2) / jnp.maximum(jnp.sum(there), 1)
        better = comparisons.pairs(rewards.shape, ranks=batch["rank"])
        right = better & (rewards[:, :, None] > rewards[:, None, :])
        accuracy = jnp.sum(right.astype(losses.dtype)) / jnp.maximum(jnp.sum(better.astype(losses.dtype)), 1)
        return loss, {"tokens": count, "accuracy": accuracy}

    return objective


def mixed(first: Objective, second: Objective, weight: float) -> Objective:
    """first + weight * second, each on a batch of its own: pre-training text beside PPO, old data beside new.

    A batch has the arrays of both under the names `a/...` and `b/...`. Both must have one count in every micro-batch
    (metrics["tokens"]), or the mix depends on how a batch is split: so use one micro-batch, or objectives whose counts
    are those of rows.

    Args:
        first: An objective; its metrics are kept.
        second: Another one.
        weight: Of the second.
    """

    def objective(
        params: Tree, batch: Batch, config: ModelConfig, key: jax.Array | None = None, **options: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        keys = (None, None) if key is None else jax.random.split(key)
        of_first, of_second = ({k[2:]: x for k, x in batch.items() if k.startswith(p)} for p in ("a/", "b/"))
        a, metrics = first(params, of_first, config, keys[0], **options)
        b, other = second(params, of_second, config, keys[1], **options)
        more = {f"second_{name}": x for name, x in other.items()}
        return a + weight * b, {**metrics, **more, "second_loss": b}

    return objective


def penalised(objective: Objective, penalty: Callable[[Tree], jax.Array]) -> Objective:
    """An objective plus a penalty on the parameters, such as `forgetting.ewc_penalty`."""

    def with_penalty(
        params: Tree, batch: Batch, config: ModelConfig, key: jax.Array | None = None, **options: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        loss, metrics = objective(params, batch, config, key, **options)
        value = penalty(params)
        return loss + value, {**metrics, "penalty": value}

    return with_penalty


def with_reference(batch: Batch, params: Tree, config: ModelConfig, **options: Any) -> Batch:
    """A batch of pairs with the log-probabilities of its answers under a reference: once, before training.

    Args:
        batch: Of pairs, or of single answers.
        params: Of the reference.
        config: Of the model.
        **options: Passed on to `garrulax.forward`.
    """
    rows = {name: x.reshape(-1, *x.shape[2:]) for name, x in batch.items() if x.ndim > 2}
    logprobs = token_logprobs(params, rows, config, **options)
    return {**batch, "reference": sequence_logprobs(logprobs, rows["weights"]).reshape(batch["weights"].shape[:2])}


def token_penalty_objective(penalty: Callable[..., jax.Array], weight: float = 1.0) -> Objective:
    """Cross entropy plus weight times a penalty of each token, such as `repetition.unlikelihood`.

    Args:
        penalty: Maps logits [B, T, V], targets [B, T], weights [B, T] and the stream segment (or None) to nats [B, T].
        weight: Of the penalty.
    """

    def objective(
        params: Tree, batch: Batch, config: ModelConfig, key: jax.Array | None = None, **options: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        logits, _ = models.forward(
            params, batch["tokens"], config, positions=batch.get("positions"), mask=mask_of(batch), key=key, **options
        )
        nll = negative_log_likelihood(logits, batch["targets"])
        extra = penalty(logits, batch["targets"], batch["weights"], batch.get("segment"))
        weights = batch["weights"].astype(nll.dtype)
        count = jnp.sum(weights)
        total, added = (jnp.sum(x * weights) / jnp.maximum(count, 1) for x in (nll, extra))
        return total + weight * added, {"tokens": count, "nll": total, "penalty": added}

    return objective
