"""The state of decoding, and its first value. Letters: B rows, N greatest number of new tokens, P context length."""

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import struct

from garrulax import models
from garrulax.core import half
from garrulax.core.config import ModelConfig
from garrulax.core.spec import Tree
from garrulax.kernels.mask import Mask
from garrulax.layers.cache import Cache
from garrulax.sampling.transforms import Knobs, Transform


@struct.dataclass
class Requests:
    """The inputs of a batch of texts. Rows are independent of one another.

    In families with two positions for each token (index in the text, index in the answer), arrays of positions have an
    axis of 2 after B.

    Attributes:
        context: int32 [B, P], tokens to read, padded on the right.
        segment: int32 [B, P], 0 for a token, PAD for padding.
        rank: int32 [B, P], attention order: a token attends to the tokens of its own or a lower rank.
        positions: int32 [B, P] or [B, 2, P].
        token: int32 [B], the token after the context.
        position: int32 [B] or [B, 2], position of `token`.
        stride: int32 [B] or [B, 2], increase of the position from each token to the next.
        length: int32 [B], tokens of the row so far: context and `token`, and for a later blank also `random_offset`
            (`requests.EncodedPrompt`); 0 for an unused row.
        limit: int32 [B], greatest number of new tokens.
        seed: uint32 [B].
        knobs: Sampling parameters for the transforms, name -> [B].
        end_tokens: int32 [E], tokens that end a row (PAD is none).
    """

    context: jax.Array
    segment: jax.Array
    rank: jax.Array
    positions: jax.Array
    token: jax.Array
    position: jax.Array
    stride: jax.Array
    length: jax.Array
    limit: jax.Array
    seed: jax.Array
    knobs: Knobs
    end_tokens: jax.Array


@struct.dataclass
class State:
    """The state of decoding between two steps.

    Attributes:
        cache: Keys and values of all tokens read so far.
        token: int32 [B], last token of each row, which the model has not read yet.
        position: int32 [B] or [B, 2], position of `token`.
        stride: int32 [B] or [B, 2], increase of the position from each token to the next.
        length: int32 [B], tokens of the row so far, with `token`; index into the random stream of the row's seed.
        seed: uint32 [B].
        limit: int32 [B], greatest number of new tokens.
        generated: int32 [B], number of new tokens so far.
        done: bool [B], whether the row gets no more tokens.
        end_tokens: int32 [E], tokens that end a row.
        column: int32 scalar, number of steps so far; the column of `tokens` that the next step writes.
        tokens: int32 [B, N], new tokens; valid in the first `generated` columns of a row.
        logprobs: float32 [B, N], their log-probabilities in the model's distribution, before any transform.
        transform_state: State of the transform.
    """

    cache: Cache
    token: jax.Array
    position: jax.Array
    stride: jax.Array
    length: jax.Array
    seed: jax.Array
    limit: jax.Array
    generated: jax.Array
    done: jax.Array
    end_tokens: jax.Array
    column: jax.Array
    tokens: jax.Array
    logprobs: jax.Array
    transform_state: Any


@functools.partial(jax.jit, static_argnames=("config", "transform", "max_new", "slots"))
def prefill(
    params: Tree, requests: Requests, config: ModelConfig, transform: Transform, max_new: int, slots: int
) -> State:
    """Reads the context of every row into a new cache.

    Args:
        params: Unstacked (`models.unstack`) or stacked.
        requests: The batch.
        config: The family's Config.
        transform: The transform of the logits.
        max_new: N, at least the greatest limit.
        slots: Number of cache slots after those of the context, at least `max_new`.

    Returns:
        The state before the first new token.
    """
    params = half.from_bits(params)
    B, P = requests.context.shape
    cache = models.cache_for(params, config, B, P + slots)
    cache = dataclasses.replace(cache, planned=requests.length + requests.limit)
    mask = Mask({"rank": requests.rank, "segment": requests.segment})
    cache = cache_tokens(params, cache, requests.context, requests.positions, config, mask)
    return State(
        cache=cache,
        token=requests.token,
        position=requests.position,
        stride=requests.stride,
        length=requests.length,
        seed=requests.seed,
        limit=requests.limit,
        generated=jnp.zeros(B, jnp.int32),
        done=requests.limit < 1,
        end_tokens=requests.end_tokens,
        column=jnp.int32(0),
        tokens=jnp.zeros((B, max_new), jnp.int32),
        logprobs=jnp.zeros((B, max_new), jnp.float32),
        transform_state=transform.init(requests.knobs),
    )


def cache_tokens(
    params: Tree, cache: Cache, tokens: jax.Array, positions: jax.Array, config: ModelConfig, mask: Mask | None = None
) -> Cache:
    """Returns the cache after the model has read tokens [B, T]. Arguments as in `garrulax.forward`.

    Under jit the logits are not computed, since nothing uses them.
    """
    return cast(Cache, models.forward(params, tokens, config, positions=positions, mask=mask, cache=cache)[1])
