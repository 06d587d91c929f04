"""The state of decoding, and the functions that begin it. Letters: B rows, N room for new tokens, S cache slots."""

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import struct

from garrulax import models
from garrulax.core.spec import Tree
from garrulax.kernels.mask import Mask
from garrulax.layers.cache import Cache
from garrulax.sampling.transforms import Knobs, Transform


@struct.dataclass
class Requests:
    """What a batch of texts begins with; rows are independent of one another. Where the family has two
    positions a token (place in the text, place in the answer), there is an axis of 2 behind the rows.

    context: int32 [B, P], tokens to read, padded on the right. segment: int32 [B, P], 0 for a token, PAD for padding.
    rank: int32 [B, P], who sees whom in the context: equal ranks see each other. positions: int32 [B, P] or [B, 2, P].
    token: int32 [B], the token after the context. position: int32 [B] or [B, 2], its position.
    stride: int32 [B] or [B, 2], what a token's position is beyond that of the one before it.
    length: int32 [B], tokens of the row so far, context and token; 0 for a row that is not in use.
    limit: int32 [B], new tokens that the row may get. seed: uint32 [B].
    knobs: name -> [B], for the transforms. stops: int32 [E], tokens that end a row (PAD is none).
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
    stops: jax.Array


@struct.dataclass
class State:
    """Decoding between two steps.

    cache: keys and values of everything read so far.
    token: int32 [B], the last token of each row, which the model has not read yet.
    position: int32 [B] or [B, 2], where `token` stands. stride: like position, added for every new token.
    length: int32 [B], tokens of the row's own text, `token` included: with the seed it decides the next draw.
    seed: uint32 [B].
    limit: int32 [B], new tokens that the row may get. made: int32 [B], new tokens so far.
    done: bool [B], the row gets no more tokens.
    stops: int32 [E], tokens that end a row.
    column: int32 scalar, steps so far, and the column of `tokens` that the next one writes.
    tokens: int32 [B, N], new tokens. logprobs: float32 [B, N], their log-probabilities in the model's own
    distribution, before any transform. Only the first `made` of a row count.
    shaping: state of the transforms.
    """

    cache: Cache
    token: jax.Array
    position: jax.Array
    stride: jax.Array
    length: jax.Array
    seed: jax.Array
    limit: jax.Array
    made: jax.Array
    done: jax.Array
    stops: jax.Array
    column: jax.Array
    tokens: jax.Array
    logprobs: jax.Array
    shaping: Any


@functools.partial(jax.jit, static_argnames=("config", "transform", "room", "slots"))
def init(params: Tree, requests: Requests, config: Any, transform: Transform, room: int, slots: int) -> State:
    """The state before the first new token: the context of every row is read into the cache.

    room: N, at least the greatest limit. slots: cache slots beyond those of the context, at least `room`.
    """
    B, P = requests.context.shape
    cache = models.cache_for(params, config, B, P + slots)
    cache = dataclasses.replace(cache, planned=requests.length + requests.limit)
    mask = Mask({"rank": requests.rank, "segment": requests.segment})
    cache = read(params, cache, requests.context, requests.positions, config, mask)
    return State(
        cache=cache,
        token=requests.token,
        position=requests.position,
        stride=requests.stride,
        length=requests.length,
        seed=requests.seed,
        limit=requests.limit,
        made=jnp.zeros(B, jnp.int32),
        done=requests.limit < 1,
        stops=requests.stops,
        column=jnp.int32(0),
        tokens=jnp.zeros((B, room), jnp.int32),
        logprobs=jnp.zeros((B, room), jnp.float32),
        shaping=transform.init(requests.knobs),
    )


def read(
    params: Tree, cache: Cache, tokens: jax.Array, positions: jax.Array, config: Any, mask: Mask | None = None
) -> Cache:
    """The cache with tokens [B, T] in it. Arguments as in `garrulax.forward`; under jit no logits are computed."""
    return cast(Cache, models.forward(params, tokens, config, positions=positions, mask=mask, cache=cache)[1])
