"""The best of several samples: the rows of a batch, and the choice among them."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from garrulax.sampling.requests import EncodedPrompt
from garrulax.sampling.search.kinds import BestOf
from garrulax.sampling.writing import Completion

T = TypeVar("T")


def repeated(items: Iterable[T], n: int) -> list[T]:
    """Each item n times, one after another."""
    return [item for item in items for _ in range(n)]


def copied(
    search: BestOf, prompts: Sequence[EncodedPrompt], values: Mapping[str, Sequence[Any]]
) -> tuple[list[EncodedPrompt], dict[str, list[Any]]]:
    """The prompts and their knobs with each prompt n times, with the seeds seed, seed + 1, ..."""
    every = {name: repeated(column, search.n) for name, column in values.items()}
    every["seed"] = [(seed + i) % 2**32 for seed in values["seed"] for i in range(search.n)]
    return repeated(prompts, search.n), every


def best_samples(search: BestOf, samples: Sequence[Completion]) -> list[list[Completion]]:
    """The best samples of each prompt, best first; `samples` has n for each prompt."""
    scored = [dataclasses.replace(one, score=mean_logprob([one])) for one in samples]
    prompts = [scored[i : i + search.n] for i in range(0, len(scored), search.n)]
    return [sorted(one, key=lambda sample: -(sample.score or 0.0))[: search.returned] for one in prompts]


def mean_logprob(answers: Iterable[Completion]) -> float:
    """The mean of the log-probabilities of the tokens of all these answers."""
    logprobs = [logprob for answer in answers for logprob in answer.logprobs]
    return math.fsum(logprobs) / len(logprobs)
