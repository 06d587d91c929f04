"""Texts with blanks, as the models that are trained on them read them (`core.blanks`; Du et al. 2022, section 2.1)."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from garrulax import models
from garrulax.core.blanks import Blanks
from garrulax.sampling.requests import Prompt, Text, check_ids, check_room, token_ids

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


def part_a(prompt: Prompt, config: Any, tokenizer: Any, name: str) -> PartA:
    """The part A of a text or of ids. ValueError where it has no blank, or where ids are out of range."""
    blanks = blanks_of(config)
    if isinstance(prompt, str):
        part = _of_text(prompt, blanks, tokenizer, name)
    else:
        ids = token_ids(prompt, tokenizer, name)
        check_ids(ids, config, name)
        part = _of_ids(ids, blanks, tokenizer)
    if not part.places:
        raise ValueError(f"{name} has no blank: put [MASK] where the model shall write")
    return part


def blanks_of(config: Any) -> Blanks:
    """How the model reads blanks. TypeError where it does not."""
    blanks = models.blanks(config)
    if blanks is None:
        raise TypeError(f"fill needs a GLM, which is trained on blanks; a {type(config).__module__.rpartition('.')[2]} "
                        "model continues texts: use generate")  # fmt: skip
    return blanks


def _of_text(text: str, blanks: Blanks, tokenizer: Any, name: str) -> PartA:
    part, at = PartA([*blanks.before], [], [], []), 0
    for blank in BLANK.finditer(text):
        before = text[at : blank.start()]
        literal = before.removesuffix(" ")
        part.ids.extend(_encode(literal, tokenizer, name, continues=at > 0))
        part.places.append(len(part.ids))
        part.ids.append(blanks.masks[blank[1]])
        part.literals.append(literal)
        part.spaced.append(literal != before)
        at = blank.end()
    tail = text[at:]
    part.ids.extend(_encode(tail, tokenizer, name, continues=True))
    part.literals.append(tail)
    if not text.rstrip().endswith(tuple(f"[{kind}MASK]" for kind in blanks.open_ended)):
        part.ids.extend(blanks.after)
    return part


def _encode(text: str, tokenizer: Any, name: str, continues: bool) -> list[int]:
    if continues and tokenizer is not None and tokenizer.strips_space:
        text = text.removeprefix(" ")  # the tokenizer puts one before every text
    return token_ids(text, tokenizer, name) if text or tokenizer is None else []


def _of_ids(ids: list[int], blanks: Blanks, tokenizer: Any) -> PartA:
    places = blanks.places(ids)
    cuts = zip([0, *(i + 1 for i in places)], [*places, len(ids)], strict=True)
    literals = ["" if tokenizer is None else tokenizer.decode(ids[a:b], start=a == 0) for a, b in cuts]
    return PartA(ids, places, literals, [False] * len(places))


def answer(ids: list[int], place: int, limit: int, config: Any, name: str, begun: Sequence[int] = ()) -> Text:
    """A part A and the beginning of the answer to the mask at `place`: sop and the tokens `begun`.

    limit: new tokens. ValueError where it would not fit.
    """
    check_ids([*ids, *begun], config, name)
    blanks = blanks_of(config)
    if blanks.spliced:
        check_room(len(ids) + len(begun), limit, config, name)
    elif len(ids) > config.context + 1:
        raise ValueError(f"{name} has {len(ids)} tokens, but the model's context is {config.context}: shorten it")
    elif len(begun) + limit >= config.context:
        raise ValueError(f"max_new_tokens={limit} does not fit into the model's context of {config.context}: lower it")
    positions = blanks.positions(ids, place, len(begun) + 2)  # of the first new token too
    return Text([*ids, blanks.sop, *begun], len(ids), positions[:, :-1], positions[:, -1] - positions[:, -2])


def last_blank(prompt: Prompt, limit: int, config: Any, tokenizer: Any, name: str) -> Text | None:
    """What `generate` goes on with: a text is followed by a blank, and its answer is what the model writes.

    Ids say so themselves: what stands before the first sop is the text, what follows is the answer so far. Without a
    sop they are a text; or None, where the family may as well continue them from left to right. The answer is to the
    first [gMASK], or else the first mask; a text without any gets one.
    Raises ValueError for a text with blanks, and for a sop that answers no mask or is not the only one.
    """
    blanks = blanks_of(config)
    ids = token_ids(prompt, tokenizer, name)
    if isinstance(prompt, str):
        if BLANK.search(prompt):
            raise ValueError(f"{name} has blanks: gx.fill fills them, gx.generate continues a text")
        ids = [*blanks.before, *ids]
    begun: list[int] = []
    if blanks.sop in ids:
        at = ids.index(blanks.sop)
        ids, begun = ids[:at], ids[at + 1 :]
        if not blanks.places(ids) or blanks.sop in begun:
            raise ValueError(f"{name} must have a mask before its <sop> (token id {blanks.sop}), and one <sop> only")
    elif not isinstance(prompt, str) and blanks.causal:
        return None
    if not blanks.places(ids):
        ids = [*ids, blanks.masks["g"]]
    rest = [i for i in blanks.places(ids) if ids[i] == blanks.masks["g"]]
    return answer(ids, (rest or blanks.places(ids))[0], limit, config, name, begun)
