"""Decoding as a pure state machine: one step samples one token for each row; the loop over steps runs on the device."""

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from garrulax import models
from garrulax.core import half
from garrulax.core.auto_mesh import split
from garrulax.core.config import ModelConfig
from garrulax.core.spec import Tree
from garrulax.core.sums import MOST_ROWS, row_sum
from garrulax.kernels.mask import PAD, Mask
from garrulax.layers.cache import Cache, with_memory_kinds, write
from garrulax.sampling.state import State, of_rows, split_state, without_layers
from garrulax.sampling.transforms import DEFAULT, Transform, sample


def decode_step(params: Tree, state: State, config: ModelConfig, transform: Transform = DEFAULT) -> State:
    """Reads the last token of each row and samples the next one. Pure; the shapes of the state do not change.

    Args:
        params: Unstacked (`models.unstack`), which decodes fastest, or stacked, as the state's cache.
        state: A state with a free slot in each row. Rows that are done keep their tokens.
        config: The family's Config.
        transform: The transform of the logits.

    Returns:
        The next state.
    """
    logits, cache = read(params, state, state.token[:, None], config)
    return choose(state, cache, logits[:, 0], transform)


def choose(state: State, cache: Cache, logits: jax.Array, transform: Transform) -> State:
    """Samples a token for each row that is not done.

    Args:
        state: The state before.
        cache: Its cache after the last token of each row was read.
        logits: float32 [B, V], of the next token.
        transform: The transform of the logits.

    Returns:
        The next state.
    """
    allowed = logits
    if state.allowed is not None:
        allowed = jnp.where(unpack_bits(state.allowed, logits.shape[1]), logits, -jnp.inf)
    transformed, transform_state = transform.update(allowed, state.transform_state)
    token = sample(transformed, state.seed, state.length)  # [B]
    # The sampled token is one of the greatest, so it alone says whether any token was left.
    impossible = jnp.take_along_axis(transformed, token[:, None], axis=1)[:, 0] == -jnp.inf
    logprob = jnp.where(impossible, -jnp.inf, log_probability(logits, token))
    return advance(state, cache, token, logprob, transform_state, transform)


def read(
    params: Tree, state: State, tokens: jax.Array, config: ModelConfig, count: jax.Array | None = None
) -> tuple[jax.Array, Cache]:
    """Logits float32 [B, T, V] after tokens [B, T] that follow those in the cache, and the cache with them in it.

    The first of the tokens has the position `state.position`. Those from `count` [B] on are padding.
    """
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]  # [1, T]
    rank = state.cache.used[:, None] + index  # [B, T]
    segment = jnp.zeros_like(rank)
    if count is not None:
        segment = jnp.where(index < count[:, None].astype(jnp.int32), segment, PAD)
        # The position of padding must not lie behind the context, where learned ones are NaN
        index = jnp.minimum(index, jnp.maximum(count - 1, 0)[:, None].astype(jnp.int32))  # [B, T]
    index = index.reshape(-1, *(1,) * (state.position.ndim - 1), tokens.shape[1])
    positions = state.position[..., None] + state.stride[..., None] * index  # [B, T] or [B, 2, T]
    mask = Mask({"rank": rank, "segment": segment})
    tokens = split(tokens, rows=0)  # so that the devices of a mesh share what is computed of the rows
    logits, cache = models.forward(params, tokens, config, positions=positions, mask=mask, cache=state.cache)
    # In bfloat16 the noise of sampling would be so coarse that rare tokens are never sampled.
    return split(logits, rows=0).astype(jnp.float32), cast(Cache, cache)


def log_probability(logits: jax.Array, token: jax.Array) -> jax.Array:
    """log softmax(logits [B, V]) of one token of each row: float32 [B]."""
    top = logits.max(axis=-1, keepdims=True)
    shifted = logits - jnp.where(jnp.isfinite(top), top, 0)
    total = row_sum(jnp.exp(shifted), MOST_ROWS)[:, 0]
    return jnp.take_along_axis(shifted, token[:, None], axis=1)[:, 0] - jnp.log(total)


def unpack_bits(words: jax.Array, size: int) -> jax.Array:
    """The first `size` bits of each row of uint32 [B, W], the lowest bit of a word first: bool [B, size]."""
    bits = words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None]  # [B, W, 32]
    return (bits & jnp.uint32(1)).astype(bool).reshape(len(words), -1)[:, :size]


