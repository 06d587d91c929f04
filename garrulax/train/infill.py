"""Batches for GLM's blank infilling (Du et al., 2022, section 2.1; THUDM/GLM).

In part A of a row, every hidden span of the text is replaced by one mask token. Part B lists the spans in random
order, each after a start-of-piece token, and is predicted token by token. For the text x1..x6 with the spans [x3] and
[x5 x6], the mask [M], start of piece [S] and end of piece [E]:

    tokens      x1 x2 [M] x4 [M] | [S] x5 x6  | [S] x3
    targets                      | x5  x6 [E] | x3  [E]
    position    0  1  2   3  4   | 4   4  4   | 2   2     in part A; in part B the position of the span's mask
                0  0  0   0  0   | 1   2  3   | 1   2     within the span; 0 in part A
    rank        0  0  0   0  0   | 6   7  8   | 9   10    a token attends to tokens of its own or a lower rank

This is numpy on the host. A row depends only on its text, its example number and the seed.
"""

import bisect
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from garrulax.train.infill_tokens import InfillTokens
from garrulax.train.rows import Example, HostBatch, infill_rows, row_generator

MASK_RATIO = 0.15  # share of the tokens to hide
# The distribution of span lengths: Poisson(3) restricted to 1..39.
_LENGTHS = np.arange(1, 40)
_LENGTH_CDF = np.cumsum(np.exp(_LENGTHS * np.log(3.0) - np.cumsum(np.log(_LENGTHS))))
_LENGTH_CDF /= _LENGTH_CDF[-1]


