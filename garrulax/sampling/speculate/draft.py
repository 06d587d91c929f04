"""Drafts of a smaller model, or of the model's own first layers. Letters: see `interface`."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from garrulax import models
from garrulax.core.config import ModelConfig
from garrulax.core.spec import Tree
from garrulax.kernels.mask import PAD
from garrulax.layers.cache import Cache
from garrulax.models.unpack import ModelLike
from garrulax.sampling.buckets import ONE_ROW
from garrulax.sampling.cache_rows import grow_cache
from garrulax.sampling.decoder import Decoder
from garrulax.sampling.loop import choose, decode_step, read
from garrulax.sampling.requests import Weights, prepare_model
from garrulax.sampling.speculate.accept import exact
from garrulax.sampling.speculate.interface import Bound, Outcome, Proposal, Proposer, Speculation, check_parents
from garrulax.sampling.start import compile_start, start
from garrulax.sampling.state import Requests, State
from garrulax.sampling.transforms import Transform


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DraftMemory:
    """The cache and the positions of a draft model.

    Attributes:
        cache: Its cache: of the row's text without the last token, or without more.
        position: int32 [B] or [B, 2], as the draft model counts: of the last token of the prompt.
        stride: int32 [B] or [B, 2].
    """

    cache: Cache
    position: jax.Array
    stride: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Draft(Speculation):
    """The argument `speculate` that `draft` makes.

    Attributes:
        model: The draft model; None is the model's own first layers.
        layers: Their number.
        tokens: Number of drafts in a pass.
    """

    model: ModelLike | None
    layers: int | None
    tokens: int

    def bind(self, weights: Weights, config: ModelConfig, transform: Transform, requests: Requests, size: int) -> Bound:
        """See `Speculation.bind`."""
        if self.model is None:
            return self._first_layers(weights, config, transform)
        own, small, _ = prepare_model(self.model)
        _check(small, config, requests)
        if _is_elsewhere(own.step, weights.step):
            raise ValueError("the draft model is on another device than the model: move it there with jax.device_put")
        decoder, read_by_it = Decoder(small, transform, ONE_ROW), _as_read_by(small, config, requests)

        def begin(state: State) -> DraftMemory:
            own_state = start(decoder, own, read_by_it, size, steps=False)
            cache = own_state.cache
            if cache.size < state.cache.size:
                cache = grow_cache(cache, state.cache.size)
            return DraftMemory(cache, own_state.position, own_state.stride)

        def ahead(state: State) -> DraftMemory:
            like = compile_start(decoder, own, read_by_it, size, steps=False)
            cache: Cache = jax.eval_shape(
                lambda cache: grow_cache(cache, max(cache.size, state.cache.size)), like.cache
            )
            return DraftMemory(cache, like.position, like.stride)

        return Bound(_proposer(small, transform, self.tokens), own.step, begin, _grow, ahead)

    def _first_layers(self, weights: Weights, config: ModelConfig, transform: Transform) -> Bound:
        count = self.layers or 0
        if count >= config.layers:
            raise ValueError(f"draft: layers={count} must be fewer than the model's {config.layers}")
        small: Any = dataclasses.replace(config, layers=count)
        params = {**weights.step, "blocks": weights.step["blocks"][:count]}

        def begin(state: State) -> DraftMemory:  # the first layers have read the prompt already
            first = dataclasses.replace(state.cache, layers=state.cache.layers[:count])
            return jax.tree.map(jnp.copy, DraftMemory(first, state.position, state.stride))

        return Bound(_proposer(small, transform, self.tokens), params, begin, _grow)


def draft(model: ModelLike | None = None, *, layers: int | None = None, tokens: int = 4) -> Draft:
    """Speculation with drafts of a smaller model (Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023).

    The draft model samples with the same transforms, seeds and noise as the model, so that both choose the same token
    where their distributions are alike. The completion is that without it. In every pass the draft model makes `tokens`
    steps: it pays if it is many times faster than the model and often right.

    Args:
        model: The draft model, of any family, with the vocabulary of the model: from `gx.load`, or (params, config).
        layers: In place of it, the number of first layers of the model itself that make the drafts, with its last norm
            and its head. They share its memory. A model that was not trained for that drafts badly.
        tokens: Number of drafts in a pass.

    Raises:
        ValueError: Neither or both of `model` and `layers`, a number below 1, or more than 89 drafts.

    Example:
        >>> import jax, garrulax as gx
        >>> config = gx.preset("gpt2-tiny", layers=2, width=32, heads=2, vocab=257, eos=None)
        >>> model = gx.init(config, jax.random.key(0)), config
        >>> one = gx.generate(model, [5, 17, 3], max_new_tokens=8, speculate=gx.draft(layers=1))
        >>> one.tokens == gx.generate(model, [5, 17, 3], max_new_tokens=8).tokens
        True
    """
    if (model is None) == (layers is None):
        raise ValueError("draft: give either a model or layers=, the number of the model's own first layers")
    for name, value in (("layers", 1 if layers is None else layers), ("tokens", tokens)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"draft: {name}={value!r} must be a whole number of at least 1")
    check_parents(tuple(range(-1, tokens - 1)))
    return Draft(model, layers, tokens)


@functools.cache  # jit compares proposers by identity
def _proposer(config: ModelConfig, transform: Transform, count: int) -> Proposer:
    def propose(params: Tree, memory: DraftMemory, state: State) -> tuple[Proposal, DraftMemory]:
        own = _catch_up(params, _own_state(memory, state), state.cache.used, config)
        own = _first_step(params, own, state.cache.used, config, transform)
        own = jax.lax.fori_loop(1, count, lambda _, own: decode_step(params, own, config, transform), own)
        index = jnp.arange(count, dtype=jnp.int32)[None]
        columns = jnp.minimum(state.generated[:, None] + index, own.tokens.shape[1] - 1)
        valid = index < (own.generated - state.generated)[:, None]
        proposal = Proposal(jnp.take_along_axis(own.tokens, columns, axis=1), valid, jnp.ones_like(state.done))
        return proposal, dataclasses.replace(memory, cache=own.cache)

    def observe(params: Tree, memory: DraftMemory, outcome: Outcome) -> DraftMemory:
        used = jnp.minimum(memory.cache.used, outcome.after.cache.used)
        return dataclasses.replace(memory, cache=dataclasses.replace(memory.cache, used=used))

    return Proposer(tuple(range(-1, count - 1)), propose, observe, exact, always=True)


def _own_state(memory: DraftMemory, state: State) -> State:
    """The state of the draft model: the row's text with its own cache and positions."""
    new = _per_row(state.generated, memory.stride)
    position = memory.position + memory.stride * new
    return dataclasses.replace(state, cache=memory.cache, position=position, stride=memory.stride, allowed=None)


