"""Rows of documents that do not see one another (`isolate=true` and `packing=first_fit`).

Every document of a row is a segment, which the mask keeps apart from the others, and has positions from 0 on. So its
loss and its gradients are those of the document in a row of its own. A document that is cut counts from where
its piece begins.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from garrulax.train.infill import BlankMix, complete, draw_blanks, text_of, with_positions
from garrulax.train.infill_tokens import InfillTokens
from garrulax.train.packing import Packing, pack
from garrulax.train.rows import Example, HostBatch, infill_rows, row_generator
from garrulax.train.tokens import Tokens

_SHORTEST = 2  # tokens of a text in which there can be a blank


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
        As `components.causal_batch`, and positions and segment, int32 [B, T]. The first token of a document is no
        target: the weight of the last token before it is 0.
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


def packed_causal(tokens: Tokens, packing: Packing, rows: np.ndarray, length: int) -> tuple[HostBatch, np.ndarray]:
    """Makes a batch for next-token prediction of packed rows, in which every place has a token and its target.

    A document of N tokens takes N - 1 places: its last token is only a target. A document that is cut goes on in its
    next piece with the last target of the piece before, so that each of its tokens but the first is a target once.

    Args:
        tokens: The text.
        packing: From `causal_packing`.
        rows: int64 [B], numbers of the rows; -1 is an empty row.
        length: T.

    Returns:
        The batch, as of `isolated_causal`; segment is -1 and the weight 0 for padding. And int64 [B, T], the index in
        the text of every token; -1 for padding.
    """
    row, piece = packing.pieces(rows)
    sizes = packing.sizes[piece]
    ends = np.cumsum(sizes)
    taken = ends - sizes  # places of the pieces before
    first = np.searchsorted(row, np.arange(len(rows)))  # the first piece of each row
    begins = row * length + taken - np.append(taken, ends[-1:])[first][row]
    within = np.arange(len(taken) and ends[-1]) - np.repeat(taken, sizes)
    place, index = np.repeat(begins, sizes) + within, np.repeat(packing.starts[piece], sizes) + within
    shape = (len(rows), length)
    batch = {
        "tokens": np.zeros(shape, np.int32),
        "targets": np.zeros(shape, np.int32),
        "weights": np.zeros(shape, np.float32),
        "positions": np.zeros(shape, np.int32),
        "segment": np.full(shape, -1, np.int32),
    }
    indices = np.full(shape, -1, np.int64)
    number = np.arange(len(row)) - first[row]
    for values, new in (
        (batch["tokens"], tokens.take(index)),
        (batch["targets"], tokens.take(index + 1)),
        (batch["weights"], 1),
        (batch["positions"], within),
        (batch["segment"], np.repeat(number, sizes)),
        (indices, index),
    ):
        values.reshape(-1)[place] = new
    return batch, indices


def causal_packing(tokens: Tokens, length: int, seed: int) -> Packing:
    """Packs documents into rows of `length` tokens with their targets, for `packed_causal`.

    Raises:
        ValueError: If no document has two tokens.
    """
    targets = tokens.documents - np.arange(len(tokens.documents))  # a document has one target fewer than tokens
    packing = pack(targets, length, length, seed, room=lambda sizes: sizes)
    owner = np.searchsorted(targets, packing.starts, side="right") - 1
    return dataclasses.replace(packing, starts=packing.starts + owner)


def infill_packing(tokens: Tokens, length: int, seed: int, ids: InfillTokens) -> Packing:
    """Packs documents into rows of `length` tokens with room for their blanks, for `infill_documents`.

    Raises:
        ValueError: If no document is long enough for a blank.
    """
    longest = max(size for size in range(1, length) if _room(size, ids) <= length)
    return pack(tokens.documents, length, longest, seed, lambda sizes: _room(sizes, ids), shortest=2)


def _room(size: Any, ids: InfillTokens) -> Any:
    """Places for `size` tokens of a document: its [CLS], and two for each of as many blanks as it will have."""
    return size + ids.first + 2 * (1 + size * 6 // 100)  # 1.25 * 15 % / 3.16, see `infill.source_window`


def isolated_infill(
    windows: np.ndarray,
    segments: np.ndarray,
    examples: Sequence[int] | np.ndarray,
    seed: int,
    ids: InfillTokens,
    length: int,
    mix: BlankMix,
    completions: np.ndarray | None = None,
) -> HostBatch:
    """Makes a blank-infilling example of every document of a window, one after the other in a row.

    Args:
        windows: int [B, N], plain text.
        segments: int32 [B, N], the document of every token.
        examples: int [B], as for `infill.infill_batch`.
        seed: Of the run.
        ids: Control tokens.
        length: T.
        mix: Frequencies of the kinds of blanks.
        completions: int [B, N], how many tokens behind this one the completion of its document begins; None if no
            document has a prompt.

    Returns:
        As `infill_documents`.
    """
    rows = []
    for row, (window, owner) in enumerate(zip(windows, segments, strict=True)):
        cuts = np.flatnonzero(np.diff(owner)) + 1
        prompts = [0] * (len(cuts) + 1) if completions is None else completions[row][[0, *cuts]].tolist()
        rows.append(list(zip(np.split(window, cuts), prompts, strict=True)))
    return infill_documents(rows, examples, seed, ids, length, mix)


def infill_documents(
    rows: Sequence[Sequence[tuple[np.ndarray, int]]],
    examples: Sequence[int] | np.ndarray,
    seed: int,
    ids: InfillTokens,
    length: int,
    mix: BlankMix,
) -> HostBatch:
    """Makes a row of blank-infilling examples of several documents each.

    Each has its own [CLS], context, blanks and answers. A document with a prompt has its completion as one answer
    (`infill.complete`); a piece of one that is nothing but prompt is left out. So are pieces of one token, which have
    no room for a blank, and the end of a row with so many documents that their control tokens do not fit.

    Args:
        rows: Of each row its documents: int [N], the tokens, and how many of them are the prompt.
        examples: int [B], as for `infill.infill_batch`.
        seed: Of the run.
        ids: Control tokens.
        length: T.
        mix: Frequencies of the kinds of blanks.

    Returns:
        As `infill.infill_batch`; segment counts the documents of a row.
    """
    made = []
    for documents, example in zip(rows, examples, strict=True):
        rng = row_generator(seed, int(example))
        made.append(list(_examples(documents, rng, ids, length, mix)))
    return with_positions(infill_rows(made, length, ids.pad), ids)


def _examples(
    documents: Sequence[tuple[np.ndarray, int]], rng: np.random.Generator, ids: InfillTokens, length: int, mix: BlankMix
) -> Iterator[Example]:
    """The examples of one row."""
    used = [(tokens, prompt) for tokens, prompt in documents if len(tokens) >= _SHORTEST and prompt < len(tokens)]
    needed = sum(len(tokens) + ids.first + 2 for tokens, _ in used)  # with one blank in each
    left = length
    for tokens, prompt in used:
        source = text_of(tokens, ids)
        needed -= len(source) + 2
        room = left - len(source)
        if room < 2:
            return
        if prompt > 0:
            example = complete(source, prompt + ids.first, ids)
        else:
            spans = max(1, (room - needed) // 2)
            example = draw_blanks(source, rng, ids, mix, max_spans=min(spans, room // 2))
        left -= example.length
        yield example
