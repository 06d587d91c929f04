"""Decoding as a pure state machine: `step` makes one token a row, `run` makes many on the device."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from garrulax import models
from garrulax.core.spec import Tree
from garrulax.kernels.mask import PAD, Mask
from garrulax.sampling.state import State
from garrulax.sampling.transforms import STANDARD, Transform, draw


def step(params: Tree, state: State, config: Any, transform: Transform = STANDARD) -> State:
    """Every row that is not done reads its last token and gets a new one. Pure; the state keeps its shapes.

    params: as from `models.unstack`, which decodes fastest, or stacked; as they were in `init`.
    """
    going = ~state.done
    # What a row that is done reads is hidden from its later self: a blank may be filled after this one (`fill`).
    segment = jnp.where(going, 0, PAD)[:, None]
    mask = Mask({"rank": jnp.broadcast_to(state.cache.used, segment.shape), "segment": segment})
    logits, cache = models.forward(
        params, state.token[:, None], config, positions=state.position[..., None], mask=mask, cache=state.cache
    )
    logits = logits[:, 0].astype(jnp.float32)  # in bfloat16 the noise would be so coarse that rare tokens never win
    shaped, shaping = transform.update(logits, state.shaping)
    token = draw(shaped, state.seed, state.length)
    logprob = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)

    made = state.made + going
    ended = jnp.any(token[:, None] == state.stops, axis=1) | (made >= state.limit)
    stride = jnp.where(going.reshape(-1, *(1,) * (state.stride.ndim - 1)), state.stride, 0)
    at = (0, state.column)
    return dataclasses.replace(
        state,
        cache=cache,
        token=jnp.where(going, token, state.token),
        position=state.position + stride,
        length=state.length + going,
        made=made,
        done=state.done | ended,
        column=state.column + 1,
        tokens=jax.lax.dynamic_update_slice(state.tokens, token[:, None], at),
        logprobs=jax.lax.dynamic_update_slice(state.logprobs, logprob[:, None], at),
        shaping=shaping,
    )


@functools.partial(jax.jit, static_argnames=("config", "transform"), donate_argnames="state")
def run(params: Tree, state: State, steps: jax.Array | int, config: Any, transform: Transform = STANDARD) -> State:
    """Up to `steps` steps (int32, traced: one executable for one-shot and streaming), fewer where all rows are done.

    The state is donated: the cache is updated where it lies.
    """

    def going(carry):
        count, state = carry
        return (count < steps) & ~jnp.all(state.done)

    def body(carry):
        count, state = carry
        return count + 1, step(params, state, config, transform)

    return jax.lax.while_loop(going, body, (jnp.int32(0), state))[1]
