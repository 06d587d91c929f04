"""Contrastive search (Su et al. 2022). Letters: P prompts, k candidates, V vocabulary, S slots, D width of the model.

The candidates for the next token of a prompt are read together, as k tokens that do not see one another. The keys and
values of the chosen one then move to the first of the k new slots, and the others are overwritten.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from garrulax import models
from garrulax.core import half
from garrulax.core.config import ModelConfig
from garrulax.core.dtypes import at_least_float32
from garrulax.core.spec import Tree
from garrulax.kernels.mask import PAD, Mask
from garrulax.layers.cache import Cache
from garrulax.sampling.buckets import slots_for
from garrulax.sampling.decoder import Decoder
from garrulax.sampling.loop import advance, log_probability, unpack_bits
from garrulax.sampling.requests import Weights, of_one_context
from garrulax.sampling.search.beams import EVERY_BIT, beam_inputs, bit_names
from garrulax.sampling.search.kinds import ContrastiveSearch
from garrulax.sampling.start import size_of, start
from garrulax.sampling.state import Requests, State, grow
from garrulax.sampling.transforms import Transform, argmax
from garrulax.sampling.writing import Writer, end_stopped, push_new_tokens

STOP_CHECK_STEPS = 8  # steps between two checks for stop strings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Contrast:
    """The state of contrastive search between two steps.

    Attributes:
        state: The state of decoding; but the model has read its `token` already.
        logits: float32 [P, V], after that token.
        hidden: [P, S, D], hidden states in the last layer of the tokens in the cache, each divided by its length.
    """

    state: State
    logits: jax.Array
    hidden: jax.Array


@functools.partial(jax.jit, static_argnames="config")
def context_hidden(params: Tree, requests: Requests, config: ModelConfig) -> jax.Array:
    """`Contrast.hidden` of the contexts of requests: [B, P, D]."""
    mask = Mask({"rank": requests.rank, "segment": requests.segment})
    x, _ = models.hidden(half.from_bits(params), requests.context, config, positions=requests.positions, mask=mask)
    return jnp.where((requests.segment != PAD)[:, :, None], _direction(x), 0)


@functools.partial(jax.jit, static_argnames=("config", "search"), donate_argnames="state")
def begin_contrast(
    params: Tree, state: State, hidden: jax.Array, config: ModelConfig, search: ContrastiveSearch
) -> Contrast:
    """Reads the last token of each prompt.

    Args:
        params: Of the model, in the form of the cache.
        state: Before the first new token. It is donated.
        hidden: [P, S, D], of the tokens in the cache.
        config: The family's Config.
        search: The search.
    """
    params = half.from_bits(params)
    segment = state.cache.streams["segment"]
    streams = {**state.cache.streams, **dict.fromkeys(bit_names(search.k), jnp.full_like(segment, EVERY_BIT))}
    cache = dataclasses.replace(state.cache, streams=streams)
    x, logits, after = _read(params, cache, state.token[:, None], state.position, config, search.k)
    after = _keep_one(after, jnp.zeros_like(state.token), search.k, cache.used)
    hidden = _put(hidden, _direction(x)[:, 0], cache.used)
    return Contrast(dataclasses.replace(state, cache=after), logits[:, 0], hidden)


@functools.partial(jax.jit, static_argnames=("config", "transform", "search"), donate_argnames="before")
def contrast_steps(
    params: Tree,
    before: Contrast,
    steps: jax.Array | int,
    alpha: jax.Array | float,
    config: ModelConfig,
    transform: Transform,
    search: ContrastiveSearch,
) -> Contrast:
    """Takes up to `steps` steps, fewer if all rows are done before, or if a row has too few free slots.

    Args:
        params: Of the model, in the form of the cache.
        before: It is donated.
        steps: int32 scalar, traced.
        alpha: float32 scalar, traced; that of `search` is not read.
        config: The family's Config.
        transform: The transform of the logits.
        search: The search.
    """
    params, alpha = half.from_bits(params), jnp.asarray(alpha, jnp.float32)

    def unfinished(carry):
        count, one = carry
        room = one.state.cache.used.max() + search.k <= one.state.cache.size
        return (count < steps) & ~jnp.all(one.state.done) & room

    def body(carry):
        count, one = carry
        return count + 1, contrast_step(params, one, alpha, config, transform, search)

    return jax.lax.while_loop(unfinished, body, (jnp.int32(0), before))[1]


def contrast_step(
    params: Tree,
    before: Contrast,
    alpha: jax.Array,
    config: ModelConfig,
    transform: Transform,
    search: ContrastiveSearch,
) -> Contrast:
    """One step of `contrast_steps`."""
    state, logits = before.state, before.logits
    allowed = logits if state.allowed is None else jnp.where(unpack_bits(state.allowed, config.vocab), logits, -jnp.inf)
    transformed, transform_state = transform.update(allowed, state.transform_state)
    p, tokens = jax.lax.top_k(jax.nn.softmax(transformed, axis=-1), search.k)  # [P, k]
    used = state.cache.used
    x, next_logits, cache = _read(params, state.cache, tokens, state.position + state.stride, config, search.k)
    direction = _direction(x)  # [P, k, D]
    cosine = jnp.einsum("PKD,PSD->PKS", direction, before.hidden)
    known = jnp.arange(before.hidden.shape[1], dtype=jnp.int32)[None] < used[:, None]  # [P, S]
    likeness = jnp.where(known[:, None], cosine, -jnp.inf).max(axis=-1).astype(jnp.float32)  # [P, k]
    value = jnp.where(p > 0, (1 - alpha) * p - alpha * likeness, -jnp.inf)  # a token that is not allowed has p = 0
    chosen = argmax(value)  # [P]

    def of_chosen(y):  # [P, k, ...]
        return jnp.take_along_axis(y, chosen.reshape(-1, *(1,) * (y.ndim - 1)), axis=1)[:, 0]

    cache = _keep_one(cache, chosen, search.k, used)
    token = of_chosen(tokens)
    logprob = jnp.where(value.max(axis=-1) == -jnp.inf, -jnp.inf, log_probability(logits, token))  # as in `loop.choose`
    after = advance(state, cache, token, logprob, transform_state, transform)
    return Contrast(after, of_chosen(next_logits), _put(before.hidden, of_chosen(direction), used))


def _read(
    params: Tree, cache: Cache, tokens: jax.Array, position: jax.Array, config: ModelConfig, k: int
) -> tuple[jax.Array, jax.Array, Cache]:
    """Hidden states [P, T, D] and logits float32 [P, T, V] of T <= k tokens that do not see one another."""
    positions, mask = beam_inputs(cache, tokens, position, k)
    x, after = models.hidden(params, tokens, config, positions=positions, mask=mask, cache=cache)
    assert after is not None
    return x, models.family(config).logits(params, x, config).astype(jnp.float32), after


def _keep_one(cache: Cache, chosen: jax.Array, k: int, used: jax.Array) -> Cache:
    """The cache with the token in slot used + chosen [P] alone, in slot `used`."""
    rows = jnp.arange(len(used), dtype=jnp.int32)

    def move(x):  # [P K, S, C], [P, K, S, C] or [L, P, K, S, C], where K is the number of heads
        if x.ndim == 3:
            heads = len(x) // len(used)
            every = jnp.arange(len(x), dtype=jnp.int32)
            slot = jnp.repeat(used, heads)
            return x.at[every, slot].set(x[every, slot + jnp.repeat(chosen, heads)])
        at = (rows, slice(None), used), (rows, slice(None), used + chosen)
        to, of = at if x.ndim == 4 else (((slice(None), *one)) for one in at)
        return x.at[to].set(x[of])

    layers = jax.tree.map(move, cache.layers)
    bits = {name: cache.streams[name].at[rows, used].set(EVERY_BIT) for name in bit_names(k)}
    return dataclasses.replace(cache, layers=layers, streams={**cache.streams, **bits}, used=used + 1)


def _direction(x: jax.Array) -> jax.Array:
    """Vectors [..., D] divided by their lengths, in at least float32."""
    x = x.astype(at_least_float32(x.dtype))
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def _put(hidden: jax.Array, new: jax.Array, slot: jax.Array) -> jax.Array:
    """hidden [P, S, D] with new [P, D] in one slot of each row."""
    return hidden.at[jnp.arange(len(slot), dtype=jnp.int32), slot].set(new.astype(hidden.dtype))


def start_contrast(
    search: ContrastiveSearch, decoder: Decoder, weights: Weights, requests: Requests, more: int = 0
) -> tuple[State, jax.Array]:
    """The state before the first new token, and `Contrast.hidden` of it. Arguments as in `start.start`."""
    size = size_of(requests, decoder.buckets, more + search.k)
    state = start(decoder, weights, requests, size, steps=False)
    parts = []
    for i in range(len(requests.token)):
        x = context_hidden(weights.prefill, of_one_context(requests, [i], decoder.buckets), decoder.config)
        parts.append(jnp.pad(x, ((0, 0), (0, state.cache.size - x.shape[1]), (0, 0))))
    hidden = jnp.concatenate(parts)
    return state, jnp.pad(hidden, ((0, len(state.token) - len(hidden)), (0, 0), (0, 0)))


def contrast(
    search: ContrastiveSearch,
    decoder: Decoder,
    weights: Weights,
    state: State,
    hidden: jax.Array,
    writers: Mapping[int, Writer],
    every: int,
    size: int,
) -> State:
    """Searches until every writer is finished.

    Args:
        search: The search.
        decoder: The functions of the model.
        weights: Its parameters.
        state: Before the first new token. It is donated.
        hidden: See `start_contrast`.
        writers: Row -> its writer.
        every: Number of steps between two checks for stop strings.
        size: Greatest number of slots of a row.

    Returns:
        The last state, as `decode_steps` would leave it.

    Raises:
        FloatingPointError: The logits are not finite.
    """

    def with_room(state: State, hidden: jax.Array, room: int) -> tuple[State, jax.Array]:
        needed = int(state.cache.used.max()) + room
        if needed <= state.cache.size:
            return state, hidden
        state = grow(state, max(needed, slots_for(needed, size)))
        return state, jnp.pad(hidden, ((0, 0), (0, state.cache.size - hidden.shape[1]), (0, 0)))

    alpha, static = np.float32(search.alpha), dataclasses.replace(search, alpha=0.0)
    one = begin_contrast(weights.step, *with_room(state, hidden, search.k), decoder.config, static)
    while True:
        state, hidden = with_room(one.state, one.hidden, search.k)
        one = Contrast(state, one.logits, hidden)
        one = contrast_steps(weights.step, one, np.int32(every), alpha, decoder.config, decoder.transform, static)
        push_new_tokens(one.state, writers)
        if all(writer.reason for writer in writers.values()):
            return _unread(one.state, search)
        one = dataclasses.replace(one, state=end_stopped(one.state, writers))


def _unread(state: State, search: ContrastiveSearch) -> State:
    """The state with the last token of each row out of the cache, as after `decode_steps`."""
    streams = {name: x for name, x in state.cache.streams.items() if name not in bit_names(search.k)}
    cache = dataclasses.replace(state.cache, streams=streams, used=state.cache.used - 1)
    return dataclasses.replace(state, cache=cache)
