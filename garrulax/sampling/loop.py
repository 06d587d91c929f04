"""Decoding as a pure state machine: one step samples one token for each row; the loop over steps runs on the device."""

import dataclasses
import functools
from typing import cast

import jax
import jax.numpy as jnp

from garrulax import models
from garrulax.core import half
from garrulax.core.config import ModelConfig
from garrulax.core.dtypes import int32_indices
from garrulax.core.spec import Tree
from garrulax.kernels.mask import PAD, Mask
from garrulax.layers.cache import Cache
from garrulax.sampling.state import State
from garrulax.sampling.transforms import DEFAULT, Transform, sample


def decode_step(params: Tree, state: State, config: ModelConfig, transform: Transform = DEFAULT) -> State:
    """Reads the last token of each row and samples the next one. Pure; the shapes of the state do not change.

    Args:
        params: Unstacked (`models.unstack`), which decodes fastest, or stacked; the same form as in `prefill`.
        state: From `prefill` or an earlier step. Rows that are done keep their tokens.
        config: The family's Config.
        transform: The transform of the logits.

    Returns:
        The next state.
    """
    active = ~state.done  # [B]
    # A finished row keeps stepping with the batch. Its tokens are marked as padding, so that the row does not attend
    # to them when its next blank is filled (`fill`).
    segment = jnp.where(active, 0, jnp.int32(PAD))[:, None]  # [B, 1]
    mask = Mask({"rank": jnp.broadcast_to(state.cache.used, segment.shape), "segment": segment})
    logits, cache = models.forward(
        params, state.token[:, None], config, positions=state.position[..., None], mask=mask, cache=state.cache
    )
    # [B, V]. In bfloat16 the noise would be so coarse that rare tokens are never sampled.
    logits = logits[:, 0].astype(jnp.float32)
    transformed, transform_state = transform.update(logits, state.transform_state)
    token = sample(transformed, state.seed, state.length)  # [B]
    logprob = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)  # [B]

    generated = state.generated + active.astype(jnp.int32)
    ended = jnp.any(token[:, None] == state.end_tokens[None], axis=1) | (generated >= state.limit)
    # [B] or [B, 2]
    stride = jnp.where(active.reshape(-1, *(1,) * (state.stride.ndim - 1)), state.stride, 0)
    at = int32_indices(0, state.column)
    return dataclasses.replace(
        state,
        cache=cast(Cache, cache),
        token=jnp.where(active, token, state.token),
        position=state.position + stride,
        length=state.length + active.astype(jnp.int32),
        generated=generated,
        done=state.done | ended,
        column=state.column + 1,
        tokens=jax.lax.dynamic_update_slice(state.tokens, token[:, None], at),
        logprobs=jax.lax.dynamic_update_slice(state.logprobs, logprob[:, None], at),
        transform_state=transform_state,
    )


@functools.partial(jax.jit, static_argnames=("config", "transform"), donate_argnames="state")
def decode_steps(
    params: Tree, state: State, steps: jax.Array | int, config: ModelConfig, transform: Transform = DEFAULT
) -> State:
    """Takes up to `steps` steps, fewer if all rows are done before.

    Args:
        params: See `decode_step`.
        state: From `prefill` or an earlier call. It is donated, so that the cache is updated in place.
        steps: int32 scalar. It is traced, so that `generate` and `stream` share one executable.
        config: See `decode_step`.
        transform: See `decode_step`.

    Returns:
        The last state.
    """

    params = half.from_bits(params)

    def unfinished(carry):
        count, state = carry
        return (count < steps) & ~jnp.all(state.done)

    def body(carry):
        count, state = carry
        return count + 1, decode_step(params, state, config, transform)

    return jax.lax.while_loop(unfinished, body, (jnp.int32(0), state))[1]
