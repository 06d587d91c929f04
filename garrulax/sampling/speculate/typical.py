"""Typical acceptance of drafts (Cai et al. 2024, arXiv 2401.10774, section 2.3.1). Letters: see `interface`."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from garrulax.sampling.loop import advance, log_probability
from garrulax.sampling.speculate.interface import Accept, Proposal, depths
from garrulax.sampling.state import State
from garrulax.sampling.transforms import Transform, sample

EPSILON = 0.09  # the default of FasterDecoding/Medusa, whose delta is its square root


def threshold(logits: jax.Array, epsilon: float, delta: float) -> jax.Array:
    """The probability above which a draft is accepted: min(epsilon, delta * exp(-H)), H the entropy in nats.

    Args:
        logits: float32 [..., V]; -inf for what cannot be sampled.
        epsilon: The probability that is always enough.
        delta: The factor.

    Returns:
        float32 [...].
    """
    logp = jax.nn.log_softmax(logits, axis=-1)
    entropy = -jnp.sum(jnp.where(logp > -jnp.inf, jnp.exp(logp) * logp, 0), axis=-1)
    return jnp.minimum(jnp.asarray(epsilon, logits.dtype), jnp.asarray(delta, logits.dtype) * jnp.exp(-entropy))


@functools.cache  # jit compares the functions of proposers by identity
def typical(epsilon: float, delta: float) -> Accept:
    """Accepts drafts that are typical of the model's distribution after all transforms.

    Of the paths of accepted drafts the longest is taken, of equally long ones the most probable. After it one more
    token is sampled as always.

    Args:
        epsilon: See `threshold`.
        delta: See `threshold`.
    """

    def accept(
        state: State, proposal: Proposal, parents: tuple[int, ...], logits: jax.Array, transform: Transform
    ) -> tuple[State, jax.Array]:
        longest = max(depths(parents), default=0) + 1
        path, length = _best(state, proposal, parents, logits, transform, epsilon, delta)
        first, rows = state.cache.used, jnp.arange(len(state.done))
        ended = state.done
        taken = jnp.zeros_like(path)
        for depth in range(longest):
            at = path[:, depth]
            going = ~ended & (length >= depth)
            forced = length > depth
            here = logits[rows, at]
            transformed, transform_state = transform.update(here, state.transform_state)
            following = path[:, min(depth + 1, longest - 1)]
            draft = proposal.tokens[rows, jnp.maximum(following - 1, 0)]
            token = jnp.where(forced, draft, sample(transformed, state.seed, state.length))
            before = dataclasses.replace(state, done=state.done | ~going)
            cache = dataclasses.replace(state.cache, used=first + (depth + 1))
            logprob = log_probability(here, token)
            new = advance(before, cache, token, logprob, transform_state, transform)
            ended = jnp.where(going, new.done, ended)
            taken = taken.at[:, depth].set(jnp.where(going, at, taken[:, max(depth - 1, 0)]))
            state = dataclasses.replace(new, done=ended)
        return state, taken

    return accept


def _best(
    state: State,
    proposal: Proposal,
    parents: tuple[int, ...],
    logits: jax.Array,
    transform: Transform,
    epsilon: float,
    delta: float,
) -> tuple[jax.Array, jax.Array]:
    """The best path of accepted drafts of each row.

    Returns:
        int32 [B, G]: column d is the token of the pass at depth d of the path, 0 for the last token of the text, j + 1
        for draft j; the last one repeats. And the number of drafts in it, int32 [B].
    """
    rows, depth = len(state.done), (0, *depths(parents))
    up = (-1, *(parent + 1 for parent in parents))
    good, score = [jnp.ones((rows,), bool)], [jnp.zeros((rows,), jnp.float32)]  # of each token of the pass
    level, before = [0], state.transform_state
    while level:
        after, seen = transform.update(_flat(logits[:, jnp.asarray(level)]), before)
        logp = jax.nn.log_softmax(after, axis=-1).reshape(rows, len(level), -1)
        limit = threshold(after, epsilon, delta).reshape(rows, -1)  # [B, n]
        following = [node for node in range(len(up)) if up[node] in level]
        place = jnp.asarray([level.index(up[node]) for node in following], jnp.int32)
        drafts = jnp.stack([proposal.tokens[:, node - 1] for node in following], 1) if following else place[None]
        for n, node in enumerate(following):
            parent = level.index(up[node])
            own = jnp.take_along_axis(logp[:, parent], drafts[:, n : n + 1], axis=1)[:, 0]
            enough = proposal.valid[:, node - 1] & (jnp.exp(own) > limit[:, parent])
            good.append(good[up[node]] & enough)
            score.append(score[up[node]] + own)
        if following:
            before = transform.observe(_flat(drafts), _of_parents(seen, place, rows))
        level = following
    lengths = jnp.where(jnp.stack(good, 1), jnp.asarray(depth, jnp.int32)[None], -1)  # [B, T]
    length = lengths.max(axis=1)
    scores = jnp.where(lengths == length[:, None], jnp.stack(score, 1), -jnp.inf)
    end = jnp.argmax(scores, axis=1).astype(jnp.int32)  # [B]
    ways = jnp.asarray([_way(node, parents, max(depth) + 1) for node in range(len(up))], jnp.int32)  # [T, G]
    return ways[end], length


def _of_parents(states: Any, place: jax.Array, rows: int) -> Any:
    """States of a transform [B * n, ...]: those of the nodes `place` of a level."""
    return jax.tree.map(lambda x: _flat(x.reshape(rows, -1, *x.shape[1:])[:, place]), states)


def _flat(x: jax.Array) -> jax.Array:
    """[B, n, ...] as [B * n, ...]: the nodes of a level as rows."""
    return x.reshape(-1, *x.shape[2:])


def _way(node: int, parents: tuple[int, ...], longest: int) -> list[int]:
    """The tokens of the pass from the root to one of them; the last one repeats."""
    way = [node]
    while way[0]:
        way.insert(0, parents[way[0] - 1] + 1)
    return way + [node] * (longest - len(way))
