"""The state of decoding, and what happens to its rows: they are read, put in, made longer and taken out.

Letters: B rows, P context length, S cache slots of a row, E end tokens.
"""

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from garrulax import models
from garrulax.core import half
from garrulax.core.auto_mesh import in_context, split
from garrulax.core.config import ModelConfig
from garrulax.core.records import Record
from garrulax.core.spec import Tree
from garrulax.kernels.mask import PAD
from garrulax.layers.cache import Cache
from garrulax.layers.cache_kinds import FULL, Kind
from garrulax.sampling.cache_rows import extract_layers, grow_cache, insert_layers, put_rows, split_layer
from garrulax.sampling.contexts import cache_context
from garrulax.sampling.transforms import Knobs, Transform


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Requests(Record):
    """Texts to be continued. Rows are independent of one another.

    In families with two positions for each token (index in the text, index in the answer), arrays of positions have an
    axis of 2 after B.

    Rows that begin alike can share one context: `context`, `segment`, `rank` and `positions` then have one row.

    Attributes:
        context: int32 [B, P], tokens to read, padded on the right.
        segment: int32 [B, P], 0 for a token, PAD for padding.
        rank: int32 [B, P], attention order: a token attends to the tokens of its own or a lower rank.
        positions: int32 [B, P] or [B, 2, P].
        token: int32 [B], the token after the context.
        position: int32 [B] or [B, 2], position of `token`.
        stride: int32 [B] or [B, 2], increase of the position from each token to the next.
        length: int32 [B], tokens of the row so far: context and `token`, and for a later blank also `random_offset`
            (`requests.EncodedPrompt`).
        limit: int32 [B], greatest number of new tokens.
        seed: uint32 [B].
        ends: int32 [B, E], tokens that end the row; PAD, which is no token, fills up.
        prompt: int32 [B, P'], the prompt as transforms see it, from the left; PAD where there is no token.
        unconditional: bool [B], whether the row is the second of a pair for classifier-free guidance.
        knobs: Sampling parameters for the transforms, name -> array, or tuple of arrays, whose first axis is B.
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
    ends: jax.Array
    prompt: jax.Array
    unconditional: jax.Array
    knobs: Knobs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State(Record):
    """The state of decoding between two steps. Each row has its own text, its own length and its own random stream.

    Every array but those of `cache.layers` has the rows on its first axis.

    Attributes:
        cache: Keys and values of all tokens that the model has read; `cache.used` is their number in each row.
        token: int32 [B], last token of each row, which the model has not read yet.
        position: int32 [B] or [B, 2], position of `token`.
        stride: int32 [B] or [B, 2], increase of the position from each token to the next.
        length: int32 [B], tokens of the row so far, with `token`; index into the random stream of the row's seed.
        seed: uint32 [B].
        limit: int32 [B], greatest number of new tokens.
        generated: int32 [B], number of new tokens so far.
        done: bool [B], whether the row gets no more tokens. A free row is done.
        ends: int32 [B, E], tokens that end the row.
        tokens: int32 [B, S], new tokens: number i is in column i % S, so the last S of `generated` are there.
        logprobs: float32 [B, S], their log-probabilities in the model's distribution, before any transform; -inf where
            the transforms and `allowed` left no token.
        allowed: uint32 [B, ceil(V / 32)], the tokens that may be sampled next: bit i of word j stands for token
            32 j + i. None allows all.
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
    ends: jax.Array
    tokens: jax.Array
    logprobs: jax.Array
    allowed: jax.Array | None
    transform_state: Any


def empty(params: Tree, prefix: State, config: ModelConfig, rows: int, slots: int, constrained: bool = False) -> State:
    """A state whose rows are all free.

    Args:
        params: In the form, stacked or not, in which `step` will get them.
        prefix: From `prefill`, of a request like those that will be inserted. Only dtypes and axes are read, so that
            its arrays may be abstract.
        config: The family's Config.
        rows: B.
        slots: S, number of cache slots of a row. `grow` makes them more.
        constrained: Whether the state has `allowed`.
    """

    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, prefix))
    leaves, tree = jax.tree.flatten(like)
    return _empty(tuple((x.shape, x.dtype) for x in leaves), tree, config, rows, slots, constrained)


