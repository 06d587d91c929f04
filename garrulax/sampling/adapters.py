"""The argument `adapter` of `generate`: which adapter of the model each prompt is continued with."""

from collections.abc import Sequence
from typing import Any

from garrulax import models
from garrulax.core import half
from garrulax.core.lora_rows import by_row
from garrulax.core.spec import Tree
from garrulax.models.unpack import ModelLike, unpack_model
from garrulax.sampling.requests import Weights

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
    return Weights(prefill[0], half.as_bits(models.unstack(step)), tuple(prefill[i] for i in index))
