"""The beginning of decoding: a state with a row for each request."""

import collections
import dataclasses

import jax
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
    """Reads each prompt by itself, and puts it into its row of a new state. Requests that differ in their seeds only
    are read once.

    Args:
        decoder: The functions of the model.
        weights: Its parameters.
        requests: Of all prompts, as NumPy arrays; request i gets row i.
        size: From `size_of`.

    Returns:
        The state before the first new token.
    """
    count, width = requests.context.shape
    rows = decoder.buckets.of("rows", count)
    first = one_row(requests, 0, decoder.buckets)
    state = decoder.empty(weights.step, first, rows, size, slots_for(max(width, 2), size))
    ones = [one_row(requests, i, decoder.buckets) for i in range(count)]
    keys = [_all_but_seed(one) for one in ones]
    uses = collections.Counter(keys)
    read: dict[tuple, State] = {}
    for i, (one, key) in enumerate(zip(ones, keys, strict=True)):
        prefix = read.pop(key, None) or decoder.prefill(weights.prefill, one, size)
        state = decoder.insert(state, dataclasses.replace(prefix, seed=one.seed), i)
        uses[key] -= 1
        if uses[key]:
            read[key] = prefix
    return state


def _all_but_seed(one: Requests) -> tuple:
    """Equal for equal requests, whatever their seeds."""
    leaves = jax.tree.leaves(dataclasses.replace(one, seed=one.limit))
    return tuple((x.shape, np.asarray(x).tobytes()) for x in leaves)
