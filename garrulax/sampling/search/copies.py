"""The best of several samples: the rows of a batch, and the choice among them."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from garrulax.sampling.requests import EncodedPrompt
from garrulax.sampling.search.kinds import BestOf
from garrulax.sampling.writing import Completion


def copied(
    search: BestOf, prompts: Sequence[EncodedPrompt], values: Mapping[str, Sequence[Any]]
) -> tuple[list[EncodedPrompt], dict[str, list[Any]]]:
    """The prompts and their knobs with each prompt n times, with the seeds seed, seed + 1, ..."""
    repeated = {name: [x for x in column for _ in range(search.n)] for name, column in values.items()}
    repeated["seed"] = [(seed + i) % 2**32 for seed in values["seed"] for i in range(search.n)]
    return [prompt for prompt in prompts for _ in range(search.n)], repeated


def best_samples(search: BestOf, samples: Sequence[Completion]) -> list[list[Completion]]:
    """The best samples of each prompt, best first; `samples` has n for each prompt."""
    scored = [dataclasses.replace(one, score=math.fsum(one.logprobs) / len(one.logprobs)) for one in samples]
    prompts = [scored[i : i + search.n] for i in range(0, len(scored), search.n)]
    return [sorted(one, key=lambda sample: -(sample.score or 0.0))[: search.returned] for one in prompts]
