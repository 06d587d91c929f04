"""Running the layers of a model one after another."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from garrulax.layers.cache import Cache

_policies = jax.checkpoint_policies
#: What the backward pass recomputes: nothing; everything but the products with weights and attention; everything.
REMAT = {
    "none": None,
    "dots": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable,
        _policies.save_only_these_names("attention_out", "attention_lse"),  # `kernels.passes`
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def run(
    block: Callable,
    x: jax.Array,
    blocks: Any,
    *,
    cache: Cache | None,
    key: jax.Array | None,
    remat: str = "none",
    unroll: bool = False,
) -> tuple[jax.Array, Cache | None]:
    """x after all layers, and the cache.

    block: (x, p, kv, layer, key) -> (x, kv) with the layer's parameters p, the cache arrays kv (None without a
    cache), its number (int32) and its dropout key (None without dropout).
    blocks: parameters stacked on a leading axis, which run as `lax.scan` (compile time does not grow with depth), or
    a tuple with one tree a layer, which run unrolled (a decoding step reads each weight where it lies: on CPU twice
    as fast as slicing it out of the stack). The cache must have the same form.
    remat: what the backward pass recomputes, a name in `REMAT`.
    unroll: lay the scan out as straight code: compile time grows with depth, and on CPU a small model trains a
    quarter faster, since nothing is copied into and out of the stack.
    """
    if remat not in REMAT:
        raise ValueError(f"unknown remat {remat!r}: choose from {', '.join(REMAT)}")
    if cache is not None and isinstance(blocks, tuple) != isinstance(cache.layers, tuple):
        raise ValueError("parameters and cache must both be stacked or both be unstacked (make_cache(stacked=...))")
    if remat != "none":
        block = jax.checkpoint(block, policy=REMAT[remat])
    if isinstance(blocks, tuple):
        return _unrolled(block, x, blocks, cache, key)
    return _scanned(block, x, blocks, cache, key, unroll)


def _unrolled(block, x, blocks, cache, key):
    kvs = cache.layers if cache else (None,) * len(blocks)
    done = []
    for i, (p, kv) in enumerate(zip(blocks, kvs, strict=True)):
        x, kv = block(x, p, kv, jnp.int32(i), _fold(key, i))
        done.append(kv)
    return x, dataclasses.replace(cache, layers=tuple(done)) if cache else None


def _scanned(block, x, blocks, cache, key, unroll):
    layers = jax.tree.leaves(blocks)[0].shape[0]

    def body(carry, layer):
        x, kv = carry
        i, p = layer
        return block(x, p, kv, i, _fold(key, i)), None

    carry = (x, cache.layers if cache else None)
    (x, kv), _ = jax.lax.scan(body, carry, (jnp.arange(layers, dtype=jnp.int32), blocks), unroll=unroll)
    return x, dataclasses.replace(cache, layers=kv) if cache else None


def _fold(key, layer):
    return None if key is None else jax.random.fold_in(key, layer)