def _catch_up(params: Tree, own: State, used: jax.Array, config: ModelConfig) -> State:
    """Reads what the draft model lacks but the last two tokens: forced tokens were appended without it.

    Args:
        params: Of the draft model.
        own: Its state.
        used: int32 [B], number of tokens that the model has read.
        config: Of the draft model.
    """

    def behind(cache: Cache) -> jax.Array:
        return jnp.any(used - cache.used > 1)

    def read_one(cache: Cache) -> Cache:
        now = dataclasses.replace(own, cache=cache)
        _, after = read(params, _back(now, used), _missed(now, used)[:, None], config)
        return dataclasses.replace(after, used=jnp.where(used - cache.used > 1, after.used, cache.used))

    return dataclasses.replace(own, cache=jax.lax.while_loop(behind, read_one, own.cache))


def _first_step(params: Tree, own: State, used: jax.Array, config: ModelConfig, transform: Transform) -> State:
    """A step of the draft model, which first reads the token before the last one, if it has not yet.

    That is so after a pass in which all drafts were accepted: the last of them was sampled but not read. Arguments as
    in `_catch_up`.
    """
    late = (used > own.cache.used)[:, None]
    last = own.token[:, None]
    tokens = jnp.concatenate([jnp.where(late, _missed(own, used)[:, None], last), last], axis=1)  # [B, 2]
    logits, cache = read(params, _back(own, used), tokens, config, 1 + late[:, 0].astype(jnp.int32))
    cache = dataclasses.replace(cache, used=used + 1)
    before = dataclasses.replace(own, cache=dataclasses.replace(own.cache, used=used))
    return choose(before, cache, jnp.where(late, logits[:, 1], logits[:, 0]), transform)


def _missed(own: State, used: jax.Array) -> jax.Array:
    """The first token that the draft model has not read: int32 [B]; any where it lacks none but the last."""
    column = jnp.clip(own.generated - 1 - (used - own.cache.used), 0, own.tokens.shape[1] - 1)
    return jnp.take_along_axis(own.tokens, column[:, None], axis=1)[:, 0]


def _back(own: State, used: jax.Array) -> State:
    """The state whose `position` is that of the first token that the draft model has not read."""
    return dataclasses.replace(own, position=own.position - own.stride * _per_row(used - own.cache.used, own.stride))


def _per_row(x: jax.Array, like: jax.Array) -> jax.Array:
    """x [B] with the number of axes of `like` [B] or [B, 2]."""
    return x.reshape(-1, *(1,) * (like.ndim - 1))


def _grow(memory: DraftMemory, slots: int) -> DraftMemory:
    return dataclasses.replace(memory, cache=grow_cache(memory.cache, slots))


def _check(small: ModelConfig, config: ModelConfig, requests: Requests) -> None:
    """Raises ValueError for a draft model that cannot read what the model reads."""
    if small.vocab != config.vocab:
        raise ValueError(
            f"the draft model has {small.vocab} token ids, the model {config.vocab}: a draft needs the same vocabulary"
        )
    longest = int(np.max(np.asarray(requests.length) + np.asarray(requests.limit)))
    if longest > small.max_length:
        raise ValueError(
            f"prompt and new tokens are up to {longest} tokens, but the draft model's context is {small.max_length}: "
            "lower max_new_tokens or take another draft"
        )


def _as_read_by(small: ModelConfig, config: ModelConfig, requests: Requests) -> Requests:
    """The requests as the draft model reads them: as the model does, or from left to right if it counts otherwise."""
    ours, theirs = models.blanks(config), models.blanks(small)
    if (ours is None and theirs is None) or type(config) is type(small):
        return requests
    rows, width = requests.context.shape
    index: Any = np.broadcast_to(np.arange(width, dtype=np.int32), (rows, width))
    count: Any = (np.asarray(requests.segment) != PAD).sum(axis=1).astype(np.int32)
    positions, position, stride = index, count, np.ones_like(count)
    if theirs is not None and theirs.rows == 2:
        positions, position, stride = (np.stack([x, np.zeros_like(x)], axis=1) for x in (positions, position, stride))
    return dataclasses.replace(requests, rank=index, positions=positions, position=position, stride=stride)


def _is_elsewhere(draft: Tree, model: Tree) -> bool:
    """Whether the draft is on a device that the model is not on. A model whose weights are not read yet is on none."""
    known = _devices(model)
    return bool(known) and not _devices(draft) <= known


def _devices(tree: Tree) -> set[jax.Device]:
    return {device for x in jax.tree.leaves(tree) if isinstance(x, jax.Array) for device in x.devices()}
