"""The argument `cache` of `generate`, `stream` and sessions: a window, attention sinks, blocks, or 8 bits."""

from typing import Any

from garrulax import models
from garrulax.core.config import ModelConfig
from garrulax.layers.cache_kinds import FULL, Blocks, Full, Kind, Sinks, Window


def window(size: int, *, dtype: str | None = None) -> Window:
    """A cache of the last tokens: memory and time of a step do not grow with the text.

    A token attends to itself and the `size` - 1 tokens before it, at their own positions, so a text still ends with
    the model's context. Models that were trained with a window have such a cache by default.

    Args:
        size: Number of tokens.
        dtype: "int8" keeps keys and values in 8 bits; None in the dtype of the parameters.

    Raises:
        ValueError: A size below 1, or another dtype.

    Example:
        >>> import jax, garrulax as gx
        >>> config = gx.preset("llama-tiny", layers=1, eos=None)
        >>> model = gx.init(config, jax.random.key(0)), config
        >>> len(gx.generate(model, [5, 17, 3], max_new_tokens=100, cache=gx.window(32)).tokens)
        100
    """
    return Window(size, dtype=dtype)


def sinks(first: int, size: int, *, dtype: str | None = None) -> Sinks:
    """StreamingLLM: a cache of the first tokens and the last ones, with which a text may go on without an end.

    A token attends to the first tokens of the text, to itself and the `size` - 1 tokens before it. Keys are kept before
    the rotary embedding, and positions are counted in the cache: the tokens that are kept have 0, 1, 2, ..., so the
    model never meets a position beyond its context (Xiao et al. 2023, arXiv 2309.17453).

    Args:
        first: Number of first tokens; 4 in the paper.
        size: Number of last tokens. Both together at most the model's context.
        dtype: As for `window`.

    Raises:
        ValueError: A number below 1, fewer last tokens than first ones, or another dtype.

    Example:
        >>> import jax, garrulax as gx
        >>> config = gx.preset("llama-tiny", layers=1, eos=None)  # its context is 128
        >>> model = gx.init(config, jax.random.key(0)), config
        >>> len(gx.generate(model, [5, 17, 3], max_new_tokens=500, cache=gx.sinks(4, 60)).tokens)
        500
    """
    if isinstance(first, int) and isinstance(size, int) and 1 <= size < first:
        raise ValueError(f"sinks({first}, {size}): the window of {size} tokens is smaller than the {first} sinks")
    return Sinks(first, size, dtype=dtype)


def blocks(
    size: int = 128,
    top: int = 16,
    first: int = 128,
    local: int = 4096,
    representatives: int = 4,
    *,
    dtype: str | None = None,
    offload: bool = False,
) -> Blocks:
    """InfLLM: a cache of the whole text, of which a token attends to the blocks that it looks up.

    Of each block some keys are its representatives. A query attends to the first tokens, to a local window, and of the
    blocks between them to the `top` ones whose representatives have the largest products with it. These tokens have
    the positions 0, 1, 2, ... in the order of the text, so a text may be longer than the context (Xiao et al. 2024,
    arXiv 2402.04617). Memory grows with the text, the time of a step hardly.

    Args:
        size: Tokens of a block.
        top: Number of blocks that each key/value head looks up for a token.
        first: Number of first tokens.
        local: Least number of last tokens, a multiple of `size`.
        representatives: Keys of a block with which a query is compared.
        dtype: As for `window`.
        offload: Keeps keys and values in the memory of the host (JAX's "pinned_host"), of which the device gets for
            each token those that it attends to. The text is the same, of any length that fits into that memory, and a
            step takes longer: docs/caches.md says what it moves.

    first + (top + 1) * size + local - 1 is at most the model's context.

    Raises:
        ValueError: A number below its least value, `local` is no multiple of `size`, or `offload` is neither true nor
            false.

    Example:
        >>> import jax, garrulax as gx
        >>> config = gx.preset("llama-tiny", layers=1, eos=None)  # its context is 128
        >>> model = gx.init(config, jax.random.key(0)), config
        >>> cache = gx.blocks(size=8, top=4, first=4, local=64)
        >>> len(gx.generate(model, [5, 17, 3], max_new_tokens=300, cache=cache).tokens)
        300
    """
    return Blocks(size, top, first, local, representatives, dtype=dtype, offload=offload)


def kind_for(cache: Any, config: ModelConfig) -> Kind:
    """The kind of cache that the argument `cache` of `generate` means.

    Raises:
        TypeError: It is something else.
        ValueError: An unknown name, or the model cannot have such a cache.
    """
    named = {"full": FULL, "int8": Full(dtype="int8")}
    if isinstance(cache, str) and cache not in named:
        raise ValueError(f"cache={cache!r} must be 'full', 'int8', gx.window(n), gx.sinks(first, n) or gx.blocks(...)")
    kind = named[cache] if isinstance(cache, str) else cache
    if not isinstance(kind, Kind):
        raise TypeError(f"cache={cache!r:.60} must be 'full', 'int8', gx.window(n), gx.sinks(first, n) or gx.blocks()")
    models.check_cache(config, kind)
    return kind


def choose_kind(kind: Kind, config: ModelConfig, size: int, full_only: str | None = None) -> Kind:
    """The kind of cache with which texts of up to `size` tokens are written.

    A full cache becomes a window, in all layers or in some, where the model attends no further back and the window has
    fewer slots, and a window that no text outgrows a full cache, which has as many slots as the text needs.

    Args:
        kind: What was asked for.
        config: The family's Config.
        size: Greatest number of tokens of a row.
        full_only: Name of an argument of `generate` that goes with full caches only, if it was given.

    Raises:
        ValueError: Another kind was asked for than that argument goes with.
    """
    if full_only and kind != FULL:
        what = f"cache={'int8' if kind.name == 'full' else kind.name}"
        raise ValueError(f"{what} does not go with {full_only}: leave one of them out")
    if isinstance(kind, Window) and kind.size >= size:
        kind = Full(dtype=kind.dtype)
    if not isinstance(kind, Full) or full_only:
        return kind
    own = models.default_cache(config, kind.dtype)
    return own if own.saves(size) else kind
