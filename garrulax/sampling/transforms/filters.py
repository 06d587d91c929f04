"""Filters, which remove improbable tokens, and temperature. Letters: B rows, V vocabulary."""

import functools

import jax
import jax.numpy as jnp

from garrulax.sampling.transforms.base import Transform, argmax, token_ids
from garrulax.sampling.transforms.thresholds import top_mask


@functools.cache
def temperature() -> Transform:
    """Divides logits by the knob `temperature` (float32 [B]) and shifts each row by a constant.

    Temperature 0 keeps only the greatest logit; of several equal ones, the first.
    """

    def update(logits, value):
        positive = value > 0  # [B]
        # Subtract the maximum first: no difference overflows, however low the temperature.
        scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / jnp.where(positive, value, 1)[:, None]  # [B, V]
        greedy = jnp.where(token_ids(logits) == argmax(logits)[:, None], jnp.zeros_like(logits), -jnp.inf)  # [B, V]
        return jnp.where(positive[:, None], scaled, greedy), value

    return Transform(lambda knobs: knobs["temperature"], update)


@functools.cache
def top_k() -> Transform:
    """Keeps the k greatest logits (Fan et al. 2018); knob `top_k` (int32 [B]), 0 keeps all.

    Tokens that tie with the k-th are kept, as in transformers.
    """

    def cut(logits, k):
        keep = top_mask(logits, jnp.ones_like(logits), k.astype(jnp.float32))
        return jnp.where(keep | (k == 0)[:, None], logits, -jnp.inf)

    def update(logits, k):
        return jax.lax.cond(jnp.any(k > 0), cut, lambda x, _: x, logits, k), k

    return Transform(lambda knobs: knobs["top_k"], update)


@functools.cache
def top_p() -> Transform:
    """Keeps the nucleus (Holtzman et al. 2020): the most probable tokens whose probabilities sum to p.

    The knob is `top_p` (float32 [B]); 1 keeps all. A token is kept if the sum over all more probable tokens is less
    than p, so at least one token is kept. Equally probable tokens are kept or removed together (transformers keeps as
    many of them as its sort puts first).
    """

    def cut(logits, p):
        keep = top_mask(logits, jax.nn.softmax(logits, axis=-1), p)
        return jnp.where(keep | (p >= 1)[:, None], logits, -jnp.inf)

    def update(logits, p):
        return jax.lax.cond(jnp.any(p < 1), cut, lambda x, _: x, logits, p), p

    return Transform(lambda knobs: knobs["top_p"], update)
