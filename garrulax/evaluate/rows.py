"""The rows of a scoring pass: what the model reads, and which tokens are scored."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from garrulax import models
from garrulax.core.blanks import Blanks
from garrulax.core.config import ModelConfig


class Row(NamedTuple):
    """One row of a forward pass. R is the number of rows of positions (1 or 2).

    Attributes:
        tokens: int32 [T], what the model reads.
        positions: int32 [R, T].
        targets: int32 [T], the token that the logits of each place predict.
        choice: int32 [T], i where the target belongs to the i-th scored text, counted from 1; 0 where nothing is
            scored. For models that fill blanks it is the argument of `kernels.masks.choices` too.
    """

    tokens: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    choice: np.ndarray


def continuation_row(context: Sequence[int], continuation: Sequence[int], config: ModelConfig) -> Row:
    """The row that scores a continuation.

    A model that fills blanks reads the context with [gMASK] behind it, in both directions, and the continuation as the
    answer to this blank (THUDM/GLM-130B evaluation/dataset.py, LanguageModelTaskDataset). Other models read both from
    left to right; the last token is not read, since nothing after it is scored.

    Args:
        context: At least one token id for models that read from left to right.
        continuation: At least one token id.
        config: The family's Config.
    """
    blanks = models.blanks(config)
    if blanks is not None:
        before, behind = _around(blanks)
        ids = [*before, *context, *behind]
        return answers_row(ids, len(before) + len(context), [continuation], blanks)
    tokens = np.array([*context, *continuation], np.int32)
    choice = (np.arange(1, len(tokens)) >= len(context)).astype(np.int32)
    return Row(tokens[:-1], np.arange(len(tokens) - 1, dtype=np.int32)[None], tokens[1:], choice)


def answers_row(ids: Sequence[int], mask_index: int, answers: Sequence[Sequence[int]], blanks: Blanks) -> Row:
    """The row that scores several answers to one blank, each as if it were the only one (`Blanks.choices`)."""
    return Row(**blanks.choices(ids, mask_index, answers))


def longest_text(config: ModelConfig) -> int:
    """The greatest number of tokens of context and continuation together; a causal model does not read the last."""
    blanks = models.blanks(config)
    return config.max_length + 1 if blanks is None else config.max_length - sum(map(len, _around(blanks)))


def _around(blanks: Blanks) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids before a context, and those between it and the continuation, without sop."""
    return blanks.before, (blanks.masks["g"], *(() if "g" in blanks.open_ended else blanks.after))
