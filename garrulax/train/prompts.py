"""Rows in which a part of each text is read but not predicted: prompts of completions, and prefixes of prefix LM.

Both change a batch for next-token prediction, whose place t has token t and predicts token t + 1.
"""

import numpy as np

from garrulax.train.rows import HostBatch
from garrulax.train.sampler import hash_of
from garrulax.train.tokens import Tokens


def only_completions(batch: HostBatch, index: np.ndarray, tokens: Tokens) -> HostBatch:
    """The batch with weight 0 for the targets that belong to a prompt.

    Args:
        batch: With weights, float32 [B, T].
        index: int64 [B, T], the index in the text of every token; -1 for padding.
        tokens: The text.
    """
    if tokens.completions is None:
        return batch
    completes = index + 1 >= tokens.completion_of(np.clip(index + 1, 0, len(tokens) - 1))
    return {**batch, "weights": batch["weights"] * completes}


def with_prefixes(
    batch: HostBatch, index: np.ndarray, tokens: Tokens, examples: np.ndarray, seed: int
) -> HostBatch:  # fmt: skip
    """The batch for prefix LM (Liu et al. 2018; Raffel et al. 2020, section 3.2.1).

    The tokens of a prefix attend to one another, the others to those before them, and only targets after the prefix
    count. The prefix is the prompt of a document that has one. Of another text it is drawn uniformly, from one token to
    all but one.

    Args:
        batch: With tokens and weights [B, T], and segment [B, T] if the documents of a row are kept apart.
        index: As for `only_completions`.
        tokens: The text.
        examples: int64 [B], numbers of the rows in the run.
        seed: Of the run; together with the number of the row it decides the prefixes.

    Returns:
        The batch with segment and rank, int32 [B, T].
    """
    rows, length = batch["tokens"].shape
    segment = batch.get("segment", np.zeros((rows, length), np.int32))
    begins = np.flatnonzero(np.diff(segment, axis=1, prepend=-2))  # the first place of every text, rows joined
    sizes = np.diff(begins, append=rows * length)
    uniform = hash_of(seed, np.asarray(examples)[begins // length], begins % length)
    prefix = 1 + (uniform % np.maximum(sizes - 1, 1).astype(np.uint64)).astype(np.int64)
    if tokens.completions is not None:
        first = np.maximum(index.reshape(-1)[begins], 0)
        prompt = tokens.completion_of(first) - first
        prefix = np.where(prompt > 0, np.minimum(prompt, sizes + 1), prefix)
    begin = np.repeat(begins, sizes).reshape(rows, length)
    place = np.arange(rows * length).reshape(rows, length)
    prefix = np.repeat(prefix, sizes).reshape(rows, length)
    in_prefix = place - begin < prefix
    rank = np.where(in_prefix, begin, place) % length
    predicts = place - begin >= prefix - 1
    return {
        **batch,
        "weights": batch["weights"] * predicts,
        "rank": rank.astype(np.int32),
        "segment": segment,
    }
