"""The arguments of one forward pass that every layer reads: positions, mask, cache."""

import dataclasses

import jax
import jax.numpy as jnp

from garrulax.core.dtypes import as_int32
from garrulax.kernels.mask import PAD_KEY, Mask, Streams, as_keys
from garrulax.kernels.masks import causal_from
from garrulax.layers.cache import Cache, write
from garrulax.layers.cache_kinds import Kind, LayerWindows


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of a pipeline of layers (`models.pipeline`).

    Attributes:
        index: int32 scalar, which stage this device computes.
        received: [B, T, D], from the stage before; the first stage reads the embedded tokens instead.
    """

    index: jax.Array
    received: jax.Array


@dataclasses.dataclass(frozen=True)
class Call:
    """One forward pass, prepared: what `models.forward` hands to the function `hidden` of a family.

    Attributes:
        tokens: int32 [B, T].
        positions: int32 [B, T], or [B, 2, T] for families whose tokens have a place in the text and one in an answer.
        mask: Who attends to whom: the streams of these tokens as queries, and of everything cached as keys.
        cache: The cache, with the streams of these tokens in it but not yet their keys and values; None without one.
        slot: int32 [B], the slot of each row's first token in the cache, or [B, T], that of each token in a ring; None
            without a cache.
        key: PRNG key for dropout; None for no dropout.
        remat: What the backward pass recomputes, a name in `layers.stack.REMAT`.
        unroll: Whether the loop over layers becomes straight code.
        stage: In a pipeline of layers, this device's stage; None runs all layers.
        group: Tokens of a group of LongLoRA's shifted attention; 0 attends to everything.
        context_parallel: How attention gets the keys of other devices (`kernels.attention`).
        window_slot: Where only some layers have a window, `slot` in these layers; else None.
    """

    tokens: jax.Array
    positions: jax.Array
    mask: Mask
    cache: Cache | None = None
    slot: jax.Array | None = None
    key: jax.Array | None = None
    remat: str = "none"
    unroll: bool = False
    stage: Stage | None = None
    group: int = 0
    context_parallel: str | None = None
    window_slot: jax.Array | None = None

    @property
    def room(self) -> int | None:
        """Number of positions where they are counted in the cache (`cache_kinds.Kind.room`), else None."""
        return None if self.cache is None else self.cache.kind.room

    @property
    def number(self) -> jax.Array:
        """int32 [B, T], how many tokens of its row the cache read before each token."""
        assert self.cache is not None
        count = self.tokens.shape[1]
        return self.cache.used[:, None] + jnp.arange(-count, 0, dtype=jnp.int32)[None]

    @property
    def text_length(self) -> jax.Array:
        """int32 [B], the length of each row's whole text: the one its cache plans, or up to its last position.

        Rotary positions that depend on the length take this one, so that they do not change while a text grows.
        """
        if self.cache is not None:
            return self.cache.planned
        places = self.positions[:, 0] if self.positions.ndim == 3 else self.positions  # [B, T]
        return places.max(axis=1) + 1


def default_positions(tokens: jax.Array, cache: Cache | None, rows: int) -> jax.Array:
    """Positions of a text that continues what is in the cache.

    Args:
        tokens: int32 [B, T].
        cache: The cache, or None.
        rows: Rows of positions; the second, the place in an answer, is 0.

    Returns:
        int32 [B, T], or [B, 2, T] for two rows.
    """
    start = 0 if cache is None else cache.used[:, None]
    first = jnp.zeros_like(tokens, jnp.int32) + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None] + start
    return first if rows == 1 else jnp.stack([first, jnp.zeros_like(first)], axis=1)


def slots_of(cache: Cache, query: Streams) -> jax.Array:
    """The slots of the next T tokens of each row, whose streams are given.

    Returns:
        int32 [B], the first of slots in a row; or for rings [B, T], where padding has none: `cache.size`.
    """
    return _ring_slots(cache.kind, cache.used, query, cache.size) if cache.kind.ring else cache.used


def window_slots_of(cache: Cache, query: Streams) -> jax.Array | None:
    """`slots_of` in the layers with a window, where only some layers have one; else None."""
    if not isinstance(cache.kind, LayerWindows):
        return None
    assert cache.window_streams is not None
    return _ring_slots(cache.kind.window, cache.used, query, cache.window_streams["rank"].shape[1])


def _ring_slots(kind: Kind, used: jax.Array, query: Streams, size: int) -> jax.Array:
    """`slots_of` in a ring of `size` slots, for rows of `used` tokens."""
    count = query["position"].shape[1]
    slots = kind.slot(used[:, None] + jnp.arange(count, dtype=jnp.int32)[None], size)
    if count == 1:
        return slots[:, 0]
    return jnp.where(query["segment"] >= 0, slots, size) if "segment" in query else slots


def mask_and_cache(
    tokens: jax.Array, positions: jax.Array, mask: Mask | None, cache: Cache | None
) -> tuple[Mask, Cache | None]:
    """The mask over these tokens and the cache, and the cache with the streams of these tokens in it.

    Args:
        tokens: int32 [B, T].
        positions: int32 [B, T], where each token stands in its own text; they become the stream `position`.
        mask: Who attends to whom; None is causal, continued from the cache. With a cache, its streams of keys, if it
            has any, are those of all slots that the cache does not keep, such as the bits of `masks.tree`.
        cache: The cache, or None.

    Raises:
        ValueError: The cache is too small (checked where its fill is known, so not under jit), the pass is too long for
            its kind, or the mask has streams of keys that the cache holds, or lacks streams that the cache keeps.
    """
    if mask is None:
        mask = causal_from(tokens, 0 if cache is None else cache.used[:, None])
    given = {name: as_int32(stream) for name, stream in mask.query.items()}
    query = {**given, "position": jnp.zeros_like(tokens, jnp.int32) + positions.astype(jnp.int32)}
    if cache is None:
        return dataclasses.replace(mask, query=query), None
    count, kind = tokens.shape[1], cache.kind
    if kind.longest_pass is not None and count > kind.longest_pass:
        raise ValueError(
            f"a pass of {count} tokens is too long for a cache of kind {kind.name!r}, which reads up to "
            f"{kind.longest_pass} at once (its chunk): read them in several passes"
        )
    if (
        not kind.ring
        and not isinstance(cache.used, jax.core.Tracer)
        and (most := int(cache.used.max())) + count > cache.size
    ):
        raise ValueError(f"the cache has {cache.size} slots: {most} used, no room for {count} more")
    more = {} if mask.key is None else mask.key
    if held := sorted(more.keys() & cache.streams.keys()):
        raise ValueError(
            f"the cache holds the streams {held} of the keys: give the mask streams of the new tokens only"
        )
    new = as_keys(query)
    missing = sorted(cache.streams.keys() - new.keys())
    if missing:
        raise ValueError(f"the cache keeps streams {missing}, which the mask does not give")
    if more and isinstance(kind, LayerWindows):
        raise ValueError(f"a mask with streams of keys does not go with a cache of {kind.name}: take a full one")
    used = cache.used + count
    streams = _with_new(cache.streams, new, slots_of(cache, query), used)
    window, window_slots = cache.window_streams, window_slots_of(cache, query)
    window = _with_new(window, new, window_slots, used) if window is not None and window_slots is not None else None
    narrowed = Mask(query, {**streams, **more}, kind.narrow(mask.rule))
    return narrowed, dataclasses.replace(cache, streams=streams, used=used, window_streams=window)


def _with_new(streams: Streams, new: Streams, slots: jax.Array, used: jax.Array) -> Streams:
    """Streams [B, S] of a cache with those [B, T] of new tokens in `slots`, after which the rows have `used` tokens."""
    streams = {name: write(stream, new[name], slots, axis=1) for name, stream in streams.items()}
    # The slots behind the new tokens may hold others that the row no longer has.
    behind = jnp.arange(streams["segment"].shape[1], dtype=jnp.int32)[None] >= used[:, None]
    return {**streams, "segment": jnp.where(behind, PAD_KEY, streams["segment"])}
