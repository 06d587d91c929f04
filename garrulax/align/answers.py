"""Files of judged answers to prompts, as arrays: pairs for preference losses, rankings for reward models, and single
answers for KTO.

A record is one of

- {"prompt": ..., "chosen": ..., "rejected": ...}
- {"prompt": ..., "answers": [best, ..., worst], "ranks": [0, 1, 1, ...]} (ranks may be left out; equal ranks are a tie)

and for KTO also

- {"prompt": ..., "completion": ..., "label": true or false}

where a prompt is a text or a list of messages, and an answer a text or a list of one message of the assistant.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from garrulax.align.comparisons import NO_ANSWER
from garrulax.align.conversations import ChatTokenizer, Example, as_messages, encode, has_chat_format, plain
from garrulax.align.sft import blank_arrays
from garrulax.core.config import ModelConfig
from garrulax.train.batches import Data
from garrulax.train.rows import HostBatch
from garrulax.train.sampler import permute
from garrulax.train.settings import Settings


@dataclasses.dataclass(frozen=True)
class Ranking:
    """The answers to one prompt.

    Attributes:
        answers: Prompt and answer each; the mask is 1 at tokens of the answer.
        ranks: Of each answer, smaller is better.
    """

    answers: list[Example]
    ranks: list[int]

    def pairs(self) -> Iterator[tuple[Example, Example]]:
        """Each better answer with each worse one. Ties are no pair, and neither are two equal answers."""
        for i, j in itertools.permutations(range(len(self.answers)), 2):
            if self.ranks[i] < self.ranks[j] and self.answers[i].tokens != self.answers[j].tokens:
                yield self.answers[i], self.answers[j]


@dataclasses.dataclass(frozen=True)
class AnswerFormat:
    """How a prompt and an answer become tokens.

    Attributes:
        tokenizer: Of the model.
        ends: Ids that end an answer.
        prompt_ids: As for `conversations.plain`.
    """

    tokenizer: ChatTokenizer
    ends: Sequence[int]
    prompt_ids: Callable[[str], list[int]] | None = None

    def example(self, prompt: Any, text: Any, where: str) -> Example:
        """A prompt and one answer, whose tokens alone are in the mask.

        A model with a chat format reads both as messages; another one reads a text that the answer continues.

        Args:
            prompt: A text or a list of messages.
            text: The answer, a text or a list of one message of the assistant.
            where: The place in the file, for errors.

        Raises:
            ValueError: If prompt or answer have another form.
        """
        replies = as_messages(text, "assistant")
        if len(replies) != 1 or not isinstance(replies[0].get("content"), str):
            raise ValueError(f"{where}: an answer is a text, or one message of the assistant, not {text!r:.60}")
        messages = [*as_messages(prompt, "user"), *replies]
        if not has_chat_format(self.tokenizer):
            return plain(self.tokenizer, messages, self.ends, where, self.prompt_ids)
        return encode(self.tokenizer, messages, self.ends, where, last_only=True)


def ranking(record: Mapping[str, Any], form: AnswerFormat, where: str) -> Ranking:
    """The answers of a record (see the module docstring).

    Args:
        record: The parsed JSON object.
        form: How answers become tokens.
        where: The place in the file, for errors.

    Raises:
        ValueError: If the record has another form.
    """
    if "prompt" not in record:
        raise ValueError(f"{where} has no prompt, but {', '.join(record)}")
    if "chosen" in record and "rejected" in record:
        answers, ranks = [record["chosen"], record["rejected"]], [0, 1]
    elif isinstance(record.get("answers"), list):
        answers = record["answers"]
        ranks = record.get("ranks", list(range(len(answers))))
    else:
        raise ValueError(f"{where} has the keys {', '.join(record)}: give chosen and rejected, or answers, best first")
    if len(ranks) != len(answers) or not all(isinstance(r, int) and 0 <= r < NO_ANSWER for r in ranks):
        raise ValueError(f"{where}: ranks={ranks!r:.60} are not whole numbers, one an answer")
    if len(answers) < 2:
        raise ValueError(f"{where} has {len(answers)} answers: two or more can be compared")
    return Ranking([form.example(record["prompt"], one, where) for one in answers], list(ranks))


def split(count: int, seed: int = 0) -> tuple[list[int], list[int]]:
    """Indices to train on and to hold out, one in twenty.

    Raises:
        ValueError: If there are fewer than two.
    """
    if count < 2:
        raise ValueError(f"{count} records cannot be split: give two or more, or name held-out ones with valid=")
    order = permute(np.arange(count), count, seed, 0).tolist()
    held = max(1, count // 20)
    return sorted(order[held:]), sorted(order[:held])


def pair_arrays(
    rankings: Sequence[Ranking], window: int, config: ModelConfig | None = None
) -> tuple[HostBatch, dict[str, int]]:
    """All pairs of some rankings.

    Args:
        rankings: Of any number of answers.
        window: Greatest number of tokens of a row.
        config: Of a model whose answers are blanks; None for one that reads from left to right.

    Returns:
        tokens, targets int32 and weights float32 [N, 2, T], the better answer first, for blanks also positions, rank
        and segment; and how many were left out, by why.

    Raises:
        ValueError: If no pair is left.
    """
    every = [pair for one in rankings for pair in one.pairs()]
    kept = [pair for pair in every if max(map(len, pair)) <= window + 1]
    if not every:
        raise ValueError("there is no pair of a better and a worse answer: all of them tie or are equal")
    if not kept:
        raise ValueError(f"no pair fits into window={window}")
    rows = [row_arrays(pair, window, config) for pair in kept]
    left_out = {
        "without a better answer": sum(not any(one.pairs()) for one in rankings),
        "too long": len(every) - len(kept),
    }
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}, left_out


def ranking_arrays(rankings: Sequence[Ranking], window: int) -> tuple[HostBatch, dict[str, int]]:
    """Rankings as arrays for `objectives.reward_objective`, a prompt a row, with K the greatest number of answers.

    Args:
        rankings: Of any number of answers.
        window: Greatest number of tokens of a row.

    Returns:
        tokens int32 [P, K, T], length and rank int32 [P, K], weights float32 [P, K, T]; and how many were left out.

    Raises:
        ValueError: If none is left.
    """
    with_pairs = [one for one in rankings if any(one.pairs())]
    kept = [one for one in with_pairs if max(map(len, one.answers)) <= window]
    if not with_pairs:
        raise ValueError("there is no pair of a better and a worse answer: all of them tie or are equal")
    if not kept:
        raise ValueError(f"no ranking fits into window={window}")
    K = max(len(one.answers) for one in kept)
    arrays = {
        "tokens": np.zeros((len(kept), K, window), np.int32),
        "weights": np.zeros((len(kept), K, window), np.float32),
        "length": np.zeros((len(kept), K), np.int32),
        "rank": np.full((len(kept), K), NO_ANSWER, np.int32),
    }
    for p, one in enumerate(kept):
        for k, (example, rank) in enumerate(zip(one.answers, one.ranks, strict=True)):
            arrays["tokens"][p, k, : len(example)] = example.tokens
            arrays["weights"][p, k, : len(example)] = example.mask
            arrays["length"][p, k], arrays["rank"][p, k] = len(example), rank
    left_out = {"without a better answer": len(rankings) - len(with_pairs), "too long": len(with_pairs) - len(kept)}
    return arrays, left_out


def array_data(train: HostBatch, valid: HostBatch, settings: Settings, notes: Sequence[str] = ()) -> Data:
    """Batches of rows of arrays, in another order in every epoch.

    Args:
        train: Arrays [N, ...] to train on.
        valid: To evaluate on.
        settings: Of the run; uses batch and seed.
        notes: Lines for the user.

    Raises:
        ValueError: If the weights of a row are all 0.
    """
    count, held = (len(next(iter(arrays.values()))) for arrays in (train, valid))
    for arrays in (train, valid):
        empty = ~arrays["weights"].reshape(len(arrays["weights"]), -1).any(axis=1)
        if empty.any():
            raise ValueError(f"row {int(empty.argmax())} has no token with a weight: there is nothing to learn from it")

    def batch_at(step: int) -> HostBatch:
        epoch, index = np.divmod(step * settings.batch + np.arange(settings.batch), count)
        rows = permute(index, count, settings.seed, epoch)
        return {name: x[rows] for name, x in train.items()}

    def held_out() -> Iterator[HostBatch]:
        for first in range(0, held, settings.batch):
            part = {name: x[first : first + settings.batch] for name, x in valid.items()}
            yield {**part, "bytes": np.zeros(len(next(iter(part.values()))), np.float32)}

    digest = hashlib.sha256()
    for arrays in (train, valid):
        for name in sorted(arrays):
            digest.update(arrays[name].tobytes())
    return Data(batch_at, held_out, {"corpus": digest.hexdigest()}, tuple(notes))


def filled(arrays: HostBatch, function: Callable[[HostBatch], np.ndarray], batch: int, name: str) -> HostBatch:
    """Arrays [N, ...] with one more, which a function computes for parts of `batch` rows; the last is filled up."""
    count, found = len(arrays["tokens"]), []
    for first in range(0, count, batch):
        rows = np.minimum(np.arange(first, first + batch), count - 1)
        found.append(np.asarray(function({key: x[rows] for key, x in arrays.items()})))
    return {**arrays, name: np.concatenate(found)[:count]}


def row_arrays(examples: Sequence[Example], window: int, config: ModelConfig | None) -> HostBatch:
    """Prompts with answers, one a row; the arguments are those of `pair_arrays`."""
    if config is not None:
        return blank_arrays(examples, config, window)
    shape = (len(examples), window)
    row = {
        "tokens": np.zeros(shape, np.int32),
        "targets": np.zeros(shape, np.int32),
        "weights": np.zeros(shape, np.float32),
    }
    for i, example in enumerate(examples):
        size = len(example) - 1
        row["tokens"][i, :size], row["targets"][i, :size] = example.tokens[:-1], example.tokens[1:]
        row["weights"][i, :size] = example.mask[1:]
    return row
