"""Penalties on tokens that the text already has. Letters: B rows, V vocabulary, P prompt length."""

import functools

import jax.numpy as jnp
import numpy as np

from garrulax.sampling.transforms.base import Transform, only_if
from garrulax.sampling.transforms.tokens import mark, set_token


@functools.cache
def repetition_penalty() -> Transform:
    """Divides positive logits of tokens of the prompt and the text so far by a number, and multiplies negative ones.

    The knob is `repetition_penalty` (float32 [B], Keskar et al. 2019); above 1 such tokens become less probable, 1 is
    off. The state has a flag for each token, bool [B, V].
    """

    def init(knobs):
        return knobs["repetition_penalty"], mark(knobs["prompt"], knobs["vocab"])

    def penalise(logits, penalty, seen):
        factor = penalty.astype(logits.dtype)[:, None]
        return jnp.where(seen, jnp.where(logits < 0, logits * factor, logits / factor), logits)

    def update(logits, state):
        return only_if(state[0] != 1, penalise, logits, *state), state

    def observe(token, state):
        penalty, seen = state
        return penalty, set_token(seen, token)

    return Transform(init, update, observe)


@functools.cache
def presence_penalty() -> Transform:
    """Subtracts a number from the logits of the new tokens so far, prompt left out.

    The knob is `presence_penalty` (float32 [B]), 0 is off. The state has a flag for each token, bool [B, V].
    """

    def init(knobs):
        penalty = knobs["presence_penalty"]
        return penalty, jnp.zeros((penalty.shape[0], knobs["vocab"]), bool)

    def penalise(logits, penalty, seen):
        return logits - jnp.where(seen, penalty.astype(logits.dtype)[:, None], 0)

    def update(logits, state):
        return only_if(state[0] != 0, penalise, logits, *state), state

    def observe(token, state):
        penalty, seen = state
        return penalty, set_token(seen, token)

    return Transform(init, update, observe)


@functools.cache
def frequency_penalty() -> Transform:
    """Subtracts from the logit of each token a number times how often the token is among the new tokens so far.

    The knob is `frequency_penalty` (float32 [B]), 0 is off. The state has a count for each token, uint16 [B, V], which
    stays at its greatest value.
    """
    most = np.iinfo(np.uint16).max

    def init(knobs):
        penalty = knobs["frequency_penalty"]
        return penalty, jnp.zeros((penalty.shape[0], knobs["vocab"]), jnp.uint16)

    def penalise(logits, penalty, counts):
        return logits - penalty.astype(logits.dtype)[:, None] * counts.astype(logits.dtype)

    def update(logits, state):
        return only_if(state[0] != 0, penalise, logits, *state), state

    def observe(token, state):
        penalty, counts = state
        rows = jnp.arange(token.shape[0], dtype=jnp.int32)
        new = jnp.minimum(counts[rows, token], most - 1) + jnp.ones_like(counts, shape=token.shape)
        return penalty, counts.at[rows, token].set(new)

    return Transform(init, update, observe)
