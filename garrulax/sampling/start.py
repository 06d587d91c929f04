"""The beginning of decoding: a state with a row for each request."""

import numpy as np

from garrulax.sampling.buckets import Buckets, slots_for
from garrulax.sampling.decoder import Decoder
from garrulax.sampling.requests import Weights, one_row
from garrulax.sampling.state import Requests, State


def size_of(requests: Requests, buckets: Buckets, more: int = 0) -> int:
    """The bucket of the greatest number of tokens that a row of these requests may get, and `more`."""
    longest = int(np.max(np.asarray(requests.length) + np.asarray(requests.limit)))
    return buckets.of("size", max(longest + more, requests.context.shape[1]))


def start(decoder: Decoder, weights: Weights, requests: Requests, size: int) -> State:
    """Reads each prompt by itself, and puts it into its row of a new state.

    Args:
        decoder: The functions of the model.
        weights: Its parameters.
        requests: Of all prompts, as NumPy arrays; request i gets row i.
        size: From `size_of`.

    Returns:
        The state before the first new token.
    """
    each, rows, slots = _rows(decoder, requests, size)
    like = decoder.compile_ahead(weights, each[0], rows, slots, size)
    state = decoder.empty(weights.step, like, rows, slots)
    for i, one in enumerate(each):
        state = decoder.insert(state, decoder.prefill(weights.prefill, one, size), i)
    return state


def compile_start(decoder: Decoder, weights: Weights, requests: Requests, size: int) -> None:
    """Begins to compile what `start` and the first steps need. Arguments as there; the weights may be abstract."""
    each, rows, slots = _rows(decoder, requests, size)
    decoder.compile_ahead(weights, each[0], rows, slots, size)


def _rows(decoder: Decoder, requests: Requests, size: int) -> tuple[list[Requests], int, int]:
    """The requests one by one, and the numbers of rows and slots of their state."""
    count, width = requests.context.shape
    each = [one_row(requests, i, decoder.buckets) for i in range(count)]
    return each, decoder.buckets.of("rows", count), slots_for(max(width, 2), size)
