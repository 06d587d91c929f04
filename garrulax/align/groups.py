"""Policy gradients without a critic: several responses to a prompt are compared with each other.

Letters: B responses, T tokens, G responses of a prompt, which stand next to each other. Sources: Kool et al. 2019 and
Ahmadian et al. 2024 (RLOO), Shao et al. 2024 (GRPO), Liu et al. 2025 (Dr. GRPO), Yu et al. 2025 (DAPO), Zheng et al.
2025 (GSPO).
"""

import jax
import jax.numpy as jnp

from garrulax.align.policy import clipped_terms, kl_estimate, masked_mean

LOSSES = ("grpo", "dr_grpo", "dapo", "gspo")
SCALES = ("group", "batch", "none")
_EPSILON = 1e-4  # added to the standard deviation, as in TRL


def group_advantages(rewards: jax.Array, size: int, *, scale: str = "group") -> jax.Array:
    """(reward - mean of the group) / (standard deviation + 1e-4).

    A reward that is NaN could not be given: that response is left out of its group's mean and gets advantage 0.

    Args:
        rewards: Of the responses, [B].
        size: G.
        scale: Whose standard deviation (with n - 1): that of the "group" (GRPO) or of the whole "batch"; "none" does
            not divide (Dr. GRPO).

    Returns:
        [B], without gradients.

    Raises:
        ValueError: If groups of that size do not fill the batch, or the scale is unknown.
    """
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r}: choose from {', '.join(SCALES)}")
    grouped, there, mean = _grouped(rewards, size)
    centred = jnp.where(there, grouped - mean, 0)
    if scale == "none":
        return centred.reshape(-1)
    if scale == "group":
        deviation = _deviation(grouped, there, mean, axis=1)
    else:
        whole = jnp.sum(jnp.where(there, grouped, 0)) / jnp.maximum(jnp.sum(there.astype(grouped.dtype)), 1)
        deviation = _deviation(grouped, there, whole, axis=None)
    return (centred / (deviation + _EPSILON)).reshape(-1)


def leave_one_out_advantages(rewards: jax.Array, size: int, *, normalise: bool = False) -> jax.Array:
    """Each reward less the mean of the other rewards of its group (RLOO); NaN as in `group_advantages`.

    Args:
        rewards: Of the responses, [B], with the KL taken off where it is a part of them.
        size: G, at least 2.
        normalise: Subtract the mean of the batch, and divide by its standard deviation (with n - 1) + 1e-4.

    Returns:
        [B], without gradients. A response that is alone in its group gets 0.

    Raises:
        ValueError: If groups of that size do not fill the batch.
    """
    grouped, there, mean = _grouped(rewards, size)
    count = jnp.sum(there.astype(grouped.dtype), axis=1, keepdims=True)
    advantages = jnp.where(there & (count > 1), count / jnp.maximum(count - 1, 1) * (grouped - mean), 0)
    if normalise:
        whole = jnp.sum(advantages) / jnp.maximum(jnp.sum(there.astype(grouped.dtype)), 1)
        deviation = _deviation(advantages, there, whole, axis=None)
        advantages = jnp.where(there, (advantages - whole) / (deviation + _EPSILON), 0)
    return advantages.reshape(-1)


def mixed_groups(rewards: jax.Array, size: int) -> jax.Array:
    """The share of the groups whose rewards differ: only these have a gradient."""
    grouped, there, _ = _grouped(rewards, size)
    low = jnp.min(jnp.where(there, grouped, jnp.inf), axis=1)
    return jnp.mean((jnp.max(jnp.where(there, grouped, -jnp.inf), axis=1) > low).astype(grouped.dtype))


