"""`generate` and `stream`: prompts in, completions or pieces of text out."""

from collections.abc import Generator, Sequence
from typing import Any

from garrulax import models
from garrulax.sampling.blanks import last_blank
from garrulax.sampling.requests import (
    Prompt,
    Text,
    assemble,
    bucket,
    continuation,
    ends,
    listed,
    spread,
    token_ids,
    unpack,
)
from garrulax.sampling.state import init
from garrulax.sampling.transforms import STANDARD, Transform
from garrulax.sampling.writing import Completion, Steps, Writer, drive, exhaust, first, stop_strings

LOOK = 8  # steps between two looks for stop strings


def generate(
    model: Any,
    prompts: Prompt | Sequence[Prompt],
    *,
    max_new_tokens: int | Sequence[int] = 128,
    temperature: float | Sequence[float] = 1.0,
    top_k: int | Sequence[int] = 0,
    top_p: float | Sequence[float] = 1.0,
    seed: int | Sequence[int] = 0,
    stop: str | Sequence[str] = (),
    transform: Transform = STANDARD,
) -> Any:
    """Continues texts. One `Completion` a prompt; for a text or a list of ids alone, its Completion.

    model: from `gx.load`, or (params, config); decoding takes `gx.unstack`ed parameters, so to call often, unstack
    once. prompts: a text, a list of token ids, or a list of these. Ids are read as `gx.forward` reads them; a text gets
    what its tokenizer puts around it, such as bos; a text for a GLM is read both ways, and what follows it is its last
    blank: it gets [gMASK] and <sop>. So do ids without <sop> for GLM-130B and ChatGLM-6B, unless they have a mask; ids
    with <sop> are, for every GLM, a text with its mask, <sop>, and the answer so far. ([gMASK] <sop> and a text:
    GLM-130B reads it from left to right.)
    max_new_tokens, temperature, top_k, top_p, seed: a number, or one a prompt. temperature 0 is greedy, top_k 0 and
    top_p 1 are off; they apply in this order. stop: strings that end a completion and are not part of it.
    transform: what shapes the distribution (`sampling.transforms`); a new one compiles anew, new values never do.

    A completion depends on its own prompt, knobs and seed alone: not on the other prompts, their order, or streaming.
    (To rounding: batches of other sizes are other programs, whose logits may differ in their last bits.)

    Raises ValueError, saying what to do, for an empty prompt, one that does not fit into the context with
    max_new_tokens, ids out of range, a text where there is no tokenizer, and bad knobs; FloatingPointError where the
    logits are not finite.
    """
    prompts, alone = listed(prompts)
    knobs = spread(
        len(prompts), max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
    completions = exhaust(_generate(model, prompts, knobs, stop, LOOK if stop else None, transform))
    return completions[0] if alone else completions


def stream(
    model: Any,
    prompt: Prompt,
    *,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    transform: Transform = STANDARD,
    every: int = 4,
) -> Generator[str, None, Completion]:
    """Continues one text, yielding its pieces as they are made: together they are `generate`'s text.

    every: tokens made between two pieces. A piece never ends inside a character, and never holds what may be the
    beginning of a stop string. The generator returns the Completion. The rest as in `generate`; errors are raised
    by the call itself, before the first piece.
    """
    prompts, alone = listed(prompt)
    if not alone:
        raise ValueError(f"stream takes one prompt, not {len(prompts)}: generate takes several")
    knobs = spread(1, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    if every < 1:
        raise ValueError(f"every={every} must be at least 1")
    return first(_generate(model, prompts, knobs, stop, every, transform))


def _generate(
    model: Any, prompts: list[Prompt], knobs: dict[str, list], stop: Any, every: int | None, transform: Transform
) -> Steps[list[Completion]]:
    """Checks and begins at once; the generator that it returns decodes, `every` steps at a time (None: all)."""
    params, config, tokenizer = unpack(model)
    stop = stop_strings(stop, tokenizer)
    limits = knobs["max_new_tokens"]
    texts = [
        _text(prompt, limit, config, tokenizer, f"prompt {i}")
        for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
    ]
    requests = assemble(texts, knobs, config)
    room = bucket(max(limits), least=16)

    def steps():
        writers = [Writer(tokenizer, limit, ends(config), stop) for limit in limits]
        state = init(params, requests, config, transform, room, room)
        yield from drive(params, state, writers, every or room, config, transform)
        return [writer.completion() for writer in writers]

    return steps()


def _text(prompt: Prompt, limit: int, config: Any, tokenizer: Any, name: str) -> Text:
    if models.blanks(config) is not None:
        text = last_blank(prompt, limit, config, tokenizer, name)
        if text is not None:
            return text
    ids = token_ids(prompt, tokenizer, name)
    if isinstance(prompt, str):
        ids = [*tokenizer.prefix, *ids, *tokenizer.suffix]
    return continuation(ids, limit, config, name)
