"""Losses on pairs of answers, of which one is preferred, and on single answers that are desirable or not.

Every function takes log-probabilities of whole completions (`logprobs.sequence_logprobs`), their end token included and
the prompt excluded, and returns one loss an example, of the same shape. Whether these are sums or means per token
changes the meaning of `beta`, so each function says which it is meant for.
"""

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid

Number = jax.Array | float


def dpo(
    policy_chosen: jax.Array,
    policy_rejected: jax.Array,
    reference_chosen: Number = 0.0,
    reference_rejected: Number = 0.0,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """Direct preference optimisation (Rafailov et al. 2023, eq. 7): -log sigmoid(beta h).

    h is by how much more the policy than the reference prefers the chosen answer. With `label_smoothing` it is cDPO
    (Mitchell 2023): that share of the preferences is taken to be flipped. At the beginning the loss is log 2.

    Args:
        policy_chosen: Log-probabilities of the chosen answers under the policy, sums over tokens, [N].
        policy_rejected: Of the rejected answers, [N].
        reference_chosen: The same under the reference, [N]; 0 for both is without a reference.
        reference_rejected: [N].
        beta: Strength of the pull towards the reference.
        label_smoothing: From 0 to 0.5.

    Returns:
        Loss of each pair, nats, [N].
    """
    h = beta * _margin(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    return -(1 - label_smoothing) * log_sigmoid(h) - label_smoothing * log_sigmoid(-h)


def ipo(
    policy_chosen: jax.Array,
    policy_rejected: jax.Array,
    reference_chosen: Number = 0.0,
    reference_rejected: Number = 0.0,
    *,
    beta: float = 0.1,
) -> jax.Array:
    """Identity preference optimisation (Azar et al. 2023, eq. 17): (h - 1 / (2 beta))^2.

    Args:
        policy_chosen: Log-probabilities of the chosen answers under the policy, [N]: means per token, as the authors
            and TRL do; the DPO repository has sums, for which the target of 1 / (2 beta) nats is that of whole answers.
        policy_rejected: Of the rejected answers, [N].
        reference_chosen: The same under the reference, [N].
        reference_rejected: [N].
        beta: The regularisation tau of the paper.

    Returns:
        Loss of each pair, [N].
    """
    return (_margin(policy_chosen, policy_rejected, reference_chosen, reference_rejected) - 1 / (2 * beta)) ** 2


def kto(
    policy: jax.Array,
    reference: jax.Array,
    desirable: jax.Array,
    kl: jax.Array,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> jax.Array:
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, eq. 8), for answers that are judged one by one.

    Args:
        policy: Log-probabilities of the answers under the policy, sums over tokens, [N].
        reference: The same under the reference, [N].
        desirable: bool [N].
        kl: From `kto_kl` over the whole batch, a scalar.
        beta: Strength of the pull towards the reference.
        desirable_weight: Of desirable answers. Their weight times their number should be 1 to 4/3 times that of the
            others.
        undesirable_weight: Of the others.

    Returns:
        Loss of each answer, [N].
    """
    gain = beta * (policy - reference - kl)
    good = desirable_weight * (1 - jax.nn.sigmoid(gain))
    bad = undesirable_weight * (1 - jax.nn.sigmoid(-gain))
    return jnp.where(desirable, good, bad)


def kto_kl(policy: jax.Array, reference: jax.Array) -> jax.Array:
    """The estimate of KL(policy || reference) in `kto`, without a gradient.

    Args:
        policy: Log-probabilities under the policy of mismatched answers, each to the prompt of another row, [N].
        reference: The same under the reference, [N].

    Returns:
        A scalar, at least 0.
    """
    return jax.lax.stop_gradient(jnp.maximum(jnp.mean(policy - reference), 0))


def orpo(chosen: jax.Array, rejected: jax.Array, nll: Number = 0.0, *, beta: float = 0.1) -> jax.Array:
    """Odds-ratio preference optimisation (Hong et al. 2024, eq. 6): nll - beta log sigmoid(log odds ratio).

    Args:
        chosen: Log-probabilities of the chosen answers, means per token, [N], less than 0.
        rejected: Of the rejected answers, [N].
        nll: Mean negative log-likelihood per token of the chosen answers, [N] or a scalar; 0 leaves it out.
        beta: Weight of the odds ratio (lambda in the paper).

    Returns:
        Loss of each pair, [N].
    """
    log_odds = (chosen - log1mexp(chosen)) - (rejected - log1mexp(rejected))
    return nll - beta * log_sigmoid(log_odds)


def simpo(chosen: jax.Array, rejected: jax.Array, *, beta: float = 2.0, gamma: float = 1.0) -> jax.Array:
    """Simple preference optimisation (Meng et al. 2024, eq. 6): -log sigmoid(beta (chosen - rejected) - gamma).

    Args:
        chosen: Log-probabilities of the chosen answers, means per token, [N].
        rejected: Of the rejected answers, [N].
        beta: Scale of the rewards.
        gamma: Margin between the rewards.

    Returns:
        Loss of each pair, [N].
    """
    return -log_sigmoid(beta * (chosen - rejected) - gamma)


def log1mexp(x: jax.Array) -> jax.Array:
    """log(1 - exp(x)) for x < 0, without cancellation near 0 and far from it (Maechler 2012)."""
    near = x > -0.6931471805599453
    # Each branch gets a harmless value where the other one counts, so that no derivative is NaN.
    return jnp.where(near, jnp.log(-jnp.expm1(jnp.where(near, x, -1))), jnp.log1p(-jnp.exp(jnp.where(near, -1, x))))


def _margin(
    policy_chosen: jax.Array, policy_rejected: jax.Array, reference_chosen: Number, reference_rejected: Number
) -> jax.Array:
    return (policy_chosen - policy_rejected) - (reference_chosen - reference_rejected)
