"""Prompts of models that are trained on blanks (`core.blanks`; Du et al. 2022, section 2.1)."""

import dataclasses
import re
from collections.abc import Sequence

from garrulax import models
from garrulax.core.blanks import Blanks
from garrulax.core.config import ModelConfig
from garrulax.core.text import whole_characters
from garrulax.models.unpack import TokenizerLike
from garrulax.sampling.requests import MOST_NEW_TOKENS, EncodedPrompt, Prompt, check_ids, new_tokens, token_ids

BLANK = re.compile(r"\[([sg]?)MASK\]")


@dataclasses.dataclass(frozen=True)
class PartA:
    """A text with blanks.

    Attributes:
        ids: Token ids of the text, with its masks and the control tokens around it.
        mask_indices: Indices of the masks in `ids`.
        literals: The text before each mask, and after the last one.
        space_before: For each mask, whether a space stood before it. Tokens of words begin with their space, so the
            space is left out of `ids`, and the answer begins with it.
    """

    ids: list[int]
    mask_indices: list[int]
    literals: list[str]
    space_before: list[bool]


def part_a(prompt: Prompt, config: ModelConfig, tokenizer: TokenizerLike | None, name: str) -> PartA:
    """Returns the part A of a text with [MASK]s, or of its ids.

    Args:
        prompt: A text, or token ids that are used as they are.
        config: The family's Config.
        tokenizer: Needed for a text.
        name: Name of the prompt in errors.

    Raises:
        TypeError: The model is not trained on blanks.
        ValueError: The text has no blank, or an id is outside the vocabulary.
    """
    blanks = blanks_of(config)
    if isinstance(prompt, str):
        part = _encode_text(whole_characters(prompt), blanks, tokenizer, name)
    else:
        ids = token_ids(prompt, tokenizer, name)
        check_ids(ids, config, name)
        part = _split_ids(ids, blanks, tokenizer)
    if not part.mask_indices:
        raise ValueError(f"{name} has no blank: put [MASK] where the model shall write")
    return part


def blanks_of(config: ModelConfig) -> Blanks:
    """Returns the conventions by which a model reads blanks. Raises TypeError if it is not trained on blanks."""
    blanks = models.blanks(config)
    if blanks is None:
        raise TypeError(f"fill needs a GLM, which is trained on blanks; a {type(config).__module__.rpartition('.')[2]} "
                        "model continues texts: use generate")  # fmt: skip
    return blanks


def _encode_text(text: str, blanks: Blanks, tokenizer: TokenizerLike | None, name: str) -> PartA:
    part, end = PartA([*blanks.before], [], [], []), 0
    for blank in BLANK.finditer(text):
        before = text[end : blank.start()]
        literal = before.removesuffix(" ")
        part.ids.extend(_encode_literal(literal, tokenizer, name, continues=end > 0))
        part.mask_indices.append(len(part.ids))
        part.ids.append(blanks.masks[blank[1]])
        part.literals.append(literal)
        part.space_before.append(literal != before)
        end = blank.end()
    tail = text[end:]
    part.ids.extend(_encode_literal(tail, tokenizer, name, continues=True))
    part.literals.append(tail)
    if not text.rstrip().endswith(tuple(f"[{kind}MASK]" for kind in blanks.open_ended)):
        part.ids.extend(blanks.after)
    return part


def _encode_literal(text: str, tokenizer: TokenizerLike | None, name: str, continues: bool) -> list[int]:
    if continues and tokenizer is not None and tokenizer.strips_space:
        text = text.removeprefix(" ")  # the tokenizer adds a space in front of every text
    return token_ids(text, tokenizer, name) if text or tokenizer is None else []


def _split_ids(ids: list[int], blanks: Blanks, tokenizer: TokenizerLike | None) -> PartA:
    masks = blanks.mask_indices(ids)
    bounds = zip([0, *(i + 1 for i in masks)], [*masks, len(ids)], strict=True)
    literals = ["" if tokenizer is None else tokenizer.decode(ids[a:b], start=a == 0) for a, b in bounds]
    return PartA(ids, masks, literals, [False] * len(masks))


