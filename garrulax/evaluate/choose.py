"""`choose`: which of several continuations, or of several answers to a blank, is the most probable."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from garrulax import models
from garrulax.core.blanks import Blanks
from garrulax.core.config import ModelConfig
from garrulax.core.text import whole_characters
from garrulax.evaluate.passes import BATCH_TOKENS, Found, prepare, score_rows
from garrulax.evaluate.rows import answers_row, continuation_row, longest_text
from garrulax.evaluate.texts import encode_pair, size_in_bytes, text_of
from garrulax.models.unpack import ModelLike, TokenizerLike
from garrulax.sampling.blanks import BLANK, part_a
from garrulax.sampling.requests import Prompt, check_ids, token_ids

NORMALISE = ("none", "tokens", "bytes")


@dataclasses.dataclass(frozen=True)
class Choice:
    """The options of a prompt and their scores.

    Attributes:
        index: Of the option with the greatest score; the first of equal ones.
        scores: Log-probability of each option, divided as `normalise` says.
        logprobs: Log-probability of each option.
        is_greedy: Whether greedy decoding would write the option.

    Example:
        >>> import garrulax as gx
        >>> gx.Choice(index=1, scores=[-4.0, -2.5], logprobs=[-8.0, -5.0], is_greedy=[False, True]).index
        1
    """

    index: int
    scores: list[float]
    logprobs: list[float]
    is_greedy: list[bool]


def choose(
    model: ModelLike,
    prompt: Prompt,
    options: Sequence[Prompt],
    *,
    normalise: str = "none",
    prefix: Sequence[int] | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> Choice:
    """Scores the options of a prompt: by the log-probability of each as the continuation, or as the answer to a blank.

    A model that fills blanks (GLM) reads a prompt with one blank, such as [MASK], and all options in a single pass, in
    which they do not see one another; a prompt without a blank gets a [MASK] at its end. The score of an option is the
    log-probability of its tokens at this blank, without an end token (GLM-130B's evaluation of multiple choice). A
    space before the blank becomes the beginning of each option.

    Args:
        model: From `gx.load`, or (params, config).
        prompt: A text or a list of token ids.
        options: Texts, or lists of token ids if the prompt is one. A text that continues a word's end begins with its
            space: " Paris". Spaces at the end of the prompt count as the beginning of the options.
        normalise: "none" compares sums of log-probabilities, which favour short options; "tokens" divides each by its
            number of tokens, and "bytes" by the UTF-8 bytes of the option.
        prefix: Token ids in front of the prompt, see `gx.score`.
        batch_tokens: Greatest number of tokens that are computed at a time, padding included.

    Returns:
        The best option, and the scores of all.

    Raises:
        ValueError: No option, an empty one, an unknown `normalise`, a prompt with several blanks, or an error of
            `gx.score`.
        FloatingPointError: The logits are not finite.

    Example:
        >>> import jax, garrulax as gx
        >>> config = gx.preset("gpt2-tiny", layers=1, width=32, heads=2, vocab=257, eos=None)
        >>> model = (gx.init(config, jax.random.key(0)), config)
        >>> found = gx.choose(model, [5, 17, 3], [[9], [8, 7]], normalise="tokens")
        >>> found.scores[1] == found.logprobs[1] / 2
        True
    """
    if normalise not in NORMALISE:
        raise ValueError(f"unknown normalise={normalise!r}: choose from {', '.join(NORMALISE)}")
    if isinstance(options, str) or not len(options):
        raise ValueError("options must be a list of at least one text or list of token ids")
    params, config, tokenizer = prepare(model)
    blanks = models.blanks(config)
    names = [f"option {i}" for i in range(len(options))]
    if blanks is None:
        pairs = [
            encode_pair(option, prompt, prefix, config, tokenizer, name)
            for option, name in zip(options, names, strict=True)
        ]
        if not all(context for context, _ in pairs):
            raise ValueError("the prompt is empty: give at least one token, or a prefix")
        _check_size(max(len(context) + len(ids) for context, ids in pairs), longest_text(config))
        rows = [continuation_row(context, ids, config) for context, ids in pairs]
        found, counts = score_rows(rows, params, config, batch_tokens), [len(ids) for _, ids in pairs]
    else:
        ids, mask_index, answers = _answers(prompt, options, names, prefix, config, tokenizer, blanks)
        counts = [len(answer) for answer in answers]
        _check_size(len(ids) + max(counts), config.max_length)
        (whole,) = score_rows([answers_row(ids, mask_index, answers, blanks)], params, config, batch_tokens)
        found = _split(whole, counts)
    logprobs = [math.fsum(x.logprobs.tolist()) for x in found]
    sizes = _divisors(normalise, options, counts, tokenizer)
    scores = [logprob / size for logprob, size in zip(logprobs, sizes, strict=True)]
    return Choice(int(np.argmax(scores)), scores, logprobs, [bool(x.is_argmax.all()) for x in found])


def _answers(
    prompt: Prompt,
    options: Sequence[Prompt],
    names: Sequence[str],
    prefix: Sequence[int] | None,
    config: ModelConfig,
    tokenizer: TokenizerLike | None,
    blanks: Blanks,
) -> tuple[list[int], int, list[list[int]]]:
    """Ids of the text with its blank, the index of the blank, and ids of the answers."""
    if isinstance(prompt, str):
        prompt = prompt if BLANK.search(prompt) else prompt + "[MASK]"
    elif not blanks.mask_indices(prompt):
        prompt = [*prompt, blanks.masks[""]]
    part = part_a(prompt, config, tokenizer, "the prompt")
    if len(part.mask_indices) > 1:
        raise ValueError(f"the prompt has {len(part.mask_indices)} blanks: choose takes one")
    begun = [*(prefix or ()), *part.ids]
    answers = []
    for option, name in zip(options, names, strict=True):
        if isinstance(option, str) and tokenizer is not None:
            option = " " * (part.space_before[0] and not option.startswith(" ")) + whole_characters(option)
            if tokenizer.strips_space:  # the tokenizer adds a space in front of every text
                option = option.removeprefix(" ")
        answers.append(token_ids(option, tokenizer, name))
        check_ids(answers[-1], config, name)
    return begun, part.mask_indices[0] + len(begun) - len(part.ids), answers


def _split(whole: Found, counts: Sequence[int]) -> list[Found]:
    ends = np.cumsum(counts)[:-1]
    return [Found(*both) for both in zip(*(np.split(x, ends) for x in whole), strict=True)]


def _divisors(
    normalise: str, options: Sequence[Prompt], counts: Sequence[int], tokenizer: TokenizerLike | None
) -> Sequence[int]:
    if normalise == "none":
        return [1] * len(counts)
    if normalise == "tokens":
        return counts
    sizes = [size_in_bytes(text_of(option, tokenizer)) for option in options]
    if not all(sizes):
        raise ValueError('normalise="bytes" needs options that have a text: give texts, or a model with a tokenizer')
    return [size for size in sizes if size is not None]


def _check_size(size: int, most: int) -> None:
    if size > most:
        raise ValueError(f"prompt and longest option have {size} tokens, but {most} fit into the model's context")
