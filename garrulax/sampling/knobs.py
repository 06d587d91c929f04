"""Knobs (sampling parameters): their values as users give them, and as arrays for transforms. Runs on the host only.

A knob has one value for all prompts, or a list with one for each. The value of some knobs is itself a list, such as
`suppress_tokens=[5, 6]`: that is one value for all prompts, and `[[5, 6], [7]]` is one for each of two. None stands for
a knob that is off.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from garrulax.sampling.knob_kinds import (
    Kind,
    biased_tokens,
    biased_words,
    integer,
    number,
    start_and_factor,
    token,
    tokens,
    watermarks,
    words,
)
from garrulax.sampling.transforms import Transform
from garrulax.sampling.transforms.order import suggestion


class Knob(NamedTuple):
    """A built-in knob.

    Attributes:
        kind: Its kind.
        wanted: What a valid value is, for errors.
        off: The normal form of None: the value with which the knob changes nothing. ... if None is no valid value.
    """

    kind: Kind
    wanted: str
    off: Any = ...


_count = integer(lambda x: 0 <= x < 2**31)
_penalty = number(math.isfinite)
_positive = number(lambda x: 0 < x < math.inf)
_share = number(lambda x: 0 < x <= 1)
_cutoff = number(lambda x: 0 <= x < 1)

#: Knobs of `generate` that no transform reads.
REQUEST_KNOBS = {
    "max_new_tokens": Knob(
        integer(lambda x: 1 <= x < 2**31), "a whole number of at least 1, or None (as many as fit)", None
    ),
    "seed": Knob(integer(lambda x: 0 <= x < 2**32, np.uint32), "a whole number from 0 to 2**32 - 1"),
}
#: Knobs of the transforms, and by which values they are off.
KNOBS = {
    "temperature": Knob(
        number(lambda x: 0 <= x < math.inf), "a number of at least 0 (0 is greedy, 1 or None is off)", 1.0
    ),
    "top_k": Knob(_count, "a whole number of at least 0 (0 or None is off)", 0),
    "top_p": Knob(_share, "above 0 and at most 1 (1 or None is off)", 1.0),
    "min_p": Knob(number(lambda x: 0 <= x <= 1), "a number from 0 to 1 (0 or None is off)", 0.0),
    "top_h": Knob(_share, "above 0 and at most 1 (None is off)", 0.0),
    "typical_p": Knob(_share, "above 0 and at most 1 (1 or None is off)", 1.0),
    "epsilon_cutoff": Knob(_cutoff, "at least 0 and below 1 (0 or None is off)", 0.0),
    "eta_cutoff": Knob(_cutoff, "at least 0 and below 1 (0 or None is off)", 0.0),
    "repetition_penalty": Knob(_positive, "a number above 0 (1 or None is off)", 1.0),
    "frequency_penalty": Knob(_penalty, "a number (0 or None is off)", 0.0),
    "presence_penalty": Knob(_penalty, "a number (0 or None is off)", 0.0),
    "guidance_scale": Knob(_penalty, "a number (1 or None is off)", 1.0),
    "no_repeat_ngram_size": Knob(_count, "a whole number of at least 0 (0 or None is off)", 0),
    "min_length": Knob(_count, "a whole number of at least 0 (0 or None is off)", 0),
    "min_new_tokens": Knob(_count, "a whole number of at least 0 (0 or None is off)", 0),
    "forced_bos_token_id": Knob(token(), "a token id (None is off)", -1),
    "forced_eos_token_id": Knob(tokens(), "a token id or a list of them (None is off)", ()),
    "suppress_tokens": Knob(tokens(), "a list of token ids (None is off)", ()),
    "begin_suppress_tokens": Knob(tokens(), "a list of token ids (None is off)", ()),
    "allowed_tokens": Knob(tokens(least=1), "a list of token ids, at least one (None is off)", ()),
    "logit_bias": Knob(biased_tokens(), "a dict from token ids to numbers (None is off)", ()),
    "bad_words_ids": Knob(words(), "a list of lists of token ids, none of them empty (None is off)", ()),
    "sequence_bias": Knob(
        biased_words(), "a dict from tuples of token ids to numbers, or a list of [ids, number] (None is off)", ()
    ),
    "exponential_decay_length_penalty": Knob(
        start_and_factor(), "a number of tokens and a factor above 0 (None is off)", (0, 1.0)
    ),
    "watermark": Knob(watermarks(), "what gx.watermark(key) returns (None is off)", None),
}
#: Filters change nothing in a row that is greedy (temperature 0), and are switched off there.
FILTERS = ("top_h", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
RESERVED = ("prompt", "vocab", "size", "ends", "limit", "unconditional")


def knobs_per_prompt(count: int, /, *, vocab: int | None = None, **knobs: Any) -> dict[str, list[Any]]:
    """Returns each knob as a list with one value, in normal form, for each of `count` prompts.

    Args:
        count: Number of prompts.
        vocab: Size of the vocabulary, which token ids and top_k must not exceed; None skips this check.
        **knobs: Values as users give them. Knobs that are not built in have numbers, or arrays of one shape.

    Raises:
        ValueError: A bad value or a wrong number of values; the message names the knob.
    """
    values = {name: [_read(name, v) for v in _per_prompt(name, value, count)] for name, value in knobs.items()}
    for name in values if vocab is not None else ():
        _check_vocabulary(name, values[name], vocab)
    return values


def _knob(name: str) -> Knob | None:
    return KNOBS.get(name) or REQUEST_KNOBS.get(name)


def _per_prompt(name: str, value: Any, count: int) -> list[Any]:
    value, knob = _plain(value), _knob(name)
    if knob.kind.is_one(value) if knob else not isinstance(value, list | tuple):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} has {len(value)} values for {count} prompts: give one, or one a prompt")
    return list(value)


def _plain(value: Any) -> Any:
    """Arrays, also those in a list, as lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [_plain(x) for x in value] if isinstance(value, list) else value


