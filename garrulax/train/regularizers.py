"""Changes of the training loss and of its gradient that held-out losses leave out."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from garrulax.core.spec import Tree


@dataclasses.dataclass(frozen=True)
class Regularizers:
    """The terms that are added to the negative log-likelihood of a token.

    Attributes:
        z_loss: Coefficient of log(Z)^2, where Z is the denominator of the softmax (Chowdhery et al. 2022, section 5:
            1e-4). It keeps the logits from drifting.
        label_smoothing: Share e of the target's probability that all V tokens get alike: the target distribution is
            1 - e + e / V at the target and e / V elsewhere (Szegedy et al. 2016, section 7).
        embedding_shrink: Factor of the gradient that reaches the token embedding through the lookup (Zeng et al. 2023,
            section 2.2: 0.1). The gradient through a tied output head keeps its size.
    """

    z_loss: float = 0.0
    label_smoothing: float = 0.0
    embedding_shrink: float = 1.0


def shrunk(params: Tree, factor: float) -> Tree:
    """The parameters, where the gradient of the token embedding is multiplied by `factor`.

    The paper writes factor * x + (1 - factor) * stop_gradient(x), whose value rounds; this one is x exactly.
    """
    if factor == 1:
        return params
    fixed = jax.lax.stop_gradient(params["tokens"])
    return {**params, "tokens": fixed + jnp.asarray(factor, fixed.dtype) * (params["tokens"] - fixed)}


def regularized(nll: jax.Array, logits: jax.Array, extra: Regularizers) -> jax.Array:
    """Negative log-likelihoods with z-loss and label smoothing.

    With smoothing e, the cross-entropy is lse - (1 - e) logit[target] - e mean(logits), where nll is
    lse - logit[target].

    Args:
        nll: [...].
        logits: [..., V].
        extra: What to add.

    Returns:
        [...], in the dtype of nll.
    """
    if not extra.z_loss and not extra.label_smoothing:
        return nll
    logits = logits.astype(nll.dtype)
    lse: Any = jax.nn.logsumexp(logits, axis=-1)
    if extra.label_smoothing:
        nll = nll + extra.label_smoothing * ((lse - nll) - jnp.mean(logits, axis=-1))
    return nll + extra.z_loss * jnp.square(lse)