@dataclass(frozen=True)
class BlankMix:
    """How often each kind of blanks is drawn, and the parameters of each kind. The defaults are GLM-10B's.

    Attributes:
        token: Relative frequency of rows with token-level blanks (short spans).
        sentence: Relative frequency of rows with sentence-level blanks (whole sentences).
        document: Relative frequency of rows with a document-level blank (one long span).
        document_ratio: A document-level blank covers between this share and all of the text.
        interior: Probability that a document-level blank lies inside the text instead of at its end.
        block: Probability that [dBLOCK] replaces an input token of a token-level span.
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

    @functools.cached_property
    def cumulative(self) -> list[float]:
        """The shares of rows with blanks of each kind and of the kinds before it: token, sentence, document."""
        shares = np.array([self.token, self.sentence, self.document])
        return (np.cumsum(shares) / shares.sum()).tolist()


#: GLM-130B's (Zeng et al. 2023, section 2.2): [MASK] for short spans in 30 % of the rows; in the others [gMASK] for the
#: rest of the text, whose length is uniform. ChatGLM-6B's is not published.
GLM_130B = BlankMix(token=0.3, sentence=0.0, document=0.7, document_ratio=0.0, interior=0.0)


def source_window(length: int) -> int:
    """The `Sampler` window for rows of `length` tokens: nearly always all spans fit into the row.

    A row has [CLS], window + 1 tokens, and two more for every span: its mask and its start of piece. Spans cover 15 %
    of the text and are 3.16 tokens long on average; a quarter more spans than that fit into the row, plus four.

    Args:
        length: T, tokens in a row.

    Raises:
        ValueError: If the row is too short for any window.
    """
    window = int((length - 8) / (1 + 2 * 1.25 * MASK_RATIO / 3.16)) - 2
    if window < 8:
        raise ValueError(f"rows of {length} tokens are too short for blank infilling: use 24 or more")
    return window


def infill_batch(
    windows: np.ndarray,
    examples: Sequence[int] | np.ndarray,
    seed: int,
    ids: InfillTokens,
    length: int,
    mix: BlankMix | None = None,
) -> HostBatch:
    """Makes a blank-infilling example of `length` tokens from every row of text.

    Args:
        windows: int [B, N], plain text, which may have eos between documents.
        examples: int [B], the numbers of these rows in the run (`Sampler.examples_at(step)`).
        seed: Of the run; together with the number of the example it decides all random choices.
        ids: Control tokens.
        length: T, at least N + 3. Spans that do not fit are not hidden (`source_window` makes that rare).
        mix: Frequencies of the kinds of blanks; None is `BlankMix()`.

    Returns:
        A dict of
        tokens: int32 [B, T];
        targets: int32 [B, T], predicted by the logits of the same index;
        weights: float32 [B, T], 1 for the targets that count in the loss, else 0;
        positions: int32 [B, 2, T], in the corrupted text and within the span; [B, T] if `ids.rows` is 1;
        rank: int32 [B, T], 0 in part A and t + 1 in part B; t attends to s if rank[s] <= rank[t];
        segment: int32 [B, T], 0 for tokens and -1 for padding. Padding has position 0 and rank 0.

    Raises:
        ValueError: If `length` is too short for a window, or [dBLOCK] is wanted and missing.
    """
    mix = mix or BlankMix()
    size = windows.shape[1] + ids.first
    if length < size + 2:
        raise ValueError(f"a row of {length} tokens cannot hold a window of {size - 1}: it needs {size + 2} or more")
    if mix.block and ids.block is None:
        raise ValueError("the mix asks for [dBLOCK], which this tokenizer lacks")
    rows = []
    for window, example in zip(windows, examples, strict=True):
        rng = row_generator(seed, int(example))
        rows.append([draw_blanks(text_of(window, ids), rng, ids, mix, max_spans=(length - size) // 2)])
    return with_positions(infill_rows(rows, length, ids.pad), ids)


def text_of(tokens: np.ndarray, ids: InfillTokens) -> np.ndarray:
    """The tokens of a text, int32, after [CLS] where the model has it."""
    return (tokens if ids.cls is None else np.concatenate([[ids.cls], tokens])).astype(np.int32)


def with_positions(batch: HostBatch, ids: InfillTokens) -> HostBatch:
    """The batch with as many rows of positions as the model reads."""
    return batch if ids.rows == 2 else {**batch, "positions": batch["positions"][:, 0]}


def draw_blanks(
    source: np.ndarray, rng: np.random.Generator, ids: InfillTokens, mix: BlankMix, max_spans: int
) -> Example:
    """Draws the kind of blanks and then the blanks for one text.

    Args:
        source: int [L], the text, which starts with [CLS] where the model has it.
        rng: For all random choices.
        ids: Control tokens.
        mix: Frequencies of the kinds of blanks.
        max_spans: Greatest number of blanks.
    """
    kind = bisect.bisect_right(mix.cumulative, rng.random())
    if kind == 2:
        return _document(source, rng, ids, mix)
    if kind == 1:
        spans = sentence_spans(source, rng, ids)[:max_spans]
        if spans:
            return Example(source, spans, ids.sentence_mask, ids.start, ids.end)
        # A text in which no sentence ends gets token-level blanks instead.
    spans = token_spans(source, rng, ids.eos, max_spans, ids.first)
    rng.shuffle(spans)
    inputs = None
    if mix.block and ids.block is not None:
        inputs = np.where(rng.random(len(source)) < mix.block, ids.block, source)
    return Example(source, spans, ids.mask, ids.start, ids.end, inputs)


def complete(source: np.ndarray, prompt: int, ids: InfillTokens) -> Example:
    """A prompt and its completion: the completion is the answer to a [gMASK] behind the prompt, and ends with it.

    Source: THUDM/chatglm-6b, tokenization_chatglm.py, build_inputs_with_special_tokens.

    Args:
        source: int [L], as for `draw_blanks`; an eos at its end is left out, since the end of the answer stands for it.
        prompt: Tokens of it that are the prompt, [CLS] included; less than L.
        ids: Control tokens.
    """
    size = len(source) - (source[-1] == ids.eos and len(source) > prompt + 1)
    return Example(source[:size], [(prompt, size)], ids.document_mask, ids.start, ids.end, goes_on=ids.goes_on)


def token_spans(
    source: np.ndarray, rng: np.random.Generator, eos: int, max_spans: int, first: int = 1
) -> list[tuple[int, int]]:
    """Draws token-level blanks: spans of Poisson length that cover 15 % of a text.

    Lengths are drawn until their sum reaches the 15 %. Each span is put into a random document of the text, with
    probabilities in proportion to the free tokens there.

    Args:
        source: int [L], the text, which starts with [CLS].
        rng: For all random choices.
        eos: Id of the token between documents.
        max_spans: Greatest number of spans.
        first: Index of the first token that may be hidden, 1 behind [CLS].

    Returns:
        [begin, stop) of every span, in the order of the text. Between two spans is at least one token; no span contains
        [CLS], an eos or the last token.
    """
    documents = _documents(source, eos, first)
    lengths = _span_lengths(int(MASK_RATIO * len(source)), rng)[:max_spans]
    spans = []
    for (begin, stop), chosen in zip(documents, _shared_out(lengths, documents, rng), strict=True):
        if not chosen:
            continue
        slack = stop - begin - sum(chosen) - len(chosen) + 1
        gaps = np.sort(rng.integers(0, slack + 1, len(chosen)))  # free tokens of the document before each span
        for gap, span in zip(gaps.tolist(), chosen, strict=True):
            spans.append((begin + gap, begin + gap + span))
            begin += span + 1
    return spans


def _shared_out(
    lengths: Sequence[int], documents: Sequence[tuple[int, int]], rng: np.random.Generator
) -> list[list[int]]:
    """The spans of each document: every span goes to one in which it fits, with the probability of its free tokens."""
    free = [stop - begin for begin, stop in documents]
    if len(free) == 1:
        return [_all_in_one(lengths, free[0], rng)]
    chosen: list[list[int]] = [[] for _ in documents]
    for span in lengths:
        fits = [room if room >= span else 0 for room in free]  # a few numbers: lists are faster than arrays
        if not any(fits):
            continue
        before = list(itertools.accumulate(fits))
        document = bisect.bisect_right(before, int(rng.integers(before[-1])))
        chosen[document].append(span)
        free[document] -= span + 1  # one more token, between this span and the next
    return chosen


def _all_in_one(lengths: Sequence[int], free: int, rng: np.random.Generator) -> list[int]:
    """`_shared_out` of one document, with the same draws, though they decide nothing: all at once is faster."""
    chosen, rooms = [], []
    for span in lengths:
        if span <= free:
            chosen.append(span)
            rooms.append(free)
            free -= span + 1
    if rooms:
        rng.integers(rooms)
    return chosen


def sentence_spans(source: np.ndarray, rng: np.random.Generator, ids: InfillTokens) -> list[tuple[int, int]]:
    """Draws sentence-level blanks: whole sentences, in random order, until they make up 15 % of a text.

    The text after the last sentence end is no sentence, since the window may have cut it off anywhere.

    Args:
        source: int [L], the text, which starts with [CLS].
        rng: For the order of the sentences.
        ids: Control tokens, and the tokens that end a sentence.

    Returns:
        [begin, stop) of every sentence, in the order drawn. Two of them may be adjacent.
    """
    ends = np.flatnonzero(ids.sentence_ends[source] | (source == ids.eos))
    begins = np.concatenate([[ids.first], ends[:-1] + 1]) if len(ends) else ends
    stops = np.where(source[ends] == ids.eos, ends, ends + 1)
    stops = np.minimum(stops, len(source) - 1)  # never hide the last token
    sentences = [(int(begin), int(stop)) for begin, stop in zip(begins, stops, strict=True) if stop > begin]
    rng.shuffle(sentences)
    covered = np.cumsum([stop - begin for begin, stop in sentences])
    return sentences[: int(np.searchsorted(covered, int(MASK_RATIO * len(source)))) + 1]


def _document(source: np.ndarray, rng: np.random.Generator, ids: InfillTokens, mix: BlankMix) -> Example:
    """One long blank: the rest of the text or, if the text is a single document, perhaps a span inside it."""
    size, first = len(source), ids.first
    blank = int(rng.integers(min(int(mix.document_ratio * size), size - 1 - first), size - first))
    blank = max(blank, 1)
    if rng.random() < mix.interior and ids.eos not in source[first:-1]:
        begin = int(rng.integers(first, size - blank))
        span, end = (begin, begin + blank), ids.end
    else:
        span, end = (size - blank, size), None
    return Example(source, [span], ids.document_mask, ids.start, end, goes_on=ids.goes_on)


def _documents(source: np.ndarray, eos: int, first: int) -> list[tuple[int, int]]:
    """[begin, stop) of the documents of a text, without the eos between them, [CLS] and the last token."""
    cuts = [first - 1, *np.flatnonzero(source[first:-1] == eos) + first, len(source) - 1]
    return [(int(a) + 1, int(b)) for a, b in itertools.pairwise(cuts)]


def _span_lengths(total: int, rng: np.random.Generator) -> list[int]:
    """Random lengths until their sum reaches `total`, at least one length."""
    lengths = _LENGTHS[np.searchsorted(_LENGTH_CDF, rng.random(max(total, 1)))]  # enough, even if all of them are 1
    return lengths[: int(np.searchsorted(np.cumsum(lengths), total)) + 1].tolist()
