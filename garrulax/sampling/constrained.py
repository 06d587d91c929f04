"""Decoding under constraints: the host follows each text through its grammar and says which tokens may come next.

Reading and sampling are two programs. The device reads the last token of each row while the host computes the masks.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from garrulax.core import half
from garrulax.core.config import ModelConfig
from garrulax.core.spec import Tree
from garrulax.models.unpack import TokenizerLike
from garrulax.sampling import loop
from garrulax.sampling.buckets import bucket
from garrulax.sampling.constrain import Constraint, Matcher
from garrulax.sampling.decoder import Decoder
from garrulax.sampling.state import State, with_layers, without_layers
from garrulax.sampling.transforms import Transform
from garrulax.sampling.writing import Pieces, Writer, end_stopped, push_new_tokens, with_free_slots

FORCED = 64  # greatest number of forced tokens that are read in one pass


def matchers_of(
    constrain: Constraint | Sequence[Constraint | None] | None,
    limits: Sequence[int],
    copies: int,
    config: ModelConfig,
    tokenizer: TokenizerLike | None,
    ends: Sequence[int],
) -> list[Matcher | None]:
    """A matcher for each row; None for a row without a constraint.

    Args:
        constrain: The argument of `generate`: one constraint for all prompts, or one a prompt.
        limits: Greatest number of new tokens of each row.
        copies: Number of rows of each prompt, one after another.
        config: The family's Config.
        tokenizer: The model's tokenizer.
        ends: Ids of the tokens that end a text.

    Raises:
        ValueError: The model has no tokenizer or no end tokens, there is a wrong number of constraints, or a limit is
            too small for its constraint.
        TypeError: `constrain` is no constraint.
    """
    count = len(limits) // copies
    given: list[Any] = list(constrain) if isinstance(constrain, list | tuple) else [constrain] * count
    if len(given) != count:
        raise ValueError(f"constrain has {len(given)} constraints for {count} prompts: give one, or one a prompt")
    each = [one for one in given for _ in range(copies)]
    if wrong := [one for one in each if one is not None and not isinstance(one, Constraint)]:
        raise TypeError(
            f"constrain={wrong[0]!r:.60} must be made by gx.json_schema, gx.regex, gx.grammar or gx.tool_call"
        )
    if any(each) and tokenizer is None:
        raise ValueError("a constraint needs the model's tokenizer, which it does not have")
    return [
        None if one is None or tokenizer is None else one.bind(tokenizer, config.vocab, ends).matcher(limit)
        for one, limit in zip(each, limits, strict=True)
    ]


def decode_constrained(
    decoder: Decoder,
    params: Tree,
    state: State,
    writers: Mapping[int, Writer],
    matchers: Mapping[int, Matcher],
    size: int,
) -> Pieces[State]:
    """`writing.decode_pieces` for rows some of which have a constraint, with a piece for each token.

    Args:
        decoder: The functions of the model.
        params: In the form of the state's cache.
        state: With a request in the row of each writer, and with `allowed`. It is donated.
        writers: Row -> its writer.
        matchers: Row -> its matcher, which has seen the new tokens so far.
        size: Greatest number of tokens that a row may have.

    Returns:
        A generator, which returns the last state.

    Raises:
        FloatingPointError: The logits are not finite.
        ValueError: No token may be sampled.
    """
    masks = np.full((len(state.done), -(-decoder.config.vocab // 32)), 0xFFFFFFFF, np.uint32)
    while True:
        state = with_free_slots(state, 1, size)
        state, logits = _read_last(params, state, decoder.config)
        for row, matcher in matchers.items():
            matcher.mask(masks[row])
        state = _choose_accepted(decoder, state, logits, masks, matchers)
        pieces = push_new_tokens(state, writers)
        state = append_forced(decoder, params, state, writers, matchers, size)
        pieces = [a + b for a, b in zip(pieces, push_new_tokens(state, writers), strict=True)]
        yield pieces
        if all(writer.reason for writer in writers.values()):
            return state
        matchers = {row: matcher for row, matcher in matchers.items() if not writers[row].reason}
        state = end_stopped(state, writers)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def _read_last(params: Tree, state: State, config: ModelConfig) -> tuple[State, jax.Array]:
    """The state after the last token of each row was read, and the logits [B, V] of the next."""
    logits, cache = loop.read(half.from_bits(params), state, state.token[:, None], config)
    used = jnp.where(state.done, state.cache.used, cache.used)
    return dataclasses.replace(state, cache=dataclasses.replace(cache, used=used)), logits[:, 0]


@functools.partial(jax.jit, static_argnames="transform")
def _choose(rest: State, logits: jax.Array, allowed: jax.Array, transform: Transform) -> State:
    return loop.choose(dataclasses.replace(rest, allowed=allowed), rest.cache, logits, transform)


def _choose_accepted(
    decoder: Decoder, state: State, logits: jax.Array, masks: np.ndarray, matchers: Mapping[int, Matcher]
) -> State:
    """Samples a token for each row. A row whose matcher refuses its token samples again, under a mask without it."""
    waiting = dict(matchers)
    done = np.asarray(state.done)
    while True:
        chosen = _choose(without_layers(state), logits, masks, decoder.transform)
        tokens, logprobs = jax.device_get((chosen.token, chosen.logprobs))
        columns = np.asarray(state.generated)
        refused = {}
        for row, matcher in waiting.items():
            impossible = not np.isfinite(logprobs[row, columns[row]])  # `push_new_tokens` raises the error
            if not done[row] and not impossible and not matcher.accept(int(tokens[row])):
                matcher.mask(masks[row])
                refused[row] = matcher
        if not refused:
            return with_layers(chosen, state.cache.layers)
        waiting = refused


def append_forced(
    decoder: Decoder,
    params: Tree,
    state: State,
    writers: Mapping[int, Writer],
    matchers: Mapping[int, Matcher],
    size: int,
) -> State:
    """Appends the tokens that must come next, in one pass, to each row that has several of them."""
    forced: dict[int, list[int]] = {}
    for row, matcher in matchers.items():
        tokens = [] if writers[row].reason or matcher.finished else matcher.forced()[:FORCED]
        if len(tokens) > 1:
            accepted = [token for token in tokens if matcher.accept(token)]
            assert accepted == tokens, "a forced token was refused"
            forced[row] = tokens
    if not forced:
        return state
    width = bucket(max(map(len, forced.values())), least=8)
    padded, count = np.zeros((len(state.done), width), np.int32), np.zeros(len(state.done), np.int32)
    for row, ids in forced.items():
        padded[row, : len(ids)], count[row] = ids, len(ids)
    return decoder.append(params, with_free_slots(state, width, size), padded, count)
