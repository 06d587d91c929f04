"""Arrays for KTO: answers that are labelled desirable or not, each beside an answer to another prompt."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from garrulax.align.answers import AnswerFormat, ranking, row_arrays
from garrulax.align.conversations import Example
from garrulax.core.config import ModelConfig
from garrulax.train.rows import HostBatch

Labelled = tuple[Example, bool]


def labelled(record: Mapping[str, Any], form: AnswerFormat, where: str) -> list[Labelled]:
    """The answers of a record, and whether each is desirable; a pair is one of each kind (see `align.answers`).

    Args:
        record: As for `answers.ranking`, like the others.
        form: See there.
        where: See there.

    Raises:
        ValueError: If the record has another form.
    """
    if "label" not in record:
        if "chosen" in record and "rejected" in record:
            both = ranking(record, form, where).answers
            return [(both[0], True), (both[1], False)]
        raise ValueError(f"{where} has the keys {', '.join(record)}: give prompt, completion and label (true or "
                         "false), or prompt, chosen and rejected")  # fmt: skip
    missing = [name for name in ("prompt", "completion") if name not in record]
    if missing:
        raise ValueError(f"{where} has a label, but no {' and no '.join(missing)}")
    if not isinstance(record["label"], bool):
        raise ValueError(f"{where}: label={record['label']!r:.60} is neither true nor false")
    return [(form.example(record["prompt"], record["completion"], where), record["label"])]


def labelled_arrays(
    answers: Sequence[Labelled], window: int, config: ModelConfig | None = None
) -> tuple[HostBatch, dict[str, int]]:
    """Answers as arrays for `objectives.kto_objective`.

    Each row also has its prompt followed by the next answer to another prompt. The KL is estimated on these mismatched
    answers (Ethayarajh et al. 2024, arXiv 2402.01306).

    Args:
        answers: From `labelled`.
        window: Greatest number of tokens of a row.
        config: Of a model whose answers are blanks; None for one that reads from left to right.

    Returns:
        tokens, targets int32 and weights float32 [N, 2, T], for blanks also positions, rank and segment; desirable,
        float32 [N]; and how many were left out, by why.

    Raises:
        ValueError: If no answer fits, or all have one prompt.
    """
    kept = [one for one in answers if len(one[0]) <= window + 1]
    if not kept:
        raise ValueError(f"no answer fits into window={window}")
    parts = [_parts(example) for example, _ in kept]
    if all(prompt == parts[0][0] for prompt, _ in parts):
        raise ValueError("all answers are to one prompt: KTO compares with answers to other prompts; give two or more "
                         "(if it is the held-out ones, name others with --valid)")  # fmt: skip
    rows, count = [], len(kept)
    for i, (prompt, _) in enumerate(parts):
        other = next(text for p, text in (parts[(i + k) % count] for k in range(1, count)) if p != prompt)
        other = other[: window + 1 - len(prompt)]
        mismatched = Example([*prompt, *other], [False] * len(prompt) + [True] * len(other))
        rows.append(row_arrays([kept[i][0], mismatched], window, config))
    arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    desirable = np.array([good for _, good in kept], np.float32)
    return {**arrays, "desirable": desirable}, {"too long": len(answers) - count}


def _parts(example: Example) -> tuple[list[int], list[int]]:
    """The ids of the prompt, and those of the answer."""
    first = example.mask.index(True)
    return example.tokens[:first], example.tokens[first:]
