"""The arithmetic of policy-gradient methods: rewards, advantages, clipped losses, and the controller of the KL.

Letters: B rollouts, T tokens, G rollouts of a prompt. Arrays [B, T] are aligned to targets: index t speaks of the
response token that the logits at t predict, and values[t] is the value of the state before that token. Masks are 1 (or
True) at response tokens up to and with the end token.

The papers' programs differ in a dozen details (Huang et al. 2024, "The N+ implementation details of RLHF with PPO").
This is the convention here: the score is paid at the end token, or at the last token where the limit cut the response;
one mask holds for rewards, advantages and both losses; variances are biased; advantages are whitened once for all
rollouts.
"""

import dataclasses

import jax
import jax.numpy as jnp


def kl_estimate(logprobs: jax.Array, reference: jax.Array, kind: str = "k1") -> jax.Array:
    """An estimate of KL(policy || reference) from each sampled token (Schulman 2020, "Approximating KL divergence").

    As a reward, k1 is right. As a term of a loss, k2 has the gradient of KL(policy || reference), k1 has none in
    expectation, and k3 that of KL(reference || policy). k3 is never negative: it is for logs.

    Args:
        logprobs: Of the tokens under the policy that sampled them, [...].
        reference: Under the reference, [...].
        kind: "k1", "k2" or "k3".

    Returns:
        Nats, [...].

    Raises:
        ValueError: For another kind.
    """
    log_ratio = reference - logprobs
    if kind == "k1":
        return -log_ratio
    if kind == "k2":
        return 0.5 * log_ratio**2
    if kind == "k3":
        return jnp.expm1(log_ratio) - log_ratio
    raise ValueError(f"kind={kind!r}: the estimates of the KL are k1, k2 and k3")


def token_rewards(scores: jax.Array, kl: jax.Array, mask: jax.Array, *, coefficient: float | jax.Array) -> jax.Array:
    """-coefficient * kl at every response token, and the score added at the last one.

    Args:
        scores: Of the responses, [B].
        kl: Of each token, from `kl_estimate`, [B, T].
        mask: Of the responses, [B, T].
        coefficient: Of the KL (beta).

    Returns:
        [B, T], 0 outside the mask.
    """
    mask = mask.astype(kl.dtype)
    after = jnp.flip(jnp.cumsum(jnp.flip(mask, -1), axis=-1), -1)  # response tokens from here on
    last = mask * (after == 1).astype(kl.dtype)
    return (-coefficient * kl) * mask + scores.astype(kl.dtype)[:, None] * last


def score_without_end(
    scores: jax.Array, ended: jax.Array, *, penalty: float | None = None, instead: float | None = None
) -> jax.Array:
    """Scores of responses that the limit cut: less `penalty` (as TRL), or `instead` (as OpenAI's code).

    Args:
        scores: [B].
        ended: Whether the response has its end token, bool [B].
        penalty: Subtracted from the score.
        instead: The score of such a response.

    Raises:
        ValueError: If both are given.
    """
    if penalty is not None and instead is not None:
        raise ValueError("a response without an end token has its score replaced or lowered, not both")
    cut = instead if instead is not None else scores - (penalty or 0.0)
    return jnp.where(ended, scores, cut)


