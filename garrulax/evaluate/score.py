"""`score`: the log-probability of each token of texts."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from garrulax.core.config import ModelConfig
from garrulax.evaluate.passes import BATCH_TOKENS, prepare, score_rows
from garrulax.evaluate.rows import Row, continuation_row, longest_text
from garrulax.evaluate.texts import conditions_of, encode_pair, size_in_bytes, text_of
from garrulax.models.unpack import ModelLike
from garrulax.sampling.requests import Prompt, prompt_list


@dataclasses.dataclass(frozen=True)
class Score:
    """How probable a text is.

    Attributes:
        tokens: Token ids of the text, without prefix and condition.
        logprobs: Natural logarithm of the probability of each token after all before it; None for a first token with
            nothing before it.
        is_argmax: Whether each token is the most probable one; None like `logprobs`.
        bytes: Number of UTF-8 bytes of the text; None for token ids of a model without a tokenizer.

    Example:
        >>> import garrulax as gx
        >>> found = gx.Score(tokens=[5, 17, 3], logprobs=[None, -1.5, -0.5], is_argmax=[None, False, True], bytes=3)
        >>> found.logprob, found.count, found.is_greedy
        (-2.0, 2, False)
    """

    tokens: list[int]
    logprobs: list[float | None]
    is_argmax: list[bool | None]
    bytes: int | None

    @property
    def logprob(self) -> float:
        """The sum: the log-probability of the text."""
        return math.fsum(x for x in self.logprobs if x is not None)

    @property
    def count(self) -> int:
        """Number of scored tokens: all, or all but the first."""
        return sum(x is not None for x in self.logprobs)

    @property
    def is_greedy(self) -> bool:
        """Whether greedy decoding would write the scored tokens."""
        return all(x is not False for x in self.is_argmax)


def score(
    model: ModelLike,
    texts: Prompt | Sequence[Prompt],
    *,
    condition: Prompt | Sequence[Prompt] | None = None,
    prefix: Sequence[int] | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> Score | list[Score]:
    """Scores texts: the log-probability of each token, given those before it and a condition.

    A result does not depend on the other texts, up to rounding. The logits of a whole batch never exist at once:
    memory grows with `batch_tokens` times the width of the model, not with the vocabulary.

    A model that fills blanks (GLM) reads the condition with [gMASK] behind it, in both directions, and the text as the
    answer to this blank, as GLM-130B's evaluation does; without a condition the first token takes its place.

    Args:
        model: From `gx.load`, or (params, config).
        texts: A text, a list of token ids, or a list of these.
        condition: What is read before the text and not scored: one for all texts, or one a text. Spaces at its end
            count as the beginning of the text, and both are encoded as one text, as lm-evaluation-harness does.
        prefix: Token ids in front of each text and condition, which are not scored either. None takes those that the
            tokenizer puts before a prompt, such as bos; token ids get none. Without prefix and condition the first
            token is not scored: `prefix=[model.tokenizer.eos]` scores it for models that have no bos.
        batch_tokens: Greatest number of tokens that are computed at a time, padding included.

    Returns:
        The Score of a single text, or the list of those of a list.

    Raises:
        ValueError: An empty text, one that is longer than the context (`gx.perplexity` takes such), an id outside the
            vocabulary, a text without a tokenizer, or a text with a condition of token ids.
        FloatingPointError: The logits are not finite.

    Example:
        >>> import jax, garrulax as gx
        >>> config = gx.preset("gpt2-tiny", layers=1, width=32, heads=2, vocab=257, eos=None)
        >>> model = (gx.init(config, jax.random.key(0)), config)
        >>> alone, given = gx.score(model, [[5, 17, 3], [9]], condition=[[8], [1, 2]])
        >>> alone.count, given.count, alone.logprob < 0
        (3, 1, True)
    """
    params, config, tokenizer = prepare(model)
    items, single = prompt_list(texts)
    rows: list[Row] = []
    begun: list[tuple[list[int], int]] = []  # ids of each text, and how many of them are not scored
    for i, (text, before) in enumerate(zip(items, conditions_of(condition, len(items)), strict=True)):
        name = "the text" if single else f"text {i}"
        context, ids = encode_pair(text, before, prefix, config, tokenizer, name)
        unscored = 0 if context else 1
        size, most = len(context) + len(ids), longest_text(config)
        if size > most:
            raise ValueError(
                f"{name} has {size} tokens with its condition, but the model can score {most} at once: shorten it, or "
                "take gx.perplexity, which reads long texts in windows"
            )
        begun.append((ids, unscored))
        rows.append(_row(context or ids[:1], ids[unscored:], config))
    results = [
        Score(
            ids,
            [None] * unscored + found.logprobs.tolist(),
            [None] * unscored + found.is_argmax.tolist(),
            size_in_bytes(text_of(text, tokenizer)),
        )
        for text, (ids, unscored), found in zip(
            items, begun, score_rows(rows, params, config, batch_tokens), strict=True
        )
    ]
    return results[0] if single else results


def _row(context: Sequence[int], ids: Sequence[int], config: ModelConfig) -> Row:
    """The row of a text; one without scored targets for a text whose only token has nothing before it."""
    if ids:
        return continuation_row(context, ids, config)
    nothing = np.zeros(1, np.int32)
    return Row(nothing, nothing[None], nothing, nothing)