def _read(name: str, value: Any) -> Any:
    knob = _knob(name)
    if knob is None:
        return value
    if value is None and knob.off is not ...:
        return knob.off
    try:
        return knob.kind.read(value)
    except (TypeError, ValueError, OverflowError, AttributeError):
        raise ValueError(f"{name}={value!r:.80} must be {knob.wanted}") from None


def _check_vocabulary(name: str, values: Sequence[Any], vocab: int | None) -> None:
    knob = KNOBS.get(name)
    if knob is None or vocab is None:
        return
    for value in values:
        if name == "top_k" and value > vocab:
            raise ValueError(f"top_k={value} is more than the {vocab} tokens of the vocabulary: lower it (0 keeps all)")
        if wrong := [i for i in knob.kind.tokens(value) if i >= vocab]:
            raise ValueError(f"{name} has token id {wrong[0]}: this model's ids are 0 to {vocab - 1}")


def knob_arrays(transform: Transform, knobs: Mapping[str, Sequence[Any]], rows: int) -> dict[str, Any]:
    """Returns the knobs that a transform reads, as arrays.

    Args:
        transform: The transform.
        knobs: From `knobs_per_prompt`. Knobs that are off need not be given.
        rows: B, at least the number of prompts. In the other rows the knobs are off.

    Returns:
        Name -> array, or tuple of arrays, whose first axis is B.

    Raises:
        ValueError: A knob that is not off and that the transform does not read, a knob that it reads and that is
            neither given nor built in, values that are no numbers, or a watermark at temperature 0.

    Example:
        >>> from garrulax.sampling import knobs, transforms
        >>> given = knobs.knobs_per_prompt(2, temperature=[0.5, 0], min_p=0.1)
        >>> chain = transforms.standard_chain(given)
        >>> {name: array.tolist() for name, array in knobs.knob_arrays(chain, given, 2).items() if name != "min_p"}
        {'temperature': [0.5, 0.0], 'top_k': [0, 0], 'top_p': [1.0, 1.0]}
    """
    given = {name: values for name, values in knobs.items() if name not in REQUEST_KNOBS}
    own = {name: _own_array(name, values, rows) for name, values in given.items() if name not in KNOBS}
    names, optional = _reads(transform, tuple((name, x.shape[1:], x.dtype) for name, x in own.items()))
    for name, values in given.items():
        if name not in names and not (name in KNOBS and all(v == KNOBS[name].off for v in values)):
            known = f": add sampling.transforms' transform for {name} to it" if name in KNOBS else ""
            raise ValueError(f"no transform of the chain reads the knob {name!r}{known or suggestion(name)}")
    if missing := sorted(name for name in names - optional if name not in own and name not in KNOBS):
        raise ValueError(f"the transform reads the knob {missing[0]!r}, which has no default: give {missing[0]}=...")
    greedy = [t == 0 for t in given.get("temperature", ())]
    if any(g and mark is not None for g, mark in zip(greedy, given.get("watermark", ()), strict=False)):
        raise ValueError("a watermark needs a choice of tokens, and temperature=0 leaves one: set it above 0")
    arrays = {name: x for name, x in own.items() if name in names}
    for name in sorted(names & KNOBS.keys()):
        knob = KNOBS[name]
        values = list(given.get(name, ()))
        if name in FILTERS and greedy:
            values = [knob.off if g else v for g, v in zip(greedy, values, strict=bool(values))]
        arrays[name] = knob.kind.array(values + [knob.off] * (rows - len(values)))
    return arrays


