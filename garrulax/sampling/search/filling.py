"""Searches for the answers to blanks, and the order of the blanks by confidence.

Letters: B texts, N blanks, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from garrulax import models
from garrulax.core import half
from garrulax.core.config import ModelConfig
from garrulax.core.spec import Tree
from garrulax.models.unpack import TokenizerLike
from garrulax.sampling.buckets import bucket
from garrulax.sampling.decoder import Decoder
from garrulax.sampling.requests import Weights
from garrulax.sampling.search.beams import EVERY_BIT, beam_inputs, bit_names
from garrulax.sampling.search.kinds import BeamSearch, BestOf, ContrastiveSearch
from garrulax.sampling.search.running import best_writers, finish
from garrulax.sampling.state import State, grow
from garrulax.sampling.writing import Writer

ORDERS = ("text", "confidence")


def check_fill(search: Any, order: str, scales: Sequence[float] = ()) -> None:
    """Raises ValueError for a search, an order or a guidance (its scales) that `fill` does not have."""
    if any(scale != 1 for scale in scales):
        raise ValueError("guidance_scale goes with gx.generate only: leave it out")
    if order not in ORDERS:
        raise ValueError(f"order={order!r:.60} must be one of {', '.join(map(repr, ORDERS))}")
    if isinstance(search, ContrastiveSearch):
        raise ValueError("gx.contrastive compares hidden states, which fill does not keep from blank to blank: take "
                         "gx.beam, gx.diverse_beam or gx.best_of")  # fmt: skip
    if search is not None and not (isinstance(search, BeamSearch | BestOf) and search.returned == 1):
        raise ValueError("fill takes gx.beam(...), gx.diverse_beam(...) or gx.best_of(...), with returned=1")


@functools.partial(jax.jit, static_argnames="config")
def certainties(params: Tree, state: State, positions: jax.Array, config: ModelConfig) -> jax.Array:
    """log-probability of the most probable first token of the answers to several blanks: float32 [B, N].

    The start token is read once for each blank, and no one of them sees the others.

    Args:
        params: In the form of the state's cache.
        state: Whose `token` is the start token of an answer, with N free slots in each row.
        positions: int32 [B, N] or [B, 2, N], position of the start token for each blank.
        config: The family's Config.
    """
    params, N = half.from_bits(params), positions.shape[-1]
    bits = dict.fromkeys(bit_names(N), jnp.full_like(state.cache.streams["segment"], EVERY_BIT))
    cache = dataclasses.replace(state.cache, streams={**state.cache.streams, **bits})
    tokens = jnp.broadcast_to(state.token[:, None], (len(state.token), N))
    _, mask = beam_inputs(cache, tokens, state.position, N)
    logits, _ = models.forward(params, tokens, config, positions=positions, mask=mask, cache=cache)
    return jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1).max(axis=-1)


def with_slots(state: State, free: int) -> State:
    """The state with at least so many free slots in each row."""
    needed = int(state.cache.used.max()) + free
    return state if needed <= state.cache.size else grow(state, max(needed, state.cache.size + 64))


def beam_answers(
    search: BeamSearch,
    decoder: Decoder,
    weights: Weights,
    state: State,
    limits: Sequence[int],
    ends: Sequence[int],
    tokenizer: TokenizerLike | None,
    space_before: Sequence[bool],
    keep: bool,
) -> tuple[list[Writer], State | None]:
    """The best answer to one blank of each text.

    Args:
        search: The search.
        decoder: The functions of the model.
        weights: Its parameters.
        state: Before the first token of the answers. It is donated.
        limits: Greatest number of new tokens for each text, 0 for a text without a further blank.
        ends: Tokens that end an answer.
        tokenizer: None for answers without text.
        space_before: See `Writer`, one for each text.
        keep: Whether to return a state that has the answers behind the texts.

    Returns:
        The answers, and the state after them, or None.
    """
    before: Any = state
    rest = jax.tree.map(jnp.copy, dataclasses.replace(before, cache=None))  # the search donates what it gets
    used, streams = jnp.copy(state.cache.used), state.cache.streams.keys()
    beams = finish(search, decoder, weights, state)
    found = best_writers(beams, range(len(limits)), limits, ends, tokenizer, space_before)
    writers = [one[0] if one else Writer(tokenizer, 0, ends) for one in found]
    if not keep:
        return writers, None
    # The slots of the texts are as they were; the answers are read once more, into the slots behind them.
    cache = dataclasses.replace(beams.cache, used=used, streams={name: beams.cache.streams[name] for name in streams})
    longest = bucket(max(len(writer.tokens) for writer in writers), 16)
    tokens, count = np.zeros((len(used), longest), np.int32), np.zeros(len(used), np.int32)
    for row, writer in enumerate(writers):
        count[row] = len(writer.tokens)
        tokens[row, : count[row]] = writer.tokens
    state = with_slots(dataclasses.replace(rest, cache=cache), longest)
    return writers, decoder.append(weights.step, state, jnp.asarray(tokens), jnp.asarray(count))
