"""Batches for the two pre-training objectives: causal language modelling and GLM's blank infilling.

Blank infilling (Du et al., 2022, section 2.1; THUDM/GLM): spans of the text are replaced by a mask token each, which
gives part A; part B holds the spans in random order, each behind a start-of-piece token, to be predicted token by
token. With spans [x3] and [x5 x6] of x1..x6, [M] the mask, [S] start and [E] end of piece:

    tokens      x1 x2 [M] x4 [M] | [S] x5 x6  | [S] x3
    targets                      | x5  x6 [E] | x3  [E]
    position    0  1  2   3  4   | 4   4  4   | 2   2     in the corrupted text; that of the span's mask in part B
                0  0  0   0  0   | 1   2  3   | 1   2     within the span
    rank        0  0  0   0  0   | 6   7  8   | 9   10    a token attends to tokens of its rank or lower

Everything here is numpy on the host. A row depends on the text, the seed and the number of the example, and on nothing
else: not on the process that makes it, not on the rows beside it.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

Batch = dict[str, np.ndarray]

MASK_RATIO = 0.15
_SENTENCE_ENDS = ".?!;:。？！；：…\n"
# Span lengths follow Poisson(3) restricted to 1..39.
_LENGTHS = np.arange(1, 40)
_LENGTH_CDF = np.cumsum(np.exp(_LENGTHS * np.log(3.0) - np.cumsum(np.log(_LENGTHS))))
_LENGTH_CDF /= _LENGTH_CDF[-1]


def causal(windows: np.ndarray) -> Batch:
    """Next-token prediction: windows int32 [B, T + 1] to tokens, targets int32 [B, T] and weights float32 [B, T]."""
    return {
        "tokens": windows[:, :-1],
        "targets": windows[:, 1:],
        "weights": np.ones((len(windows), windows.shape[1] - 1), np.float32),
    }


class Vocabulary(Protocol):
    """What blank infilling needs of a tokenizer (any `garrulax.hub.tokenizers.Tokenizer` has it)."""

    vocab: int
    eos: int | None
    pad: int | None
    specials: dict[str, int]

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for."""
        ...


@dataclass(frozen=True)
class InfillTokens:
    """The ids that blank infilling writes, and where sentences end.

    `mask`, `sentence_mask` and `document_mask` stand for token-, sentence- and document-level blanks; models without
    task masks use one id for all three. `start`, `end`: of a span, in part B. `sentence_ends`: bool [V], ids after
    which a sentence ends.
    `block` (optional) replaces single inputs of a span.
    """

    cls: int
    mask: int
    sentence_mask: int
    document_mask: int
    start: int
    end: int
    eos: int
    pad: int
    sentence_ends: np.ndarray
    block: int | None = None

    @classmethod
    def of(cls, tokenizer: "Vocabulary", task_mask: bool = True) -> "InfillTokens":
        """The ids that a tokenizer with GLM's control tokens has for them.

        task_mask: whether sentences and documents are masked by [sMASK] and [gMASK] or, like tokens, by [MASK].
        Raises ValueError that lists the control tokens the tokenizer lacks.
        """
        specials = tokenizer.specials
        names = {
            "cls": "[CLS]",
            "mask": "[MASK]",
            "sentence_mask": "[sMASK]" if task_mask else "[MASK]",
            "document_mask": "[gMASK]" if task_mask else "[MASK]",
            "start": "<|startofpiece|>",
            "end": "<|endofpiece|>",
        }
        missing = [name for name in names.values() if name not in specials]
        eos = tokenizer.eos
        if missing or eos is None:
            missing += ["an end-of-text token"] if eos is None else []
            raise ValueError(
                f"blank infilling needs control tokens that this tokenizer lacks: {', '.join(missing)}; "
                "train one with specials=GLM_SPECIALS"
            )
        ends = np.array([_ends_sentence(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab)])
        return cls(
            **{field: specials[name] for field, name in names.items()},
            eos=eos,
            pad=eos if tokenizer.pad is None else tokenizer.pad,
            sentence_ends=ends,
            block=specials.get("[dBLOCK]"),
        )


