"""From tokens on the device to text: the loop on the host, stop strings, streaming."""

import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from garrulax.core.spec import Tree
from garrulax.models.unpack import DecoderLike, TokenizerLike
from garrulax.sampling.buckets import bucket, slots_for
from garrulax.sampling.decoder import Decoder
from garrulax.sampling.ends import StopStrings
from garrulax.sampling.state import State, grow

T = TypeVar("T")
Pieces = Generator[list[str], None, T]  # yields the new text of each row, returns a T


@dataclasses.dataclass(frozen=True)
class Completion:
    """The tokens that a model wrote after a prompt or into a blank.

    Attributes:
        tokens: Ids of the new tokens, with the token that ended the text if there is one.
        text: Their text, without the stop string and the text after it; None if the model has no tokenizer.
        logprobs: log-probability of each token in the model's own distribution (before temperature, top-k and top-p;
            natural logarithm, float32).
        finish_reason: "eos" (a token that ends texts), "stop" (a stop string) or "length" (max_new_tokens).
        score: What a search ranks it by (`sampling.search`); None without a search.
        passes: Number of passes of the model that gave these tokens, with `speculate`; None without it. Each gives one
            token, and as many more as drafts were accepted; but those that the device had made before a stop string was
            found count too.

    Example:
        >>> import jax, garrulax as gx
        >>> config = gx.preset("gpt2-tiny", layers=1, width=32, heads=2, vocab=257, eos=None)
        >>> completion = gx.generate((gx.init(config, jax.random.key(0)), config), [5, 17, 3], max_new_tokens=2)
        >>> isinstance(completion, gx.Completion), len(completion.tokens), len(completion.logprobs)
        (True, 2, 2)
    """

    tokens: list[int]
    text: str | None
    logprobs: list[float]
    finish_reason: str
    score: float | None = None
    passes: int | None = None

    def __str__(self) -> str:
        return str(self.tokens) if self.text is None else self.text


class Writer:
    """Collects the tokens of one row, and its text up to the first stop string.

    Text that may be the beginning of a stop string, and bytes that are not yet a character, are withheld until this is
    decided: the text that `push` returns is final.

    Attributes:
        tokens: Ids so far.
        logprobs: Their log-probabilities.
        reason: Why the row is finished (`Completion.finish_reason`); None while it is not.
        streamed: Everything that `push` has returned.
        score: The score of the completion, if a search has found it.
    """

    def __init__(
        self,
        tokenizer: TokenizerLike | None,
        limit: int,
        end_tokens: Sequence[int],
        stop: StopStrings | Sequence[str] = (),
        *,
        space_before: bool = False,
    ):
        """Begins a row.

        Args:
            tokenizer: None for a row without text.
            limit: Greatest number of tokens; a row with 0 is finished.
            end_tokens: Ids that end the text.
            stop: Strings that end the text.
            space_before: Put a space in front of a streamed text that begins without one.
        """
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.reason: str | None = None if limit else "length"
        self.streamed = ""
        self.score: float | None = None
        self._decoder = None if tokenizer is None else tokenizer.stream(start=False)
        self._limit, self._end_tokens, self._space_before = limit, end_tokens, space_before
        self._stop = stop if isinstance(stop, StopStrings) else StopStrings(stop, tokenizer)
        self._pieces: list[str] = []
        self._withheld = ""

    def push(self, tokens: Sequence[int], logprobs: Sequence[float]) -> str:
        """Adds tokens and returns the text that is now final. Ignores tokens after the end of the row."""
        pieces = []
        for token, logprob in zip(tokens, logprobs, strict=True):
            if self.reason is not None:
                break
            self.tokens.append(token)
            self.logprobs.append(logprob)
            if token in self._end_tokens:
                self.reason = "eos"
            elif len(self.tokens) == self._limit:
                self.reason = "length"
            if self._decoder is not None:
                pieces.append(self._decode(token, self._decoder))
        piece = "".join(pieces)
        self._pieces.append(piece)
        if piece and self._space_before and not self.streamed and not piece[0].isspace():
            piece = f" {piece}"
        self.streamed += piece
        return piece

    def _decode(self, token: int, decoder: DecoderLike) -> str:
        if self.reason != "eos":
            self._withheld += decoder.push([token]) + self._stop.mark(token)
        if self.reason is not None:
            self._withheld += decoder.flush()
        size = self._stop.find(self._withheld)
        if size is not None:
            self.reason = "stop"
        elif self.reason is not None:
            size = len(self._withheld)
        else:
            size = self._stop.final_size(self._withheld)
        piece, self._withheld = self._withheld[:size], self._withheld[size:]
        return self._stop.visible(piece)

    def completion(self) -> Completion:
        """Returns the completion of a finished row; ValueError for an unfinished one."""
        if self.reason is None:
            raise ValueError("the row is not finished")
        text = None if self._decoder is None else "".join(self._pieces)
        return Completion(self.tokens, text, self.logprobs, self.reason, self.score)


