"""One step of beam search for the beams of one group: which continuations go on, and which are finished.

Letters: P prompts, K beams, V vocabulary, L new tokens, E end tokens.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from garrulax.layers.cache import write


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sequences:
    """Sequences of new tokens. The leading axes are [P, K], or [P, G, K] for several groups.

    Attributes:
        score: float32 [P, K], falling; -inf where there is no sequence.
        tokens: int32 [P, K, L], valid in the first `length` columns.
        logprobs: float32 [P, K, L], their log-probabilities in the model's own distribution.
        length: int32 [P, K].
    """

    score: jax.Array
    tokens: jax.Array
    logprobs: jax.Array
    length: jax.Array

    def group(self, g: int) -> "Sequences":
        """Those of one group of [P, G, K]."""
        return jax.tree.map(lambda x: x[:, g], self)

    @staticmethod
    def stack(groups: Sequence["Sequences"]) -> "Sequences":
        """The sequences of several groups [P, K] as [P, G, K]."""
        return jax.tree.map(lambda *x: jnp.stack(x, axis=1), *groups)

    def take(self, index: jax.Array) -> "Sequences":
        """Those with the numbers int32 [P, K'] of each prompt."""
        return jax.tree.map(
            lambda x: jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), 1), self
        )


class Selected(NamedTuple):
    """The result of `select`.

    Attributes:
        running: The beams that go on.
        finished: The best finished sequences.
        token: int32 [P, K], last token of each beam.
        parent: int32 [P, K], the beam that it continues.
        done: bool [P].
    """

    running: Sequences
    finished: Sequences
    token: jax.Array
    parent: jax.Array
    done: jax.Array


def select(
    choices: jax.Array,
    logprobs: jax.Array,
    running: Sequences,
    finished: Sequences,
    done: jax.Array,
    generated: jax.Array,
    limit: jax.Array,
    ends: jax.Array,
    length_penalty: jax.Array,
    early_stopping: bool | str,
    bound_with_ends: bool,
) -> Selected:
    """Chooses the continuations of one step.

    Args:
        choices: float32 [P, K, V], what each token would add to the score of each beam.
        logprobs: float32 [P, K, V], in the model's own distribution.
        running: The beams.
        finished: The finished sequences.
        done: bool [P]; prompts that are done keep their finished sequences.
        generated: int32 [P], number of new tokens so far.
        limit: int32 [P], greatest number of them.
        ends: int32 [P, E], tokens that end a sequence.
        length_penalty: float32 scalar.
        early_stopping: See `kinds.beam`.
        bound_with_ends: Whether the best continuation that may still be finished counts those that end now, as in
            transformers' group beam search, or not, as in its beam search.
    """
    P, K, V = choices.shape
    total = choices + running.score[:, :, None]
    is_end = (
        jnp.zeros((P, V), bool)
        .at[jnp.arange(P, dtype=jnp.int32)[:, None], jnp.where(ends < 0, V, ends)]
        .set(True, mode="drop")
    )
    # transformers takes so many candidates at once that K of them do not end; these are the same.
    best, best_index = jax.lax.top_k(total.reshape(P, -1), K)
    goes_on = jnp.where(is_end[:, None], -jnp.inf, total)
    score, index = jax.lax.top_k(goes_on.reshape(P, -1), K)
    new = _continued(running, logprobs, score, index, generated)
    ending = _continued(running, logprobs, best, best_index, generated)

    length = (generated + 1).astype(jnp.float32)  # [P]
    at_limit = generated + 1 >= limit
    ended = jnp.take_along_axis(is_end, best_index % V, axis=1) | at_limit[:, None]
    final = jnp.where(ended, best / (length**length_penalty)[:, None], -jnp.inf)
    ending = dataclasses.replace(ending, score=final)
    merged: Sequences = jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), finished, ending)
    after = merged.take(jax.lax.top_k(merged.score, K)[1])
    finished = jax.tree.map(lambda x, y: jnp.where(done.reshape(P, *(1,) * (x.ndim - 1)), x, y), finished, after)

    longest = limit.astype(jnp.float32) if early_stopping == "never" else length
    longest = jnp.where(length_penalty > 0, longest, length)
    # The first is the greatest, but XLA:CPU would sort all continuations to take a slice of the best.
    attainable = (best if bound_with_ends else score).max(axis=1) / longest**length_penalty
    worst = finished.score.min(axis=1)  # -inf as long as fewer than K are finished
    stop = ~(attainable > worst)
    if early_stopping is True:
        stop |= worst > -jnp.inf
    return Selected(new, finished, index % V, index // V, done | at_limit | stop)


def _continued(
    running: Sequences, logprobs: jax.Array, score: jax.Array, index: jax.Array, generated: jax.Array
) -> Sequences:
    """The beams after the continuations [P, K] with the given scores; `index` is beam x V + token."""
    P, K, V = logprobs.shape
    parents = running.take(index // V)
    column = jnp.repeat(jnp.minimum(generated, parents.tokens.shape[2] - 1), K)

    def put(x, new):
        return write(x.reshape(P * K, -1), new.reshape(P * K, 1), column, axis=1).reshape(x.shape)

    logprob = jnp.take_along_axis(logprobs.reshape(P, -1), index, axis=1)
    tokens, logprobs = put(parents.tokens, (index % V).astype(jnp.int32)), put(parents.logprobs, logprob)
    return Sequences(score, tokens, logprobs, jnp.broadcast_to(generated[:, None] + 1, (P, K)))
