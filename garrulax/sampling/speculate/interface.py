"""The parts of speculation: proposals, acceptance, and the pure functions of a proposer.

Letters: B rows, N drafts (nodes of the tree of drafts), T = N + 1 tokens that a pass reads, D width of the model, G
greatest depth of the tree plus 1.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from garrulax.core.config import ModelConfig
from garrulax.sampling.requests import Weights
from garrulax.sampling.state import Requests, State
from garrulax.sampling.transforms import Transform


class Proposal(NamedTuple):
    """Tokens that may come next: a tree of drafts for each row.

    Attributes:
        tokens: int32 [B, N], the drafts, in the order of the proposer's `parents`.
        valid: bool [B, N], which of them are there. What follows one that is not there is not there either.
        worth: bool [B], whether a pass over all drafts is likely to pay. A pass reads all of them if this holds for any
            row that is not done; otherwise it reads as few tokens as the device can read at the price of one.
    """

    tokens: jax.Array
    valid: jax.Array
    worth: jax.Array


class Outcome(NamedTuple):
    """The states before and after one pass of the model.

    Attributes:
        before: The state before it, without keys and values.
        after: The state after it, without keys and values. Row b has `after.generated[b] - before.generated[b]` new
            tokens: the drafts that were accepted, and one more.
        hidden: [B, D], the hidden state, after the last norm, from whose logits the last of them was sampled.
    """

    before: State
    after: State
    hidden: jax.Array


#: Function from (the state before, without keys and values; the proposal; parents; logits float32 [B, T, V] after the
#: last token and each draft; the transform) to (the state after; path int32 [B, G]). The state has the accepted drafts
#: and one more token, sampled after them, and `cache.used` counts the last token and the accepted drafts. Column i of
#: `path` is the token of the pass that is kept in the i-th new slot: 0 is the last token, j + 1 is draft j.
Accept = Callable[[State, Proposal, tuple[int, ...], jax.Array, Transform], tuple[State, jax.Array]]


class Proposer(NamedTuple):
    """The pure functions of a proposer. Programs are compiled for it, so that equal ones must be the same object.

    Attributes:
        parents: The tree of drafts: for each its parent, a draft before it, or -1 for one that follows the last token.
            -1, 0, 1, ... is a chain.
        propose: Function from (params, memory, state) to (Proposal, memory). `params` are those of the proposer.
        observe: Function from (params, memory, Outcome) to memory.
        accept: How drafts are accepted. `accept.exact` gives the tokens that decoding without drafts gives.
        always: Whether every proposal is worth a pass, so that no other program is needed.
    """

    parents: tuple[int, ...]
    propose: Callable[[Any, Any, State], tuple[Proposal, Any]]
    observe: Callable[[Any, Any, Outcome], Any]
    accept: Accept
    always: bool = False


@dataclasses.dataclass(frozen=True)
class Bound:
    """A way of speculation, for one model and the requests of one call.

    Attributes:
        proposer: Its functions.
        params: The parameters of the proposer.
        begin: Function from the first state, before any new token, to the proposer's memory: a tree of arrays, which
            shares none with the state.
        grow: Function from (memory, number of slots of the state) to the memory of a state with more slots.
        compile_ahead: Function from the abstract first state to the abstract memory, which begins to compile what
            `begin` will run; None if there is nothing to compile.
    """

    proposer: Proposer
    params: Any
    begin: Callable[[State], Any]
    grow: Callable[[Any, int], Any] = lambda memory, slots: memory
    compile_ahead: Callable[[State], Any] | None = None


class Speculation(abc.ABC):
    """A way of speculation, the argument `speculate` of `generate`."""

    @abc.abstractmethod
    def bind(self, weights: Weights, config: ModelConfig, transform: Transform, requests: Requests, size: int) -> Bound:
        """The proposer for a model and requests.

        Args:
            weights: The parameters of the model.
            config: Its Config.
            transform: The transform of its logits.
            requests: One for each row, as NumPy arrays.
            size: Greatest number of tokens that a row may get.

        Raises:
            ValueError: It does not go with the model or the requests.
        """


def is_chain(parents: tuple[int, ...]) -> bool:
    """Whether each draft follows the one before it."""
    return parents == tuple(range(-1, len(parents) - 1))


def depths(parents: tuple[int, ...]) -> tuple[int, ...]:
    """The depth of each draft in the tree: 1 if it follows the last token, else the depth of its parent plus 1."""
    found: list[int] = []
    for parent in parents:
        found.append(1 if parent < 0 else found[parent] + 1)
    return tuple(found)


def check_parents(parents: tuple[int, ...], most: int = 89) -> None:
    """Raises ValueError for an empty tree, one with a parent not before its draft, and one of more than `most`."""
    if any(not -1 <= parent < i for i, parent in enumerate(parents)):
        raise ValueError(f"the parent of a draft must be a draft before it, or -1: {list(parents)}")
    if not 0 < len(parents) <= most:
        raise ValueError(f"a tree has 1 to {most} drafts, not {len(parents)}")
