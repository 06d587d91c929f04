"""Texts with blanks: the token ids and positions by which a model reads such a text and writes into it.

A text has one mask token for each blank. To fill a blank, the model reads the text (part A in Du et al. 2022, section
2.1), then a start token (`sop`), and writes the answer token by token until an end token.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Blanks:
    """The conventions of one family for texts with blanks.

    Attributes:
        masks: Id of the mask token by kind: "" for a few words ([MASK]), "s" for sentences ([sMASK]), "g" for the rest
            of a text ([gMASK]). Several kinds may have the same id.
        sop: Id of the token that begins an answer.
        end_tokens: Ids of the tokens that end an answer or the text.
        before: Ids in front of every text.
        after: Ids behind every text, except one that ends with a mask whose kind is in `open_ended`.
        open_ended: Kinds of masks.
        rows: Number of rows of position ids: 1, or 2 where the index of a token in its answer has a row of its own (0
            in the text).
        masks_answered_at_end: Ids of the masks whose answers have the positions after the end of the text. Every token
            of an answer to another mask has the position of that mask.
        insert_answers: If True, an answer replaces its mask and the text is read again for the next blank. If False,
            answers stay behind the text, and later answers attend to them.
        causal: Whether the model can also continue ids without `sop`, each token attending to those before it, as
            `garrulax.forward` does by default.
    """

    masks: Mapping[str, int]
    sop: int
    end_tokens: tuple[int, ...]
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    open_ended: tuple[str, ...] = ()
    rows: int = 2
    masks_answered_at_end: frozenset[int] = frozenset()
    insert_answers: bool = True
    causal: bool = False

    def mask_indices(self, ids: Sequence[int]) -> list[int]:
        """Indices of the mask tokens in `ids`."""
        masks = set(self.masks.values())
        return [i for i, token in enumerate(ids) if token in masks]

    def positions(self, ids: Sequence[int], mask_index: int, answer_length: int) -> np.ndarray:
        """Position ids of a text followed by the beginning of the answer to one of its masks.

        Args:
            ids: The text.
            mask_index: Index in `ids` of the mask that is answered.
            answer_length: Number of tokens of the answer, `sop` included.

        Returns:
            int32 [rows, len(ids) + answer_length].
        """
        in_answer = np.arange(1, answer_length + 1)
        if ids[mask_index] in self.masks_answered_at_end:
            in_text = len(ids) - 1 + in_answer
        else:
            in_text = np.full(answer_length, mask_index)
        first = np.concatenate([np.arange(len(ids)), in_text])
        second = np.concatenate([np.zeros(len(ids), int), in_answer])
        return np.stack([first, second][: self.rows]).astype(np.int32)

    def choices(self, ids: Sequence[int], mask_index: int, answers: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
        """The inputs that score several answers to one mask in a single pass.

        Source: THUDM/GLM-130B evaluation/dataset.py, build_multiple_choice_sample.

        Args:
            ids: The text.
            mask_index: Index in `ids` of the mask that is answered.
            answers: The token ids of each answer, without `sop`.

        Returns:
            int32 arrays by name, for T = len(ids) + the length of all answers: `tokens` [T]; `positions` [rows, T];
            `choice` [T], the argument of `kernels.masks.choices` (0 in the text, i in the i-th answer); and `targets`
            [T], the token that the logits must predict (0 in the text, where nothing is scored). The score of an answer
            is the sum of the log-probabilities of its targets.
        """
        no_targets = np.zeros(len(ids), int)
        answer_positions = [self.positions(ids, mask_index, len(answer))[:, len(ids) :] for answer in answers]
        arrays: dict[str, list[Any]] = {
            "tokens": [ids, *([self.sop, *answer[:-1]] for answer in answers)],
            "targets": [no_targets, *answers],
            "choice": [no_targets, *(np.full(len(answer), i) for i, answer in enumerate(answers, 1))],
        }
        positions = np.concatenate([self.positions(ids, mask_index, 0), *answer_positions], axis=1)
        return {"positions": positions, **{name: np.concatenate(x).astype(np.int32) for name, x in arrays.items()}}


def masks(mask: int, sentence_mask: int | None, generation_mask: int | None) -> dict[str, int]:
    """`Blanks.masks` of a model that uses [MASK] for every kind without an id (None)."""
    return {
        "": mask,
        "s": mask if sentence_mask is None else sentence_mask,
        "g": mask if generation_mask is None else generation_mask,
    }
