"""Which drafts are accepted: those that the ordinary sampler samples. Letters: see `interface`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from garrulax.sampling.loop import choose
from garrulax.sampling.speculate.interface import Proposal, depths
from garrulax.sampling.state import State
from garrulax.sampling.transforms import Transform


def exact(
    state: State,
    proposal: Proposal,
    parents: tuple[int, ...],
    logits: jax.Array,
    transform: Transform,
    allowed: jax.Array | None = None,
) -> tuple[State, jax.Array]:
    """Accepts the drafts that would have been sampled without speculation.

    Beginning after the last token, the next token is sampled as always: with the transform, and with the noise of the
    row's seed and the number of tokens in the row. If a draft at this place of the tree is this token, the token after
    the draft is sampled likewise, and so on. So the tokens are those of decoding without drafts, greedy or sampled,
    under every transform. A draft model that samples with the same noise is accepted with the probability of a maximal
    coupling or little less (Daliri, Musco, Suresh 2024, arXiv 2408.07978).

    Args:
        state: The state before the pass, without keys and values.
        proposal: The drafts.
        parents: The tree of drafts; the proposal may have more columns.
        logits: float32 [B, T, V], after the last token and each draft.
        transform: The transform of the logits.
        allowed: uint32 [B, T, W], the tokens that may follow each of them (`State.allowed`); None allows all.

    Returns:
        See `interface.Accept`.
    """
    count = len(parents)
    up = jnp.asarray(np.array(parents, np.int32).reshape(1, count) + 1)  # [1, N], 0 for the last token
    drafts, valid = proposal.tokens[:, :count], proposal.valid[:, :count]
    first, rows = state.cache.used, len(state.done)
    longest = max(depths(parents), default=0) + 1
    path = jnp.zeros((rows, longest), jnp.int32)

    def walking(carry: tuple) -> jax.Array:
        return jnp.any(carry[-1])

    def take(carry: tuple) -> tuple:
        depth, state, path, at, going = carry
        before = dataclasses.replace(state, done=state.done | ~going)
        if allowed is not None:
            before = dataclasses.replace(before, allowed=_at(allowed, at))
        cache = dataclasses.replace(state.cache, used=first + (depth + 1))
        new = choose(before, cache, _at(logits, at), transform)
        new = dataclasses.replace(new, done=jnp.where(going, new.done, state.done), allowed=state.allowed)
        fits = valid & (up == at[:, None]) & (drafts == new.token[:, None])  # [B, N]
        going = going & ~new.done & jnp.any(fits, axis=1)
        at = jnp.where(going, jnp.argmax(fits, axis=1).astype(jnp.int32) + 1, at) if count else at
        path = jnp.where(going[:, None] & (jnp.arange(longest, dtype=jnp.int32)[None] > depth), at[:, None], path)
        return depth + 1, new, path, at, going

    carry = (jnp.int32(0), state, path, jnp.zeros(rows, jnp.int32), ~state.done)
    _, state, path, _, _ = jax.lax.while_loop(walking, take, carry)
    return state, path


def _at(x: jax.Array, index: jax.Array) -> jax.Array:
    """x [B, T, ...] at an index [B] of each row: [B, ...]."""
    return jnp.take_along_axis(x, index.reshape(-1, 1, *(1,) * (x.ndim - 2)), axis=1)[:, 0]
