"""From what a caller asks for to the arrays that decoding begins with: checked, padded to a few sizes. Host only."""

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from garrulax import models
from garrulax.core.spec import Tree
from garrulax.kernels.mask import PAD
from garrulax.sampling.state import Requests

Prompt = str | Sequence[int]


class Text(NamedTuple):
    """A text to go on with.

    ids: its tokens; the first new one follows the last. prefix: how many of the first see one another (a text with
    blanks); each of the others sees those before it. positions: int32 [R, len(ids)], R = 2 where the place in an
    answer has a row of its own. stride: int32 [R], from the last token to the first new one, and so on.
    spent: draws made with the text's seed before, beyond one a token of `ids`: no draw is made twice.
    """

    ids: list[int]
    prefix: int
    positions: np.ndarray
    stride: np.ndarray
    spent: int = 0

    @property
    def token(self) -> int:
        """The last token, which decoding begins with."""
        return self.ids[-1]

    @property
    def position(self) -> np.ndarray:
        """Where `token` stands: int32 [R]."""
        return self.positions[:, -1]


def unpack(model: Any) -> tuple[Tree, Any, Any]:
    """(params in the form that decodes fastest, config, tokenizer or None) of a Model or of (params, config).

    Raises TypeError for anything else, ValueError for parameters on several devices.
    """
    if isinstance(model, tuple):
        if len(model) != 2:
            raise TypeError(f"a model given as a tuple is (params, config), not {len(model)} things")
        params, config, tokenizer = *model, None
    elif all(hasattr(model, name) for name in ("params", "config", "tokenizer")):
        params, config, tokenizer = model.params, model.config, model.tokenizer
    else:
        raise TypeError(f"a model is what gx.load returns, or a tuple (params, config), not {type(model).__name__}")
    models.family(config)
    if any(isinstance(x, jax.Array) and len(x.sharding.device_set) > 1 for x in jax.tree.leaves(params)):
        raise ValueError(
            "decoding runs on one device, but the parameters are on several: gather them with jax.device_get(params)"
        )
    return params if isinstance(params["blocks"], tuple) else _unstack(params), config, tokenizer


_unstack = jax.jit(models.unstack)


def listed(prompts: Any) -> tuple[list[Prompt], bool]:
    """(list of texts and lists of ids, whether it was one alone). ValueError where there is none."""
    if isinstance(prompts, str):
        return [prompts], True
    prompts = prompts.tolist() if hasattr(prompts, "tolist") else list(prompts)
    if not prompts:
        raise ValueError("there is no prompt: give a text, a list of token ids, or a list of either")
    if not any(isinstance(p, str) or np.ndim(p) for p in prompts):
        return [prompts], True
    return prompts, False


def token_ids(prompt: Prompt, tokenizer: Any, name: str) -> list[int]:
    """The ids of a text or of a list of ids. ValueError for a text without a tokenizer and for what is no id."""
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError(f"{name} is a text but the model has no tokenizer: give token ids")
        return list(tokenizer.encode(prompt))
    try:
        return [operator.index(token) for token in prompt]
    except TypeError:
        raise ValueError(f"{name} must be a text or a list of token ids, not {prompt!r:.60}") from None


def check_ids(ids: list[int], config: Any, name: str) -> None:
    """ValueError for an empty list and for an id that the model does not have."""
    if not ids:
        raise ValueError(f"{name} is empty: give at least one token")
    wrong = [token for token in ids if not 0 <= token < config.vocab]
    if wrong:
        raise ValueError(f"{name} has token id {wrong[0]}: this model's ids are 0 to {config.vocab - 1}")


def continuation(ids: list[int], limit: int, config: Any, name: str) -> Text:
    """A text that is read causally, as `garrulax.forward` does by default. ValueError where it would not fit."""
    check_ids(ids, config, name)
    check_room(len(ids), limit, config, name)
    blanks = models.blanks(config)
    rows = 1 if blanks is None else blanks.rows
    positions, stride = np.zeros((rows, len(ids)), np.int32), np.zeros(rows, np.int32)
    positions[0], stride[0] = np.arange(len(ids)), 1
    return Text(ids, 0, positions, stride)


def check_room(size: int, limit: int, config: Any, name: str) -> None:
    """ValueError where a text of `size` tokens and `limit` new ones do not fit into the model's context."""
    if size + limit > config.max_length:
        raise ValueError(
            f"{name} has {size} tokens and {limit} new ones are asked for, but the model's context is "
            f"{config.max_length}: shorten the prompt or lower max_new_tokens"
        )


