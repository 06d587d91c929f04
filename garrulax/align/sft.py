"""Instruction tuning: batches of conversations in packed rows, in which only the assistant's tokens are targets.

The objective is `train.objectives.causal_lm`: its weights are the mask. A conversation sees only itself.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from garrulax.align.conversations import Example
from garrulax.align.rollouts import aligned
from garrulax.core.config import ModelConfig
from garrulax.sampling.partners import encode_prompt
from garrulax.train.batches import Data
from garrulax.train.components import in_order, packed_component
from garrulax.train.documents import causal_packing, packed_causal
from garrulax.train.feed import Feed
from garrulax.train.packing import Packing
from garrulax.train.rows import HostBatch
from garrulax.train.settings import Settings
from garrulax.train.tokens import Tokens


@dataclasses.dataclass(frozen=True)
class Examples:
    """Encoded conversations, one after another.

    Attributes:
        tokens: Their ids.
        mask: float32, one for each id, 1 where the assistant writes it.
    """

    tokens: Tokens
    mask: np.ndarray

    @classmethod
    def of(cls, examples: Sequence[Example]) -> "Examples":
        """Joins examples."""
        ids = np.concatenate([np.asarray(e.tokens, np.int32) for e in examples])
        mask = np.concatenate([np.asarray(e.mask, np.float32) for e in examples])
        documents = np.concatenate([[0], np.cumsum([len(e) for e in examples])]).astype(np.int64)
        return cls(Tokens([ids], 0, documents), mask)

    @property
    def digest(self) -> str:
        """A hash of the tokens, the mask, and where each conversation begins."""
        parts = (self.tokens[:], self.mask, np.asarray(self.tokens.documents))
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


def fitting(examples: Sequence[Example], window: int) -> tuple[list[Example], int]:
    """The examples that fit into a row, and the number of those left out: a cut answer would teach not to end.

    Raises:
        ValueError: If none fits.
    """
    kept = [e for e in examples if len(e) <= window + 1]
    if not kept:
        shortest = min(map(len, examples), default=0)
        raise ValueError(
            f"no conversation fits into window={window}" + (f": the shortest has {shortest} tokens" if shortest else "")
        )
    return kept, len(examples) - len(kept)


def make_sft_data(train: Sequence[Example], valid: Sequence[Example], settings: Settings) -> Data:
    """Batches of conversations for `train.loop`.

    Args:
        train: To train on.
        valid: To evaluate on.
        settings: Of the run; uses window, batch and seed.

    Raises:
        ValueError: If no conversation fits into the window.
    """
    notes = []
    parts = []
    for name, examples in (("train", train), ("held-out", valid)):
        kept, dropped = fitting(examples, settings.window)
        if dropped:
            notes.append(f"{dropped:,} of {len(examples):,} {name} conversations left out: longer than "
                         f"window={settings.window}")  # fmt: skip
        parts.append(Examples.of(kept))
    rows, held = (causal_packing(part.tokens, settings.window, settings.seed) for part in parts)

    def make(places: np.ndarray, numbers: np.ndarray) -> HostBatch:
        return _batch(parts[0], rows, places, settings.window)

    def held_out() -> Iterator[HostBatch]:
        for places in in_order(len(held), settings.batch):
            batch = _batch(parts[1], held, places, settings.window)
            yield {**batch, "bytes": np.zeros(len(places), np.float32)}

    component = packed_component(rows, settings.seed, make, held_out)
    feed = Feed([component], [1.0], settings.batch)
    supervised = float(parts[0].mask.mean())
    notes.append(
        f"conversations: {len(parts[0].tokens.documents) - 1:,} in {len(rows):,} rows, {rows.waste:.2%} of the places "
        f"empty, {supervised:.1%} of the tokens are the assistant's"
    )
    identity = {"corpus": f"{parts[0].digest},{parts[1].digest}"}
    return Data(feed.batch_at, feed.held_out, identity, tuple(notes))


def blank_arrays(examples: Sequence[Example], config: ModelConfig, window: int) -> HostBatch:
    """Answers as blanks, for models of the GLM families: one conversation a row, of which the last answer counts.

    Args:
        examples: Of which the mask is 1 at the end alone, behind the token that begins a blank.
        config: Of the model.
        window: T.

    Returns:
        The arrays of `rollouts.aligned`, with the positions of the family and its mask.
    """
    prompts, responses = [], []
    for number, example in enumerate(examples):
        first = len(example) - sum(example.mask)
        ids, answer = example.tokens[:first], example.tokens[first:]
        prompts.append(encode_prompt(ids, len(answer), config, None, f"conversation {number}"))
        responses.append(answer)
    return aligned(prompts, responses, window)


def _batch(examples: Examples, packing: Packing, rows: np.ndarray, window: int) -> HostBatch:
    batch, index = packed_causal(examples.tokens, packing, rows, window)
    # Index t speaks of the token that it predicts, the one behind it.
    targets = np.where(index >= 0, examples.mask[np.clip(index + 1, 0, len(examples.mask) - 1)], 0)
    return {**batch, "weights": (batch["weights"] * targets).astype(np.float32)}
