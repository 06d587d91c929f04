"""Rows of packed documents that do not see one another (`isolate=true`).

Every document of a row is a segment, which the mask keeps apart from the others, and has positions from 0 on. So its
loss and its gradients are those of the document in a row of its own. A document that the window cuts counts from where
the row begins.
"""

from collections.abc import Sequence

import numpy as np

from garrulax.train.infill import BlankMix, InfillTokens, corrupt
from garrulax.train.rows import HostBatch, empty_batch, row_generator, write_row

_SHORTEST = 3  # tokens of a text with [CLS] in which there can be a blank


def segments_at(documents: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """The documents in some windows of a text, counted from 0 in each window.

    Args:
        documents: int64 [D + 1], as in `shards.Tokens`.
        starts: int64 [B], index in the text of each window's first token.
        length: Of a window.

    Returns:
        int32 [B, length].
    """
    found = np.searchsorted(documents, starts[:, None] + np.arange(length), side="right")
    return (found - found[:, :1]).astype(np.int32)


def isolated_causal(windows: np.ndarray, segments: np.ndarray) -> HostBatch:
    """Makes a batch for next-token prediction within each document.

    Args:
        windows: int32 [B, T + 1], plain text.
        segments: int32 [B, T + 1], the document of every token.

    Returns:
        As `batches.causal_batch`, and positions and segment, int32 [B, T]. The first token of a document is no target:
        the weight of the last token before it is 0.
    """
    index = np.arange(windows.shape[1] - 1)
    own, following = segments[:, :-1], segments[:, 1:]
    begins = np.where(np.diff(own, axis=1, prepend=-1) != 0, index, 0)
    return {
        "tokens": windows[:, :-1],
        "targets": windows[:, 1:],
        "weights": (own == following).astype(np.float32),
        "positions": (index - np.maximum.accumulate(begins, axis=1)).astype(np.int32),
        "segment": own,
    }


def isolated_infill(
    windows: np.ndarray,
    segments: np.ndarray,
    examples: Sequence[int] | np.ndarray,
    seed: int,
    ids: InfillTokens,
    length: int,
    mix: BlankMix,
) -> HostBatch:
    """Makes a blank-infilling example of every document of a window, one after the other in a row.

    Each has its own [CLS], context, blanks and answers. Documents of one or two tokens have no room for a blank and are
    left out, and so is the end of a row with so many documents that their control tokens do not fit.

    Args:
        windows: int [B, N], plain text.
        segments: int32 [B, N], the document of every token.
        examples: int [B], as for `infill.infill_batch`.
        seed: Of the run.
        ids: Control tokens.
        length: T.
        mix: Frequencies of the kinds of blanks.

    Returns:
        As `infill.infill_batch`; segment counts the documents of a row.
    """
    batch = empty_batch(len(windows), length, ids.pad)
    for row, (window, owner, example) in enumerate(zip(windows, segments, examples, strict=True)):
        rng = row_generator(seed, int(example))
        parts = np.split(window, np.flatnonzero(np.diff(owner)) + 1)
        sources = [np.concatenate([[ids.cls], part]).astype(np.int32) for part in parts]
        sources = [source for source in sources if len(source) >= _SHORTEST]
        at = 0
        for segment, source in enumerate(sources):
            needed = sum(len(other) + 2 for other in sources[segment + 1 :])  # with one blank in each
            spans = max(1, (length - at - len(source) - needed) // 2)
            if at + len(source) + 2 > length:
                break
            example_of_one = corrupt(source, rng, ids, mix, max_spans=min(spans, (length - at - len(source)) // 2))
            write_row(batch, row, *example_of_one, at=at, segment=segment)
            at += len(example_of_one[0])
    return batch
