"""Beam search on the host: from requests to completions."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from garrulax.models.unpack import TokenizerLike
from garrulax.sampling.buckets import LEAST_SLOTS, bucket
from garrulax.sampling.constrain import Matcher
from garrulax.sampling.decoder import Decoder
from garrulax.sampling.ends import StopStrings
from garrulax.sampling.requests import Weights
from garrulax.sampling.search.beams import Beams, begin, grow, search_steps
from garrulax.sampling.search.constrained import Following
from garrulax.sampling.search.contrasting import STOP_CHECK_STEPS, contrast, start_contrast
from garrulax.sampling.search.kinds import BeamSearch, ContrastiveSearch
from garrulax.sampling.search.selecting import Sequences
from garrulax.sampling.start import size_of, start
from garrulax.sampling.state import Requests, State
from garrulax.sampling.writing import Completion, Writer

ALL_STEPS = np.int32(2**30)
ONE_ROW = tuple(1 << i for i in range(20))  # several beams are several tokens of one row, which may be alone


def start_beams(search: BeamSearch, decoder: Decoder, weights: Weights, requests: Requests, more: int = 0) -> State:
    """The state with a row for each prompt, before its first new token; arguments as in `start.start`."""
    if search.beams > 1:
        decoder = dataclasses.replace(decoder, buckets=dataclasses.replace(decoder.buckets, rows=ONE_ROW))
    return start(decoder, weights, requests, size_of(requests, decoder.buckets, more), steps=False)


def finish(
    search: BeamSearch,
    decoder: Decoder,
    weights: Weights,
    state: State,
    matchers: Mapping[int, Matcher] | None = None,
) -> Beams:
    """Searches until all prompts are done.

    Args:
        search: The search.
        decoder: The functions of the model.
        weights: Its parameters.
        state: With a row for each prompt, before its first new token.
        matchers: Row -> what follows the constraint of its prompt.

    Returns:
        The last state of the search.

    Raises:
        FloatingPointError: The logits are not finite.
    """
    limit, used = jax.device_get((state.limit, state.cache.used))
    beams = begin(state, search, bucket(int(limit.max()), 16))
    most = slots_between(int((used + search.beams * limit).max()))
    numbers = np.float32(search.length_penalty), np.float32(search.penalty)
    # These numbers are arrays of the program, so that other values of them compile nothing.
    static = dataclasses.replace(search, length_penalty=1.0, penalty=0.0, returned=1)
    following = Following(matchers, beams, decoder.config.vocab) if matchers else None
    while True:
        if int(beams.cache.used.max()) + search.beams > beams.cache.size:
            needed = beams.cache.size + search.beams
            beams = grow(beams, max(needed, min(most, 4 * beams.cache.size)))
        if following is not None:
            beams = following.step(weights.step, beams, *numbers, decoder.config, decoder.transform, static)
        else:
            beams = search_steps(weights.step, beams, ALL_STEPS, *numbers, decoder.config, decoder.transform, static)
        if np.isnan(jax.device_get(beams.running.score)).any():
            raise FloatingPointError("the model's logits are not finite: are its parameters?")
        if bool(beams.done.all()):
            return beams


def slots_between(needed: int) -> int:
    """Rounds up to a power of two, or to one and a half of it: XLA:CPU reads all slots in every step."""
    slots = bucket(needed, LEAST_SLOTS)
    return slots * 3 // 4 if needed <= slots * 3 // 4 and slots > LEAST_SLOTS else slots


def best_writers(
    beams: Beams,
    rows: Sequence[int],
    limits: Sequence[int],
    ends: Sequence[int],
    tokenizer: TokenizerLike | None,
    space_before: Sequence[bool] | None = None,
) -> list[list[Writer]]:
    """The finished sequences of some prompts, best first.

    Args:
        beams: When all prompts are done.
        rows: The row of each prompt.
        limits: Greatest number of new tokens of each.
        ends: Tokens that end a sequence.
        tokenizer: None for sequences without text.
        space_before: See `Writer`, one for each prompt.

    Raises:
        ValueError: A prompt for which the transform allows no sequence.
    """
    finished: Sequences = jax.device_get(beams.finished)
    found = []
    for i, (row, limit) in enumerate(zip(rows, limits, strict=True)):
        # Of all groups; [K', ...]
        one = jax.tree.map(lambda x, row=row: x[row].reshape(-1, *x.shape[3:]), finished)
        order = [j for j in np.argsort(-one.score, kind="stable") if one.score[j] > -np.inf]
        if limit and not order:
            raise ValueError(f"the transform leaves no token for prompt {i}: no sequence has a probability above 0")
        writers = []
        for j in order:
            writer = Writer(tokenizer, limit, ends, space_before=bool(space_before and space_before[i]))
            length = one.length[j]
            writer.push(one.tokens[j, :length].tolist(), one.logprobs[j, :length].tolist())
            writer.score = float(one.score[j])
            writers.append(writer)
        found.append(writers)
    return found


def searched(
    search: BeamSearch | ContrastiveSearch,
    decoder: Decoder,
    weights: Weights,
    requests: Requests,
    rows: Sequence[int],
    limits: Sequence[int],
    ends: Sequence[int],
    tokenizer: TokenizerLike | None,
    stops: StopStrings,
    matchers: Mapping[int, Matcher],
) -> list[list[Completion]]:
    """The completions that a search returns for each prompt, best first.

    Args:
        search: Beam search or contrastive search.
        decoder: The functions of the model.
        weights: Its parameters.
        requests: Of all rows.
        rows: The row of each prompt.
        limits: Greatest number of new tokens of each prompt.
        ends: Tokens that end a text.
        tokenizer: None for completions without text.
        stops: Stop strings, for contrastive search.
        matchers: Row -> what follows the constraint of its prompt, for beam search.
    """
    if isinstance(search, ContrastiveSearch):
        writers = {row: Writer(tokenizer, limit, ends, stops) for row, limit in zip(rows, limits, strict=True)}
        state, hidden = start_contrast(search, decoder, weights, requests)
        every = STOP_CHECK_STEPS if stops else max(limits)
        contrast(search, decoder, weights, state, hidden, writers, every, size_of(requests, decoder.buckets, search.k))
        return [[writer.completion()] for writer in writers.values()]
    state = start_beams(search, decoder, weights, requests)
    found = best_writers(finish(search, decoder, weights, state, matchers), rows, limits, ends, tokenizer)
    return [[writer.completion() for writer in one[: search.returned]] for one in found]