def _own_array(name: str, values: Sequence[Any], rows: int) -> np.ndarray:
    """Array of a knob that is not built in; rows without a prompt have the last prompt's value."""
    try:
        array = np.array([*values, *[values[-1]] * (rows - len(values))])
    except ValueError:  # lists of different shapes
        array = np.array(None)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name}={values[0]!r:.80} must be a number, or an array of the same shape for every prompt")
    return array.astype({"b": np.bool_, "f": np.float32}.get(array.dtype.kind, np.int32))


def knob_names(transform: Transform) -> frozenset[str]:
    """Returns the names of the knobs that a transform reads, without the reserved ones.

    They are found by tracing `init`, which computes nothing.
    """
    return _reads(transform, ())[0]


@functools.lru_cache(maxsize=256)
def _reads(transform: Transform, own: tuple[tuple[str, tuple[int, ...], Any], ...]) -> tuple[frozenset, frozenset]:
    """Returns the names of the knobs that `init` reads, and those of them that it reads with a default of its own.

    Args:
        transform: The transform.
        own: Name, shape without B, and dtype of knobs that are not built in; by default [] and float32.
    """
    recorder = _Recorder({name: (shape, dtype) for name, shape, dtype in own})
    jax.eval_shape(lambda: transform.init(recorder))
    return frozenset(recorder.read), frozenset(recorder.optional)


class _Recorder(Mapping[str, Any]):
    """Knobs of two rows that record which of them are read."""

    def __init__(self, own: Mapping[str, tuple[tuple[int, ...], Any]]):
        self.read: set[str] = set()
        self.optional: set[str] = set()
        self._own = own

    def __getitem__(self, name: str) -> Any:
        if name in ("vocab", "size"):
            return 32
        if name in RESERVED:
            width = {"prompt": (4,), "ends": (1,)}.get(name, ())
            return jnp.zeros((2, *width), bool if name == "unconditional" else jnp.int32)
        self.read.add(name)
        if name in KNOBS:
            return jax.tree.map(jnp.asarray, KNOBS[name].kind.array([KNOBS[name].off] * 2))
        shape, dtype = self._own.get(name, ((), jnp.float32))
        return jnp.zeros((2, *shape), dtype)

    def get(self, name: str, default: Any = None) -> Any:
        """`default` for a knob that is neither given nor built in, as the real mapping does."""
        if name in KNOBS or name in RESERVED or name in self._own:
            return self[name]
        self.read.add(name)
        self.optional.add(name)
        return default

    def __iter__(self) -> Iterator[str]:
        return iter(self._own)

    def __len__(self) -> int:
        return len(self._own)