def gae(
    rewards: jax.Array, values: jax.Array, mask: jax.Array | None = None, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[jax.Array, jax.Array]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16).

    Args:
        rewards: [B, T].
        values: Of the states before the tokens, [B, T].
        mask: [B, T]; rewards and values outside count as 0, so that nothing is carried over the end. None is all.
        gamma: Discount.
        lam: lambda.

    Returns:
        Advantages and returns (advantages + values), [B, T], without gradients.
    """
    rewards, values = jax.lax.stop_gradient((rewards, values))
    inside = jnp.ones_like(values) if mask is None else mask.astype(values.dtype)
    # `where`, not a product: what padding holds may be NaN.
    rewards, values = (jnp.where(inside > 0, x, 0) for x in (rewards, values))
    following = jnp.concatenate([values[:, 1:], jnp.zeros_like(values[:, :1])], axis=1)
    deltas = rewards + gamma * following - values

    def back(carried: jax.Array, delta: jax.Array) -> tuple[jax.Array, jax.Array]:
        carried = delta + gamma * lam * carried
        return carried, carried

    _, advantages = jax.lax.scan(back, jnp.zeros_like(values[:, 0]), deltas.T, reverse=True)
    advantages = advantages.T * inside
    return advantages, advantages + values


def whiten(
    x: jax.Array, mask: jax.Array | None = None, *, keep_mean: bool = False, unbiased: bool = False
) -> jax.Array:
    """(x - mean) / sqrt(variance + 1e-8), mean and variance over the mask.

    Args:
        x: Any shape; rewards keep their mean, advantages do not.
        mask: Of x's shape; None is all.
        keep_mean: Add the mean again.
        unbiased: Divide the squares by n - 1 (TRL) instead of n (OpenAI); one value has variance 0.

    Returns:
        Of x's shape, 0 outside the mask.
    """
    inside = jnp.ones_like(x) if mask is None else mask.astype(x.dtype)
    x = jnp.where(inside > 0, x, 0)
    count = jnp.sum(inside)
    mean = jnp.sum(x) / jnp.maximum(count, 1)
    squares = jnp.sum(inside * (x - mean) ** 2)
    variance = squares / jnp.maximum(count - 1 if unbiased else count, 1)
    white = (x - mean) * jax.lax.rsqrt(variance + 1e-8)
    return inside * (white + mean if keep_mean else white)


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """The mean of x over the mask; 0 if nothing is in it."""
    inside = mask.astype(x.dtype)
    return jnp.sum(jnp.where(inside > 0, x, 0)) / jnp.maximum(jnp.sum(inside), 1)


def clipped_policy_loss(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
) -> jax.Array:
    """PPO's loss (Schulman et al. 2017, eq. 7), the mean over the mask.

    Args:
        logprobs: Of the tokens under the policy that is trained, [B, T].
        old_logprobs: When they were sampled, [B, T].
        advantages: [B, T].
        mask: Of the responses, [B, T].
        clip: The ratio is clipped to 1 - clip ... 1 + clip.
        clip_high: Instead of `clip` on the upper side (DAPO).

    Returns:
        A scalar.
    """
    return masked_mean(clipped_terms(logprobs - old_logprobs, advantages, clip, clip_high), mask)


def clipped_terms(
    log_ratio: jax.Array, advantages: jax.Array, clip: float, clip_high: float | None = None, cap: float | None = None
) -> jax.Array:
    """max(-A ratio, -A clipped ratio) elementwise; `cap` bounds the ratio from above also where A is negative."""
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - clip, 1 + (clip if clip_high is None else clip_high))
    if cap is not None:
        ratio = jnp.minimum(ratio, cap)
    return jnp.maximum(-advantages * ratio, -advantages * clipped)


def clipped_value_loss(
    values: jax.Array, old_values: jax.Array, returns: jax.Array, mask: jax.Array, *, clip: float = 0.2
) -> jax.Array:
    """Half the squared error of the values, or of the values clipped around the old ones where that is larger.

    Args:
        values: Predicted now, [B, T].
        old_values: Predicted when the tokens were sampled, [B, T].
        returns: From `gae`, [B, T].
        mask: Of the responses, [B, T].
        clip: Greatest change of a value.

    Returns:
        The mean over the mask, a scalar.
    """
    clipped = jnp.clip(values, old_values - clip, old_values + clip)
    return 0.5 * masked_mean(jnp.maximum((values - returns) ** 2, (clipped - returns) ** 2), mask)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KLController:
    """The adaptive coefficient of the KL (Ziegler et al. 2019, section 2.2), part of the state of a run.

    Attributes:
        coefficient: Now, float32, a scalar.
        target: Nats of a whole response; None leaves the coefficient fixed.
        horizon: Responses within which the coefficient follows.
    """

    coefficient: jax.Array | float
    target: float | None = dataclasses.field(default=None, metadata={"static": True})
    horizon: int = dataclasses.field(default=10_000, metadata={"static": True})

    def update(self, kl: jax.Array, episodes: int) -> "KLController":
        """The controller after a batch.

        Args:
            kl: Mean over the responses of the sum over their tokens, nats, a scalar.
            episodes: Responses in the batch.
        """
        if self.target is None:
            return self
        error = jnp.clip(kl / self.target - 1, -0.2, 0.2)
        return dataclasses.replace(self, coefficient=self.coefficient * (1 + error * (episodes / self.horizon)))
