"""`fill`: a GLM writes every blank of a text, left to right, each seeing the text and the answers before it."""

import dataclasses
import functools
from collections.abc import Generator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from garrulax.core.blanks import Blanks
from garrulax.core.spec import Tree
from garrulax.kernels.mask import PAD, Mask
from garrulax.sampling.blanks import PartA, answer, blanks_of, part_a
from garrulax.sampling.requests import Prompt, Text, assemble, bucket, ends, listed, spread, unpack
from garrulax.sampling.state import State, init, read
from garrulax.sampling.transforms import STANDARD, Transform
from garrulax.sampling.writing import Completion, Steps, Writer, drive, exhaust, first, stop_strings


@dataclasses.dataclass(frozen=True)
class Filled:
    """A text with its blanks filled.

    tokens: ids of the whole, the answers in place of their masks, without the tokens that ended them.
    text: the whole; None where the model has no tokenizer. spans: the answers, in the order of the text.
    """

    tokens: list[int]
    text: str | None
    spans: list[Completion]

    def __str__(self) -> str:
        return str(self.tokens) if self.text is None else self.text


def fill(
    model: Any,
    texts: Prompt | Sequence[Prompt],
    *,
    max_new_tokens: int | Sequence[int] = 64,
    temperature: float | Sequence[float] = 1.0,
    top_k: int | Sequence[int] = 0,
    top_p: float | Sequence[float] = 1.0,
    seed: int | Sequence[int] = 0,
    stop: str | Sequence[str] = (),
    transform: Transform = STANDARD,
) -> Any:
    """Fills the blanks of texts. One `Filled` a text; for a text alone, its Filled.

    texts: with a blank wherever [MASK] stands (or [sMASK], [gMASK], for models that know blanks of sentences and
    of the rest of a text), one or a list. A list of token ids is a part A as it is, with the config's mask ids.
    max_new_tokens: for each blank. The other arguments as in `generate`; a text's answers depend on its own text,
    knobs and seed alone.

    The text is read both ways. Then, for each blank in turn, the model gets [sop] and writes until [eop]. A GLM reads
    the text once; the answers stay behind it for the blanks after them (THUDM/GLM generate_samples.py). GLM-130B and
    ChatGLM-6B read it again for every blank, with the answers so far in place of their masks (GLM-130B generate.py).
    A space before a blank belongs to the answer, as tokens have it; the text gets it back where the answer has none.

    Raises TypeError for a model that is not trained on blanks; ValueError as `generate` does, and for a text without
    one.
    """
    texts, alone = listed(texts)
    knobs = spread(
        len(texts), max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
    filled = exhaust(_fill(model, texts, knobs, stop, None, transform))
    return filled[0] if alone else filled


def fill_stream(
    model: Any,
    text: Prompt,
    *,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    transform: Transform = STANDARD,
    every: int = 4,
) -> Generator[str, None, Filled]:
    """Fills the blanks of one text, yielding the whole text piece by piece, from its beginning: what stands between
    the blanks as soon as the blank before it is filled. Together the pieces are the text of `fill`.

    every: tokens made between two pieces. The generator returns the Filled. The rest as in `fill`; errors are raised
    by the call itself, before the first piece.
    """
    texts, alone = listed(text)
    if not alone:
        raise ValueError(f"fill_stream takes one text, not {len(texts)}: fill takes several")
    knobs = spread(1, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    if every < 1:
        raise ValueError(f"every={every} must be at least 1")
    return first(_fill(model, texts, knobs, stop, every, transform))


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def reopen(params: Tree, state: State, position: jax.Array, limit: jax.Array, config: Any) -> State:
    """The state before the answers to the next blanks. position: int32 [B, 2], of [sop]. limit: int32 [B], 0 for a row
    that has no further blank."""
    # The end of an answer is never read, as in training; the last token of one that was cut off is.
    cut_off = ~jnp.any(state.token[:, None] == state.stops, axis=1)
    segment = jnp.where(cut_off, 0, PAD)[:, None]
    mask = Mask({"rank": jnp.broadcast_to(state.cache.used, segment.shape), "segment": segment})
    cache = read(params, state.cache, state.token[:, None], state.position[..., None], config, mask)
    return dataclasses.replace(
        state,
        cache=cache,
        token=jnp.full_like(state.token, blanks_of(config).sop),
        position=position,
        length=state.length + 1,
        limit=limit,
        made=jnp.zeros_like(state.made),
        done=limit < 1,
        column=jnp.zeros_like(state.column),
    )


def _fill(
    model: Any, texts: list[Prompt], knobs: dict[str, list], stop: Any, every: int | None, transform: Transform
) -> Steps[list[Filled]]:
    """Checks and begins at once; the generator that it returns fills, `every` steps at a time (None: all)."""
    params, config, tokenizer = unpack(model)
    blanks = blanks_of(config)
    stop = stop_strings(stop, tokenizer)
    parts = [part_a(text, config, tokenizer, f"text {i}") for i, text in enumerate(texts)]
    limits = knobs["max_new_tokens"]
    begun = []
    for i, (part, limit) in enumerate(zip(parts, limits, strict=True)):
        more = limit * len(part.places) if blanks.spliced else limit  # what the text itself must have room for
        begun.append(answer(part.ids, part.places[0], more, config, f"text {i}"))
    turns = max(len(part.places) for part in parts)
    room = bucket(max(limits), least=16)
    slots = room if blanks.spliced else bucket(turns * (room + 1) - 1)
    # What follows a stop string must not be in the cache: look after every token.
    look = 1 if stop else every or room

    def steps():
        written: list[list[Writer]] = [[] for _ in parts]
        state = None
        for turn in range(turns):
            left = [limit if turn < len(part.places) else 0 for part, limit in zip(parts, limits, strict=True)]
            if state is None or blanks.spliced:
                now = [
                    _with_answers(part, row, config) if limit else text
                    for part, row, limit, text in zip(parts, written, left, begun, strict=True)
                ]
                requests = assemble(now, {**knobs, "max_new_tokens": left}, config)
                state = init(params, requests, config, transform, room, slots)
            else:
                state = reopen(params, state, *_next_blanks(parts, left, turn, len(state.done), blanks), config)
            yield _literals(parts, turn)
            writers = [
                Writer(tokenizer, limit, ends(config), stop, spaced=limit > 0 and part.spaced[turn])
                for part, limit in zip(parts, left, strict=True)
            ]
            state = yield from drive(params, state, writers, look, config, transform)
            for row, writer in zip(written, writers, strict=True):
                row.append(writer)
        yield _literals(parts, turns)
        return [_filled(part, row[: len(part.places)]) for part, row in zip(parts, written, strict=True)]

    return steps()


def _literals(parts: list[PartA], turn: int) -> list[str]:
    """What stands before blank `turn` of each text; behind the last blank, the tail."""
    return [part.literals[turn] if turn < len(part.literals) else "" for part in parts]


def _next_blanks(
    parts: list[PartA], left: list[int], turn: int, rows: int, blanks: Blanks
) -> tuple[np.ndarray, np.ndarray]:
    """`position` and `limit` of `reopen`, padded to the rows of the batch."""
    position, limit = np.zeros((rows, blanks.rows), np.int32), np.zeros(rows, np.int32)
    limit[: len(left)] = left
    for row, part in enumerate(parts):
        if left[row]:
            position[row] = blanks.positions(part.ids, part.places[turn], 1)[:, -1]
    return position, limit


def _with_answers(part: PartA, writers: list[Writer], config: Any) -> Text:
    """The text with the answers so far in place of their masks, and the beginning of the next answer."""
    ids = _spliced(part, writers)
    place = part.places[len(writers)] + len(ids) - len(part.ids)  # all that changed is before it
    spent = sum(1 + (writer.reason == "eos") for writer in writers)  # a mask made room for one, an end has no room
    return answer(ids, place, 1, config, "the text")._replace(spent=spent)


def _spliced(part: PartA, writers: list[Writer]) -> list[int]:
    """Ids of the text, the answers in place of the first masks, without the tokens that ended them."""
    ids, at = [], 0
    for place, writer in zip(part.places, writers, strict=False):
        ids += [*part.ids[at:place], *writer.tokens[: len(writer.tokens) - (writer.reason == "eos")]]
        at = place + 1
    return ids + part.ids[at:]


def _filled(part: PartA, writers: list[Writer]) -> Filled:
    text = part.literals[0]
    for writer, literal in zip(writers, part.literals[1:], strict=True):
        text += writer.shown + literal
    spans = [writer.completion() for writer in writers]
    return Filled(_spliced(part, writers), None if spans[0].text is None else text, spans)
