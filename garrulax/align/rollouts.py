"""Rollouts: what a model writes after prompts, as arrays to train on.

Letters: B responses, T tokens, R rows of positions (1, or 2 in the GLM families).

Responses are sampled from the model's own distribution (temperature 1, no filter), so that the log-probabilities of
sampling are those of training, up to rounding. A response depends on the parameters, its prompt and its seed alone, and
the seed on the run's seed, the step and the row: a resumed run writes what it would have written.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from garrulax.core.config import ModelConfig
from garrulax.core.spec import Tree
from garrulax.models.unpack import TokenizerLike
from garrulax.sampling.generate import generate
from garrulax.sampling.partners import encode_prompt
from garrulax.sampling.requests import EncodedPrompt, Prompt
from garrulax.train.rows import HostBatch
from garrulax.train.sampler import hash_of


@dataclasses.dataclass(frozen=True)
class Sampled:
    """A prompt and a response, as a reward function sees them.

    Attributes:
        prompt: Token ids, as the model read them.
        response: Token ids, with the end token if there is one.
        text: The response as text, without the end token; "" without a tokenizer.
        ended: Whether the response has its end token; if not, the limit cut it.
        given: The prompt as it was given.
    """

    prompt: list[int]
    response: list[int]
    text: str
    ended: bool
    given: Prompt


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Responses to prompts.

    Attributes:
        batch: Host arrays in the form of `train.objectives`, aligned to targets: tokens, targets, weights (1 at targets
            that belong to the response), positions, rank, segment, and logprobs, float32 [B, T], of sampling.
        samples: The responses, in the order of the rows.
    """

    batch: HostBatch
    samples: list[Sampled]


class Prompts:
    """Prompts that are read in one way for sampling and for training.

    Args:
        prompts: Texts, lists of ids, or conversations that end with the user's message.
        config: Of the model.
        tokenizer: Of the model; only lists of ids do without.
        limit: Greatest number of tokens of a response.
        multiple: Of which `length` is one: into how many parts a mesh splits the tokens of a row.

    Raises:
        ValueError: If there is none, or one does not fit into the context with `limit` tokens.
    """

    def __init__(
        self,
        prompts: Sequence[Any],
        config: ModelConfig,
        tokenizer: TokenizerLike | None,
        limit: int,
        multiple: int = 1,
    ):
        if not prompts:
            raise ValueError("there are no prompts")
        self.given = [_ids(prompt, tokenizer) for prompt in prompts]
        self.encoded: list[EncodedPrompt] = [
            encode_prompt(prompt, limit, config, tokenizer, f"prompt {i}") for i, prompt in enumerate(self.given)
        ]
        #: T, one for the whole run, so that one program is compiled.
        longest = max(len(one.ids) for one in self.encoded) + limit - 1
        self.length = longest + -longest % multiple

    def __len__(self) -> int:
        return len(self.given)


def _ids(prompt: Any, tokenizer: TokenizerLike | None) -> Prompt:
    if isinstance(prompt, str) or not prompt or not isinstance(prompt[0], Mapping):
        return prompt
    if tokenizer is None:
        raise ValueError("a conversation needs a tokenizer with a chat format")
    return list(tokenizer.apply_chat_template(prompt, add_generation_prompt=True))  # type: ignore[attr-defined]


def seeds(seed: int, step: int, rows: int) -> list[int]:
    """One seed a row, uint32: rows of one seed would share their random numbers."""
    return (hash_of(seed, step, np.arange(rows)) % np.uint64(2**32)).astype(np.int64).tolist()


def roll_out(
    params: Tree,
    config: ModelConfig,
    prompts: Prompts,
    chosen: Sequence[int],
    *,
    seeds: Sequence[int],
    limit: int,
    tokenizer: TokenizerLike | None = None,
    end_tokens: Sequence[int] | None = None,
) -> Rollout:
    """Lets the model write a response to each of some prompts.

    Args:
        params: Of the model, on one device or a mesh; unstacked ones decode fastest.
        config: Of the model.
        prompts: All prompts of the run.
        chosen: Indices of the prompts, B; several responses to a prompt are its index several times.
        seeds: One a response.
        limit: Greatest number of tokens of a response.
        tokenizer: For the texts.
        end_tokens: Ids that end a response; None takes those of the model.
    """
    from garrulax.hub import Model

    rows = [prompts.encoded[i] for i in chosen]
    model: Any = (params, config) if tokenizer is None else Model(config, params, tokenizer)  # type: ignore[arg-type]
    written: Any = generate(model, [one.ids for one in rows], max_new_tokens=limit, temperature=1.0, seed=list(seeds),
                       end_tokens=end_tokens)  # fmt: skip
    samples = [
        Sampled(one.ids, list(w.tokens), w.text or "", w.finish_reason == "eos", prompts.given[i])
        for i, one, w in zip(chosen, rows, written, strict=True)
    ]
    batch = aligned(rows, [sample.response for sample in samples], prompts.length)
    logprobs = np.zeros(batch["weights"].shape, np.float32)
    logprobs[batch["weights"] > 0] = np.concatenate([np.asarray(w.logprobs, np.float32) for w in written])
    return Rollout({**batch, "logprobs": logprobs}, samples)


def aligned(prompts: Sequence[EncodedPrompt], responses: Sequence[Sequence[int]], length: int) -> HostBatch:
    """Prompts and responses as a batch of `train.objectives`, with the positions and the mask of the model's family.

    Args:
        prompts: As the model reads them.
        responses: Ids of the response to each.
        length: T, at least that of the longest prompt and its response, less 1.

    Returns:
        tokens, targets, weights (1 at targets that belong to the response), positions, rank, segment.
    """
    B, R = len(prompts), len(prompts[0].stride)
    batch = {
        "tokens": np.zeros((B, length), np.int32),
        "targets": np.zeros((B, length), np.int32),
        "weights": np.zeros((B, length), np.float32),
        "positions": np.zeros((B, R, length), np.int32),
        "rank": np.zeros((B, length), np.int32),
        "segment": np.full((B, length), -1, np.int32),
    }
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        ids = [*prompt.ids, *response]
        first, size = len(prompt.ids) - 1, len(ids) - 1
        batch["tokens"][row, :size], batch["targets"][row, :size] = ids[:-1], ids[1:]
        batch["weights"][row, first:size] = 1
        later = prompt.position[:, None] + prompt.stride[:, None] * np.arange(1, size - first)
        batch["positions"][row, :, :size] = np.concatenate([prompt.positions, later], axis=1)
        batch["rank"][row, prompt.prefix :] = np.arange(prompt.prefix, length)
        batch["segment"][row, :size] = 0
    if R == 1:
        batch["positions"] = batch["positions"][:, 0]
    return batch
