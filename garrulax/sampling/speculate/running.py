"""Speculation from the host: checks, compilation, and the loop over pieces of text."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from garrulax.core.spec import Tree
from garrulax.sampling import ahead
from garrulax.sampling.constrain import Matcher
from garrulax.sampling.decoder import Decoder
from garrulax.sampling.requests import Weights
from garrulax.sampling.search import BestOf, Search
from garrulax.sampling.speculate.accept import exact
from garrulax.sampling.speculate.constrained import decode_constrained_speculating, with_room
from garrulax.sampling.speculate.interface import Bound, Speculation
from garrulax.sampling.speculate.loop import Speculating, speculate_steps
from garrulax.sampling.start import compile_start
from garrulax.sampling.state import Requests, State
from garrulax.sampling.writing import Pieces, Writer, end_stopped, push_new_tokens


def check_speculation(speculate: Speculation, search: Search | None, guided: bool) -> None:
    """Raises TypeError for what is no way of speculation, and ValueError for what does not go with it."""
    if not isinstance(speculate, Speculation):
        raise TypeError(f"speculate={speculate!r:.60} must be made by gx.prompt_lookup, gx.draft or gx.medusa")
    if search is not None and not isinstance(search, BestOf):
        raise ValueError("speculate does not go with this search, which compares several tokens: use gx.best_of")
    if guided:
        raise ValueError("speculate does not go with guidance_scale: leave one of them out")


def check_acceptance(bound: Bound, constrained: bool) -> None:
    """Raises ValueError where drafts under constraints would be accepted by another rule than the exact one."""
    if constrained and bound.proposer.accept is not exact:
        raise ValueError("constrain goes with exact acceptance only: leave accept= of gx.medusa out")


def begin(state: State, bound: Bound) -> Speculating:
    """Speculation before the first new token."""
    return _with_memory(state, bound.begin(state))


def _with_memory(state: State, memory: Any) -> Speculating:
    return Speculating(state, memory, jnp.zeros((len(state.done),), jnp.int32))


def compile_speculation(
    decoder: Decoder, weights: Weights, requests: Requests, size: int, bound: Bound, constrained: bool = False
) -> None:
    """Begins to compile what `start` and the loop need, at once, in other threads.

    Args:
        decoder: The functions of the model.
        weights: Its parameters, which may be abstract.
        requests: One for each row.
        size: Greatest number of tokens that a row may get.
        bound: What guesses tokens.
        constrained: Whether there are constraints, for whose programs nothing is compiled ahead but the first.
    """
    state = compile_start(decoder, weights, requests, size, steps=False)
    if constrained:
        return
    memory = (bound.compile_ahead or functools.partial(jax.eval_shape, bound.begin))(state)
    one = jax.eval_shape(_with_memory, state, memory)
    ahead.compile_ahead(speculate_steps, weights.step, bound.params, one, np.int32(1), **_static(decoder, bound))


def decode_speculating(
    decoder: Decoder,
    params: Tree,
    state: State,
    writers: Mapping[int, Writer],
    every: int,
    size: int,
    bound: Bound,
    matchers: Mapping[int, Matcher],
) -> Pieces[dict[int, int]]:
    """`writing.decode_pieces`, or with matchers `constrained.decode_constrained`, with speculation.

    Arguments as there; `every` counts passes.

    Returns:
        A generator, whose result is the number of passes of each row.
    """
    one = begin(state, bound)
    if matchers:
        one = yield from decode_constrained_speculating(decoder, params, one, writers, matchers, size, bound)
    else:
        one = yield from _decode(_stepper(decoder, params, every, size, bound), one, writers)
    passes = np.asarray(one.passes)
    return {row: int(passes[row]) for row in writers}


def _decode(
    step: Callable[[Speculating], Speculating], one: Speculating, writers: Mapping[int, Writer]
) -> Pieces[Speculating]:
    while True:
        one = step(one)
        yield push_new_tokens(one.state, writers)
        if all(writer.reason for writer in writers.values()):
            return one
        one = dataclasses.replace(one, state=end_stopped(one.state, writers))


def _stepper(
    decoder: Decoder, params: Tree, every: int, size: int, bound: Bound
) -> Callable[[Speculating], Speculating]:
    """A function that makes up to `every` passes, and first makes the cache longer where a row has no room for one."""
    programs: dict[int, Callable[..., Speculating]] = {}  # by number of slots

    def step(one: Speculating) -> Speculating:
        one = with_room(one, bound, size)
        slots = one.state.cache.size
        if slots not in programs:
            arguments = (params, bound.params, one, np.int32(every))
            programs[slots] = ahead.find(speculate_steps, *arguments, **_static(decoder, bound))
        return programs[slots](params, bound.params, one, np.int32(every))

    return step


def _static(decoder: Decoder, bound: Bound) -> dict[str, Any]:
    return {"config": decoder.config, "transform": decoder.transform, "proposer": bound.proposer}
