"""The rows of a batch: prompts, and for classifier-free guidance the prompts without their condition."""

from collections.abc import Sequence
from typing import Any

from garrulax import models
from garrulax.core.config import ModelConfig
from garrulax.models.unpack import TokenizerLike
from garrulax.sampling.blanks import last_blank_prompt
from garrulax.sampling.requests import EncodedPrompt, Prompt, causal_prompt, prompt_list, token_ids


def encode_prompt(
    prompt: Prompt,
    limit: int | None,
    config: ModelConfig,
    tokenizer: TokenizerLike | None,
    name: str,
    endless: bool = False,
) -> EncodedPrompt:
    """The prompt that `generate` continues; `name` is its name in errors, `endless` as for `new_tokens`."""
    if models.blanks(config) is not None:
        encoded = last_blank_prompt(prompt, limit, config, tokenizer, name)
        if encoded is not None:
            return encoded
    ids = token_ids(prompt, tokenizer, name)
    if isinstance(prompt, str) and tokenizer is not None:
        ids = [*tokenizer.prefix, *ids, *tokenizer.suffix]
    return causal_prompt(ids, limit, config, name, endless)


def with_partners(
    encoded: list[EncodedPrompt],
    values: dict[str, list],
    negative_prompts: Prompt | Sequence[Prompt] | None,
    copies: int,
    config: ModelConfig,
    tokenizer: TokenizerLike | None,
    endless: bool = False,
) -> tuple[list[int], list[EncodedPrompt], dict[str, list]]:
    """The rows of a batch in which each prompt with guidance is followed by the prompt without its condition.

    `encoded` has each prompt `copies` times, one after another.

    Returns:
        The row of each prompt, all rows, and the values of their knobs.
    """
    scales = values.get("guidance_scale", [1.0] * len(encoded))
    guided = [i for i, scale in enumerate(scales) if scale != 1]
    if not guided:
        if negative_prompts is not None:
            raise ValueError("negative_prompts needs guidance_scale, with another value than 1")
        return list(range(len(encoded))), encoded, values
    negative: list[Any] = [[prompt.token] for prompt in encoded]
    if negative_prompts is not None:
        given, single = prompt_list(negative_prompts)
        count = len(encoded) // copies
        if not single and len(given) != count:
            raise ValueError(f"negative_prompts has {len(given)} prompts for {count}: give one, or one each")
        negative = given * len(encoded) if single else [one for one in given for _ in range(copies)]
    elif any(encoded[i].prefix for i in guided):
        raise ValueError("guidance_scale needs negative_prompts where the model answers a blank")
    order: list[int] = []  # pairs first, since the first of a pair has an even row
    all_rows: list[EncodedPrompt] = []
    for i in guided:
        partner = encode_prompt(negative[i], encoded[i].limit, config, tokenizer, f"negative prompt {i}", endless)
        all_rows += [encoded[i], partner._replace(conditional=encoded[i])]
        order += [i, i]
    others = [i for i in range(len(encoded)) if i not in guided]
    all_rows += [encoded[i] for i in others]
    order += others
    return (
        [order.index(i) for i in range(len(encoded))],
        all_rows,
        {name: [x[i] for i in order] for name, x in values.items()},
    )