def group_policy_loss(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    loss: str = "dr_grpo",
    clip: float = 0.2,
    clip_high: float | None = None,
    cap: float | None = None,
    limit: int | None = None,
    reference: jax.Array | None = None,
    beta: float = 0.0,
    corrected_kl: bool = True,
) -> jax.Array:
    """The losses of GRPO and its relatives, which differ in how they average over tokens.

    - "grpo": mean over the responses of the mean over their tokens.
    - "dr_grpo": sum over the tokens, divided by B times `limit`: long wrong answers are not favoured.
    - "dapo": mean over all tokens.
    - "gspo": as "grpo", with one ratio for the whole response, exp(mean of the log ratios).

    Args:
        logprobs: Of the tokens under the policy that is trained, [B, T].
        old_logprobs: When they were sampled, [B, T].
        advantages: Of the responses, [B].
        mask: Of the responses, [B, T].
        loss: One of `LOSSES`.
        clip: The ratio is clipped to 1 - clip ... 1 + clip_high.
        clip_high: None is `clip`; DAPO has 0.28.
        cap: Greatest ratio where the advantage is negative.
        limit: Greatest number of tokens of a response; only for "dr_grpo", where None is T.
        reference: Log-probabilities under the reference, [B, T], for `beta` > 0.
        beta: Weight of the KL to the reference, estimated by k3.
        corrected_kl: Multiply k3 by the ratio, which gives it the gradient of KL(policy || reference).

    Returns:
        A scalar.

    Raises:
        ValueError: For an unknown loss, or beta without a reference.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss={loss!r}: choose from {', '.join(LOSSES)}")
    if beta and reference is None:
        raise ValueError(f"beta={beta} needs the log-probabilities of a reference")
    inside = mask.astype(logprobs.dtype)
    log_ratio = jnp.where(inside > 0, logprobs - old_logprobs, 0)
    lengths = jnp.maximum(jnp.sum(inside, axis=1), 1)
    if loss == "gspo":
        log_ratio = jnp.broadcast_to((jnp.sum(log_ratio, axis=1) / lengths)[:, None], log_ratio.shape)
    terms = clipped_terms(log_ratio, jax.lax.stop_gradient(advantages)[:, None], clip, clip_high, cap)
    if beta and reference is not None:
        kl = kl_estimate(logprobs, reference, "k3")
        terms = terms + beta * (kl * jnp.exp(log_ratio) if corrected_kl else kl)
    if loss == "dapo":
        return masked_mean(terms, mask)
    sums = jnp.sum(jnp.where(inside > 0, terms, 0), axis=1)
    if loss == "dr_grpo":
        return jnp.mean(sums) / (limit or logprobs.shape[1])
    return jnp.mean(sums / lengths)


def sequence_policy_loss(
    logprobs: jax.Array, old_logprobs: jax.Array, advantages: jax.Array, mask: jax.Array, *, clip: float = 0.2
) -> jax.Array:
    """RLOO's loss: the ratio of whole responses, clipped as in PPO; the mean over the responses.

    Args:
        logprobs: Of the tokens under the policy that is trained, [B, T].
        old_logprobs: When they were sampled, [B, T].
        advantages: Of the responses, [B].
        mask: Of the responses, [B, T].
        clip: The ratio is clipped to 1 - clip ... 1 + clip.
    """
    log_ratio = jnp.sum(jnp.where(mask.astype(bool), logprobs - old_logprobs, 0), axis=1)
    return jnp.mean(clipped_terms(log_ratio, jax.lax.stop_gradient(advantages), clip))


def _grouped(rewards: jax.Array, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rewards [P, G], which of them are not NaN, and the means of the groups over those [P, 1]."""
    if size < 1 or rewards.shape[0] % size:
        raise ValueError(f"{rewards.shape[0]} rewards are not groups of {size}")
    grouped = jax.lax.stop_gradient(rewards).reshape(-1, size)
    there = ~jnp.isnan(grouped)
    count = jnp.sum(there.astype(grouped.dtype), axis=1, keepdims=True)
    mean = jnp.sum(jnp.where(there, grouped, 0), axis=1, keepdims=True) / jnp.maximum(count, 1)
    return grouped, there, mean


def _deviation(x: jax.Array, there: jax.Array, mean: jax.Array, axis: int | None) -> jax.Array:
    squares = jnp.sum(jnp.where(there, (x - mean) ** 2, 0), axis=axis, keepdims=True)
    return jnp.sqrt(squares / jnp.maximum(jnp.sum(there.astype(x.dtype), axis=axis, keepdims=True) - 1, 1))
