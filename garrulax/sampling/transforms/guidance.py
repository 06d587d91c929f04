"""Classifier-free guidance. Letters: B rows, V vocabulary."""

import functools

import jax
import jax.numpy as jnp

from garrulax.sampling.transforms.base import Transform, only_if


@functools.cache
def guidance() -> Transform:
    """Moves the logits away from those of the same text after another prompt (Sanchez et al. 2023).

    Row 2 i is the text after its prompt, and row 2 i + 1, which the reserved knob `unconditional` (bool [B]) marks, the
    same text after the other prompt. Both get scale (c - u) + u, where c and u are the log-probabilities of the two.
    The knob is `guidance_scale` (float32 [B], equal in both rows); rows with 1 and rows without such a partner keep
    their logits.
    """

    def init(knobs):
        return knobs["guidance_scale"], knobs["unconditional"]

    def guide(logits, scale, unconditional):
        V = logits.shape[-1]
        pairs = jax.nn.log_softmax(logits, axis=-1).reshape(-1, 2, V)
        c, u = pairs[:, 0], pairs[:, 1]
        possible = (c > -jnp.inf) & (u > -jnp.inf)
        mixed = jnp.where(possible, scale[::2].astype(logits.dtype)[:, None] * (c - u) + u, -jnp.inf)
        guided = (scale[::2] != 1) & unconditional[1::2]
        return jnp.where(guided[:, None, None], mixed[:, None], logits.reshape(-1, 2, V)).reshape(logits.shape)

    def update(logits, state):
        if logits.shape[0] % 2:  # no pairs
            return logits, state
        return only_if(state[0] != 1, guide, logits, *state), state

    return Transform(init, update)
