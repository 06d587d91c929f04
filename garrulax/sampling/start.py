"""The beginning of decoding: a state with a row for each request."""

import dataclasses
import functools
import math
import threading
from typing import Any

import jax
import numpy as np

from garrulax.core.spec import Tree
from garrulax.kernels.mask import PAD
from garrulax.layers.cache import Cache, on_host
from garrulax.sampling import ahead
from garrulax.sampling.buckets import Buckets, bucket, slots_for
from garrulax.sampling.decoder import Decoder
from garrulax.sampling.requests import Weights, of_one_context
from garrulax.sampling.state import Requests, State

#: No step on zeros is taken for more slots than this: its state would need as much memory as that of the prompt.
MOST_SLOTS_ON_ZEROS = 1024
_begun = threading.Event()  # the first step with parameters is on its way: one on zeros would only take time from it


def size_of(requests: Requests, buckets: Buckets, more: int = 0) -> int:
    """The bucket of the greatest number of tokens that a row of these requests may get, and `more`."""
    longest = int(np.max(np.asarray(requests.length) + np.asarray(requests.limit)))
    return buckets.of("size", max(longest + more, requests.context.shape[1]))


def start(
    decoder: Decoder,
    weights: Weights,
    requests: Requests,
    size: int,
    constrained: bool = False,
    steps: bool = True,
    past: Cache | None = None,
) -> State:
    """Reads each prompt by itself, on a mesh all prompts together, and puts them into the rows of a new state.

    Args:
        decoder: The functions of the model.
        weights: Its parameters.
        requests: Of all prompts, as NumPy arrays; request i gets row i.
        size: From `size_of`.
        constrained: Whether the state has `allowed`.
        steps: Whether `Decoder.step` will be called, and is compiled meanwhile.
        past: A cache of one row with what stands before every prompt, and room for the longest.

    Returns:
        The state before the first new token.
    """
    _begun.set()
    groups, rows, slots = _groups(decoder, weights, requests, size)
    slots += 0 if past is None else past.size - requests.context.shape[1]
    first = weights._replace(prefill=weights.of(0))
    like = decoder.compile_ahead(first, groups[0][0], rows, slots, size, past, steps)
    state = decoder.empty(weights.step, like, rows, slots, constrained)
    for one, places in groups:
        params = weights.prefill if places is None else weights.of(places[0])
        state = decoder.insert(state, decoder.prefill(params, one, size, past), places)
    return state


def compile_start(decoder: Decoder, weights: Weights, requests: Requests, size: int, steps: bool = True) -> State:
    """Begins to compile what `start` and the first steps need. Arguments as there; the weights may be abstract.

    Returns:
        The abstract result of `start`.
    """
    groups, rows, slots = _groups(decoder, weights, requests, size)
    prefix = decoder.compile_ahead(weights, groups[0][0], rows, slots, size, steps=steps)
    state: State = jax.eval_shape(lambda: decoder.empty(weights.step, prefix, rows, slots))
    if steps and jax.default_backend() == "cpu" and slots <= MOST_SLOTS_ON_ZEROS:
        _begun.clear()
        ahead.call_ahead(functools.partial(_step_on_zeros, decoder, weights.step, prefix, groups[0][1], rows, slots))
    return state


def _step_on_zeros(
    decoder: Decoder, params: Tree, prefix: State, places: np.ndarray | None, rows: int, slots: int
) -> None:
    """Takes the first step with zeros for the parameters and for what was read.

    XLA:CPU makes the kernels of a program's products when they run first, which takes ten times as long as a step of a
    small model, and the programs of `empty` and `insert` are compiled in their first call.
    """
    params, prefix = _zeros((params, prefix))
    state = decoder.insert(decoder.empty(params, prefix, rows, slots), prefix, places)
    state = dataclasses.replace(state, done=jax.numpy.asarray(np.zeros(rows, bool)))  # or no step would be taken
    step = decoder.program(params, state)  # waits until it is compiled
    if not _begun.is_set():
        jax.block_until_ready(step(params, state, np.int32(1)).token)


def _zeros(tree: Any) -> Any:
    """Arrays of zeros on a CPU for abstract ones, all in the same memory, which the system does not allocate."""
    sizes = [math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree)]
    memory = np.zeros(max(sizes) + 64, np.uint8)
    memory = memory[-memory.ctypes.data % 64 :]  # aligned so that XLA uses it without a copy

    def zeros(x: jax.ShapeDtypeStruct, is_on_host: bool) -> jax.Array:
        part = memory[: math.prod(x.shape) * x.dtype.itemsize].view(x.dtype).reshape(x.shape)
        return jax.device_put(part, jax.memory.Space.Host if is_on_host else None, may_alias=True)

    return jax.tree.map(zeros, tree, on_host(tree))


def _groups(
    decoder: Decoder, weights: Weights, requests: Requests, size: int
) -> tuple[list[tuple[Requests, np.ndarray | None]], int, int]:
    """The requests that are read together, and the numbers of rows and slots of their state.

    On one device those with one context and one adapter are read together: the result for a request then does not
    depend on the others, to the last bit. On a mesh all are, so that its devices share the rows.

    Returns:
        For each group its requests, and their rows: None for all rows of the state. The number of requests in a group
        of one context is rounded up to a power of two by repeating the first.
    """
    count, width = requests.context.shape
    rows, slots = decoder.buckets.of("rows", count), slots_for(max(width, 2), size)
    groups: dict[tuple[bytes, int], list[int]] = {}
    for i in range(count):
        parts = (requests.context, requests.segment, requests.rank, requests.positions)
        # What is planned for rotary positions depends on the limit.
        key = b"".join(np.asarray(x[i]).tobytes() for x in (*parts, requests.limit)), id(weights.of(i))
        groups.setdefault(key, []).append(i)
    if len(groups) > 1 and weights.mesh is not None:
        return [(_filled_up(requests, rows), None)], rows, slots
    padded = (members + members[:1] * (bucket(len(members)) - len(members)) for members in groups.values())
    each: list[tuple[Requests, np.ndarray | None]] = [
        (of_one_context(requests, one, decoder.buckets), np.array(one, np.int32)) for one in padded
    ]
    return each, rows, slots


def _filled_up(requests: Requests, rows: int) -> Requests:
    """The requests and, up to a number of rows, others with empty contexts that get no tokens."""
    count = len(requests.limit)
    chosen = np.minimum(np.arange(rows), count - 1)  # the knobs are those of the last request
    more: Requests = jax.tree.map(lambda x: np.asarray(x)[chosen], requests)
    there = np.arange(rows) < count
    segment: Any = np.where(there[:, None], more.segment, PAD)
    limit: Any = np.where(there, more.limit, 0)
    return dataclasses.replace(more, segment=segment, limit=limit)
