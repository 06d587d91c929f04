"""The rows of one corpus: which there are, in which order they come, and the arrays that they become.

A corpus has an endless sequence of rows, in which every epoch has each row once, in another order. A component makes
any rows of this sequence from their numbers alone.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import numpy as np

from garrulax.train.documents import (
    causal_packing,
    infill_documents,
    infill_packing,
    isolated_causal,
    isolated_infill,
    packed_causal,
    segments_at,
)
from garrulax.train.infill import BlankMix, infill_batch, source_window
from garrulax.train.infill_tokens import InfillTokenizer, InfillTokens
from garrulax.train.packing import Packing
from garrulax.train.prompts import only_completions, with_prefixes
from garrulax.train.rows import HostBatch
from garrulax.train.sampler import Sampler, eval_windows, permute
from garrulax.train.settings import Settings
from garrulax.train.shards import Dataset
from garrulax.train.tokens import Tokens

# Seed of the blanks and prefixes in the held-out text. It is the same in every run, so that losses can be compared.
HELD_OUT_SEED = 2**40
# Tokens of the shortest text that blank infilling is evaluated on.
_SHORTEST = 9


@dataclass(frozen=True)
class Component:
    """The rows of one corpus.

    Attributes:
        rows: Number of rows in an epoch.
        places: Maps numbers of rows in the endless sequence, int64, to where they lie in the text, int64 of that shape.
        make: Maps such places [B] and the numbers of the rows [B] to a batch.
        held_out: Starts a pass over this process's rows of the held-out batches, see `batches.Data`.
        waste: Share of the places in packed rows that have no token; None for rows that are not packed.
    """

    rows: int
    places: Callable[[np.ndarray], np.ndarray]
    make: Callable[[np.ndarray, np.ndarray], HostBatch]
    held_out: Callable[[], Iterator[HostBatch]]
    waste: float | None = None


def causal(dataset: Dataset, settings: Settings, seed: int, *, prefix: bool = False) -> Component:
    """Rows for next-token prediction or prefix LM. Evaluation predicts each held-out token exactly once.

    Kept apart (`isolate`, or packed), a document sees only itself, and its first token is not predicted. Prompts and
    prefixes are not predicted either.

    Args:
        dataset: The token ids.
        settings: Of the run; uses window, batch, isolate and packing.
        seed: Of this corpus in the run.
        prefix: Whether the rows are for prefix LM.

    Raises:
        ValueError: If the text is shorter than a window, or the held-out text than two tokens.
    """
    check_length(dataset.valid, 2)
    length, packed = settings.window, settings.packing == "first_fit"
    if prefix and not packed and not settings.isolate:
        check_no_prompts(dataset, "prefix")

    def finished(batch: HostBatch, index: np.ndarray, tokens: Tokens, examples: np.ndarray, seed: int) -> HostBatch:
        return with_prefixes(batch, index, tokens, examples, seed) if prefix else only_completions(batch, index, tokens)

    def cut(tokens: Tokens, starts: np.ndarray, windows: np.ndarray) -> tuple[HostBatch, np.ndarray]:
        index = starts[:, None] + np.arange(length)
        if settings.isolate:
            return isolated_causal(windows, segments_at(tokens.documents, starts, length + 1)), index
        return causal_batch(windows), index

    bytes_per_token = dataset.valid.bytes / (len(dataset.valid) - 1)

    def evaluated(batch: HostBatch, index: np.ndarray, examples: np.ndarray, present: np.ndarray | int) -> HostBatch:
        batch = finished(batch, index, dataset.valid, examples, HELD_OUT_SEED)
        weights = batch["weights"] * present
        return {**batch, "weights": weights, "bytes": weights.sum(1) * np.float32(bytes_per_token)}

    if packed:
        train, valid = (causal_packing(tokens, length, seed) for tokens in (dataset.train, dataset.valid))

        def make(rows: np.ndarray, examples: np.ndarray) -> HostBatch:
            return finished(*packed_causal(dataset.train, train, rows, length), dataset.train, examples, seed)

        def held_out() -> Iterator[HostBatch]:
            for rows in in_order(len(valid), settings.batch):
                yield evaluated(*packed_causal(dataset.valid, valid, rows, length), rows, 1)

        return packed_component(train, seed, make, held_out)

    sampler = Sampler(dataset.train, length, 1, seed, name="training text")

    def make_cut(starts: np.ndarray, examples: np.ndarray) -> HostBatch:
        batch, index = cut(dataset.train, starts, dataset.train.windows(starts, length + 1))
        return finished(batch, index, dataset.train, examples, seed)

    def held_out_cut() -> Iterator[HostBatch]:
        windows = eval_windows(dataset.valid, length, settings.batch, jax.process_index(), jax.process_count())
        for i, (window, present) in enumerate(windows):
            rows = i * settings.batch + jax.process_index() * len(window) + np.arange(len(window))
            yield evaluated(*cut(dataset.valid, rows * length, window), rows, present)

    return Component(sampler.windows_per_epoch, sampler.starts, make_cut, held_out_cut)


def causal_batch(windows: np.ndarray) -> HostBatch:
    """Makes a batch for next-token prediction.

    Args:
        windows: int32 [B, T + 1], plain text.

    Returns:
        tokens and targets, int32 [B, T]; weights, float32 [B, T], all 1.
    """
    return {
        "tokens": windows[:, :-1],
        "targets": windows[:, 1:],
        "weights": np.ones((len(windows), windows.shape[1] - 1), np.float32),
    }


def infill(
    dataset: Dataset, settings: Settings, seed: int, tokenizer: InfillTokenizer, ids: InfillTokens, mix: BlankMix
) -> Component:
    """Rows for blank infilling. The held-out text gets the same blanks in every evaluation of every run.

    A held-out text that is shorter than a window is evaluated whole, in every row of one batch with other blanks. Kept
    apart (`isolate`, or packed), every document is an example of its own, and completions are answers to their prompts.

    Args:
        dataset: The token ids.
        settings: Of the run; uses window, batch, isolate and packing.
        seed: Of this corpus in the run.
        tokenizer: Gives the number of bytes of every token.
        ids: Control tokens.
        mix: Frequencies of the kinds of blanks.

    Raises:
        ValueError: If the text or the window is too short, or documents with prompts are not kept apart.
    """
    length, packed = settings.window, settings.packing == "first_fit"
    check_length(dataset.valid, _SHORTEST)
    if not packed and not settings.isolate:
        check_no_prompts(dataset, "infill")
    sizes = np.array([len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab)], np.float32)  # [V]

    def evaluated(batch: HostBatch) -> HostBatch:
        return {**batch, "bytes": (sizes[batch["targets"]] * batch["weights"]).sum(1)}

    if packed:
        train, valid = (infill_packing(tokens, length, seed, ids) for tokens in (dataset.train, dataset.valid))

        def from_rows(
            tokens: Tokens, packing: Packing, rows: np.ndarray, examples: np.ndarray, seed: int
        ) -> HostBatch:  # fmt: skip
            row, piece = packing.pieces(rows)
            starts, sizes = packing.starts[piece], packing.sizes[piece]
            ends = np.cumsum(sizes)
            text = tokens.take(np.arange(sizes.sum()) + np.repeat(starts - ends + sizes, sizes))  # of all pieces
            prompts = tokens.completion_of(starts) - starts
            documents: list[list[tuple[np.ndarray, int]]] = [[] for _ in rows]
            for at, size, end, prompt in zip(*(x.tolist() for x in (row, sizes, ends, prompts)), strict=True):
                documents[at].append((text[end - size : end], prompt))
            return infill_documents(documents, examples, seed, ids, length, mix)

        def make(rows: np.ndarray, examples: np.ndarray) -> HostBatch:
            return from_rows(dataset.train, train, rows, examples, seed)

        def held_out() -> Iterator[HostBatch]:
            for rows in in_order(len(valid), settings.batch):
                yield evaluated(from_rows(dataset.valid, valid, rows, np.maximum(rows, 0), HELD_OUT_SEED))

        return packed_component(train, seed, make, held_out)

    width = source_window(length)
    sampler = Sampler(dataset.train, width, 1, seed, name="training text")
    split = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    held = Sampler(dataset.valid, min(width, len(dataset.valid) - 1), settings.batch, HELD_OUT_SEED, **split)

    def from_windows(tokens: Tokens, width: int, starts: np.ndarray, examples: np.ndarray, seed: int) -> HostBatch:
        windows = tokens.windows(starts, width + 1)
        if not settings.isolate:
            return infill_batch(windows, examples, seed, ids, length, mix)
        index = starts[:, None] + np.arange(width + 1)
        completions = None if tokens.completions is None else tokens.completion_of(index) - index
        segments = segments_at(tokens.documents, starts, width + 1)
        return isolated_infill(windows, segments, examples, seed, ids, length, mix, completions)

    def make_cut(starts: np.ndarray, examples: np.ndarray) -> HostBatch:
        return from_windows(dataset.train, width, starts, examples, seed)

    def held_out_cut() -> Iterator[HostBatch]:
        for step in range(max(1, held.windows_per_epoch // settings.batch)):
            where, examples = held.starts_at(step), held.examples_at(step)
            yield evaluated(from_windows(dataset.valid, held.window, where, examples, HELD_OUT_SEED))

    return Component(sampler.windows_per_epoch, sampler.starts, make_cut, held_out_cut)


def check_length(held_out: Tokens, least: int) -> None:
    """Checks that there is held-out text enough to evaluate on. Raises ValueError that says what to do."""
    if len(held_out) < least:
        raise ValueError(
            f"the held-out text has {len(held_out)} tokens ({held_out.bytes} bytes), too few to evaluate on: use more "
            f"text, or name a held-out text of at least {least} tokens with valid="
        )


def check_no_prompts(dataset: Dataset, objective: str) -> None:
    """Checks that no document has a prompt, for objectives that must see where each document begins."""
    if dataset.train.completions is not None or dataset.valid.completions is not None:
        raise ValueError(
            f"objective={objective}: documents with prompts must be kept apart; set packing=first_fit or isolate=true"
        )


def packed_component(packing: Packing, seed: int, make: Callable, held_out: Callable) -> Component:
    """The component of packed rows; `make` and `held_out` are those of `Component`, `make` of the packing's rows."""
    rows = len(packing)

    def places(examples: np.ndarray) -> np.ndarray:
        epoch, index = np.divmod(examples, rows)
        return permute(index, rows, seed, epoch)

    return Component(rows, places, make, held_out, packing.waste)


def in_order(count: int, batch: int) -> Iterator[np.ndarray]:
    """This process's rows of the batches of a pass over `count` rows; -1 after the last."""
    local = batch // jax.process_count()
    for first in range(0, count, batch):
        rows = first + jax.process_index() * local + np.arange(local)
        yield np.where(rows < count, rows, -1)
