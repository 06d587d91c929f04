"""The loop of speculation, which runs on the device: propose, read, accept. Letters: see `interface`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from garrulax.core import half
from garrulax.core.config import ModelConfig
from garrulax.core.spec import Tree
from garrulax.sampling.speculate.interface import Outcome, Proposal, Proposer
from garrulax.sampling.speculate.verify import verify
from garrulax.sampling.state import State
from garrulax.sampling.transforms import Transform

T = TypeVar("T")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Speculating:
    """The state of decoding with speculation between two passes.

    Attributes:
        state: The state of decoding.
        memory: What the proposer remembers.
        passes: int32 [B], number of passes of the model that have given each row new tokens.
    """

    state: State
    memory: Any
    passes: jax.Array


@functools.partial(jax.jit, static_argnames=("config", "transform", "proposer"), donate_argnames="one")
def speculate_steps(
    params: Tree,
    own: Any,
    one: Speculating,
    steps: jax.Array | int,
    config: ModelConfig,
    transform: Transform,
    proposer: Proposer,
) -> Speculating:
    """Takes up to `steps` passes, fewer if all rows are done before, or if a row has too few free slots (`room`).

    Args:
        params: Of the model, in the form of the state's cache.
        own: The parameters of the proposer.
        one: It is donated, so that the cache is updated in place.
        steps: int32 scalar, traced.
        config: The family's Config.
        transform: The transform of the logits.
        proposer: What proposes drafts.
    """
    params, own = half.from_bits(params), half.from_bits(own)
    wide = room(proposer)
    narrow = narrow_width(proposer, len(one.state.done))

    def unfinished(carry: tuple) -> jax.Array:
        count, one = carry
        return (count < steps) & ~jnp.all(one.state.done) & (one.state.cache.used.max() + wide <= one.state.cache.size)

    def body(carry: tuple) -> tuple:
        count, one = carry
        proposal, memory = proposer.propose(own, one.memory, one.state)
        one = dataclasses.replace(one, memory=memory)

        def read(width: int) -> Callable[[Speculating], Speculating]:
            return lambda one: read_once(params, own, one, proposal, width, config, transform, proposer)

        if proposer.always or narrow == wide:
            return count + 1, read(wide)(one)
        worth = jnp.any(proposal.worth & ~one.state.done)
        return count + 1, _if(worth, read(wide), _if(~worth, read(narrow), one))

    return jax.lax.while_loop(unfinished, body, (jnp.int32(0), one))[1]


def read_once(
    params: Tree,
    own: Any,
    one: Speculating,
    proposal: Proposal,
    width: int,
    config: ModelConfig,
    transform: Transform,
    proposer: Proposer,
) -> Speculating:
    """One pass over `width` tokens of each row."""
    state, outcome = verify(params, one.state, proposal, width, config, transform, proposer)
    return observed(own, one, state, outcome, proposer)


def observed(own: Any, one: Speculating, state: State, outcome: Outcome, proposer: Proposer) -> Speculating:
    """Updates the memory of the proposer and the number of passes, after a pass that led to `state`."""
    active = (~outcome.before.done).astype(jnp.int32)
    return Speculating(state, proposer.observe(own, one.memory, outcome), one.passes + active)


def room(proposer: Proposer) -> int:
    """Number of free slots that a pass needs: T."""
    return len(proposer.parents) + 1


def narrow_width(proposer: Proposer, rows: int) -> int:
    """Number of tokens of each row that a pass reads where no proposal is worth more.

    Two of a single row: products of one row have other last bits than those of several on XLA:CPU, so a row that is
    decoded alone is read beside another anyway. The first draft takes that place.
    """
    return min(2 if rows == 1 else 1, room(proposer))


def _if(condition: jax.Array, change: Callable[[T], T], x: T) -> T:
    """change(x) if the condition (bool scalar) holds, otherwise x: as a loop, in which XLA updates caches in place."""

    def once(carry: tuple[jax.Array, T]) -> tuple[jax.Array, T]:
        return jnp.zeros((), bool), change(carry[1])

    return jax.lax.while_loop(lambda carry: carry[0], once, (condition, x))[1]