@dataclass(frozen=True)
class Mix:
    """What share of the rows is corrupted how, and the numbers of each way. Defaults: GLM-10B's.

    Attributes:
      token, sentence, document: relative frequencies of the three kinds of blanks.
      document_ratio: a document-level blank covers between this share and all of the text.
      interior: probability that it lies inside the text and not at its end.
      block: probability that a span's input token (token-level) is replaced by [dBLOCK].
    """

    token: float = 0.5
    sentence: float = 0.3
    document: float = 0.2
    document_ratio: float = 0.25
    interior: float = 0.5
    block: float = 0.0

    def __post_init__(self):
        shares = (self.token, self.sentence, self.document)
        if min(shares) < 0 or sum(shares) <= 0:
            raise ValueError(f"the shares of a mix must not be negative nor all zero, are {shares}")
        for name in ("document_ratio", "interior", "block"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} of a mix must be between 0 and 1, is {getattr(self, name)}")


def source_window(length: int) -> int:
    """The `Sampler` window whose corrupted rows fit into `length` tokens, rarely giving up a span.

    A row is [CLS], window + 1 tokens, and two more for every span: its mask and its start of piece. Spans are 3.16
    tokens long on average and cover 15 %; a quarter more than that, and four, are allowed for.
    """
    window = int((length - 8) / (1 + 2 * 1.25 * MASK_RATIO / 3.16)) - 2
    if window < 8:
        raise ValueError(f"rows of {length} tokens are too short for blank infilling: use 24 or more")
    return window


