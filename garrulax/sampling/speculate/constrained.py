"""Speculation under constraints: the device reads the drafts while the host follows them through the grammar.

Letters: see `interface`; W words of a bit map.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from garrulax.core import half
from garrulax.core.config import ModelConfig
from garrulax.core.spec import Tree
from garrulax.layers.cache import Cache
from garrulax.sampling.constrain import Matcher
from garrulax.sampling.constrained import append_forced
from garrulax.sampling.decoder import Decoder
from garrulax.sampling.speculate.accept import exact
from garrulax.sampling.speculate.interface import Bound, Proposal, Proposer
from garrulax.sampling.speculate.loop import Speculating, narrow_width, observed, room
from garrulax.sampling.speculate.verify import finish, read_tree
from garrulax.sampling.state import State, with_layers, without_layers
from garrulax.sampling.transforms import Transform
from garrulax.sampling.writing import Pieces, Writer, end_stopped, push_new_tokens, with_free_slots


def decode_constrained_speculating(
    decoder: Decoder,
    params: Tree,
    one: Speculating,
    writers: Mapping[int, Writer],
    matchers: Mapping[int, Matcher],
    size: int,
    bound: Bound,
) -> Pieces[Speculating]:
    """`constrained.decode_constrained` with speculation. Drafts are accepted as by `accept.exact`.

    Args:
        decoder: The functions of the model.
        params: In the form of the state's cache.
        one: Before the first new token. It is donated.
        writers: Row -> what collects its tokens.
        matchers: Row -> what follows its constraint.
        size: Greatest number of tokens that a row may get.
        bound: What guesses tokens.
    """
    proposer = bound.proposer
    while True:
        one = with_room(one, bound, size)
        proposal, memory = _propose(bound.params, one.memory, without_layers(one.state), proposer)
        worth, done = jax.device_get((proposal.worth, one.state.done))
        wide = proposer.always or bool((worth & ~done).any())
        width = room(proposer) if wide else narrow_width(proposer, len(done))
        parents = proposer.parents[: width - 1]
        before = without_layers(one.state)
        hidden, logits, cache = _read(params, one.state.cache.layers, before, proposal, decoder.config, parents)
        after, path = _accepted(decoder, before, proposal, parents, logits, matchers)
        one = dataclasses.replace(one, memory=memory)
        one = _finish(bound.params, one.passes, one.memory, before, after, path, hidden, cache, proposer, parents)
        pieces = push_new_tokens(one.state, writers)
        state = append_forced(decoder, params, one.state, writers, matchers, size)
        pieces = [a + b for a, b in zip(pieces, push_new_tokens(state, writers), strict=True)]
        yield pieces
        one = dataclasses.replace(one, state=state)
        if all(writer.reason for writer in writers.values()):
            return one
        matchers = {row: matcher for row, matcher in matchers.items() if not writers[row].reason}
        one = dataclasses.replace(one, state=end_stopped(state, writers))


def with_room(one: Speculating, bound: Bound, size: int) -> Speculating:
    """The state with room for a pass in every row."""
    state = with_free_slots(one.state, room(bound.proposer), size)
    if state is one.state:
        return one
    return dataclasses.replace(one, state=state, memory=bound.grow(one.memory, state.cache.size))


@functools.partial(jax.jit, static_argnames="proposer", donate_argnames="memory")
def _propose(own: Any, memory: Any, state: State, proposer: Proposer) -> tuple[Proposal, Any]:
    return proposer.propose(half.from_bits(own), memory, state)


@functools.partial(jax.jit, static_argnames=("config", "parents"), donate_argnames="layers")
def _read(
    params: Tree, layers: Any, before: State, proposal: Proposal, config: ModelConfig, parents: tuple[int, ...]
) -> tuple[jax.Array, jax.Array, Cache]:
    drafts = jnp.where(proposal.valid, proposal.tokens, 0)[:, : len(parents)]
    return read_tree(half.from_bits(params), with_layers(before, layers), drafts, parents, config)


@functools.partial(jax.jit, static_argnames=("transform", "parents"))
def _accept(
    before: State,
    proposal: Proposal,
    logits: jax.Array,
    allowed: jax.Array,
    transform: Transform,
    parents: tuple[int, ...],
) -> tuple[State, jax.Array]:
    return exact(before, proposal, parents, logits, transform, allowed)


@functools.partial(jax.jit, static_argnames=("proposer", "parents"), donate_argnames=("memory", "cache"))
def _finish(
    own: Any,
    passes: jax.Array,
    memory: Any,
    before: State,
    after: State,
    path: jax.Array,
    hidden: jax.Array,
    cache: Cache,
    proposer: Proposer,
    parents: tuple[int, ...],
) -> Speculating:
    state, outcome = finish(before, after, path, hidden, cache, parents)
    return observed(half.from_bits(own), Speculating(state, memory, passes), state, outcome, proposer)


def _accepted(
    decoder: Decoder,
    before: State,
    proposal: Proposal,
    parents: tuple[int, ...],
    logits: jax.Array,
    matchers: Mapping[int, Matcher],
) -> tuple[State, jax.Array]:
    """`exact` under the masks of the grammars. Where a matcher refuses a token, all is sampled again without it."""
    tokens, valid, done, first = (
        np.array(x) for x in jax.device_get((proposal.tokens, proposal.valid, before.done, before.generated))
    )
    words = -(-decoder.config.vocab // 32)
    allowed = np.full((len(done), len(parents) + 1, words), 0xFFFFFFFF, np.uint32)
    active = {row: matcher for row, matcher in matchers.items() if not done[row]}
    for row, matcher in active.items():
        _follow(matcher, tokens[row], valid[row], parents, allowed[row])
    proposal = proposal._replace(valid=jnp.asarray(valid))
    while True:
        after, path = _accept(before, proposal, logits, allowed, decoder.transform, parents)
        new, logprobs, count, kept = jax.device_get((after.tokens, after.logprobs, after.generated, path))
        refused = False
        for row, matcher in list(active.items()):
            here = slice(first[row], count[row])
            if not np.isfinite(logprobs[row, here]).all():  # `push_new_tokens` raises the error
                del active[row]
                continue
            *drafts, last = new[row, here].tolist()
            for token in drafts:
                assert matcher.accept(token), "a draft that was accepted before is refused"
            if not matcher.accept(last):
                matcher.mask(allowed[row, kept[row, len(drafts)]])
                refused = True
                matcher.rollback(len(drafts))
            else:
                del active[row]
        if not refused:
            return after, path


def _follow(
    matcher: Matcher, tokens: np.ndarray, valid: np.ndarray, parents: tuple[int, ...], allowed: np.ndarray
) -> None:
    """Writes what may follow the last token and each draft, and makes drafts invalid that the grammar refuses.

    Args:
        matcher: Of the text; afterwards it is where it was.
        tokens: int32 [N], the drafts.
        valid: bool [N].
        parents: Their tree.
        allowed: uint32 [T, W].
    """

    def visit(node: int) -> None:
        here = allowed[node + 1]
        matcher.mask(here)
        for child in (i for i, parent in enumerate(parents) if parent == node and valid[i]):
            token = int(tokens[child])
            valid[child] = bool(here[token >> 5] >> np.uint32(token & 31) & 1)
            if valid[child] and not matcher.accept(token):
                matcher.mask(here)
                valid[child] = False
            if valid[child]:
                if not matcher.finished:
                    visit(child)
                matcher.rollback(1)

    visit(-1)
