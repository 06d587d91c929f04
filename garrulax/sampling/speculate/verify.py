"""One pass of the model over the last token of each row and the drafts after it. Letters: see `interface`."""

import dataclasses
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from garrulax import models
from garrulax.core.config import ModelConfig
from garrulax.core.spec import Tree
from garrulax.kernels import masks
from garrulax.kernels.mask import CAUSAL, SAME_SEGMENT, Mask
from garrulax.layers.cache import KV, Cache, write, write_layer
from garrulax.sampling.speculate.interface import Outcome, Proposal, Proposer, depths, is_chain
from garrulax.sampling.state import State, without_layers
from garrulax.sampling.transforms import Transform


def verify(
    params: Tree,
    state: State,
    proposal: Proposal,
    width: int,
    config: ModelConfig,
    transform: Transform,
    proposer: Proposer,
) -> tuple[State, Outcome]:
    """Reads the last token of each row and its first drafts, and accepts some of these.

    Args:
        params: Of the model, in the form of the state's cache.
        state: With `width` free slots in each row.
        proposal: The drafts.
        width: Number of tokens to read, T. 1 is an ordinary step.
        config: The family's Config.
        transform: The transform of the logits.
        proposer: What proposed them.
    """
    parents = proposer.parents[: width - 1]
    drafts = jnp.where(proposal.valid, proposal.tokens, 0)[:, : width - 1]
    x, logits, cache = read_tree(params, state, drafts, parents, config)
    before = without_layers(state)
    after, path = proposer.accept(before, proposal, parents, logits, transform)
    return finish(before, after, path, x, cache, parents)


def finish(
    before: State, after: State, path: jax.Array, hidden: jax.Array, cache: Cache, parents: tuple[int, ...]
) -> tuple[State, Outcome]:
    """The state after a pass, of which the accepted tokens are kept.

    Args:
        before: The state before it, without keys and values.
        after: From `Accept`.
        path: From `Accept`.
        hidden: [B, T, D], from `read_tree`.
        cache: From `read_tree`.
        parents: The tree of drafts that was read.
    """
    if not is_chain(parents):
        cache = _gather(cache, before.cache.used, path, hidden.shape[1])
    streams = {"streams": cache.streams, "layers": cache.layers}
    last = jnp.maximum(after.cache.used - before.cache.used - 1, 0)[:, None]  # the row of a text that is done has none
    node = jnp.take_along_axis(path, last, axis=1)  # [B, 1]
    outcome = Outcome(before, after, jnp.take_along_axis(hidden, node[:, :, None], axis=1)[:, 0])
    return dataclasses.replace(after, cache=dataclasses.replace(after.cache, **streams)), outcome


def read_tree(
    params: Tree, state: State, drafts: jax.Array, parents: tuple[int, ...], config: ModelConfig
) -> tuple[jax.Array, jax.Array, Cache]:
    """Reads the last token of each row and the drafts [B, N] after it; each attends to the text and its ancestors.

    Returns:
        Hidden states after the last norm [B, T, D], logits float32 [B, T, V], and the cache with all T tokens in it.
    """
    tokens = jnp.concatenate([state.token[:, None], drafts], axis=1)
    depth = jnp.asarray(np.array((0, *depths(parents)), np.int32))[None]  # [1, T]
    rank = state.cache.used[:, None] + depth
    mask = Mask({"rank": rank, "segment": jnp.zeros_like(rank)})
    if not is_chain(parents):
        mask = _tree_mask(mask, state.cache, parents)
    # Behind the last token that a row may get, positions must not go on: learned ones are NaN there.
    ahead = jnp.minimum(depth, jnp.maximum(state.limit - state.generated, 0)[:, None])  # [B, T]
    ahead = ahead.reshape(len(ahead), *(1,) * (state.position.ndim - 1), -1)
    positions = state.position[..., None] + state.stride[..., None] * ahead
    x, cache = models.hidden(params, tokens, config, positions=positions, mask=mask, cache=state.cache)
    # In bfloat16 the noise of sampling would be so coarse that rare tokens are never sampled.
    return x, models.family(config).logits(params, x, config).astype(jnp.float32), cast(Cache, cache)


def _tree_mask(mask: Mask, cache: Cache, parents: tuple[int, ...]) -> Mask:
    """`mask`, in which a draft attends to no draft but its ancestors and itself."""
    whole = (-1, *(parent + 1 for parent in parents))  # with the last token as the root
    slots = jnp.arange(cache.size, dtype=jnp.int32)[None] - cache.used[:, None]  # [B, S]: number of the token there
    contents = jnp.where(slots < 0, masks.COMMITTED, jnp.where(slots < len(whole), slots, masks.EMPTY))
    tree = masks.tree(whole, contents)
    return Mask({**mask.query, **tree.query}, tree.key, CAUSAL & SAME_SEGMENT & tree.rule)


def _gather(cache: Cache, first: jax.Array, path: jax.Array, tokens: int) -> Cache:
    """Moves the keys and values of accepted tokens to the slots from `first` [B] on.

    `path` [B, G], from 0 to T - 1, numbers these tokens among the T `tokens` of the pass, which are in the slots from
    `first` on.
    """
    slots = first[:, None] + path  # [B, G]
    B = len(slots)

    def moved(x: jax.Array) -> jax.Array:  # [B, S], [B, K, S, C] or [B·K, S, C]
        if x.ndim == 2:
            return write(x, jnp.take_along_axis(x, slots, axis=1), first, axis=1)
        rows = x.reshape(B, -1, *x.shape[-2:])  # [B, K, S, C]
        read = jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, tokens, axis=1))(rows, first)
        # A slice first: where a gather reads the cache itself, XLA:CPU copies the whole of it.
        return write_layer(x, 0, jnp.take_along_axis(read, path[:, None, :, None], axis=2), first)

    def layer(kv: KV) -> KV:
        return {
            name: jax.vmap(moved)(x) if x.ndim == 5 else moved(x)  # stacked: [L, B, K, S, C]
            for name, x in kv.items()
        }

    layers = tuple(map(layer, cache.layers)) if isinstance(cache.layers, tuple) else layer(cache.layers)
    return dataclasses.replace(cache, layers=layers, streams={name: moved(s) for name, s in cache.streams.items()})
