"""Transforms that allow, forbid or favour tokens by their ids. Letters: B rows, V vocabulary, K ids of a knob."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from garrulax.sampling.transforms.base import Transform, only_if


def mark(ids: jax.Array, vocab: int) -> jax.Array:
    """Flags of ids: int32 [B, K], negative for none, to bool [B, V]."""
    return jnp.zeros((ids.shape[0], vocab), bool).at[at_ids(ids, vocab)].set(True, mode="drop")


def set_token(flags: jax.Array, token: jax.Array) -> jax.Array:
    """Returns the flags bool [B, V] with that of each row's token, int32 [B], set."""
    return flags.at[jnp.arange(token.shape[0], dtype=jnp.int32), token].set(True)


def at_ids(ids: jax.Array, vocab: int) -> tuple[jax.Array, jax.Array]:
    """Index of the ids, int32 [B, K], of each row of [B, V]. Negative ones lie outside: use mode="drop"."""
    return jnp.arange(ids.shape[0], dtype=jnp.int32)[:, None], jnp.where(ids < 0, vocab, ids)


def forbid(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """Logits [B, V] with -inf at the ids, int32 [B, K], negative for none."""

    def scatter(logits, ids):
        return logits.at[at_ids(ids, logits.shape[-1])].set(-jnp.inf, mode="drop")

    return only_if(ids >= 0, scatter, logits, ids)


def add(logits: jax.Array, ids: jax.Array, bias: jax.Array) -> jax.Array:
    """Logits [B, V] with numbers added at the ids, both [B, K]; negative ids for none."""

    def scatter(logits, ids, bias):
        return logits.at[at_ids(ids, logits.shape[-1])].add(bias.astype(logits.dtype), mode="drop")

    return only_if(ids >= 0, scatter, logits, ids, bias)


@functools.cache
def only(size: int, others: tuple[int, ...] = ()) -> Transform:
    """Keeps the ids below `size`, and `others`."""

    def update(logits, state):
        ids = np.arange(logits.shape[-1])[None]  # [1, V]
        return jnp.where((ids < size) | np.isin(ids, others), logits, -jnp.inf), state

    return Transform(lambda knobs: (), update)


@functools.cache
def allowed_tokens() -> Transform:
    """Keeps the ids of the knob `allowed_tokens` (int32 [B, K], negative for none); a row without ids keeps all.

    The state has a flag for each token, bool [B, V].
    """

    def init(knobs):
        ids = knobs["allowed_tokens"]
        return mark(ids, knobs["vocab"]) | jnp.all(ids < 0, axis=-1, keepdims=True)

    return Transform(init, lambda logits, allowed: (jnp.where(allowed, logits, -jnp.inf), allowed))


@functools.cache
def suppress_tokens() -> Transform:
    """Removes the ids of the knob `suppress_tokens` (int32 [B, K], negative for none)."""
    return Transform(lambda knobs: knobs["suppress_tokens"], lambda logits, ids: (forbid(logits, ids), ids))


@functools.cache
def logit_bias() -> Transform:
    """Adds a number to the logits of some ids.

    The knob `logit_bias` is a pair: ids (int32 [B, K], negative for none) and numbers (float32 [B, K]).
    """
    return Transform(lambda knobs: knobs["logit_bias"], lambda logits, state: (add(logits, *state), state))
