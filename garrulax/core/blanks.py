"""How the models that are trained on blanks read a text and write into it: which tokens, and where they stand."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Blanks:
    """The conventions of one family. A text has a mask token for every blank; an answer is `sop` and what follows.

    masks: id of the mask by kind: "" of a few words ([MASK]), "s" of sentences ([sMASK]), "g" of the rest of a text
    ([gMASK]); a model may have one id for several kinds.
    sop: id that begins an answer. ends: ids that end one, or the text.
    before: ids in front of every text. after: ids behind a text, unless it ends with a mask of a kind in `open_ended`.
    rows: rows of positions: 1, or 2 where the place in the answer has a row of its own (0 in the text).
    counting: ids of the masks whose answers' positions count on from the text; those of the others stay at the mask.
    spliced: whether an answer takes the place of its mask and the text is read again for the next blank; otherwise
    answers stand behind the text, where the later ones see them.
    causal: whether ids without `sop` may be continued as `garrulax.forward` reads them, each seeing those before it.
    """

    masks: Mapping[str, int]
    sop: int
    ends: tuple[int, ...]
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    open_ended: tuple[str, ...] = ()
    rows: int = 2
    counting: frozenset[int] = frozenset()
    spliced: bool = True
    causal: bool = False

    def places(self, ids: Sequence[int]) -> list[int]:
        """Indices of the masks in `ids`."""
        masks = set(self.masks.values())
        return [i for i, token in enumerate(ids) if token in masks]

    def positions(self, ids: Sequence[int], place: int, answer: int) -> np.ndarray:
        """Positions of a text and of the first `answer` tokens (`sop` is one) written for its mask at index `place`:
        int32 [rows, len(ids) + answer]."""
        span = np.arange(1, answer + 1)
        at = len(ids) - 1 + span if ids[place] in self.counting else np.full(answer, place)
        first = np.concatenate([np.arange(len(ids)), at])
        second = np.concatenate([np.zeros(len(ids), int), span])
        return np.stack([first, second][: self.rows]).astype(np.int32)

    def choices(self, ids: Sequence[int], place: int, answers: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
        """Several answers to the mask at index `place`, to be scored in one pass (THUDM/GLM-130B
        evaluation/dataset.py, build_multiple_choice_sample).

        Returns int32 arrays: tokens [T], positions [rows, T], choice [T] for `kernels.masks.choices`, and targets [T],
        which token the logits are to predict (0 where `choice` is 0: nothing). The score of an answer is the sum of
        its targets' log-probabilities.
        """
        empty = np.zeros(len(ids), int)
        starts = [self.positions(ids, place, len(answer))[:, len(ids) :] for answer in answers]
        arrays: dict[str, list[Any]] = {
            "tokens": [ids, *([self.sop, *answer[:-1]] for answer in answers)],
            "targets": [empty, *answers],
            "choice": [empty, *(np.full(len(answer), i) for i, answer in enumerate(answers, 1))],
        }
        positions = np.concatenate([self.positions(ids, place, 0), *starts], axis=1)
        return {"positions": positions, **{name: np.concatenate(x).astype(np.int32) for name, x in arrays.items()}}


def masks(mask: int, sentence_mask: int | None, generation_mask: int | None) -> dict[str, int]:
    """`Blanks.masks` of a model whose [MASK] serves for the kinds that have no id of their own."""
    return {
        "": mask,
        "s": mask if sentence_mask is None else sentence_mask,
        "g": mask if generation_mask is None else generation_mask,
    }
