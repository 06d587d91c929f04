"""Transforms that depend on the number of tokens. Letters: B rows, V vocabulary, K ids of a knob, E end tokens."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from garrulax.sampling.transforms.base import Knobs, Transform, only_if
from garrulax.sampling.transforms.sequences import prompt_length
from garrulax.sampling.transforms.tokens import at_ids, forbid


def _counting(
    init: Callable[[Knobs], Any],
    is_on: Callable[[jax.Array, Any], jax.Array],
    change: Callable[[jax.Array, jax.Array, Any], jax.Array],
) -> Transform:
    """Returns a transform that counts the new tokens.

    Args:
        init: Function from knobs to constants.
        is_on: Function from (number of new tokens so far, int32 [B], constants) to bool [B]: the rows to change.
        change: Function from (logits [B, V], number of new tokens, constants) to logits.
    """

    def begin(knobs):
        constants = init(knobs)
        return jnp.zeros(jax.tree.leaves(constants)[0].shape[0], jnp.int32), constants

    def update(logits, state):
        rows = is_on(*state)

        def changed(logits):
            return jnp.where(rows[:, None], change(logits, *state), logits)

        return only_if(rows, changed, logits), state

    def observe(token, state):
        new, constants = state
        return new + 1, constants

    return Transform(begin, update, observe)


@functools.cache
def min_length() -> Transform:
    """Removes the end tokens while prompt and new tokens are fewer than the knob `min_length` (int32 [B], 0 is off)."""

    def init(knobs):
        return knobs["min_length"] - prompt_length(knobs), knobs["ends"]

    return _counting(init, lambda new, c: new < c[0], lambda logits, _, c: forbid(logits, c[1]))


@functools.cache
def min_new_tokens() -> Transform:
    """Removes the end tokens while there are fewer new tokens than the knob `min_new_tokens` (int32 [B], 0 is off)."""

    def init(knobs):
        return knobs["min_new_tokens"], knobs["ends"]

    return _counting(init, lambda new, c: new < c[0], lambda logits, _, c: forbid(logits, c[1]))


@functools.cache
def forced_bos() -> Transform:
    """Allows only the knob `forced_bos_token_id` (int32 [B], -1 is off) after a prompt of one token."""

    def init(knobs):
        return knobs["forced_bos_token_id"], prompt_length(knobs)

    def is_on(new, constants):
        token, length = constants
        return (new == 0) & (length == 1) & (token >= 0)

    return _counting(init, is_on, lambda logits, _, c: _allow(logits, c[0][:, None]))


@functools.cache
def forced_eos() -> Transform:
    """Allows only the ids of the knob `forced_eos_token_id` (int32 [B, K], negative for none) as the last new token."""

    def init(knobs):
        return knobs["forced_eos_token_id"], knobs["limit"]

    def is_on(new, constants):
        ids, limit = constants
        return (new == limit - 1) & jnp.any(ids >= 0, axis=-1)

    return _counting(init, is_on, lambda logits, _, c: _allow(logits, c[0]))


@functools.cache
def begin_suppress_tokens(after_forced_bos: bool = False) -> Transform:
    """Removes the ids of the knob `begin_suppress_tokens` (int32 [B, K], negative for none) from the first new token.

    Args:
        after_forced_bos: From the second one instead in rows where `forced_bos`, an earlier transform of the chain,
            forces the first.
    """

    def init(knobs):
        ids = knobs["begin_suppress_tokens"]
        if not after_forced_bos:
            return ids, jnp.zeros(ids.shape[0], jnp.int32)
        return ids, ((prompt_length(knobs) == 1) & (knobs["forced_bos_token_id"] >= 0)).astype(jnp.int32)

    def is_on(new, constants):
        ids, first = constants
        return (new == first) & jnp.any(ids >= 0, axis=-1)

    return _counting(init, is_on, lambda logits, _, c: forbid(logits, c[0]))


@functools.cache
def exponential_decay_length_penalty() -> Transform:
    """Raises the logits x of end tokens by |x| (factor ** (n - start) - 1) after more than `start` new tokens, n.

    The knob `exponential_decay_length_penalty` is float32 [B, 2]: start and factor; factor 1 is off.
    """

    def init(knobs):
        return knobs["exponential_decay_length_penalty"], knobs["ends"]

    def is_on(new, constants):
        start, factor = constants[0].T
        return (new.astype(start.dtype) > start) & (factor != 1)

    def change(logits, new, constants):
        penalty, ends = constants
        start, factor = penalty.astype(logits.dtype).T
        grown = factor ** (new.astype(logits.dtype) - start) - 1  # [B]
        at = at_ids(ends, logits.shape[-1])
        x = logits.at[at].get(mode="fill", fill_value=0)  # [B, E]
        return logits.at[at].set(jnp.where(jnp.isfinite(x), x + jnp.abs(x) * grown[:, None], x), mode="drop")

    return _counting(init, is_on, change)


def _allow(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """Logits with 0 at the ids, int32 [B, K], negative for none, and -inf elsewhere."""
    return jnp.full_like(logits, -jnp.inf).at[at_ids(ids, logits.shape[-1])].set(0, mode="drop")