@functools.partial(jax.jit, static_argnums=range(6))
def _empty(
    types: tuple, tree: jax.tree_util.PyTreeDef, config: ModelConfig, rows: int, slots: int, constrained: bool
) -> State:
    """`empty`, as one program: eager zeros would be one for each shape."""
    params, prefix = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(*one) for one in types])

    def free(x: jax.Array) -> jax.Array:
        return jnp.zeros((rows, *x.shape[1:]), x.dtype)

    kind = prefix.cache.kind
    like = jnp.zeros((rows, 1), jnp.int32) if in_context() else None
    cache = models.cache_for(jax.eval_shape(half.from_bits, params), config, rows, slots, like=like, kind=kind)
    state = cast(State, jax.tree.map(free, dataclasses.replace(prefix, cache=cast(Cache, None))))
    state = dataclasses.replace(
        state,
        cache=dataclasses.replace(cache, planned=jnp.zeros_like(cache.planned)),
        done=jnp.ones((rows,), bool),
        tokens=jnp.zeros((rows, cache.size), jnp.int32),
        logprobs=jnp.zeros((rows, cache.size), jnp.float32),
        allowed=jnp.zeros((rows, -(-config.vocab // 32)), jnp.uint32) if constrained else None,
    )
    return split_state(state)


@functools.partial(jax.jit, static_argnames=("config", "transform", "size", "kind"))
def prefill(
    params: Tree, requests: Requests, config: ModelConfig, transform: Transform, size: int, kind: Kind = FULL
) -> State:
    """Reads the contexts of requests.

    A program of one row for each prompt makes the result independent of the other prompts, to the last bit. On a mesh
    the rows are split over its devices.

    Args:
        params: Stacked, which compiles fastest, or unstacked (`models.unstack`).
        requests: The requests, as many as are to be read together.
        config: The family's Config.
        transform: The transform of the logits.
        size: Greatest number of tokens, of prompt and answer together, that a row may get.
            With attention sinks it may get more, of which transforms see the last `size`.
        kind: Of the cache.

    Returns:
        A state of these rows, which `insert` puts into a larger one. It has no space for new tokens.
    """
    requests = dataclasses.replace(requests, context=split(requests.context, rows=0))
    like = requests.context if in_context() and len(requests.context) > 1 else None
    cache = models.cache_for(half.from_bits(params), config, *requests.context.shape, like=like, kind=kind)
    return _read(params, requests, cache, config, transform, size)


@functools.partial(jax.jit, static_argnames=("config", "transform", "size"))
def prefill_after(
    params: Tree, requests: Requests, past: Cache, config: ModelConfig, transform: Transform, size: int
) -> State:
    """Reads the contexts of requests whose first tokens have been read already.

    Args:
        params: As in `prefill`.
        requests: One row: `rank` and `positions` go on from those of the tokens in `past`.
        past: Of one row (`extract`), in the form of `params`; its first `used` slots hold the tokens that were read. It
            has a free slot for each column of the context.
        config: As in `prefill`, like the next two.
        transform: See there.
        size: See there.

    Returns:
        As `prefill`. The cache has the slots of `past`.
    """
    return _read(params, requests, past, config, transform, size)


@functools.partial(jax.jit, static_argnames=("config", "transform", "size"), donate_argnames="cache")
def prefill_into(
    params: Tree, requests: Requests, cache: Cache, config: ModelConfig, transform: Transform, size: int
) -> State:
    """`prefill` with an empty cache that was made before.

    What a program makes in the memory of the host, XLA:TPU would move to the device between two of its computations.

    Args:
        params: As in `prefill`, like all but the cache.
        requests: See there.
        cache: With a row for each row of the context, and a slot for each of its columns. It is donated.
        config: See there.
        transform: See there.
        size: See there.

    Returns:
        As `prefill`.
    """
    return _read(params, requests, cache, config, transform, size)


def _read(
    params: Tree, requests: Requests, cache: Cache, config: ModelConfig, transform: Transform, size: int
) -> State:
    params = half.from_bits(params)
    rows, B = len(requests.context), len(requests.limit)
    cached = cache.used + jnp.sum(requests.segment != PAD, axis=1, dtype=jnp.int32)
    planned = cached + 1 + requests.limit[:rows]
    planned = planned if cache.kind.room is None else jnp.minimum(planned, cache.kind.room)
    streams = requests.segment, requests.rank, requests.positions
    cache = cache_context(params, dataclasses.replace(cache, planned=planned), requests.context, *streams, config)
    cache = dataclasses.replace(cache, used=cached)
    reserved = {name: getattr(requests, name) for name in ("ends", "limit", "unconditional")}
    # States of transforms have one shape for prompts of all lengths, so that they fit into one batch.
    prompt = jnp.pad(requests.prompt, ((0, 0), (0, size)), constant_values=PAD)[:, :size]
    state = State(
        cache=cache,
        token=requests.token,
        position=requests.position,
        stride=requests.stride,
        length=requests.length,
        seed=requests.seed,
        limit=requests.limit,
        generated=jnp.zeros(B, jnp.int32),
        done=requests.limit < 1,
        ends=requests.ends,
        tokens=jnp.zeros((B, 0), jnp.int32),
        logprobs=jnp.zeros((B, 0), jnp.float32),
        allowed=None,
        transform_state=transform.init(
            {**requests.knobs, **reserved, "prompt": prompt, "vocab": config.vocab, "size": size}
        ),
    )
    return split_state(state)


def split_state(state: State, whole: bool = True) -> State:
    """The state as it lies on a mesh in Auto mode; without one, the state itself.

    Args:
        state: The state.
        whole: Whether every device has the rows of all that is not in the cache, so that the host can read it. Between
            two steps of a loop no device needs the rows of others.
    """
    layers = jax.tree.map(split_layer, state.cache.layers)
    by_rows = functools.partial(split, rows=0)
    streams = jax.tree.map(by_rows, state.cache.streams)
    state = jax.tree.map(split if whole else by_rows, without_layers(state))
    cache = dataclasses.replace(state.cache, layers=layers, streams=streams)
    return dataclasses.replace(state, cache=cache)


def insert(state: State, prefix: State, rows: jax.Array | np.ndarray | int | None) -> State:
    """Puts requests that were read into rows, which they replace.

    Args:
        state: From `empty`, `insert`, `step` or `evict`. It is donated.
        prefix: From `prefill`, of n requests; the cache may have one row, which they share.
        rows: int32 [n], or one row; None is all rows in their order, which on a mesh moves nothing between devices.

    Returns:
        The state with the requests in it.

    Raises:
        ValueError: The state has no such row, the context does not fit into the slots of a row, or the sampling
            parameters or end tokens of the requests have other shapes than those of the state.
    """
    if rows is None:
        if len(prefix.done) != len(state.done):
            raise ValueError(f"insert: {len(prefix.done)} requests are not the {len(state.done)} rows of the state")
    else:
        _check_rows(rows, len(state.done))
        rows = jnp.atleast_1d(rows.astype(jnp.int32)) if isinstance(rows, jax.Array) else np.atleast_1d(np.int32(rows))
    _check_shapes(state, prefix)
    cache = state.cache
    layers = insert_layers(cache.layers, prefix.cache.layers, rows, len(state.done), cache.kind)
    return with_layers(_insert_rest(without_layers(state), without_layers(prefix), rows), layers)


def _check_rows(rows: jax.Array | np.ndarray | int, count: int) -> None:
    """Raises ValueError for rows that a state of `count` rows does not have: JAX would drop what is put there."""
    if isinstance(rows, jax.core.Tracer):
        return
    given = np.atleast_1d(np.asarray(rows))
    if ((given < 0) | (given >= count)).any():
        raise ValueError(f"insert: the state has rows 0 to {count - 1}, not {given.tolist()}")


def _check_shapes(state: State, prefix: State) -> None:
    """Raises ValueError for requests that do not fit into the rows of a state."""
    if prefix.cache.size > state.cache.size:
        raise ValueError(
            f"the context has {prefix.cache.size} slots, but the rows of the state have {state.cache.size}: make the "
            "state with more slots"
        )
    pairs = ((state.ends, prefix.ends), (state.transform_state, prefix.transform_state))
    for into, new in zip(*(jax.tree.leaves(x) for x in zip(*pairs, strict=True)), strict=True):
        if into.shape[1:] != new.shape[1:]:
            raise ValueError(
                f"the sampling parameters or end tokens of the request have the shape {new.shape[1:]}, those of the "
                f"state {into.shape[1:]}: prefill all requests of a state with one size, and with lists of similar "
                "lengths"
            )


def without_layers(state: State) -> State:
    """The state without keys and values: what a program that only samples needs."""
    return dataclasses.replace(state, cache=dataclasses.replace(state.cache, layers=None))


def with_layers(state: State, layers: Any) -> State:
    """The inverse of `without_layers`."""
    return dataclasses.replace(state, cache=dataclasses.replace(state.cache, layers=layers))


@functools.partial(jax.jit, donate_argnames="rest")
def _insert_rest(rest: State, new: State, rows: jax.Array | None) -> State:
    allowed = rest.allowed  # the host writes it before every step
    rest, new = (dataclasses.replace(x, allowed=None) for x in (rest, new))
    # A transform is left out where no row needs it (`transforms.base.only_if`), and the knobs of a free row, which are
    # 0, would switch filters on: a top_p of 0 is one. So rows that are done take those of the request.
    knobs = jax.tree.map(
        lambda x, y: of_rows(rest.done, y[:1].astype(x.dtype), x), *(x.transform_state for x in (rest, new))
    )
    rest = dataclasses.replace(rest, transform_state=knobs)
    rest = jax.tree.map(lambda x, y: put_rows(x, y, rows), rest, new)
    return split_state(dataclasses.replace(rest, allowed=allowed))


def extract(state: State, row: int, stacked: bool) -> Cache:
    """Copies one row out of a state, as a cache for `prefill_after`: the inverse of `insert`.

    Args:
        state: A state, on one device.
        row: The row.
        stacked: Whether the result is in the form of stacked parameters.

    Returns:
        A cache of one row with as many slots as the state. It shares no memory with the state.
    """
    cache = state.cache
    layers = extract_layers(cache.layers, row, len(state.done), cache.kind, stacked)
    rest = _extract_rest(dataclasses.replace(cache, layers=None), np.int32(row))
    return dataclasses.replace(rest, layers=layers)


@jax.jit
def _extract_rest(cache: Cache, row: jax.Array) -> Cache:
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1), cache)


def of_rows(rows: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """Rows of x where bool [B] `rows` is true, else those of y; one of them may have a single row for all."""
    return jnp.where(rows.reshape(-1, *(1,) * (x.ndim - 1)), x, y)


@functools.partial(jax.jit, static_argnames="slots")
def grow(state: State, slots: int) -> State:
    """The same state with more cache slots a row, `slots` in all."""
    more = [(0, 0), (0, slots - state.cache.size)]
    tokens, logprobs = jnp.pad(state.tokens, more), jnp.pad(state.logprobs, more)
    return split_state(
        dataclasses.replace(state, cache=grow_cache(state.cache, slots), tokens=tokens, logprobs=logprobs)
    )


@functools.partial(jax.jit, donate_argnames="state")
def evict(state: State, rows: jax.Array) -> State:
    """Frees rows (bool [B]). The state is donated. ValueError for anything else, such as numbers of rows."""
    if rows.dtype != bool or rows.shape != state.done.shape:
        raise ValueError(f"evict: rows must be bool [{len(state.done)}], True for each row to free, not {rows}")
    cache = dataclasses.replace(state.cache, used=jnp.where(rows, 0, state.cache.used))
    limit = jnp.where(rows, 0, state.limit)
    return dataclasses.replace(state, cache=cache, limit=limit, done=state.done | rows)
