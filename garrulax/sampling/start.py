"""The beginning of decoding: a state with a row for each request."""

import jax
import numpy as np

from garrulax.layers.cache import Cache
from garrulax.sampling.buckets import Buckets, bucket, slots_for
from garrulax.sampling.decoder import Decoder
from garrulax.sampling.requests import Weights, of_one_context
from garrulax.sampling.state import Requests, State


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
    """Reads each prompt by itself, and puts it into its row of a new state.

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
    groups, rows, slots = _groups(decoder, weights, requests, size)
    slots += 0 if past is None else past.size - requests.context.shape[1]
    first = weights._replace(prefill=weights.of(groups[0][1][0]))
    like = decoder.compile_ahead(first, groups[0][0], rows, slots, size, past, steps)
    state = decoder.empty(weights.step, like, rows, slots, constrained)
    for one, places in groups:
        state = decoder.insert(state, decoder.prefill(weights.of(places[0]), one, size, past), places)
    return state


def compile_start(decoder: Decoder, weights: Weights, requests: Requests, size: int, steps: bool = True) -> State:
    """Begins to compile what `start` and the first steps need. Arguments as there; the weights may be abstract.

    Returns:
        The abstract result of `start`.
    """
    groups, rows, slots = _groups(decoder, weights, requests, size)
    prefix = decoder.compile_ahead(weights, groups[0][0], rows, slots, size, steps=steps)
    state: State = jax.eval_shape(lambda: decoder.empty(weights.step, prefix, rows, slots))
    return state


def _groups(
    decoder: Decoder, weights: Weights, requests: Requests, size: int
) -> tuple[list[tuple[Requests, np.ndarray]], int, int]:
    """The requests with one context and one adapter together, and the numbers of rows and slots of their state.

    Returns:
        For each group its requests, of one context, and their rows. The number of requests is rounded up to a power of
        two by repeating the first.
    """
    count, width = requests.context.shape
    groups: dict[tuple[bytes, int], list[int]] = {}
    for i in range(count):
        parts = (requests.context, requests.segment, requests.rank, requests.positions)
        # What is planned for rotary positions depends on the limit.
        key = b"".join(np.asarray(x[i]).tobytes() for x in (*parts, requests.limit)), id(weights.of(i))
        groups.setdefault(key, []).append(i)
    padded = (rows + rows[:1] * (bucket(len(rows)) - len(rows)) for rows in groups.values())
    each = [(of_one_context(requests, rows, decoder.buckets), np.array(rows, np.int32)) for rows in padded]
    return each, decoder.buckets.of("rows", count), slots_for(max(width, 2), size)
