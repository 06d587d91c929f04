"""The layout of a parameter in a stored tensor, written as a pattern such as `"(H three C) D -> D H C"`.

The notation is that of einops (Rogozhnikov 2022): on the left the stored tensor, on the right the parameter. Letters in
parentheses lie in one stored dimension, slowest first. A pattern can therefore split dimensions, take a part of one,
and transpose; a pattern cannot express a reshape that mixes dimensions.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping

import numpy as np

Error = Callable[[str], ValueError]  # makes the error of a problem
Part = int | slice  # an entry of a dimension, or a range of entries

_NUMBERS = {"two": 2, "three": 3}  # letters whose size is their name


@dataclasses.dataclass(frozen=True)
class TensorLayout:
    """The part of a stored tensor that is a parameter: `parameter = stored.reshape(split)[index].transpose(order)`.

    Made by `parse_layout`.

    Attributes:
        name: Name of the stored tensor; `{}` stands for the number of the layer.
        pattern: The pattern that the other fields follow from.
        stored_shape: Shape of the stored tensor.
        split: Size of every letter of the left side.
        index: For every letter of the left side all of it, a range, or one entry (which drops the dimension).
        order: Permutation of the dimensions that the index leaves.
        shape: Shape of the parameter.
        inputs: Number of leading dimensions of the parameter that are contracted with the activations: those of the
            stored dimension that the first letter of the right side comes from.
    """

    name: str
    pattern: str
    stored_shape: tuple[int, ...]
    split: tuple[int, ...]
    index: tuple[Part, ...]
    order: tuple[int, ...]
    shape: tuple[int, ...]
    inputs: int

    def read(self, stored: np.ndarray) -> np.ndarray:
        """The parameter in a stored tensor: a view of it."""
        return stored.reshape(self.split)[self.index].transpose(self.order)

    def write(self, parameter: np.ndarray, stored: np.ndarray) -> None:
        """Puts the parameter to its place in the tensor to store, which must be contiguous: the inverse of `read`."""
        stored.reshape(self.split)[self.index] = parameter.transpose(np.argsort(self.order))

    def transposed(self) -> "TensorLayout":
        """The layout of the same parameter in the transpose of the stored tensor, which must have two dimensions."""
        rows, columns = re.findall(r"\([\w ]+\)|\w+", self.pattern.partition("->")[0])
        cut, count = len(rows.strip("()").split()), len(self.split)
        moved = [(at - cut) % count for at, i in enumerate(self.index) if not isinstance(i, int)]
        return dataclasses.replace(
            self,
            pattern=f"{columns} {rows} ->{self.pattern.partition('->')[2]}",
            stored_shape=self.stored_shape[::-1],
            split=self.split[cut:] + self.split[:cut],
            index=self.index[cut:] + self.index[:cut],
            order=tuple(sorted(moved).index(moved[i]) for i in self.order),
        )


def parse_layout(name: str, pattern: str, sizes: Mapping[str, int], parts: Mapping[str, Part]) -> TensorLayout:
    """The layout that a pattern describes.

    Args:
        name: Name of the stored tensor, for messages too.
        pattern: Such as `"(H three C) D -> D H C"`.
        sizes: Size of every letter; `two` and `three` need none.
        parts: The part to take of each letter that is on the left side only: an entry (`three=1`, the dimension is
            dropped), or a range (`N=slice(0, 4)`, a letter that is on the right side only takes its place).

    Raises:
        ValueError: The pattern is malformed, or letters, sizes and parts do not fit each other.
    """

    def error(problem: str) -> ValueError:
        return ValueError(f"{name}: layout {pattern!r}: {problem}")

    groups, target = parse_pattern(pattern, error)
    source = [letter for group in groups for letter in group]
    known = {**_NUMBERS, **sizes}
    if unknown := [letter for letter in dict.fromkeys((*source, *target)) if letter not in known]:
        raise error(f"{', '.join(unknown)} has no size")
    renamed = _renamed(source, target, known, parts, error)
    kept = [renamed[letter] for letter in source if not isinstance(parts.get(letter), int)]
    return TensorLayout(
        name=name,
        pattern=pattern,
        stored_shape=tuple(math.prod(known[letter] for letter in group) for group in groups),
        split=tuple(known[letter] for letter in source),
        index=tuple(parts.get(letter, slice(None)) for letter in source),
        order=tuple(kept.index(letter) for letter in target),
        shape=tuple(known[letter] for letter in target),
        inputs=_inputs([[renamed[letter] for letter in group] for group in groups], target, error),
    )


def bias_pattern(pattern: str) -> str:
    """The layout of the bias that belongs to a weight: its pattern without the inputs."""
    groups, target = parse_pattern(pattern, ValueError)
    inputs = next(group for group in groups if target[0] in group)
    outputs = " ".join(f"({' '.join(group)})" for group in groups if group is not inputs)
    return f"{outputs} -> {' '.join(letter for letter in target if letter not in inputs)}"


def parse_pattern(pattern: str, error: Error) -> tuple[list[list[str]], list[str]]:
    """Letters of the left side of a pattern by stored dimension, and of the right side."""
    left, arrow, right = pattern.partition("->")
    dimensions = re.findall(r"\(([\w ]+)\)|(\w+)", left)
    if not arrow or re.sub(r"\([\w ]+\)|\w+|\s", "", left) or re.sub(r"\w+|\s", "", right):
        raise error("it must be like '(H C) D -> D H C': groups on the left side only")
    groups, target = [(group or single).split() for group, single in dimensions], right.split()
    for side in ([letter for group in groups for letter in group], target):
        if repeated := {letter for letter in side if side.count(letter) > 1}:
            raise error(f"{', '.join(sorted(repeated))} stands twice on one side")
    if not target:
        raise error("the right side is empty")
    return groups, target


def _renamed(
    source: list[str], target: list[str], sizes: Mapping[str, int], parts: Mapping[str, Part], error: Error
) -> dict[str, str]:
    """Every letter of the left side, with the name that it has on the right side."""
    new = [letter for letter in target if letter not in source]
    renamed = {letter: letter for letter in source}
    if wrong := [letter for letter in parts if letter not in source or letter in target]:
        raise error(f"a part is taken of {', '.join(wrong)}, which must be a letter of the left side only")
    for letter in (letter for letter in source if letter not in target):
        part = parts.get(letter)
        if part is None:
            raise error(f"{letter} is on the left side only: say which part is taken of it, such as {letter}=0")
        if isinstance(part, bool) or not isinstance(part, int | slice):
            raise error(f"{letter}={part!r} must be an entry, such as {letter}=0, or a range, such as slice(0, 2)")
        if isinstance(part, int):
            if not 0 <= part < sizes[letter]:
                raise error(f"{letter}={part} is not an entry of {sizes[letter]}")
            continue
        start, stop = part.start or 0, sizes[letter] if part.stop is None else part.stop
        if part.step is not None or not 0 <= start < stop <= sizes[letter]:
            raise error(f"{letter}={start}:{stop} is not a range of {sizes[letter]} entries without steps")
        if not new or sizes[new[0]] != stop - start:
            raise error(f"{letter}={start}:{stop} of {sizes[letter]} needs a letter of that size on the right")
        renamed[letter] = new.pop(0)
    if new:
        raise error(f"{', '.join(new)} is on the right side only")
    return renamed


def _inputs(groups: list[list[str]], target: list[str], error: Error) -> int:
    """How many letters of the right side come from the same stored dimension as the first."""
    first = next(group for group in groups if target[0] in group)
    inputs = [letter for letter in target if letter in first]
    if target[: len(inputs)] != inputs:
        raise error(f"{', '.join(inputs)} share a stored dimension and must be the first letters of the right side")
    return len(inputs)
