"""Texts with blanks, as a GLM reads them (Du et al. 2022, section 2.1; THUDM/GLM generate_samples.py)."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from garrulax.models import glm
from garrulax.sampling.requests import Prompt, Text, check_ids, token_ids

BLANK = re.compile(r"\[([sg]?)MASK\]")


@dataclasses.dataclass(frozen=True)
class PartA:
    """A text with blanks.

    ids: as the model reads it. places: indices of the masks in it. literals: the text before each mask and after the
    last. spaced: for each mask, whether a space before it was left to the answer.
    """

    ids: list[int]
    places: list[int]
    literals: list[str]
    spaced: list[bool]


def part_a(prompt: Prompt, config: glm.Config, tokenizer: Any, name: str) -> PartA:
    """The part A of a text or of ids. ValueError where it has no blank, or where ids are out of range."""
    part = (
        _of_text(prompt, config, tokenizer, name)
        if isinstance(prompt, str)
        else _of_ids(prompt, config, tokenizer, name)
    )
    if not part.places:
        raise ValueError(f"{name} has no blank: put [MASK] where the model shall write")
    return part


def _of_text(text: str, config: glm.Config, tokenizer: Any, name: str) -> PartA:
    masks = {"": config.mask, "s": config.sentence_mask, "g": config.generation_mask}
    part, at = PartA([config.cls], [], [], []), 0
    for blank in BLANK.finditer(text):
        before = text[at : blank.start()]
        literal = before.removesuffix(" ")
        part.ids.extend(_encode(literal, tokenizer, name, continues=at > 0))
        part.places.append(len(part.ids))
        mask = masks[blank[1]]
        part.ids.append(config.mask if mask is None else mask)
        part.literals.append(literal)
        part.spaced.append(literal != before)
        at = blank.end()
    tail = text[at:]
    part.ids.extend(_encode(tail, tokenizer, name, continues=True))
    part.literals.append(tail)
    if not text.rstrip().endswith("[gMASK]"):  # which is the rest of the text, its end included
        part.ids.append(config.eos)
    return part


def _encode(text: str, tokenizer: Any, name: str, continues: bool) -> list[int]:
    if continues and tokenizer is not None and tokenizer.strips_space:
        text = text.removeprefix(" ")  # the tokenizer puts one before every text
    return token_ids(text, tokenizer, name) if text or tokenizer is None else []


def _of_ids(prompt: Sequence[int], config: glm.Config, tokenizer: Any, name: str) -> PartA:
    ids = token_ids(prompt, tokenizer, name)
    check_ids(ids, config, name)
    places = [i for i, token in enumerate(ids) if token in (config.mask, config.sentence_mask, config.generation_mask)]
    cuts = zip([0, *(i + 1 for i in places)], [*places, len(ids)], strict=True)
    literals = ["" if tokenizer is None else tokenizer.decode(ids[a:b], start=a == 0) for a, b in cuts]
    return PartA(ids, places, literals, [False] * len(places))


def answer(ids: list[int], place: int, limit: int, config: glm.Config, name: str) -> Text:
    """A part A and the beginning of the answer to the mask at `place`. ValueError where it would not fit."""
    check_ids(ids, config, name)
    if len(ids) > config.context + 1:
        raise ValueError(f"{name} has {len(ids)} tokens, but the model's context is {config.context}: shorten it")
    if limit >= config.context:
        raise ValueError(f"max_new_tokens={limit} does not fit into the model's context of {config.context}: lower it")
    return Text(ids, True, config.sop, (place, 1), (0, 1))