def advance(
    state: State, cache: Cache, token: jax.Array, logprob: jax.Array, transform_state: Any, transform: Transform
) -> State:
    """The state after each row that is not done got a token."""
    active = ~state.done  # [B]
    generated = state.generated + active.astype(jnp.int32)
    ended = jnp.any(token[:, None] == state.ends, axis=1) | (generated >= state.limit)
    observed = transform.observe(token, transform_state)
    column = state.generated % state.tokens.shape[1]
    return dataclasses.replace(
        state,
        # The row of a text that is done steps on with the batch, but its slot stays free.
        cache=dataclasses.replace(cache, used=jnp.where(active, cache.used, state.cache.used)),
        token=jnp.where(active, token, state.token),
        position=of_rows(active, state.position + state.stride, state.position),
        length=state.length + active.astype(jnp.int32),
        generated=generated,
        done=state.done | ended,
        tokens=_record(state.tokens, token, column, active),
        logprobs=_record(state.logprobs, logprob, column, active),
        # What did not change is handed on as it is, so that XLA computes what depends on it once before the loop.
        transform_state=jax.tree.map(
            lambda new, old: old if new is old else of_rows(active, new, old), observed, state.transform_state
        ),
    )


def _record(x: jax.Array, new: jax.Array, column: jax.Array, active: jax.Array) -> jax.Array:
    """x [B, S] with new [B] in a column of each row that is active."""
    old = jnp.take_along_axis(x, column[:, None], axis=1)[:, 0]
    return write(x, jnp.where(active, new, old)[:, None], column, axis=1)


def _goes_on(state: State) -> jax.Array:
    """bool scalar, whether some row is not done and every row has a free slot; one reduction, and so one kernel."""
    active = (~state.done).astype(jnp.int32)  # [B]: 0, 1, or 2 for a row without room
    cache = state.cache
    return (active if cache.kind.ring else jnp.where(cache.used < cache.size, active, 2)).max() == 1


@functools.partial(jax.jit, static_argnames=("config", "transform"), donate_argnames="state")
def decode_steps(
    params: Tree, state: State, steps: jax.Array | int, config: ModelConfig, transform: Transform = DEFAULT
) -> State:
    """Takes up to `steps` steps, fewer if all rows are done before, or if a row has no free slot (`state.grow`).

    Args:
        params: See `decode_step`.
        state: It is donated, so that the cache is updated in place.
        steps: int32 scalar. It is traced, so that `generate` and `stream` share one executable.
        config: See `decode_step`.
        transform: See `decode_step`.

    Returns:
        The last state.
    """

    params = half.from_bits(params)

    def unfinished(carry):
        count, state = carry
        return (count < steps) & _goes_on(state)

    def body(carry):
        count, state = carry
        return count + 1, split_state(decode_step(params, state, config, transform), whole=False)

    state = dataclasses.replace(state, cache=with_memory_kinds(state.cache))
    begun = jnp.int32(0), split_state(state, whole=False)
    return split_state(jax.lax.while_loop(unfinished, body, begun)[1])


@functools.partial(jax.jit, static_argnames=("config", "transform"), donate_argnames="state")
def append(
    params: Tree,
    state: State,
    tokens: jax.Array | np.ndarray,
    count: jax.Array | np.ndarray,
    config: ModelConfig,
    transform: Transform = DEFAULT,
) -> State:
    """Appends given tokens to the new ones of each row, in one pass of the model.

    Args:
        params: See `decode_step`.
        state: With T free slots in each row. It is donated.
        tokens: int32 [B, T], from the left.
        count: int32 [B], number of tokens of each row; 0 leaves a row as it is, like those that are done.
        config: See `decode_step`.
        transform: It observes the tokens, and does not change them.

    Returns:
        The state as if these tokens had been sampled, as far as `limit` and the end tokens allow.
    """
    params, tokens, count = half.from_bits(params), jnp.asarray(tokens), jnp.asarray(count)
    known = jnp.concatenate([state.token[:, None], tokens[:, :-1]], axis=1)
    logits, cache = read(params, state, known, config, count)
    first = state.cache.used

    def take(i: jax.Array, state: State) -> State:
        """The state after token i; without the keys and values, which one pass has written."""
        token, row_logits = (jax.lax.dynamic_index_in_dim(x, i, axis=1, keepdims=False) for x in (tokens, logits))
        skipped = (i >= count) & ~state.done
        before = dataclasses.replace(state, done=state.done | skipped)
        after = dataclasses.replace(state.cache, used=first + (i + 1))
        new = advance(before, after, token, log_probability(row_logits, token), state.transform_state, transform)
        return dataclasses.replace(new, done=new.done & ~skipped)

    taken = jax.lax.fori_loop(jnp.int32(0), jnp.int32(tokens.shape[1]), take, without_layers(state))
    cache = dataclasses.replace(cache, used=taken.cache.used)
    return split_state(dataclasses.replace(taken, cache=cache))
