"""Kinds of knobs: what a valid value is, and the array of the values of all rows. Runs on the host only.

Arrays of lists are padded to a power of two, so that lists of similar lengths use the same program.
"""

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from garrulax.sampling.transforms.watermarks import Watermark, as_arrays


class Kind(NamedTuple):
    """A kind of knobs.

    Attributes:
        read: Function from one value as users give it to its normal form. Raises TypeError, ValueError or
            OverflowError for a bad one.
        is_one: Function from what the user gives to whether that is one value for all prompts, not a list of values.
        array: Function from the normal forms of B values to an array, or a tuple of arrays, whose first axis is B.
        tokens: Function from a normal form to the token ids in it.
    """

    read: Callable[[Any], Any]
    is_one: Callable[[Any], bool]
    array: Callable[[Sequence[Any]], Any]
    tokens: Callable[[Any], Iterable[int]] = lambda value: ()


def number(valid: Callable[[float], bool]) -> Kind:
    """Numbers for which `valid` holds: float32 [B]."""
    return Kind(lambda x: _if(valid, _float(x)), _is_no_list, lambda values: np.array(values, np.float32))


def integer(valid: Callable[[int], bool], dtype: type = np.int32) -> Kind:
    """Integers for which `valid` holds: int32 [B]."""
    return Kind(lambda x: _if(valid, _int(x)), _is_no_list, lambda values: np.array(values, dtype))


def start_and_factor() -> Kind:
    """Pairs of an integer and a positive number: float32 [B, 2]."""

    def read(value):
        start, factor = value
        return _if(lambda x: x >= 0, _int(start)), _if(lambda x: 0 < x < np.inf, _float(factor))

    def is_one(value):
        return _is_no_list(value) or (len(value) == 2 and not any(x is None or _is_list(x) for x in value))

    return Kind(read, is_one, lambda values: np.array(values, np.float32).reshape(-1, 2))


def token() -> Kind:
    """Token ids: int32 [B]."""
    return integer(lambda x: 0 <= x < 2**31)._replace(tokens=lambda value: (value,))


def tokens(least: int = 0) -> Kind:
    """Lists of at least so many token ids, or single ids: int32 [B, K], -1 for none."""

    def read(value):
        ids = tuple(map(_id, value if _is_list(value) else (value,)))
        return _if(lambda x: len(x) >= least, ids)

    def is_one(value):
        return _is_no_list(value) or not any(x is None or _is_list(x) for x in value)

    return Kind(read, is_one, _padded, lambda value: value)


def words() -> Kind:
    """Lists of sequences of token ids: int32 [B, S, W]; a sequence ends in the last column, -1 for none."""

    def read(value):
        return tuple(_sequence(x) for x in value)

    def is_one(value):
        return _is_no_list(value) or all(_is_list(x) and x and not any(map(_is_list, x)) for x in value)

    return Kind(read, is_one, _padded_words, lambda value: (i for word in value for i in word))


def biased_words() -> Kind:
    """Dicts from tuples of token ids to numbers, or lists of pairs: int32 [B, S, W], as `words`, and float32 [B, S]."""

    def read(value):
        pairs = value.items() if isinstance(value, dict) else value
        return tuple((_sequence(word), _if(np.isfinite, _float(bias))) for word, bias in pairs)

    def is_one(value):
        return _is_no_list(value) or all(_is_list(x) and len(x) == 2 and _is_no_list(x[1]) for x in value)

    def array(values):
        ids = _padded_words([[word for word, _ in value] for value in values])
        return ids, _biases(values, ids.shape[1])

    return Kind(read, is_one, array, lambda value: (i for word, _ in value for i in word))


def biased_tokens() -> Kind:
    """Dicts from token ids to numbers: int32 [B, K], -1 for none, and float32 [B, K]."""

    def read(value):
        return tuple((_id(i), _if(np.isfinite, _float(bias))) for i, bias in value.items())

    def array(values):
        ids = _padded([[i for i, _ in value] for value in values])
        return ids, _biases(values, ids.shape[1])

    return Kind(read, _is_no_list, array, lambda value: (i for i, _ in value))


def watermarks() -> Kind:
    """Descriptions of watermarks: `transforms.watermarks.Marks`."""
    return Kind(lambda value: _if(lambda x: isinstance(x, Watermark), value), _is_no_list, as_arrays)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _is_no_list(value: Any) -> bool:
    return not _is_list(value)


def _if(valid: Callable[[Any], Any], value: Any) -> Any:
    if not valid(value):
        raise ValueError(value)
    return value


def _int(value: Any) -> int:
    return operator.index(_if(lambda x: not isinstance(x, bool), value))


def _float(value: Any) -> float:
    return float(_if(lambda x: not isinstance(x, bool | str), value))


def _id(value: Any) -> int:
    return _if(lambda x: 0 <= x < 2**31, _int(value))


def _sequence(value: Any) -> tuple[int, ...]:
    return _if(len, tuple(map(_id, value)))


def _width(lengths: Iterable[int], least: int) -> int:
    return 1 << (max([least, *lengths]) - 1).bit_length()


def _padded(rows: Sequence[Sequence[int]]) -> np.ndarray:
    out = np.full((len(rows), _width(map(len, rows), 4)), -1, np.int32)
    for row, values in zip(out, rows, strict=True):
        row[: len(values)] = values
    return out


def _padded_words(rows: Sequence[Sequence[Sequence[int]]]) -> np.ndarray:
    count = _width(map(len, rows), 4)
    out = np.full((len(rows), count, _width((len(word) for row in rows for word in row), 2)), -1, np.int32)
    for row, values in zip(out, rows, strict=True):
        for slot, word in zip(row, values, strict=False):
            slot[-len(word) :] = word
    return out


def _biases(rows: Sequence[Sequence[tuple[Any, float]]], width: int) -> np.ndarray:
    out = np.zeros((len(rows), width), np.float32)
    for row, values in zip(out, rows, strict=True):
        row[: len(values)] = [bias for _, bias in values]
    return out
