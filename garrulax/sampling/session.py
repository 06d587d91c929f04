"""`Session`: a conversation with a model, of which each turn reads only what is new."""

import dataclasses
import functools
import itertools
from collections.abc import Generator, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from garrulax import models
from garrulax.core import half
from garrulax.core.auto_mesh import each_using
from garrulax.core.config import ModelConfig
from garrulax.kernels.mask import PAD
from garrulax.layers.cache import Cache
from garrulax.layers.cache_kinds import Kind
from garrulax.layers.rope import same_angles
from garrulax.models.unpack import ModelLike
from garrulax.sampling.buckets import POWERS_OF_TWO, slots_for
from garrulax.sampling.cache_rows import grow_cache
from garrulax.sampling.caches import choose_kind, kind_for
from garrulax.sampling.generate import Plan, make_plan
from garrulax.sampling.requests import Prompt, after, check_every, prepare_model, prompt_list
from garrulax.sampling.state import Requests, State, extract
from garrulax.sampling.writing import Completion, Writer, push_new_tokens, stepper

LENGTHS = (16, 32, 64)  # new tokens of a turn for which `compile_ahead` compiles


class _Kept(NamedTuple):
    """The state of a session between two prompts: one object, so that an interruption cannot separate its parts.

    Attributes:
        cache: Keys and values of one row.
        planned: The length of the text for which the rotary angles of the keys were computed.
        ids: The tokens in the cache.
    """

    cache: Cache
    planned: int
    ids: list[int]


