"""A quantised matrix of numpy arrays, before its codes are packed."""

import dataclasses
import math

import jax
import ml_dtypes
import numpy as np

from garrulax.core import codes as coding
from garrulax.core.codes import Form
from garrulax.core.quantised import Quantised


@dataclasses.dataclass(frozen=True)
class Coded:
    """A quantised matrix [outputs, inputs].

    Attributes:
        codes: uint8 or int8 [outputs, inputs], one entry a code.
        scale: float16 or float32 [outputs, groups].
        offset: As in `core.quantised.Quantised`: zero points, minima or None. Without, codes of 4 bits stand for code
            minus 8 and codes of 8 bits for themselves.
        group: Number of inputs that share a scale; the last group may be shorter.
        groups: The group of each input, where they are not in order (act-order); or None.
        kind: As in `core.codes.Form`.
        bits: 4 or 8.
        values: As in `core.codes.Form`.
        factors: As in `core.quantised.Quantised`.
        activations: As in `core.codes.Form`.
    """

    codes: np.ndarray
    scale: np.ndarray
    offset: np.ndarray | None = None
    group: int = 0
    groups: np.ndarray | None = None
    kind: str = "int"
    bits: int = 4
    values: tuple[float, ...] = ()
    factors: np.ndarray | None = None
    activations: int = 0

    def rows(self, index: np.ndarray) -> "Coded":
        """The matrix of some outputs."""
        offset = None if self.offset is None else self.offset[index]
        return dataclasses.replace(self, codes=self.codes[index], scale=self.scale[index], offset=offset)

    @classmethod
    def of(cls, leaf: Quantised) -> "Coded":
        """The matrix of a weight of one layer."""
        f, host = leaf.form, jax.tree.map(np.asarray, leaf)
        codes = coding.unpack(host.codes, f.group) if f.bits == 4 else host.codes
        groups = None
        if host.order is None:
            codes = codes[:, : f.inputs]
        else:
            used = host.order < f.inputs
            groups = np.empty(f.inputs, np.int32)
            groups[host.order[used]] = np.flatnonzero(used) // f.group
            codes = codes[:, np.argsort(host.order, kind="stable")[: f.inputs]]
        group = min(f.group, f.inputs)
        return cls(codes, host.scale, host.offset, group, groups, f.kind, f.bits, f.values, host.factors, f.activations)

    def numbers(self) -> np.ndarray:
        """The matrix as float32."""
        which = np.arange(self.codes.shape[1]) // self.group if self.groups is None else self.groups
        scale = self.scale.astype(np.float32)[:, which]
        if self.kind == "table":
            level = np.asarray(self.values, np.float32)[self.codes]
        elif self.kind == "e4m3":
            level = self.codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        else:
            level = self.codes.astype(np.float32)
            if self.offset is None and self.bits == 4:
                level -= 8
        if self.offset is None:
            level *= scale
        elif np.issubdtype(self.offset.dtype, np.integer):
            level = (level - self.offset.astype(np.float32)[:, which]) * scale
        else:
            level = level * scale + self.offset.astype(np.float32)[:, which]
        return level if self.factors is None else level * self.factors

    def leaf(self, inner: tuple[int, ...], outer: tuple[int, ...], first: bool, dtype: str) -> Quantised:
        """The weight of numpy arrays.

        Args:
            inner: Sizes of its contracted dimensions.
            outer: Sizes of the others.
            first: Whether the contracted dimensions come first.
            dtype: Of the weight that it stands for.

        Raises:
            ValueError: The sizes do not fit, or more inputs are of one group than it has.
        """
        outputs, inputs = self.codes.shape
        if (math.prod(outer), math.prod(inner)) != self.codes.shape:
            raise ValueError(f"codes of {outputs} x {inputs} are not those of {math.prod(outer)} x {math.prod(inner)}")
        codes, order, group = self.codes, None, self.group
        blank = 0 if self.kind != "int" or self.offset is not None or self.bits == 8 else 8
        if self.groups is not None:
            codes, order = _in_groups(codes, self.groups, group, self.scale.shape[1], blank)
        group += group % 2 if self.bits == 4 and self.scale.shape[1] == 1 else 0  # a byte holds two codes of a group
        missing = self.scale.shape[1] * group - codes.shape[1]
        if missing:
            codes = np.pad(codes, ((0, 0), (0, missing)), constant_values=blank)
            order = None if order is None else np.pad(order, (0, missing), constant_values=inputs)
        if self.bits == 4:
            if group % 2:
                raise ValueError(f"a group of {group} inputs is odd: codes of four bits need an even one")
            codes = coding.pack(codes, group)
        form = Form(self.kind, self.bits, group, inner, outer, first, dtype, self.values, self.activations)
        factors = None if self.factors is None else self.factors.astype(np.float32)
        return Quantised(codes, self.scale, self.offset, order, factors, form)  # type: ignore[arg-type]


def _in_groups(
    codes: np.ndarray, groups: np.ndarray, size: int, count: int, blank: int
) -> tuple[np.ndarray, np.ndarray]:
    """The codes with the inputs of each group together, and the input of each code; blanks fill up groups."""
    inputs = codes.shape[1]
    sizes = np.bincount(groups, minlength=count)
    if sizes.max() > size:
        raise ValueError(f"{sizes.max()} inputs are in one group, which has {size}")
    places = np.argsort(groups, kind="stable")
    starts = np.cumsum(sizes) - sizes
    at = groups[places] * size + np.arange(inputs) - starts[groups[places]]
    order = np.full(count * size, inputs, np.int32)
    order[at] = places
    wide = np.concatenate([codes, np.full((len(codes), 1), blank, codes.dtype)], axis=1)
    return wide[:, order], order
