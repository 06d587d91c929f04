"""From the tokens on the device to text: driving the loop, cutting at stop strings, streaming."""

import dataclasses
from collections.abc import Generator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from garrulax.core.spec import Tree
from garrulax.sampling.loop import run
from garrulax.sampling.state import State
from garrulax.sampling.transforms import Transform

T = TypeVar("T")
Steps = Generator[list[str], None, T]  # yields each row's new text, returns what came of it


@dataclasses.dataclass(frozen=True)
class Completion:
    """What was written after a prompt, or into a blank.

    tokens: the new ids, with the one that ended the text, if one did. text: what they stand for, without a stop
    string and what follows it; None where the model has no tokenizer. logprobs: log-probability of each token in the
    model's own distribution (before temperature, top-k and top-p; natural logarithm, float32).
    finish_reason: "eos" (a token that ends texts), "stop" (a stop string) or "length" (max_new_tokens).
    """

    tokens: list[int]
    text: str | None
    logprobs: list[float]
    finish_reason: str

    def __str__(self) -> str:
        return str(self.tokens) if self.text is None else self.text


class Writer:
    """One row's tokens, and its text up to the first stop string.

    Text that may be the beginning of a stop string, and bytes that are not yet a character, are held back until it is
    known: what `push` returned is final, and all of it together is `shown`.
    """

    def __init__(
        self, tokenizer: Any, limit: int, ends: Sequence[int], stop: Sequence[str] = (), *, spaced: bool = False
    ):
        """limit: the greatest number of tokens; a row with 0 is finished. ends: tokens that end the text. stop: strings
        that do. spaced: show a space in front of a text that begins without one."""
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.reason: str | None = None if limit else "length"
        self.shown = ""
        self._vocab = 0 if tokenizer is None else tokenizer.vocab
        self._decoder = None if tokenizer is None else tokenizer.stream(start=False)
        self._limit, self._ends, self._stop, self._spaced = limit, ends, stop, spaced
        self._text: list[str] = []
        self._held = ""

    def push(self, tokens: Sequence[int], logprobs: Sequence[float]) -> str:
        """Takes further tokens; returns the text that is now certain. Tokens after the end are ignored."""
        pieces = []
        for token, logprob in zip(tokens, logprobs, strict=True):
            if self.reason is not None:
                break
            self.tokens.append(token)
            self.logprobs.append(logprob)
            if token in self._ends:
                self.reason = "eos"
            elif len(self.tokens) == self._limit:
                self.reason = "length"
            if self._decoder is not None:
                pieces.append(self._read(token, self._decoder))
        piece = "".join(pieces)
        self._text.append(piece)
        if piece and self._spaced and not self.shown and not piece[0].isspace():
            piece = f" {piece}"
        self.shown += piece
        return piece

    def _read(self, token: int, decoder: Any) -> str:
        if token < self._vocab and self.reason != "eos":  # beyond it are rows that only pad the embedding
            self._held += decoder.push([token])
        if self.reason is not None:
            self._held += decoder.flush()
        found = [at for at in map(self._held.find, self._stop) if at >= 0]
        if found:
            self.reason = "stop"
        size = min(found) if found else len(self._held) if self.reason else self._certain()
        piece, self._held = self._held[:size], self._held[size:]
        return piece

    def _certain(self) -> int:
        """Length of the held text without its longest ending that begins a stop string."""
        for size in range(max(map(len, self._stop), default=1) - 1, 0, -1):
            if size <= len(self._held) and any(s.startswith(self._held[-size:]) for s in self._stop):
                return len(self._held) - size
        return len(self._held)

    def completion(self) -> Completion:
        """What was written; the row must be finished."""
        if self.reason is None:
            raise ValueError("the row is not finished")
        return Completion(
            self.tokens, None if self._decoder is None else "".join(self._text), self.logprobs, self.reason
        )


def drive(
    params: Tree, state: State, writers: Sequence[Writer], every: int, config: Any, transform: Transform
) -> Steps[State]:
    """Decodes until every writer is finished; yields every `every` steps the new text of each row.

    writers: of the first rows of the state. Returns the last state; the one given is donated.
    Raises FloatingPointError where the model's logits are not finite.
    """
    while True:
        state = run(params, state, np.int32(every), config, transform)
        tokens, logprobs, made = jax.device_get((state.tokens, state.logprobs, state.made))
        pieces = []
        for row, writer in enumerate(writers):
            new = slice(len(writer.tokens), made[row])
            if not np.isfinite(logprobs[row, new]).all():
                raise FloatingPointError("the model's logits are not finite: are its parameters?")
            pieces.append(writer.push(tokens[row, new].tolist(), logprobs[row, new].tolist()))
        yield pieces
        if all(writer.reason for writer in writers):
            return state
        if any(writer.reason == "stop" for writer in writers):
            rest = [True] * (len(made) - len(writers))
            state = dataclasses.replace(state, done=jnp.array([writer.reason is not None for writer in writers] + rest))


def first(steps: Steps[list[T]]) -> Generator[str, None, T]:
    """The text of the first row, and what came of it; empty pieces are left out."""
    while True:
        try:
            pieces = next(steps)
        except StopIteration as end:
            return end.value[0]
        if pieces[0]:
            yield pieces[0]


def exhaust(steps: Steps[T]) -> T:
    """What a generator returns when all that it yields is ignored."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def stop_strings(stop: Any, tokenizer: Any) -> tuple[str, ...]:
    """The stop strings as a tuple. ValueError for an empty one, something else, or where there is no tokenizer."""
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if any(not isinstance(s, str) or not s for s in stop):
        raise ValueError(f"stop must be a text or several, none of them empty, not {stop!r}")
    if stop and tokenizer is None:
        raise ValueError("stop strings need a tokenizer, which the model does not have")
    return stop