class Session:
    """A conversation: prompts that each begin like the one before them and its completion.

    The keys and values of what the model has read are kept. The next prompt is read from the first token on that
    differs. The completions are those of `stream` for the whole prompts, up to rounding.

    Some prompts are read as a whole: those whose tokens attend to later ones (the texts of GLM-130B and ChatGLM-6B),
    and with rotary positions that depend on the length of the text (dynamic NTK, longrope) those for which they differ.

    Attributes:
        reused: Number of tokens that the last prompt did not have to read again.

    Example:
        >>> import jax, garrulax as gx
        >>> config = gx.preset("gpt2-tiny", layers=1, width=32, heads=2, vocab=257, eos=None)
        >>> session = gx.sampling.Session((gx.init(config, jax.random.key(0)), config))
        >>> prompt = [5, 17, 3]
        >>> pieces = list(session.stream(prompt, max_new_tokens=4, temperature=0))
        >>> len(session.read)  # all but the last token, which no step has read yet
        6
        >>> pieces = list(session.stream([*session.read, 8, 9], max_new_tokens=4, temperature=0))
        >>> session.reused
        6
    """

    def __init__(self, model: ModelLike, cache: str | Kind = "full"):
        """Begins a conversation.

        Args:
            model: As for `generate`. Abstract parameters are enough for `compile_ahead`.
            cache: As for `generate`. With `gx.sinks` or `gx.blocks` a conversation may be longer than the context.

        Raises:
            ValueError: The model cannot have such a cache.
        """
        self._model = model
        self._prepared = prepare_model(model)
        # The greatest size from the start: with a size that grows, programs would be compiled again.
        self._size = POWERS_OF_TWO.of("size", self._config.max_length)
        mesh = self._prepared[0].mesh
        full_only = None if mesh is None else "parameters on several devices"
        self._kind = choose_kind(kind_for(cache, self._config), self._config, self._size, full_only)
        self._begun: set[Hashable] = set()  # programs that were compiled ahead
        self.forget()

    def forget(self) -> None:
        """Frees what is kept: the next prompt is read as a whole."""
        self.reused = 0
        self._kept: _Kept | None = None

    @property
    def read(self) -> list[int]:
        """Ids of the tokens whose keys and values are kept."""
        return [] if self._kept is None else list(self._kept.ids)

    def stream(
        self, prompt: Prompt, *, max_new_tokens: int | None = None, every: int = 4, **arguments: Any
    ) -> Generator[str, None, Completion]:
        """Continues the conversation piece by piece, like `garrulax.stream` of the whole prompt.

        A generator that is closed before its end, or interrupted, leaves the session as far as it has come.

        Args:
            prompt: The whole conversation so far: token ids, or a text.
            max_new_tokens: See `stream`.
            every: Number of tokens between two pieces.
            **arguments: Further arguments of `stream`, but for guidance, constraints, speculation and `cache`.

        Returns:
            A generator of pieces, whose return value is the Completion.

        Raises:
            ValueError: See `stream`; raised by the call itself.
            FloatingPointError: The logits are not finite; raised by the generator.
        """
        prompts, single = prompt_list(prompt)
        if not single:
            raise ValueError(f"a session takes one prompt, not {len(prompts)}: generate takes several")
        check_every(every)
        if "cache" in arguments:
            raise ValueError("a session has one cache from its beginning: give it to Session, not to stream")
        for name in ("constrain", "speculate", "search"):
            if arguments.get(name) is not None:
                raise ValueError(f"a session takes no {name}: give it to generate")
        plan = self._plan(prompts, max_new_tokens, every=every, **arguments)
        if len(plan.requests.limit) > 1:
            raise ValueError("a session takes no guidance_scale: give it to generate or stream")
        return each_using(plan.weights.mesh, self._run(plan))

    def compile_ahead(self, lengths: Sequence[int] = LENGTHS, read: int | None = None, **arguments: Any) -> None:
        """Begins, in other threads, to compile the programs for prompts with some new tokens; with a mesh, none.

        Args:
            lengths: Numbers of new tokens.
            read: Number of tokens that will have been read before them; None is as many as now.
            **arguments: Those of `stream`; the programs do not depend on the values of sampling parameters.
        """
        if self._prepared[0].mesh is not None:
            return
        least = 0 if self._kept is None else self._kept.cache.size
        read = len(self.read) if read is None else read
        arguments = {**arguments, "max_new_tokens": 1, "every": 1}
        for length in lengths:
            if self._kind.room is None and read + length + 2 > self._config.max_length:
                return
            plan = self._plan([[0] * (length + 1)], **arguments)
            one = self._rest(plan, 0)
            slots = max(least, self._slots(read + one.context.shape[1], plan))
            self._compile(plan, one, jax.eval_shape(functools.partial(self._empty_cache, slots)))

    @property
    def _config(self) -> ModelConfig:
        return self._prepared[1]

    def _plan(self, prompts: list[Prompt], max_new_tokens: int | None, **arguments: Any) -> Plan:
        return make_plan(self._model, prompts, max_new_tokens, prepared=self._prepared, cache=self._kind, **arguments)

    def _run(self, plan: Plan) -> Generator[str, None, Completion]:
        weights, size = self._prepared[0], self._size_of(plan)
        causal = _is_causal(plan.requests)
        ids = _ids(plan.requests)
        state = self._begin(plan, ids, causal)
        (writer,) = plan.writers.values()
        step = stepper(plan.decoder, weights.step, plan.every, size)
        try:
            while True:
                state = step(state)
                (piece,) = push_new_tokens(state, plan.writers)
                if piece:
                    yield piece
                if writer.reason:
                    return writer.completion()
        finally:
            # A step that was interrupted may have taken the state with it: then the prompt stays.
            if causal and not state.token.is_deleted():
                self._keep(state, ids, writer)

    def _begin(self, plan: Plan, ids: list[int], causal: bool) -> State:
        """Reads what is new of the prompt, keeps that, and returns the state before the first new token."""
        weights, size, decoder = self._prepared[0], self._size_of(plan), plan.decoder
        planned = len(ids) + int(plan.requests.limit[0])
        known = _common(self.read, ids[:-1]) if causal and self._same_angles(planned) else 0
        width = decoder.buckets.of("prompt", max(1, len(ids) - 1 - known))
        slots = self._slots(max(known + width, len(ids)), plan)
        if not self._kind.ring:
            known = min(known, slots - width)  # where padding does not fit behind it, less is reused
        known = self._kind.reusable(known, len(self.read))
        past = self._past_with(known, slots)
        one = self._rest(plan, known)
        self._compile(plan, one, past)
        prefix = decoder.prefill(weights.prefill, one, size, past)
        self.reused = known
        self._kept = _Kept(prefix.cache, planned, ids[:-1]) if causal else None
        state = decoder.empty(weights.step, prefix, self._rows(plan), past.size)
        return decoder.insert(state, prefix, 0)

    def _keep(self, state: State, ids: list[int], writer: Writer) -> None:
        """Keeps what the row of a state has read after the prompt."""
        stacked = not isinstance(self._prepared[0].prefill["blocks"], tuple)
        fetched = (state.cache.used, state.generated, state.limit, state.tokens)
        used, generated, limit, tokens = jax.device_get(fetched)
        last = tokens[0, np.arange(len(writer.tokens), generated[0]) % tokens.shape[1]]
        read = [*ids, *writer.tokens, *last.tolist()][: used[0]]
        planned = len(ids) + int(limit[0])
        self._kept = _Kept(extract(state, 0, stacked), planned, read)

    def _past_with(self, known: int, slots: int) -> Cache:
        """The cache of the first `known` tokens, with at least `slots` slots."""
        if self._kept is None or known == 0:
            return self._empty_cache(slots)
        past = self._kept.cache
        if past.size < slots:
            past = grow_cache(past, slots)
        return dataclasses.replace(past, used=jnp.full_like(past.used, known))

    def _empty_cache(self, slots: int) -> Cache:
        params = jax.eval_shape(half.from_bits, self._prepared[0].prefill)
        return models.cache_for(params, self._config, 1, slots, kind=self._kind)

    def _same_angles(self, planned: int) -> bool:
        rope, most = getattr(self._config, "rope", None), self._kind.room or planned
        return (
            rope is None or self._kept is None or same_angles(rope, min(self._kept.planned, most), min(planned, most))
        )

    def _slots(self, needed: int, plan: Plan) -> int:
        return self._kind.slots(slots_for(needed, self._size_of(plan)))

    def _rest(self, plan: Plan, known: int) -> Requests:
        size = self._size_of(plan)
        requests = plan.requests
        if plan.size > size:  # of an endless text, transforms see the end
            text: Any = np.asarray(requests.prompt)
            text = text[:, : int((text != PAD).sum())][:, -size:]
            requests = dataclasses.replace(requests, prompt=text)
        return after(requests, 0, known, size + 1, plan.decoder.buckets)

    def _compile(self, plan: Plan, one: Requests, past: Cache) -> None:
        key = plan.decoder, one.context.shape, past.size
        if key in self._begun:
            return
        self._begun.add(key)
        weights = self._prepared[0]
        plan.decoder.compile_ahead(weights, one, self._rows(plan), past.size, self._size_of(plan), past)

    def _rows(self, plan: Plan) -> int:
        return plan.decoder.buckets.of("rows", 1)

    def _size_of(self, plan: Plan) -> int:
        # A ring has its size, however long the text becomes.
        return self._size if self._kind.ring and self._kind.room else max(self._size, plan.size)


def _ids(requests: Requests) -> list[int]:
    """The ids of the only row."""
    context = np.asarray(requests.context)[0]
    return [*context[np.asarray(requests.segment)[0] != PAD].tolist(), int(requests.token[0])]


def _is_causal(requests: Requests) -> bool:
    """Whether each token of the only row attends to those before it, at the positions 0, 1, 2, ..."""
    size = int((np.asarray(requests.segment)[0] != PAD).sum())
    streams = [np.asarray(requests.rank)[0], *np.asarray(requests.positions)[0].reshape(-1, requests.rank.shape[1])]
    wanted = [np.arange(size), np.arange(size), np.zeros(size)]
    return all(np.array_equal(x[:size], y) for x, y in zip(streams, wanted, strict=False))


def _common(one: list[int], other: list[int]) -> int:
    """Length of the longest common prefix."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