def decode_pieces(
    decoder: Decoder, params: Tree, state: State, writers: Mapping[int, Writer], every: int, size: int
) -> Pieces[State]:
    """Decodes until every writer is finished, and yields the new text of each writer every `every` steps.

    Args:
        decoder: The functions of the model.
        params: In the form of the state's cache.
        state: With a request in the row of each writer. It is donated.
        writers: Row -> its writer. Other rows are left to themselves.
        every: Number of steps between two pieces.
        size: Greatest number of tokens that a row may have.

    Returns:
        A generator, which returns the last state.

    Raises:
        FloatingPointError: The logits are not finite.
        ValueError: No token may be sampled.
    """
    step = stepper(decoder, params, every, size)
    while True:
        state = step(state)
        yield push_new_tokens(state, writers)
        if all(writer.reason for writer in writers.values()):
            return state
        state = end_stopped(state, writers)


def stepper(decoder: Decoder, params: Tree, every: int, size: int) -> Callable[[State], State]:
    """A function that takes `every` steps, and first makes the cache longer where a row has no free slot.

    Args:
        decoder: The functions of the model.
        params: In the form of the state's cache.
        every: Number of steps.
        size: Greatest number of tokens that a row may have.
    """
    programs: dict[int, Callable[[Tree, State, Any], State]] = {}  # by number of slots

    def step(state: State) -> State:
        state = with_free_slots(state, 1, size)
        if state.cache.size not in programs:
            programs[state.cache.size] = decoder.program(params, state)
        # The state has the last tokens only: as many as it has columns.
        return programs[state.cache.size](params, state, np.int32(min(every, state.tokens.shape[1])))

    return step


def push_new_tokens(state: State, writers: Mapping[int, Writer]) -> list[str]:
    """Gives each writer the tokens of its row that it does not have yet, and returns their new texts.

    Raises:
        FloatingPointError: The logits are not finite.
        ValueError: No token could be sampled.
    """
    tokens, logprobs, generated = jax.device_get((state.tokens, state.logprobs, state.generated))
    pieces = []
    for row, writer in writers.items():
        new = np.arange(len(writer.tokens), generated[row]) % tokens.shape[1]
        if np.isneginf(logprobs[row, new]).any():
            raise ValueError("the transforms and constraints leave no token that may be sampled: loosen them")
        if not np.isfinite(logprobs[row, new]).all():
            raise FloatingPointError("the model's logits are not finite: are its parameters?")
        pieces.append(writer.push(tokens[row, new].tolist(), logprobs[row, new].tolist()))
    return pieces


def end_stopped(state: State, writers: Mapping[int, Writer]) -> State:
    """The state in which rows that a stop string has ended are done; the device does not know of stop strings."""
    stopped = [row for row, writer in writers.items() if writer.reason == "stop"]
    if not stopped:
        return state
    done = np.zeros(len(state.done), bool)
    done[stopped] = True
    return dataclasses.replace(state, done=state.done | done)


def with_free_slots(state: State, count: int, size: int) -> State:
    """The state with at least `count` free slots in each row, unless a row has `size` slots already.

    Beyond `size` it grows only for slots that are written and never used: those of tokens that pad a pass. A ring has
    free slots always.
    """
    if state.cache.kind.ring:
        return state
    if count == 1 and state.cache.size >= size:  # the usual case; `used` would have to be read from the device
        return state
    needed = int(state.cache.used.max()) + count
    if needed <= state.cache.size:
        return state
    return grow(state, slots_for(needed, size) if needed <= size else size + bucket(count, least=64))


def first_row(pieces: Pieces[list[T]]) -> Generator[str, None, T]:
    """Yields the text of the first row, without empty pieces; returns the result of the first row."""
    while True:
        try:
            new_texts = next(pieces)
        except StopIteration as end:
            return end.value[0]
        if new_texts[0]:
            yield new_texts[0]


def exhaust(pieces: Pieces[T]) -> T:
    """Runs a generator to its end and returns its return value."""
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return end.value
