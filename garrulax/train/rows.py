"""Rows of blank-infilling examples: how texts whose blanks are chosen become the arrays of a batch.

All examples of a batch are written at once, since numpy takes as long for a few tokens as for thousands.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

HostBatch = dict[str, np.ndarray]
_NONE = -1  # in arrays, in place of an end that is None


class Example(NamedTuple):
    """A text and its blanks.

    Attributes:
        source: int [L], the text, at least one token.
        spans: [begin, stop) of every blank, disjoint, in the order of part B.
        mask: The id that replaces a span in part A.
        start: The id in front of every span in part B.
        end: The target after every span. None for a span that is the rest of the text, which ends without an
            end-of-piece token; its last token is a target but no input.
        inputs: int [L], the input tokens of part B if they differ from `source` because of [dBLOCK].
        goes_on: Whether part B has the positions after part A, in place of those of the masks.
    """

    source: np.ndarray
    spans: Sequence[tuple[int, int]]
    mask: int
    start: int
    end: int | None
    inputs: np.ndarray | None = None
    goes_on: bool = False

    @property
    def length(self) -> int:
        """Places that it takes in a row: of each span, the tokens, its mask and, with an end, its start of piece."""
        return len(self.source) + len(self.spans) * (1 if self.end is None else 2)


def row_generator(seed: int, example: int) -> np.random.Generator:
    """The generator of all random choices of one row."""
    return np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, example], np.uint64)))


def infill_rows(rows: Sequence[Sequence[Example]], length: int, pad: int) -> HostBatch:
    """Makes a batch of examples, one after the other in each row. Nothing is random.

    Source: THUDM/GLM blocklm_utils.py, make_block_data.

    Args:
        rows: Of each row its examples; a row may have none.
        length: T, tokens in a row.
        pad: The id behind the last example of a row.

    Returns:
        The arrays of `infill.infill_batch`, with two rows of positions; segment counts the examples of a row.

    Raises:
        ValueError: If the examples of a row do not fit into it.
    """
    shape = (len(rows), length)
    batch = {
        "tokens": np.full(shape, pad, np.int32),
        "targets": np.full(shape, pad, np.int32),
        "weights": np.zeros(shape, np.float32),
        "positions": np.zeros((len(rows), 2, length), np.int32),
        "rank": np.zeros(shape, np.int32),
        "segment": np.full(shape, -1, np.int32),
    }
    examples = [example for row in rows for example in row]
    if examples:
        _write(batch, examples, _places(rows, length), [number for row in rows for number in range(len(row))])
    return batch


def _places(rows: Sequence[Sequence[Example]], length: int) -> np.ndarray:
    """The place where each example begins, counted through all rows, int64 [E]."""
    places = []
    for row, examples in enumerate(rows):
        at = 0
        for example in examples:
            places.append(row * length + at)
            at += example.length
        if at > length:
            raise ValueError(f"a row of {length} tokens cannot hold examples of {at}")
    return np.array(places, np.int64)


def _write(batch: HostBatch, examples: Sequence[Example], at: np.ndarray, segment: Sequence[int]) -> None:
    """Writes the examples into a batch of padding, each from its place on."""
    length = batch["tokens"].shape[1]
    sizes = np.array([len(e.source) for e in examples])
    first = np.cumsum(sizes) - sizes  # of each text among all texts, joined
    source = np.concatenate([e.source for e in examples])
    inputs = np.concatenate([e.source if e.inputs is None else e.inputs for e in examples])
    mask, start, end = (np.array(ids) for ids in zip(*((e.mask, e.start, _NONE if e.end is None else e.end)
                                                       for e in examples), strict=True))  # fmt: skip

    owner = np.repeat(np.arange(len(examples)), [len(e.spans) for e in examples])  # the example of each span
    begins, stops = np.array([span for e in examples for span in e.spans], np.int64).reshape(-1, 2).T
    hidden = stops - begins
    begins = begins + first[owner]
    kept = np.ones(len(source), bool)
    kept[np.repeat(begins, hidden) + _counted(hidden)] = False
    kept[begins] = True  # the masks

    # Part A: the text with masks.
    masked = source.copy()
    masked[begins] = mask[owner]
    part_a = masked[kept]
    before = np.cumsum(kept)
    split = np.diff(before[first + sizes - 1], prepend=0)  # tokens of each part A
    within_a = _counted(split)
    place_a = np.repeat(at, split) + within_a
    mask_position = before[begins] - 1 - (np.cumsum(split) - split)[owner]

    # Part B: the spans, each after a start of piece.
    has_end = end[owner] != _NONE
    pieces = hidden + has_end
    within = _counted(pieces)
    target_at = np.repeat(begins, pieces) + within
    part_b = np.where(within == 0, np.repeat(start[owner], pieces), inputs[target_at - 1])
    targets = source[np.minimum(target_at, len(source) - 1)]
    targets[(np.cumsum(pieces) - 1)[has_end]] = end[owner][has_end]
    sizes_b = np.bincount(owner, pieces, minlength=len(examples)).astype(np.int64)
    after_a = np.repeat(split, sizes_b) + _counted(sizes_b)  # place in the example
    place_b = np.repeat(at, sizes_b) + after_a
    goes_on = np.repeat(np.array([e.goes_on for e in examples]), sizes_b)
    outer = np.where(goes_on, after_a, np.repeat(mask_position, pieces))

    lengths = split + sizes_b
    everywhere = np.repeat(at, lengths) + _counted(lengths)
    outer_row = np.zeros(batch["tokens"].shape, np.int32)
    inner_row = np.zeros_like(outer_row)
    for values, place, new in (
        (batch["tokens"], place_a, part_a),
        (batch["tokens"], place_b, part_b),
        (batch["targets"], place_a, part_a),
        (batch["targets"], place_b, targets),
        (batch["weights"], place_b, 1),
        (batch["rank"], place_b, place_b % length + 1),
        (batch["segment"], everywhere, np.repeat(segment, lengths)),
        (outer_row, place_a, within_a),
        (outer_row, place_b, outer),
        (inner_row, place_b, within + 1),
    ):
        values.reshape(-1)[place] = new
    batch["positions"][:, 0], batch["positions"][:, 1] = outer_row, inner_row


def _counted(counts: np.ndarray) -> np.ndarray:
    """0, 1, ... for each of some counts, joined."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
