"""The state of beam search and its steps on the device.

All beams of a prompt share one row of the cache: a step writes one slot for each beam, and no slot ever moves. The
streams `bits0`, `bits1`, ... of a slot have a bit for each beam whose text contains the token of the slot, and a beam
attends to the slots with its bit. So choosing beams changes these bits only, and the prompt is kept and read once.

Letters: P prompts, G groups of K beams each, N = G K beams of a prompt, V vocabulary, S cache slots, L new tokens,
E end tokens.
"""

import dataclasses
import functools
import operator
from typing import Any, cast

import jax
import jax.numpy as jnp

from garrulax import models
from garrulax.core import half
from garrulax.core.config import ModelConfig
from garrulax.core.spec import Tree
from garrulax.kernels.mask import CAUSAL, SAME_SEGMENT, Bits, Mask, Rule
from garrulax.kernels.masks import BITS_PER_WORD
from garrulax.layers.cache import Cache
from garrulax.sampling.loop import unpack_bits
from garrulax.sampling.search.kinds import BeamSearch
from garrulax.sampling.search.selecting import Selected, Sequences, select
from garrulax.sampling.state import State
from garrulax.sampling.transforms import Transform

EVERY_BIT = (1 << BITS_PER_WORD) - 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Beams:
    """The state of beam search between two steps.

    Attributes:
        cache: Keys and values of the prompts and of all tokens that any beam has read, P rows.
        position: int32 [P] or [P, 2], position of the beams' last tokens.
        stride: int32 [P] or [P, 2], increase of the position from each token to the next.
        limit: int32 [P], greatest number of new tokens.
        generated: int32 [P], number of new tokens of each beam so far.
        ends: int32 [P, E], tokens that end a sequence.
        done: bool [P, G], whether the group is done.
        token: int32 [P, N], last token of each beam, which the model has not read yet.
        parent: int32 [P, N], the beam of the step before which each beam continues.
        running: The beams.
        finished: The best finished sequences of each group, with scores divided by their length penalty.
        allowed: uint32 [P N, ceil(V / 32)], as `State.allowed`, in the order of `to_rows`; None allows all.
        transform_state: State of the transform, whose rows are in the order of `to_rows`.
    """

    cache: Cache
    position: jax.Array
    stride: jax.Array
    limit: jax.Array
    generated: jax.Array
    ends: jax.Array
    done: jax.Array
    token: jax.Array
    parent: jax.Array
    running: Sequences
    finished: Sequences
    allowed: jax.Array | None
    transform_state: Any


def to_rows(x: jax.Array) -> jax.Array:
    """[P, N, ...] as [P N, ...]: one beam after another, but of two prompts in turns.

    The transform for classifier-free guidance reads pairs of rows, which come from pairs of prompts.
    """
    pairs = _pairs(len(x))
    x = x.reshape(-1, pairs, *x.shape[1:])
    return jnp.swapaxes(x, 1, 2).reshape(-1, *x.shape[3:])