def answer_prompt(
    ids: list[int], mask_index: int, limit: int | None, config: ModelConfig, name: str, answer: Sequence[int] = ()
) -> EncodedPrompt:
    """Returns the prompt after which the model writes the answer to one mask: the text, sop, and the answer so far.

    Args:
        ids: Token ids of the text.
        mask_index: Index in `ids` of the mask.
        limit: Greatest number of new tokens; None is as many as fit (`requests.new_tokens`).
        config: The family's Config.
        name: Name of the prompt in errors.
        answer: Tokens of the answer so far.

    Raises:
        ValueError: An id is outside the vocabulary, or the text and `limit` new tokens do not fit into the context.
    """
    check_ids([*ids, *answer], config, name)
    blanks = blanks_of(config)
    limit = answer_tokens(len(ids), len(answer), limit, config, blanks, name)
    positions = blanks.positions(ids, mask_index, len(answer) + 2)  # of sop, the answer and the first new token
    stride = positions[:, -1] - positions[:, -2]
    return EncodedPrompt([*ids, blanks.sop, *answer], len(ids), positions[:, :-1], stride, limit)


def answer_tokens(
    size: int, written: int, limit: int | None, config: ModelConfig, blanks: Blanks, name: str, count: int = 1
) -> int:
    """Returns the greatest number of new tokens of an answer.

    Args:
        size: Number of tokens of the text.
        written: Number of tokens of the answer so far.
        limit: The number that is asked for; None is as many as fit (`requests.new_tokens`).
        config: The family's Config.
        blanks: The family's conventions.
        name: Name of the text in errors.
        count: Number of blanks. Where answers are inserted, the text must have space for all of them.

    Raises:
        ValueError: The text or the new tokens do not fit into the model's context.
    """
    if blanks.insert_answers:
        return new_tokens(size + written, limit, config, name, count)
    if size > config.context + 1:
        raise ValueError(f"{name} has {size} tokens, but the model's context is {config.context}: shorten it")
    if limit is None:
        limit = max(1, min(MOST_NEW_TOKENS, config.context - 1 - written))
    if written + limit >= config.context:
        raise ValueError(f"max_new_tokens={limit} does not fit into the model's context of {config.context}: lower it")
    return limit


def last_blank_prompt(
    prompt: Prompt, limit: int | None, config: ModelConfig, tokenizer: TokenizerLike | None, name: str
) -> EncodedPrompt | None:
    """Returns the prompt after which `generate` continues a text: the model answers a blank at the end of the text.

    Token ids may contain one sop: the ids before it are the text, the ids after it are the answer so far. The answer is
    to the first [gMASK], or else to the first mask; a text without a mask gets a [gMASK] at its end.

    Args:
        prompt: A text without blanks, or token ids.
        limit: Greatest number of new tokens; None is as many as fit (`requests.new_tokens`).
        config: The family's Config.
        tokenizer: Needed for a text.
        name: Name of the prompt in errors.

    Returns:
        The prompt; None for ids without sop if the family continues them causally.

    Raises:
        ValueError: A text with blanks; a sop without a mask before it; or a second sop.
    """
    blanks = blanks_of(config)
    ids = token_ids(prompt, tokenizer, name)
    if isinstance(prompt, str):
        if BLANK.search(prompt):
            raise ValueError(f"{name} has blanks: gx.fill fills them, gx.generate continues a text")
        ids = [*blanks.before, *ids]
    answer: list[int] = []
    if blanks.sop in ids:
        sop_index = ids.index(blanks.sop)
        ids, answer = ids[:sop_index], ids[sop_index + 1 :]
        if not blanks.mask_indices(ids) or blanks.sop in answer:
            raise ValueError(f"{name} must have a mask before its <sop> (token id {blanks.sop}), and one <sop> only")
    elif not isinstance(prompt, str) and blanks.causal:
        return None
    if not blanks.mask_indices(ids):
        ids = [*ids, blanks.masks["g"]]
    masks = blanks.mask_indices(ids)
    generation_masks = [i for i in masks if ids[i] == blanks.masks["g"]]
    return answer_prompt(ids, (generation_masks or masks)[0], limit, config, name, answer)
