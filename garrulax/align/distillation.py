"""Distillation: a student learns a teacher's distributions (Hinton et al. 2015; Agarwal et al. 2024, GKD)."""

import jax
import jax.numpy as jnp

from garrulax.core.dtypes import at_least_float32


def distillation(student: jax.Array, teacher: jax.Array, *, beta: float = 0.0, temperature: float = 1.0) -> jax.Array:
    """The generalised Jensen-Shannon divergence of each token (Agarwal et al. 2024, eq. 1).

    With mixture M = beta * teacher + (1 - beta) * student it is beta KL(teacher || M) + (1 - beta) KL(student || M);
    its ends are separate: beta = 0 is KL(teacher || student), which covers all modes, and beta = 1 is KL(student ||
    teacher), which seeks one.

    It is not multiplied by temperature^2, as TRL; do so to keep gradients of the same size at all temperatures
    (Hinton).

    Args:
        student: Logits [..., V].
        teacher: Logits [..., V] over the same vocabulary; they get no gradient.
        beta: From 0 to 1.
        temperature: Both logits are divided by it.

    Returns:
        Nats, [...].

    Raises:
        ValueError: If the vocabularies differ, or beta is not in 0 ... 1.
    """
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(
            f"the student has {student.shape[-1]} tokens, the teacher {teacher.shape[-1]}: they need one vocabulary"
        )
    if not 0 <= beta <= 1:
        raise ValueError(f"beta={beta} is not between 0 and 1")
    dtype = at_least_float32(student.dtype)
    s, t = (
        jax.nn.log_softmax(x.astype(dtype) / temperature, axis=-1) for x in (student, jax.lax.stop_gradient(teacher))
    )
    if beta == 0:
        return _kl(t, s)
    if beta == 1:
        return _kl(s, t)
    m = jnp.logaddexp(t + jnp.log(jnp.asarray(beta, dtype)), s + jnp.log1p(jnp.asarray(-beta, dtype)))
    return beta * _kl(t, m) + (1 - beta) * _kl(s, m)


def _kl(p: jax.Array, q: jax.Array) -> jax.Array:
    """KL(p || q) of log-probabilities [..., V]."""
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)
