"""Temperature, and filters that remove improbable tokens. Letters: B rows, V vocabulary.

Each filter keeps at least one token. Its work is left out if its knob is off in all rows. Knobs and logits may have
different dtypes (float64 logits in tests): knobs are converted to that of the logits.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from garrulax.sampling.transforms.base import Transform, argmax, only_if, token_ids
from garrulax.sampling.transforms.thresholds import least_float, nucleus, sum_where, top_mask


@functools.cache
def temperature() -> Transform:
    """Divides logits by the knob `temperature` (float32 [B]).

    Temperature 0 keeps only the greatest logit; of several equal ones, the first. Where the greatest would overflow, it
    is subtracted from its row first, so that no temperature is too low.
    """

    def update(logits, value):
        positive = value > 0  # [B]
        divisor = jnp.where(positive, value, 1).astype(logits.dtype)[:, None]
        top = jnp.max(logits, axis=-1, keepdims=True)  # [B, 1]
        scaled = (logits - jnp.where(jnp.isfinite(top / divisor), 0, top)) / divisor  # [B, V]
        greedy = jnp.where(token_ids(logits) == argmax(logits)[:, None], jnp.zeros_like(logits), -jnp.inf)  # [B, V]
        changed = jnp.where(positive[:, None], scaled, greedy)
        return jnp.where((value == 1)[:, None], logits, changed), value  # beam search adds up log-probabilities

    return Transform(lambda knobs: knobs["temperature"], update)


def _filter(
    name: str, is_on: Callable[[jax.Array], jax.Array], keep: Callable[[jax.Array, jax.Array], jax.Array]
) -> Transform:
    """Returns a filter with one knob.

    Args:
        name: Name of the knob.
        is_on: Function from the knob [B] to bool [B], whether it is on.
        keep: Function from (logits [B, V], knob [B]) to bool [B, V].
    """

    def cut(logits, knob):
        return jnp.where(keep(logits, knob) | ~is_on(knob)[:, None], logits, -jnp.inf)

    def update(logits, knob):
        return only_if(is_on(knob), cut, logits, knob), knob

    return Transform(lambda knobs: knobs[name], update, is_on=is_on)


def _above_0(knob: Any) -> Any:
    return knob > 0


def _below_1(knob: Any) -> Any:
    return knob < 1


@functools.cache
def top_k() -> Transform:
    """Keeps the k greatest logits (Fan et al. 2018); knob `top_k` (int32 [B]), 0 keeps all.

    Tokens that tie with the k-th are kept, as in transformers.
    """

    def keep(logits, k):
        return top_mask(logits, None, k.astype(jnp.float32))

    return _filter("top_k", _above_0, keep)


@functools.cache
def top_p() -> Transform:
    """Keeps the nucleus (Holtzman et al. 2020): as few of the most probable tokens as sum to the probability p.

    The knob is `top_p` (float32 [B]); 1 keeps all. Of equally probable tokens at the threshold, those of the greatest
    ids are kept, as in transformers, whose sort is stable on CPUs.
    """

    def keep(logits, p):
        return nucleus(jax.nn.softmax(logits, axis=-1), p.astype(logits.dtype))

    return _filter("top_p", _below_1, keep)


@functools.cache
def min_p() -> Transform:
    """Keeps tokens that are at least p times as probable as the most probable one (Nguyen et al. 2024).

    The knob is `min_p` (float32 [B]); 0 keeps all.
    """

    def keep(logits, p):
        threshold = jnp.log(p.astype(logits.dtype))[:, None]
        return logits - jnp.max(logits, axis=-1, keepdims=True) >= threshold

    return _filter("min_p", _above_0, keep)


@functools.cache
def top_h() -> Transform:
    """Keeps the most probable tokens while their part of the entropy is at most h (Potraghloo et al. 2025).

    The knob is `top_h` (float32 [B]); 0 keeps all. As in transformers, only the 100 greatest logits of a row count, and
    their distribution is the one whose entropy is measured.
    """

    def keep(logits, h):
        B, V = logits.shape
        values, ids = jax.lax.top_k(logits, min(100, V))  # [B, 100], from the greatest
        p = jax.nn.softmax(values, axis=-1)
        terms = jnp.where(p > 0, -p * jnp.log(jnp.where(p > 0, p, 1)), 0)
        limit = h.astype(logits.dtype)[:, None] * jnp.sum(terms, axis=-1, keepdims=True)
        selected = (jnp.cumsum(terms, axis=-1) <= limit).at[:, 0].set(True)
        rows = jnp.arange(B, dtype=jnp.int32)[:, None]
        return jnp.zeros((B, V), bool).at[rows, ids].set(selected)

    return _filter("top_h", _above_0, keep)


@functools.cache
def typical_p() -> Transform:
    """Keeps the tokens whose information is nearest to the entropy, until they sum to p (Meister et al. 2022).

    The knob is `typical_p` (float32 [B]); 1 keeps all.
    """

    def keep(logits, p):
        logprobs = jax.nn.log_softmax(logits, axis=-1)
        probabilities = jnp.exp(logprobs)
        entropy = _entropy(logprobs, probabilities)

        # Tokens within a distance of the entropy are those whose probability is in an interval around exp(-entropy).
        def near(distance, probabilities, entropy):
            least, greatest = jnp.exp(-entropy - distance), jnp.exp(distance - entropy)
            return (probabilities >= least[:, None]) & (probabilities <= greatest[:, None])

        def reached(distance, probabilities, entropy, p):
            return sum_where(near(distance, probabilities, entropy), probabilities) >= p

        distance = least_float(reached, (probabilities, entropy, p.astype(logits.dtype)), logits.dtype)
        # Where all together do not reach p, by rounding, the answer is no number.
        return near(jnp.where(jnp.isnan(distance), jnp.inf, distance), probabilities, entropy)

    return _filter("typical_p", _below_1, keep)


@functools.cache
def epsilon_cutoff() -> Transform:
    """Keeps tokens with at least the probability epsilon, and the most probable ones (Hewitt et al. 2022).

    The knob is `epsilon_cutoff` (float32 [B]); 0 keeps all.
    """

    def keep(logits, epsilon):
        probabilities = jax.nn.softmax(logits, axis=-1)
        return (probabilities >= epsilon.astype(logits.dtype)[:, None]) | _greatest(logits)

    return _filter("epsilon_cutoff", _above_0, keep)


@functools.cache
def eta_cutoff() -> Transform:
    """Keeps tokens with at least the probability min(eta, sqrt(eta) exp(-entropy)) (Hewitt et al. 2022).

    The knob is `eta_cutoff` (float32 [B]); 0 keeps all. The most probable tokens are always kept.
    """

    def keep(logits, eta):
        logprobs = jax.nn.log_softmax(logits, axis=-1)
        probabilities = jnp.exp(logprobs)
        eta = eta.astype(logits.dtype)
        threshold = jnp.minimum(eta, jnp.sqrt(eta) * jnp.exp(-_entropy(logprobs, probabilities)))
        return (probabilities >= threshold[:, None]) | _greatest(logits)

    return _filter("eta_cutoff", _above_0, keep)


def _entropy(logprobs: jax.Array, probabilities: jax.Array) -> jax.Array:
    """Entropy of each row in nats: [B]."""
    return -jnp.sum(jnp.where(probabilities > 0, logprobs * probabilities, 0), axis=-1)


def _greatest(logits: jax.Array) -> jax.Array:
    return logits == jnp.max(logits, axis=-1, keepdims=True)
