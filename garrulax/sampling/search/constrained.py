"""Beam search under constraints: the host follows each beam through its grammar."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from garrulax.core import half
from garrulax.core.config import ModelConfig
from garrulax.core.spec import Tree
from garrulax.sampling.constrain import Matcher
from garrulax.sampling.search.beams import Beams, choose_step, read_step, to_rows
from garrulax.sampling.search.kinds import BeamSearch
from garrulax.sampling.transforms import Transform


class Following:
    """The matchers of all beams.

    Args:
        matchers: Row -> the matcher of its prompt; other rows have no constraint.
        beams: Before the first new token.
        vocab: V.
    """

    def __init__(self, matchers: Mapping[int, Matcher], beams: Beams, vocab: int):
        P, N = beams.token.shape
        self._matchers = {row: [matcher] * N for row, matcher in matchers.items()}  # only the first beam runs yet
        self._places = np.empty(P * N, int)  # of a beam in `Beams.allowed`
        self._places[np.asarray(to_rows(jnp.arange(P * N, dtype=jnp.int32).reshape(P, N)))] = np.arange(P * N)
        self._masks = np.full((P * N, -(-vocab // 32)), 0xFFFFFFFF, np.uint32)

    def step(
        self,
        params: Tree,
        beams: Beams,
        length_penalty: np.float32,
        penalty: np.float32,
        config: ModelConfig,
        transform: Transform,
        search: BeamSearch,
    ) -> Beams:
        """One step. A token that the matcher of its beam refuses is left out, and the step chooses again.

        Args:
            params: Of the model, in the form of the cache.
            beams: It is donated.
            length_penalty: As for `search_steps`, like the others.
            penalty: Of diverse groups.
            config: The family's Config.
            transform: The transform of the log-probabilities.
            search: The search.
        """
        beams, logprobs = _read(params, beams, config)
        N = beams.token.shape[1]
        for row, each in self._matchers.items():
            for beam, matcher in enumerate(each):
                matcher.mask(self._masks[self._places[row * N + beam]])
        layers, rest = beams.cache.layers, dataclasses.replace(beams.cache, layers=None)
        beams = dataclasses.replace(beams, cache=rest)
        while True:
            allowed = dataclasses.replace(beams, allowed=jnp.asarray(self._masks))
            chosen = _choose(allowed, logprobs, length_penalty, penalty, transform, search)
            following = self._follow(chosen)
            if following is not None:
                self._matchers = following
                return dataclasses.replace(chosen, cache=dataclasses.replace(chosen.cache, layers=layers))

    def _follow(self, chosen: Beams) -> dict[int, list[Matcher]] | None:
        """The matchers after the chosen tokens; None if one of them was refused, which the masks then leave out."""
        N = chosen.token.shape[1]
        parent, token, score, done = jax.device_get((chosen.parent, chosen.token, chosen.running.score, chosen.done))
        score = score.reshape(len(parent), N)
        following: dict[int, list[Matcher]] = {}
        refused = False
        for row, each in self._matchers.items():
            following[row] = list(each)
            for beam in range(N) if not done[row].all() else ():
                before = each[parent[row, beam]]
                if score[row, beam] == -np.inf:  # there are fewer texts than beams
                    continue
                after = before.copy()
                if after.accept(int(token[row, beam])):
                    following[row][beam] = after
                else:
                    refused = True
                    before.accept(int(token[row, beam]))  # so that its next mask lacks the token
                    before.mask(self._masks[self._places[row * N + parent[row, beam]]])
        return None if refused else following


@functools.partial(jax.jit, static_argnames="config", donate_argnames="beams")
def _read(params: Tree, beams: Beams, config: ModelConfig) -> tuple[Beams, jax.Array]:
    return read_step(half.from_bits(params), beams, config)


@functools.partial(jax.jit, static_argnames=("transform", "search"))
def _choose(
    beams: Beams,
    logprobs: jax.Array,
    length_penalty: jax.Array,
    penalty: jax.Array,
    transform: Transform,
    search: BeamSearch,
) -> Beams:
    return choose_step(beams, logprobs, length_penalty, penalty, transform, search)