def from_rows(x: jax.Array, prompts: int) -> jax.Array:
    """The inverse of `to_rows`."""
    pairs = _pairs(prompts)
    x = x.reshape(prompts // pairs, -1, pairs, *x.shape[1:])
    return jnp.swapaxes(x, 1, 2).reshape(prompts, -1, *x.shape[3:])


def _pairs(prompts: int) -> int:
    return 2 - prompts % 2


@functools.partial(jax.jit, static_argnames=("search", "length"))
def begin(state: State, search: BeamSearch, length: int) -> Beams:
    """The state of the search before the first new token.

    Args:
        state: With one row for each prompt, before its first new token.
        search: The search.
        length: L, at least the greatest limit.
    """
    P, N, G = len(state.token), search.beams, search.groups
    slots = state.cache.streams["segment"]
    bits = dict.fromkeys(bit_names(N), jnp.full_like(slots, EVERY_BIT))  # all beams have the prompt

    def spread(x):  # [P, ...] to one entry for each beam
        return to_rows(jnp.broadcast_to(x[:, None], (P, N, *x.shape[1:])))

    def sequences(score):
        zero = jnp.zeros((P, G, search.group, length), jnp.int32)
        return Sequences(score, zero, zero.astype(jnp.float32), jnp.zeros((P, G, search.group), jnp.int32))

    nothing = jnp.full((P, G, search.group), -jnp.inf, jnp.float32)
    return Beams(
        cache=dataclasses.replace(state.cache, streams={**state.cache.streams, **bits}),
        position=state.position,
        stride=state.stride,
        limit=state.limit,
        generated=jnp.zeros_like(state.limit),
        ends=state.ends,
        done=jnp.broadcast_to(state.done[:, None], (P, G)),
        token=jnp.broadcast_to(state.token[:, None], (P, N)),
        parent=jnp.zeros((P, N), jnp.int32),
        running=sequences(nothing.at[:, :, 0].set(0)),  # the others would repeat the first
        finished=sequences(nothing),
        allowed=None if state.allowed is None else spread(state.allowed),
        transform_state=jax.tree.map(spread, state.transform_state),
    )


@functools.partial(jax.jit, static_argnames=("config", "transform", "search"), donate_argnames="beams")
def search_steps(
    params: Tree,
    beams: Beams,
    steps: jax.Array | int,
    length_penalty: jax.Array | float,
    penalty: jax.Array | float,
    config: ModelConfig,
    transform: Transform,
    search: BeamSearch,
) -> Beams:
    """Takes up to `steps` steps, fewer if all prompts are done before, or if a row has too few free slots.

    Args:
        params: Of the model, in the form of the cache.
        beams: It is donated, so that the cache is updated in place.
        steps: int32 scalar, traced.
        length_penalty: float32 scalar, traced; that of `search` is not read, and likewise `penalty`.
        penalty: float32 scalar, traced.
        config: The family's Config.
        transform: The transform of the log-probabilities.
        search: The search.
    """
    params = half.from_bits(params)
    penalties = jnp.asarray(length_penalty, jnp.float32), jnp.asarray(penalty, jnp.float32)

    def unfinished(carry):
        count, beams = carry
        room = beams.cache.used.max() + search.beams <= beams.cache.size
        return (count < steps) & ~jnp.all(beams.done) & room

    def body(carry):
        count, beams = carry
        return count + 1, search_step(params, beams, *penalties, config, transform, search)

    return jax.lax.while_loop(unfinished, body, (jnp.int32(0), beams))[1]


@functools.partial(jax.jit, static_argnames="slots")
def grow(beams: Beams, slots: int) -> Beams:
    """The same state with more cache slots a prompt, `slots` in all."""

    def longer(x: jax.Array, axis: int) -> jax.Array:
        return jnp.pad(x, [(0, slots - x.shape[axis] if i == axis else 0) for i in range(x.ndim)])

    layers = jax.tree.map(lambda x: longer(x, x.ndim - 2), beams.cache.layers)
    streams = {name: longer(x, 1) for name, x in beams.cache.streams.items()}
    return dataclasses.replace(beams, cache=dataclasses.replace(beams.cache, layers=layers, streams=streams))


def search_step(
    params: Tree,
    beams: Beams,
    length_penalty: jax.Array,
    penalty: jax.Array,
    config: ModelConfig,
    transform: Transform,
    search: BeamSearch,
) -> Beams:
    """One step of `search_steps`."""
    beams, logprobs = read_step(params, beams, config)
    return choose_step(beams, logprobs, length_penalty, penalty, transform, search)


def read_step(params: Tree, beams: Beams, config: ModelConfig) -> tuple[Beams, jax.Array]:
    """The beams with their last tokens in the cache, and the log-probabilities [P, N, V] of the next ones."""
    positions, mask = beam_inputs(beams.cache, beams.token, beams.position, beams.token.shape[1])
    logits, cache = cast(
        tuple[jax.Array, Cache],
        models.forward(params, beams.token, config, positions=positions, mask=mask, cache=beams.cache),
    )
    # The row of a prompt that is done steps on with the others, but its slots stay free.
    used = jnp.where(jnp.all(beams.done, axis=1), beams.cache.used, cache.used)
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return dataclasses.replace(beams, cache=dataclasses.replace(cache, used=used)), logprobs


def choose_step(
    beams: Beams,
    logprobs: jax.Array,
    length_penalty: jax.Array,
    penalty: jax.Array,
    transform: Transform,
    search: BeamSearch,
) -> Beams:
    """The beams after the next tokens were chosen. Arguments as from `read_step` and for `search_steps`."""
    P, N = beams.token.shape
    chosen, transform_state = _choose(beams, logprobs, length_penalty, penalty, transform, search)
    parent = jnp.concatenate([one.parent for one in chosen], axis=1)
    token = jnp.concatenate([one.token for one in chosen], axis=1)
    active = ~jnp.all(beams.done, axis=1)  # [P]
    streams = beams.cache.streams
    streams = {**streams, **_inherit({name: streams[name] for name in bit_names(N)}, parent)}

    def inherit(x):
        old = from_rows(x, P)
        return to_rows(jnp.take_along_axis(old, parent.reshape(P, N, *(1,) * (old.ndim - 2)), axis=1))

    transform_state = transform.observe(to_rows(token), jax.tree.map(inherit, transform_state))
    return dataclasses.replace(
        beams,
        cache=dataclasses.replace(beams.cache, streams=streams),
        position=beams.position + beams.stride * active.reshape(P, *(1,) * (beams.position.ndim - 1)).astype(jnp.int32),
        generated=beams.generated + active.astype(jnp.int32),
        done=jnp.stack([one.done for one in chosen], axis=1),
        token=token,
        parent=parent,
        running=Sequences.stack([one.running for one in chosen]),
        finished=Sequences.stack([one.finished for one in chosen]),
        transform_state=transform_state,
    )


def _choose(
    beams: Beams,
    logprobs: jax.Array,
    length_penalty: jax.Array,
    penalty: jax.Array,
    transform: Transform,
    search: BeamSearch,
) -> tuple[list[Selected], Any]:
    """Selects the next tokens of each group, one group after another. `logprobs`: [P, N, V].

    Returns the selections, and the state of the transform.
    """
    P, _, V = logprobs.shape
    allowed = None if beams.allowed is None else from_rows(unpack_bits(beams.allowed, V), P)
    every_state = jax.tree.map(lambda x: from_rows(x, P), beams.transform_state)
    chosen, states = [], []
    taken = jnp.zeros((P, V), jnp.float32)  # how often earlier groups chose each token
    for g in range(search.groups):
        group = slice(g * search.group, (g + 1) * search.group)
        choices = logprobs[:, group] - (penalty * taken[:, None] if g else 0)
        if allowed is not None:
            choices = jnp.where(allowed[:, group], choices, -jnp.inf)
        state = jax.tree.map(lambda x, group=group: to_rows(x[:, group]), every_state)
        choices, state = transform.update(to_rows(choices), state)
        if search.score is not None:
            added = search.score(to_rows(logprobs[:, group])).astype(jnp.float32)
            choices = choices + (added[:, None] if added.ndim == 1 else added)
        one = select(
            from_rows(choices, P), logprobs[:, group], beams.running.group(g), beams.finished.group(g),
            beams.done[:, g], beams.generated, beams.limit, beams.ends, length_penalty, search.early_stopping,
            search.groups > 1,
        )  # fmt: skip
        if search.groups > 1:
            counted = jnp.where(beams.done[:, g, None], V, one.token)  # a group that is done avoids nothing
            taken = taken.at[jnp.arange(P, dtype=jnp.int32)[:, None], counted].add(1, mode="drop")
        chosen.append(one._replace(parent=one.parent + g * search.group))
        states.append(jax.tree.map(lambda x: from_rows(x, P), state))
    return chosen, jax.tree.map(lambda *x: to_rows(jnp.concatenate(x, axis=1)), *states)


def beam_inputs(cache: Cache, tokens: jax.Array, position: jax.Array, beams: int) -> tuple[jax.Array, Mask]:
    """Positions and mask of the tokens [P, T] of the first T of several beams, all at one position [P] or [P, 2]."""
    rank = jnp.zeros_like(tokens) + cache.used[:, None]
    number = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    query = {"rank": rank, "segment": jnp.zeros_like(rank)}
    rules: list[Rule] = []
    for i, name in enumerate(bit_names(beams)):
        bit = jnp.where(number // BITS_PER_WORD == i, jnp.int32(1) << (number % BITS_PER_WORD), 0)
        query[name] = jnp.zeros_like(rank) + bit
        rules.append(Bits(name))
    mask = Mask(query, rule=CAUSAL & SAME_SEGMENT & functools.reduce(operator.or_, rules))
    return jnp.broadcast_to(position[..., None], (*position.shape, len(number))), mask


def bit_names(beams: int) -> tuple[str, ...]:
    """Names of the streams with the bits of the beams."""
    return tuple(f"bits{i}" for i in range(-(-beams // BITS_PER_WORD)))


def _inherit(bits: dict[str, jax.Array], parent: jax.Array) -> dict[str, jax.Array]:
    """The bits [P, S] of each slot after each of the beams [P, N] has taken the text of its parent."""
    N = parent.shape[1]
    place = jnp.arange(BITS_PER_WORD, dtype=jnp.int32)[None, :, None]
    flags = jnp.concatenate([x[:, None] >> place & 1 for x in bits.values()], axis=1)  # [P, words x 30, S]
    flags = jnp.take_along_axis(flags, parent[:, :, None], axis=1)
    flags = jnp.pad(flags, ((0, 0), (0, len(bits) * BITS_PER_WORD - N), (0, 0)))
    words = (flags.reshape(len(parent), len(bits), BITS_PER_WORD, -1) << place[:, None]).sum(axis=2, dtype=jnp.int32)
    return {name: words[:, i] for i, name in enumerate(bits)}