def ends(config: Any) -> tuple[int, ...]:
    """Token ids after which a text, or the answer to a blank, is over."""
    blanks = models.blanks(config)
    if blanks is not None:
        return blanks.ends
    return config.eos if isinstance(config.eos, tuple) else () if config.eos is None else (config.eos,)


_WHOLE = ("max_new_tokens", "top_k", "seed")
_RULES = {
    "max_new_tokens": (lambda x: 1 <= x < 2**31, "a whole number of at least 1"),
    "temperature": (lambda x: 0 <= x < math.inf, "a number of at least 0 (0 is greedy)"),
    "top_k": (lambda x: 0 <= x < 2**31, "a whole number of at least 0 (0 is off)"),
    "top_p": (lambda x: 0 < x <= 1, "above 0 and at most 1 (1 is off)"),
    "seed": (lambda x: 0 <= x < 2**32, "a whole number from 0 to 2**32 - 1"),
}


def spread(count: int, **knobs: Any) -> dict[str, list[Any]]:
    """Every knob as a list with one value a prompt. ValueError that names the knob for a bad value or length."""
    return {name: [_checked(name, v) for v in _each(name, value, count)] for name, value in knobs.items()}


def _each(name: str, value: Any, count: int) -> list[Any]:
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, list | tuple):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} has {len(value)} values for {count} prompts: give one, or one a prompt")
    return list(value)


def _checked(name: str, value: Any) -> int | float:
    allowed, wanted = _RULES[name]
    try:
        number = operator.index(value) if name in _WHOLE else float(value)
    except (TypeError, ValueError):
        number = None
    if number is None or isinstance(value, bool) or not allowed(number):
        raise ValueError(f"{name}={value!r} must be {wanted}")
    return number


def bucket(size: int, least: int = 1) -> int:
    """The next power of two: sizes are rounded up, so that few programs are compiled."""
    return max(least, 1 << (size - 1).bit_length())


def assemble(texts: Sequence[Text], knobs: Mapping[str, Sequence[Any]], config: Any) -> Requests:
    """The arrays of a batch: contexts padded on the right to a bucket, rows to a bucket; a row without a text is
    born done. knobs: as `spread` returns them, for all five names of `_RULES`."""
    rows, count = bucket(len(texts)), len(texts)
    width = bucket(max(len(text.ids) - 1 for text in texts) or 1, least=16)
    R = len(texts[0].stride)
    axes = (R,) if R > 1 else ()

    def column(values: Sequence[Any], dtype: Any, rest: Any = 0) -> Any:
        return np.array([*values, *[rest] * (rows - count)], dtype)

    def places(values: Sequence[Any]) -> Any:
        return column(values, np.int32, np.zeros(R)).reshape(rows, *axes)

    def full(value: int, *shape: int) -> Any:
        return np.full(shape, value, np.int32)

    context, rank, segment = full(0, rows, width), full(0, rows, width), full(PAD, rows, width)
    positions = full(0, rows, *axes, width)
    for row, text in enumerate(texts):
        size = len(text.ids) - 1
        context[row, :size] = text.ids[:-1]
        segment[row, :size] = 0
        positions[row, ..., :size] = text.positions[:, :-1].reshape(*axes, size)
        rank[row, text.prefix :] = np.arange(text.prefix, width)
    greedy = [t == 0 for t in knobs["temperature"]]  # of which top-k and top-p change nothing
    return Requests(
        context=context,
        segment=segment,
        rank=rank,
        positions=positions,
        token=column([text.token for text in texts], np.int32),
        position=places([text.position for text in texts]),
        stride=places([text.stride for text in texts]),
        length=column([len(text.ids) + text.spent for text in texts], np.int32),
        limit=column(knobs["max_new_tokens"], np.int32),
        seed=column(knobs["seed"], np.uint32),
        knobs={
            "temperature": column(knobs["temperature"], np.float32),
            "top_k": column([0 if g else k for g, k in zip(greedy, knobs["top_k"], strict=True)], np.int32),
            "top_p": column([1 if g else p for g, p in zip(greedy, knobs["top_p"], strict=True)], np.float32, 1),
        },
        stops=cast(jax.Array, np.array(ends(config) or (PAD,), np.int32)),
    )
