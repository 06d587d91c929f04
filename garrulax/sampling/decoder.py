"""`compile`: the pure functions with which one model decodes, and the sizes for which they are compiled."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from garrulax import models
from garrulax.core import half
from garrulax.core.config import ModelConfig
from garrulax.core.spec import Tree
from garrulax.kernels.mask import PAD
from garrulax.layers.cache import Cache
from garrulax.layers.cache_kinds import FULL, Kind
from garrulax.models.unpack import ModelLike, unpack_model
from garrulax.sampling import ahead, loop, state
from garrulax.sampling.buckets import POWERS_OF_TWO, Buckets
from garrulax.sampling.caches import kind_for
from garrulax.sampling.knobs import knobs_per_prompt
from garrulax.sampling.requests import Weights, assemble, causal_prompt, check_least, check_transform
from garrulax.sampling.state import Requests, State
from garrulax.sampling.transforms import DEFAULT, Transform


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The functions that decode with one model and one transform: pure, compiled on their first call for each bucket.

    `generate` and `stream` call them, and so does anything that keeps rows of many users in one state.

    Attributes:
        config: The family's Config.
        transform: The transform of the logits.
        buckets: The sizes for which programs are compiled.
        cache: The kind of the cache.

    Example:
        >>> import jax, garrulax as gx
        >>> from garrulax import sampling
        >>> config = gx.preset("gpt2-tiny", layers=1, width=32, heads=2, vocab=257, eos=None)
        >>> params = gx.init(config, jax.random.key(0))
        >>> decoder = sampling.compile((params, config))
        >>> one = decoder.request([5, 17, 3], max_new_tokens=4, temperature=0)
        >>> prefix = decoder.prefill(params, one, size=32)
        >>> state = decoder.insert(decoder.empty(params, prefix, rows=2, slots=32), prefix, 1)
        >>> state = decoder.step(params, state, 3)
        >>> state.generated.tolist(), state.done.tolist()
        ([0, 3], [True, False])
    """

    config: ModelConfig
    transform: Transform = DEFAULT
    buckets: Buckets = POWERS_OF_TWO
    cache: Kind = FULL

    def request(
        self,
        ids: Sequence[int],
        *,
        seed: int = 0,
        max_new_tokens: int | None = None,
        end_tokens: Sequence[int] | None = None,
        **knobs: Any,
    ) -> Requests:
        """The request to continue token ids, with one row.

        Args:
            ids: Token ids.
            seed: Seed of its random stream.
            max_new_tokens: See `generate`.
            end_tokens: Ids of the tokens that end the row; None takes those of the config.
            **knobs: Sampling parameters.
        """
        checked = knobs_per_prompt(1, vocab=self.config.vocab, max_new_tokens=max_new_tokens, seed=seed, **knobs)
        limit = checked["max_new_tokens"][0]
        prompt = causal_prompt(list(ids), limit, self.config, "the prompt", self.cache.room is not None)
        checked["max_new_tokens"] = [prompt.limit]
        check_least(checked, [prompt.limit])
        return assemble([prompt], checked, self.config, end_tokens, self.transform, self.buckets)

    def empty(self, params: Tree, prefix: State, rows: int, slots: int, constrained: bool = False) -> State:
        """A state of `rows` free rows; see `state.empty`."""
        return state.empty(params, prefix, self.config, rows, slots, constrained)

    def prefill(self, params: Tree, requests: Requests, size: int, past: Cache | None = None) -> State:
        """Reads the contexts of requests; see `state.prefill`, and with `past` `state.prefill_after`.

        Raises:
            ValueError: A request may get more tokens than `size`; with attention sinks, whose texts have no end, its
                prompt alone has more. Of requests on a device this is not checked, since the host would wait for them.
        """
        length, limit = requests.length, requests.limit
        if isinstance(length, np.ndarray) and isinstance(limit, np.ndarray):
            # A ring has free slots however long the text becomes, and a session gives the end of the prompt only.
            endless = self.cache.ring and self.cache.room is not None
            most = int(np.max(np.sum(np.asarray(requests.prompt) != PAD, axis=1) if endless else length + limit))
            if most > size:
                what = f"a prompt has {most} tokens" if endless else f"a request may get {most} tokens, with its prompt"
                raise ValueError(f"prefill: {what}, which is more than size={size}: raise size")
        function, behind, static = self._prefill(params, requests, size, past)
        return ahead.find(function, params, requests, *behind, **static)(params, requests, *behind)

    def insert(self, into: State, prefix: State, rows: jax.Array | np.ndarray | int | None) -> State:
        """Puts requests that were read into rows; see `state.insert`."""
        return state.insert(into, prefix, rows)

    def step(self, params: Tree, before: State, n: Any = 1) -> State:
        """Samples up to n tokens for each row; see `loop.decode_steps`."""
        return self.program(params, before)(params, before, np.int32(n) if isinstance(n, int) else n)

    def program(self, params: Tree, before: State) -> Callable[[Tree, State, Any], State]:
        """`step` for states of one shape, for loops: which program it is, is found out once."""
        static = {"config": self.config, "transform": self.transform}
        return ahead.find(loop.decode_steps, params, before, np.int32(1), **static)

    def append(
        self, params: Tree, before: State, tokens: jax.Array | np.ndarray, count: jax.Array | np.ndarray
    ) -> State:
        """Appends given tokens; see `loop.append`."""
        return loop.append(params, before, tokens, count, self.config, self.transform)

    def compile_ahead(
        self,
        weights: Weights,
        requests: Requests,
        rows: int,
        slots: int,
        size: int,
        past: Cache | None = None,
        steps: bool = True,
    ) -> State:
        """Begins to compile `prefill` and `step` at once, in other threads.

        Args:
            weights: The parameters, which may be abstract.
            requests: One row.
            rows: Number of rows of the state.
            slots: Number of slots of a row.
            size: Greatest number of tokens that a row may get.
            past: With which `prefill` will be called; it may be abstract.
            steps: Whether `step` is needed.

        Returns:
            The abstract result of `prefill`.
        """
        function, behind, static = self._prefill(weights.prefill, requests, size, past, abstract=True)
        prefix = jax.eval_shape(functools.partial(function, **static), weights.prefill, requests, *behind)
        if steps:  # first, since it takes longest
            own = {"config": self.config, "transform": self.transform}
            before = jax.eval_shape(lambda: self.empty(weights.step, prefix, rows, slots))
            ahead.compile_ahead(loop.decode_steps, weights.step, before, np.int32(1), gpu=ahead.GPU_STEPS, **own)
        ahead.compile_ahead(function, weights.prefill, requests, *behind, **static)
        return prefix

    def evict(self, before: State, rows: jax.Array) -> State:
        """Frees rows; see `state.evict`."""
        return state.evict(before, rows)

    def _prefill(
        self, params: Tree, requests: Requests, size: int, past: Cache | None, abstract: bool = False
    ) -> tuple[Any, tuple[Cache, ...], dict[str, Any]]:
        """The function that reads contexts, its arguments behind the requests, and its static ones."""
        static = {"config": self.config, "transform": self.transform, "size": size}
        if past is not None:
            return state.prefill_after, (past,), static
        if not self.cache.on_host:
            return state.prefill, (), static | {"kind": self.cache}

        def empty() -> Cache:
            like = jax.eval_shape(half.from_bits, params)
            return models.cache_for(like, self.config, *requests.context.shape, kind=self.cache)

        return state.prefill_into, (jax.eval_shape(empty) if abstract else empty(),), static


def compile(
    model: ModelLike,
    transform: Transform = DEFAULT,
    buckets: Buckets = POWERS_OF_TWO,
    cache: str | Kind = "full",
) -> Decoder:
    """The functions that decode with a model.

    Args:
        model: From `gx.load`, or (params, config).
        transform: The transform of the logits.
        buckets: The sizes for which programs are compiled.
        cache: The kind of the cache; see `generate`.

    Raises:
        TypeError: `transform` is no transform, such as a list of several, of which `transforms.chain` makes one.
        ValueError: The model cannot have such a cache.
    """
    check_transform(transform)
    _, config, _ = unpack_model(model)
    return Decoder(config, transform, buckets, kind_for(cache, config))
