"""The argument `adapter` of `generate`: which adapter of the model each prompt is continued with."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from garrulax import models
from garrulax.core import half
from garrulax.core.config import ModelConfig
from garrulax.core.lora_rows import by_row
from garrulax.core.spec import Tree
from garrulax.layers.cache import Cache
from garrulax.models.prefix import Prefix, SoftPrompt, as_prefix, cache_with
from garrulax.models.unpack import ModelLike, unpack_model
from garrulax.sampling.requests import Weights
from garrulax.sampling.state import Requests

Adapter = str | None


def chosen(model: ModelLike, adapter: Adapter | Sequence[Adapter], count: int) -> tuple[ModelLike, list[Tree]]:
    """The model to continue prompts with.

    Args:
        model: The model.
        adapter: The name of one of its adapters, or None for the model as it is; or one of these for each prompt.
        count: Number of prompts.

    Returns:
        The model, with the adapter if it is the same for all prompts; and otherwise the parameters for each prompt.

    Raises:
        ValueError: An unknown name, or a wrong number of names.
    """
    names = [adapter] * count if adapter is None or isinstance(adapter, str) else list(adapter)
    if len(names) != count:
        raise ValueError(f"adapter has {len(names)} names for {count} prompts: give one, or one a prompt")
    known = getattr(model, "adapters", {})
    for name in names:
        if name is not None and name not in known:
            there = ", ".join(known) or "none; gx.load_adapter(model, folder, name=...) adds one"
            raise ValueError(f"the model has no adapter {str(name)[:60]!r}: there are {there}")
    if len(set(names)) == 1:
        return (model if names[0] is None else known[names[0]]), []
    if any(getattr(known[name], "prefix", None) is not None for name in names if name is not None):
        raise ValueError("a prefix cannot share a batch with other adapters: give its prompts in a call of their own")
    params, _, _ = unpack_model(model)
    return model, [params if name is None else known[name].params for name in names]


def weights_by_row(trees: Sequence[Tree], rows: int) -> Weights:
    """The parameters of a batch whose rows have different adapters.

    Args:
        trees: The parameters of each request.
        rows: Number of rows of the state; the rows after the requests are free.
    """
    distinct = list({id(tree): tree for tree in trees}.values())
    place = {id(tree): i for i, tree in enumerate(distinct)}
    index = [place[id(tree)] for tree in trees]
    step = by_row(distinct, index + index[:1] * (rows - len(index)))
    prefill: list[Any] = [half.as_bits(tree) for tree in distinct]
    return Weights(prefill[0], half.as_bits(models.unstack(step), stacked=False), tuple(prefill[i] for i in index))


def without_prefix(model: Any) -> tuple[Any, Prefix | SoftPrompt | None]:
    """The model without its prefix, and the prefix."""
    prefix = getattr(model, "prefix", None)
    return (model, None) if prefix is None else (model.replace(prefix=None), prefix)


def behind(
    prefix: Prefix | SoftPrompt, weights: Weights, requests: Requests, config: ModelConfig
) -> tuple[Requests, Cache]:
    """Requests whose texts stand behind a prefix, and the cache of one row with it and room for their contexts.

    Raises:
        ValueError: The prefix is for another model, or with it a text does not fit into the context.
    """
    params = half.from_bits(weights.prefill)
    ready = as_prefix(prefix, params, config)
    cache = cache_with(ready, params, config, 1, requests.context.shape[1])
    shift = ready.size if ready.counted else 0
    longest = int((np.asarray(requests.length) + np.asarray(requests.limit)).max())
    if longest + shift > config.max_length:
        raise ValueError(
            f"{longest} tokens do not fit behind a prefix of {ready.size} into the model's context of "
            f"{config.max_length}: shorten the prompt or lower max_new_tokens"
        )
    if shift and np.ndim(requests.position) > 1:
        raise ValueError("a prefix of PEFT is for models with one position a token")
    moved = {name: getattr(requests, name) + np.int32(shift) for name in ("positions", "position")}
    return dataclasses.replace(requests, **moved, rank=requests.rank + np.int32(ready.size)), cache
