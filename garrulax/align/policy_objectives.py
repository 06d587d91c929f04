"""Objectives of reinforcement learning, on batches that `rl.Rollouts` makes.

A batch is that of a rollout (`rollouts.Rollout.batch`) with advantages: [B] for the methods that compare responses to
one prompt, or [B, T] for PPO, which also has values and returns [B, T]; and reference, [B, T], the log-probabilities
under the reference, where a loss needs them.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from garrulax import models
from garrulax.align.groups import LOSSES, group_policy_loss, sequence_policy_loss
from garrulax.align.logprobs import entropy, logprobs_of
from garrulax.align.policy import clipped_policy_loss, clipped_value_loss, kl_estimate, masked_mean
from garrulax.core import spec
from garrulax.core.config import ModelConfig
from garrulax.core.spec import Declare, Tree, zeros
from garrulax.models.reward import NAME, head_specs, score
from garrulax.train.objectives import Batch, Objective, mask_of

METHODS = ("ppo", "rloo", *LOSSES)
VALUE = "value"  # name of the value head beside the model's parameters
COEFFICIENT = "kl_coefficient"  # name of the coefficient of the KL there, which no gradient changes


def policy_and_values(
    params: Tree, batch: Batch, config: ModelConfig, key: jax.Array | None = None, **options: Any
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Logits [B, T, V], log-probabilities of the targets [B, T], and values [B, T] if there is a value head."""
    model = policy_model(params)
    x, _ = models.hidden(
        model, batch["tokens"], config, positions=batch.get("positions"), mask=mask_of(batch), key=key, **options
    )
    logits = models.family(config).logits(model, x, config)
    values = score(params[VALUE], x) if VALUE in params else None
    return logits, logprobs_of(logits, batch["targets"]), values


def policy_objective(
    method: str,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
    beta: float = 0.0,
    limit: int | None = None,
    clip_value: float = 0.2,
    value_weight: float = 0.1,
) -> Objective:
    """The objective of a method.

    Its metrics are the share of clipped ratios, the greatest ratio, the KL to the policy that sampled (k3), and the
    entropy; for PPO also the loss of the values and how much of the variance of the returns they explain.

    Args:
        method: One of `METHODS`.
        clip: Of the ratio.
        clip_high: Of the ratio, upwards; None is `clip`.
        beta: Weight of the KL to the reference in the loss, for the methods with groups; PPO and RLOO have it in the
            reward.
        limit: Greatest number of tokens of a response, for "dr_grpo".
        clip_value: Greatest change of a value.
        value_weight: Of the loss of the values.

    Raises:
        ValueError: For an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r}: choose from {', '.join(METHODS)}")

    def objective(
        params: Tree, batch: Batch, config: ModelConfig, key: jax.Array | None = None, **options: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        logits, logprobs, values = policy_and_values(params, batch, config, key, **options)
        old, mask, advantages = batch["logprobs"], batch["weights"], batch["advantages"]
        more = {}
        if method == "ppo":
            assert values is not None, "PPO needs a value head"
            loss = clipped_policy_loss(logprobs, old, advantages, mask, clip=clip, clip_high=clip_high)
            fit = clipped_value_loss(values, batch["values"], batch["returns"], mask, clip=clip_value)
            loss = loss + value_weight * fit
            more = {"value_loss": fit, "explained_variance": _explained(values, batch["returns"], mask)}
        elif method == "rloo":
            loss = sequence_policy_loss(logprobs, old, advantages, mask, clip=clip)
        else:
            loss = group_policy_loss(
                logprobs, old, advantages, mask, loss=method, clip=clip, clip_high=clip_high, limit=limit,
                reference=batch.get("reference"), beta=beta,
            )  # fmt: skip
        log_ratio = jnp.where(mask > 0, logprobs - old, 0)
        ratio, high = jnp.exp(log_ratio), clip if clip_high is None else clip_high
        outside = (ratio > 1 + high) | (ratio < 1 - clip)
        by_tokens = method in ("ppo", "dapo")
        metrics = {
            "tokens": jnp.sum(mask) if by_tokens else jnp.asarray(len(mask), mask.dtype),
            "clipped": masked_mean(outside.astype(mask.dtype), mask),
            "greatest_ratio": jnp.exp(jnp.max(log_ratio)),
            "kl_to_sampler": masked_mean(kl_estimate(old, logprobs, "k3"), mask),
            "entropy": masked_mean(entropy(jax.lax.stop_gradient(logits)), mask),
            **more,
        }
        return loss, metrics

    return objective


def policy_specs(config: ModelConfig, *, values: bool) -> Tree:
    """The ParamSpec tree of a model with the coefficient of the KL, and a value head if PPO needs one."""
    coefficient = Declare(zeros, D=1).param(COEFFICIENT, "D -> D", "vector", zeros)
    head = {VALUE: head_specs(config)} if values else {}
    return {**models.parameters(config), COEFFICIENT: dataclasses.replace(coefficient, layer_axes=(None,)), **head}


def policy_params(params: Tree, config: ModelConfig, coefficient: float, *, values: bool, key: jax.Array) -> Tree:
    """The parameters of a model with the coefficient of the KL, and for PPO a value head whose weight is 0.

    So the first advantages are sums of rewards. `params` may have the head of a reward model (`models.reward`): that is
    where InstructGPT's value function begins, and it is taken then.
    """
    model = {name: part for name, part in params.items() if name != NAME}
    head = {}
    if values:
        new = spec.init({VALUE: head_specs(config)}, key)
        head = {VALUE: params[NAME] if NAME in params else jax.tree.map(jnp.zeros_like, new[VALUE])}
    return {**model, COEFFICIENT: jnp.full((1,), coefficient, jnp.float32), **head}


def policy_model(params: Tree) -> Tree:
    """The parameters of the model alone, as `garrulax.save` takes them."""
    return {name: part for name, part in params.items() if name not in (VALUE, COEFFICIENT)}


def on_model(objective: Objective) -> Objective:
    """An objective of the model alone, such as `causal_lm` on pre-training text, for the parameters of a policy."""

    def of_model(
        params: Tree, batch: Batch, config: ModelConfig, key: jax.Array | None = None, **options: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        return objective(policy_model(params), batch, config, key, **options)

    return of_model


def _explained(values: jax.Array, returns: jax.Array, mask: jax.Array) -> jax.Array:
    """1 - variance of the errors / variance of the returns."""

    def variance(x: jax.Array) -> jax.Array:
        return masked_mean((x - masked_mean(x, mask)) ** 2, mask)

    return 1 - variance(returns - values) / (variance(returns) + 1e-8)
