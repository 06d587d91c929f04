"""The block memory of InfLLM: which keys stand for a block, and which blocks a query looks up.

Letters: B rows, T tokens, K key/value heads, G query heads of each, N blocks, R representatives of a block, S slots,
C width of a head. Source: Xiao et al. 2024, arXiv 2402.04617, section 3; thunlp/InfLLM.

A key represents its block by the mean of its products with the queries of the local window after the block. Products
are linear, so this is its product with the sum of these queries, of which the cache has one for each block. As in the
paper, neither rotary nor other positions enter the products with representatives. Unlike there, each key/value head
looks up its own blocks, and a block is as relevant as its most relevant representative, not as their sum: a single key
that fits is then enough.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from garrulax.layers import quantised
from garrulax.layers.cache import KV, layer_of, write_layer
from garrulax.layers.cache_kinds import Blocks, View
from garrulax.layers.call import Call
from garrulax.layers.layer_cache import LayerCache, entries

Fetch = Callable[[jax.Array, jax.Array], KV]  # from `fetch_for`


def remember(kind: Blocks, layer_cache: LayerCache, query: jax.Array, call: Call) -> LayerCache:
    """Adds the queries of a pass to the sums of their blocks, and chooses representatives of blocks that are complete.

    Args:
        kind: The kind of the cache.
        layer_cache: The layer with the keys of the pass in it.
        query: [B, T, H, C], before the rotary embedding.
        call: The forward pass.

    Returns:
        The layer with the new sums and representatives.
    """
    B, T, _, C = query.shape
    number, real = call.number, call.mask.query["segment"] >= 0  # [B, T]
    before = layer_cache.stored["queries"]
    K, N = before.shape[1:3]

    counted = real & (number >= kind.first)
    block = jnp.clip((number - kind.first) // kind.size, 0, N - 1)
    begins = counted & ((number - kind.first) % kind.size == 0)
    rows = jnp.arange(B, dtype=jnp.int32)[:, None]
    summed = query.reshape(B, T, K, -1, C).sum(axis=3).astype(before.dtype)  # [B, T, K, C]
    # The first token of a block forgets what an earlier text has left there.
    fresh = jnp.ones((B, N), bool).at[rows, block].min(~begins)[:, None, :, None]
    sums = jnp.where(fresh, before, 0)
    sums = sums.swapaxes(1, 2).at[rows, block].add(jnp.where(counted[..., None, None], summed, 0)).swapaxes(1, 2)

    # Blocks that leave the local window during the pass, the last one before it included: [B, n].
    last = kind.outside(number[:, 0]) - 1
    leaving = jnp.clip(last[:, None] + jnp.arange(1 if T == 1 else T // kind.size + 2, dtype=jnp.int32)[None], 0, N - 1)
    after = leaving[..., None] + 1 + jnp.arange(kind.local // kind.size, dtype=jnp.int32)[None, None]
    following = _take(sums, jnp.clip(after, 0, N - 1).reshape(B, -1))  # [B, K, n·W, C]
    following = following.reshape(B, K, *after.shape[1:], C).sum(axis=3)  # [B, K, n, C]
    slots = kind.first + leaving[..., None] * kind.size + jnp.arange(kind.size, dtype=jnp.int32)[None, None]
    found = entries(layer_cache, _of_heads(slots.reshape(B, -1), K), ("key", "key_scale"))
    keys = quantised.restore(found["key"], found.get("key_scale"), following.dtype)
    keys = keys.reshape(B, K, *slots.shape[1:], C)  # [B, K, n, size, C]
    best = jax.lax.top_k(jnp.einsum("BKNSC,BKNC->BKNS", keys, following), kind.representatives)[1]
    chosen = jnp.take_along_axis(keys, best[..., None], axis=3)  # [B, K, n, R, C]

    place = leaving[..., None] * kind.representatives + jnp.arange(kind.representatives, dtype=jnp.int32)[None, None]
    new = chosen.reshape(B, K, -1, C), sums
    slots_of_new = place.reshape(B, -1), jnp.zeros_like(number[:, 0])
    kv, stored = layer_cache.kv, layer_cache.stored
    for name, x, slot in zip(("representative", "queries"), new, slots_of_new, strict=True):
        kv = {**kv, name: write_layer(kv[name], layer_cache.layer, x, slot)}
        stored = {**stored, name: layer_of(kv[name], layer_cache.layer).reshape(stored[name].shape)}
    return layer_cache._replace(kv=kv, stored=stored)


def look_up(
    kind: Blocks, layer_cache: LayerCache, query: jax.Array, number: jax.Array, fetch: Fetch
) -> tuple[View, KV]:
    """Finds the keys and values that one query of each row attends to.

    Args:
        kind: The kind of the cache.
        layer_cache: The layer.
        query: [B, H, C], before the rotary embedding.
        number: int32 [B], number of the query's token.
        fetch: From `fetch_for`.

    Returns:
        The positions, and the keys and values (with scales where they are int8) [B, K, S', C].
    """
    representatives = layer_cache.stored["representative"]
    (B, K, N, C), R = layer_cache.stored["queries"].shape, kind.representatives
    outside, top = kind.outside(number), kind.parts[1] // kind.size
    q = query.reshape(B, K, -1, C).astype(representatives.dtype)
    relevance = jnp.einsum("BKGC,BKRC->BKGR", q, representatives).max(axis=2)
    relevance = relevance.reshape(B, K, N, R).max(axis=3)
    candidates = jnp.arange(N, dtype=jnp.int32)[None] < outside[:, None]
    relevance = jnp.where(candidates[:, None], relevance, -jnp.inf)
    best, blocks = jax.lax.top_k(relevance, min(top, N))
    # In the order of the text, what is no block at the end.
    blocks = jnp.sort(jnp.where(best > -jnp.inf, blocks.astype(jnp.int32), N), axis=-1)
    blocks = jnp.pad(blocks, ((0, 0), (0, 0), (0, top - blocks.shape[-1])), constant_values=N)
    inside = jnp.arange(kind.size, dtype=jnp.int32)[None, None, None]
    middle = (kind.first + blocks[..., None] * kind.size + inside).reshape(B, K, -1)
    return kind.view(number), fetch(middle, outside)


def fetch_for(kind: Blocks, layer_cache: LayerCache, number: jax.Array) -> Fetch:
    """How the queries of a pass get keys and values.

    What is in the memory of the host must be moved. So the first tokens and all local ones are fetched once for the
    pass, and for each query only the blocks that it looks up.

    Args:
        kind: The kind of the cache.
        layer_cache: The layer.
        number: int32 [B, T], numbers of the tokens of the pass.

    Returns:
        A function of the slots [B, K, S'] of looked up blocks, and of the number [B] of blocks before the local tokens.
    """
    K, before = layer_cache.stored["queries"].shape[1], kind.outside(number[:, 0])

    def together(middle: jax.Array, outside: jax.Array) -> KV:
        first, near = (_of_heads(slots, K) for slots in _first_and_near(kind, outside))
        return entries(layer_cache, jnp.concatenate([first, middle, near], axis=-1))

    if not kind.offload:
        return together
    leaving = -(-(number.shape[1] - 1) // kind.size)  # greatest number of blocks during the pass
    slots = jnp.concatenate(_first_and_near(kind, before, leaving * kind.size), axis=-1)
    shared = entries(layer_cache, _of_heads(slots, K))

    def apart(middle: jax.Array, outside: jax.Array) -> KV:
        found = entries(layer_cache, middle)
        near = jnp.arange(kind.first, kind.first + kind.near, dtype=jnp.int32)[None]
        near = near + (outside - before)[:, None] * kind.size
        parts = {name: (x[:, :, : kind.first], found[name], _take(x, near)) for name, x in shared.items()}
        return {name: jnp.concatenate(part, axis=2) for name, part in parts.items()}

    return apart


def _first_and_near(kind: Blocks, outside: jax.Array, more: int = 0) -> tuple[jax.Array, jax.Array]:
    """Slots [B, n] of the first tokens, and of the local ones, and `more`, behind as many blocks as `outside` [B]."""
    first, near = (jnp.arange(n, dtype=jnp.int32)[None] for n in (kind.first, kind.near + more))
    return jnp.broadcast_to(first, (len(outside), kind.first)), kind.first + outside[:, None] * kind.size + near


def _of_heads(slots: jax.Array, heads: int) -> jax.Array:
    """[B, K, S'] of slots [B, S'] that are the same for all heads."""
    return jnp.broadcast_to(slots[:, None], (len(slots), heads, slots.shape[1]))


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    """Entries [B, K, n, C] of x [B, K, N, C] at index [B, n]."""
    return jnp.take_along_axis(x, index[:, None, :, None], axis=2)