def infill(
    windows: np.ndarray,
    examples: Sequence[int] | np.ndarray,
    seed: int,
    ids: InfillTokens,
    length: int,
    mix: Mix | None = None,
) -> Batch:
    """Corrupts every row of text into a blank-infilling example of `length` tokens.

    Args:
      windows: int [B, N], plain text, perhaps with eos between documents.
      examples: int [B], the numbers of these rows in the run (`Sampler.examples_at(step)`).
      seed: with the number of the example decides all random choices.
      ids: control tokens.
      length: T, at least N + 3; spans that would not fit are left alone (`source_window` keeps that rare).
      mix: kinds of blanks; default `Mix()`.

    Returns a dict of
      tokens, targets: int32 [B, T], aligned: the logits at t predict targets[:, t];
      weights: float32 [B, T], 1 where the loss counts;
      positions: int32 [B, 2, T], place in the corrupted text and place within the span;
      rank: int32 [B, T], 0 in part A and t + 1 in part B: t attends to s where rank[s] <= rank[t];
      segment: int32 [B, T], 0 for tokens and -1 for padding, which also has position and rank 0.

    Raises ValueError if a row cannot fit.
    """
    mix = mix or Mix()
    size = windows.shape[1] + 1
    if length < size + 2:
        raise ValueError(f"a row of {length} tokens cannot hold a window of {size - 1}: it needs {size + 2} or more")
    if mix.block and ids.block is None:
        raise ValueError("the mix asks for [dBLOCK], which this tokenizer lacks")
    batch = empty_batch(len(windows), length, ids.pad)
    for row, (window, example) in enumerate(zip(windows, examples, strict=True)):
        rng = np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, int(example)], np.uint64)))
        source = np.concatenate([[ids.cls], window]).astype(np.int32)
        fill_row(batch, row, *corrupt(source, rng, ids, mix, most=(length - size) // 2))
    return batch


def empty_batch(rows: int, length: int, pad: int) -> Batch:
    """A batch of padding: the arrays that `infill` returns, for `fill_row` to write into."""
    return {
        "tokens": np.full((rows, length), pad, np.int32),
        "targets": np.full((rows, length), pad, np.int32),
        "weights": np.zeros((rows, length), np.float32),
        "positions": np.zeros((rows, 2, length), np.int32),
        "rank": np.zeros((rows, length), np.int32),
        "segment": np.full((rows, length), -1, np.int32),
    }


def fill_row(
    batch: Batch, row: int, tokens: np.ndarray, targets: np.ndarray, positions: np.ndarray, split: int
) -> None:
    """Writes one example, as `assemble` returns it, over the padding of a row."""
    size = len(tokens)
    batch["tokens"][row, :size] = tokens
    batch["targets"][row, :size] = targets
    batch["weights"][row, split:size] = 1
    batch["positions"][row, :, :size] = positions
    batch["rank"][row, split:size] = np.arange(split + 1, size + 1)
    batch["segment"][row, :size] = 0


Example = tuple[np.ndarray, np.ndarray, np.ndarray, int]  # tokens, targets, positions, split: see assemble


def corrupt(source: np.ndarray, rng: np.random.Generator, ids: InfillTokens, mix: Mix, most: int) -> Example:
    """Draws a kind of blanks and the blanks, at most `most`, for one text [L] that starts with [CLS]."""
    shares = np.array([mix.token, mix.sentence, mix.document])
    kind = int(np.searchsorted(np.cumsum(shares) / shares.sum(), rng.random(), side="right"))
    if kind == 2:
        return _document(source, rng, ids, mix)
    if kind == 1:
        spans = sentence_spans(source, rng, ids)[:most]
        if spans:
            return assemble(source, spans, ids.sentence_mask, ids.start, ids.end)
        # A text without any end of a sentence has no sentences to hide, but it has tokens.
    spans = token_spans(source, rng, ids.eos, most)
    rng.shuffle(spans)
    inputs = source
    if mix.block and ids.block is not None:
        inputs = np.where(rng.random(len(source)) < mix.block, ids.block, source)
    return assemble(source, spans, ids.mask, ids.start, ids.end, inputs)


def assemble(
    source: np.ndarray,
    spans: Sequence[tuple[int, int]],
    mask: int,
    start: int,
    end: int | None,
    inputs: np.ndarray | None = None,
) -> Example:
    """Part A and part B of a text with given blanks: no randomness.

    Args:
      source: int [L], the text.
      spans: [begin, stop) of every blank, disjoint, in the order in which part B lists them.
      mask: the id that replaces a span in part A.
      start: the id in front of every span in part B.
      end: the target behind every span; None for a span that is the rest of the text and brings its own eos: then its
        last token is only a target.
      inputs: what part B shows in place of `source`, if it differs ([dBLOCK]).

    Returns (tokens [T], targets [T], positions [2, T], split): part B starts at `split`. Targets of part A, which no
    loss looks at, repeat its tokens. Source: THUDM/GLM blocklm_utils.py, make_block_data.
    """
    inputs = source if inputs is None else inputs
    shown: list[Any] = []
    mask_place: dict[int, int] = {}
    at = 0
    place = 0  # in the corrupted text
    for begin, stop in sorted(spans):
        shown += [source[at:begin], [mask]]
        place += begin - at
        mask_place[begin] = place
        place += 1
        at = stop
    shown.append(source[at:])
    part_a = np.concatenate(shown)
    split = len(part_a)
    tokens: list[Any] = [part_a]
    targets: list[Any] = [part_a]
    outer, inner = [np.arange(split)], [np.zeros(split, int)]
    for begin, stop in spans:
        if end is None:
            tokens += [[start], inputs[begin : stop - 1]]
            targets += [source[begin:stop]]
        else:
            tokens += [[start], inputs[begin:stop]]
            targets += [source[begin:stop], [end]]
        size = stop - begin + (end is not None)
        outer.append(np.full(size, mask_place[begin]))
        inner.append(np.arange(1, size + 1))
    positions = np.stack([np.concatenate(outer), np.concatenate(inner)])
    return np.concatenate(tokens), np.concatenate(targets), positions, split


def token_spans(source: np.ndarray, rng: np.random.Generator, eos: int, most: int) -> list[tuple[int, int]]:
    """Spans of Poisson length over 15 % of a text, in text order, at most `most`.

    They never touch, never hold [CLS] (index 0), an eos or the last token. Lengths are drawn until they sum up to the
    15 %, the last one whole; each goes to a document of the text at random, weighted by the room left there.
    """
    room = _documents(source, eos)
    free = np.array([stop - begin for begin, stop in room])
    chosen: list[list[int]] = [[] for _ in room]
    for span in _span_lengths(int(MASK_RATIO * len(source)), rng)[:most]:
        fits = np.where(free >= span, free, 0)
        if not fits.any():
            continue
        place = int(np.searchsorted(np.cumsum(fits), rng.integers(fits.sum()), side="right"))
        chosen[place].append(span)
        free[place] -= span + 1  # and a token that keeps it apart from the next
    spans = []
    for (begin, stop), lengths in zip(room, chosen, strict=True):
        slack = stop - begin - sum(lengths) - len(lengths) + 1
        gaps = np.sort(rng.integers(0, slack + 1, len(lengths)))
        for gap, span in zip(gaps, lengths, strict=True):
            spans.append((int(begin + gap), int(begin + gap + span)))
            begin += span + 1
    return spans


def sentence_spans(source: np.ndarray, rng: np.random.Generator, ids: InfillTokens) -> list[tuple[int, int]]:
    """Whole sentences of a text, drawn in random order until they make up 15 % of it. They may touch.

    What follows the last sentence end of a document is not a sentence, for a window may cut it anywhere.
    """
    ends = np.flatnonzero(ids.sentence_ends[source] | (source == ids.eos))
    begins = np.concatenate([[1], ends[:-1] + 1]) if len(ends) else ends
    stops = np.where(source[ends] == ids.eos, ends, ends + 1)
    stops = np.minimum(stops, len(source) - 1)  # the last token stays
    sentences = [(int(begin), int(stop)) for begin, stop in zip(begins, stops, strict=True) if stop > begin]
    rng.shuffle(sentences)
    covered = np.cumsum([stop - begin for begin, stop in sentences])
    return sentences[: int(np.searchsorted(covered, int(MASK_RATIO * len(source)))) + 1]


def _document(source: np.ndarray, rng: np.random.Generator, ids: InfillTokens, mix: Mix) -> Example:
    """One long blank: the rest of the text, or a span inside of it if it is a single document."""
    size = len(source)
    blank = int(rng.integers(min(int(mix.document_ratio * size), size - 2), size - 1))
    blank = max(blank, 1)
    if rng.random() < mix.interior and ids.eos not in source[1:-1]:
        begin = int(rng.integers(1, size - blank))
        return assemble(source, [(begin, begin + blank)], ids.document_mask, ids.start, ids.end)
    return assemble(source, [(size - blank, size)], ids.document_mask, ids.start, None)


def _documents(source: np.ndarray, eos: int) -> list[tuple[int, int]]:
    """[begin, stop) of the stretches that spans may lie in: between eos, without [CLS] and the last token."""
    cuts = [0, *np.flatnonzero(source[1:-1] == eos) + 1, len(source) - 1]
    return [(int(a) + 1, int(b)) for a, b in itertools.pairwise(cuts)]


def _span_lengths(total: int, rng: np.random.Generator) -> list[int]:
    """Lengths until they sum up to `total`, at least one."""
    lengths = _LENGTHS[np.searchsorted(_LENGTH_CDF, rng.random(max(total, 1)))]  # a token each is enough
    return lengths[: int(np.searchsorted(np.cumsum(lengths), total)) + 1].tolist()


def _ends_sentence(piece: bytes) -> bool:
    return any(mark in piece.decode("utf-8", "replace") for mark in _SENTENCE_ENDS)
