"""The loop over the layers of a model."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from garrulax.core.spec import Tree
from garrulax.layers.cache import Cache
from garrulax.layers.call import Call

_policies = jax.checkpoint_policies
_product = _policies.dots_with_no_batch_dims_saveable
_named_attention = _policies.save_only_these_names("attention_out", "attention_lse", "attention_lists")
_lists = _policies.save_only_these_names("attention_lists")  # `kernels.passes`


def _product_or_attention(primitive: Any, *args: Any, **params: Any) -> Any:
    """A policy that saves products with weights, and output, lse and lists of attention.

    jax.nn gives the results of cuDNN's attention no names, so that they are known by what computes them.
    """
    if primitive.name == "dot_product_attention_fwd_wrapper":
        return True
    return _product(primitive, *args, **params) or _named_attention(primitive, *args, **params)


#: Policies of what the backward pass recomputes: nothing; all but products with weights and attention; everything but
#: the small lists of blocks that attention visits, which are the same in all layers.
REMAT = {"none": None, "dots": _product_or_attention, "full": _lists}


def scan_layers(
    block: Callable, x: jax.Array, blocks: Tree, call: Call, key: jax.Array | None = None
) -> tuple[jax.Array, Cache | None]:
    """Runs the layers one after another.

    Args:
        block: One layer, (x, p, kv, layer, key) -> (x, kv), with the layer's parameters p, the cache's arrays kv (None
            without a cache), the layer's number (int32) and its dropout key (None without dropout).
        x: [B, T, D], input of the first layer.
        blocks: Parameters stacked on a leading axis, which run as `lax.scan` (compile time does not grow with depth),
            or a tuple with one tree a layer, which run as straight code: a decoding step then reads each weight where
            it lies (on CPU twice as fast as slicing it out of the stack). The cache must have the same form.
        call: The forward pass. With `unroll` the scan becomes straight code: compile time grows with depth, and on CPU
            a small model trains a quarter faster, since nothing is copied into and out of the stack.
        key: PRNG key for dropout in the layers.

    Returns:
        x after the last layer, and the cache with the new keys and values.

    Raises:
        ValueError: An unknown `remat`, or parameters and cache of different forms.
    """
    cache, remat = call.cache, call.remat
    if remat not in REMAT:
        raise ValueError(f"unknown remat {remat!r}: choose from {', '.join(REMAT)}")
    if cache is not None and isinstance(blocks, tuple) != isinstance(cache.layers, tuple):
        raise ValueError("parameters and cache must both be stacked or both be unstacked (make_cache(stacked=...))")
    if remat != "none":
        block = jax.checkpoint(block, policy=REMAT[remat])
    if isinstance(blocks, tuple):
        return _unrolled(block, x, blocks, cache, key)
    if call.stage is None:
        return _scanned(block, x, blocks, cache, key, call.unroll)
    x = jnp.where(call.stage.index == 0, x, call.stage.received)
    return _scanned(block, x, blocks, cache, key, call.unroll, call.stage.index)


def _unrolled(block, x, blocks, cache, key):
    kvs = cache.layers if cache else (None,) * len(blocks)
    if isinstance(x, jax.core.Tracer):
        block = jax.jit(block)  # traced once for all layers that are alike; XLA makes straight code of the calls
    done = []
    for i, (p, kv) in enumerate(zip(blocks, kvs, strict=True)):
        x, kv = block(x, p, kv, jnp.int32(i), _fold(key, i))
        done.append(kv)
    return x, dataclasses.replace(cache, layers=tuple(done)) if cache else None


def _scanned(block, x, blocks, cache, key, unroll, stage=None):
    layers = jax.tree.leaves(blocks)[0].shape[0]
    numbers = jnp.arange(layers, dtype=jnp.int32) + (0 if stage is None else stage * layers)

    def body(carry, layer):
        x, kv = carry
        i, p = layer
        return block(x, p, kv, i, _fold(key, i)), None

    carry = (x, cache.layers if cache else None)
    (x, kv), _ = jax.lax.scan(body, carry, (numbers, blocks), unroll=unroll)
    return x, dataclasses.replace(cache, layers=kv) if cache else None


def _fold(key, layer):
    return None if key is None else jax.random.fold_in(key, layer)
