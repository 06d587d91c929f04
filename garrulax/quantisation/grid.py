"""Scales, and rounding to the nearest code.

Everything is computed in float32 in the order of the authors' code (IST-DASLab/gptq, quant.py): with symmetric codes
the largest number of a row lies exactly between two codes, so that other orders give other codes.
"""

import dataclasses

import ml_dtypes
import numpy as np

from garrulax.core.coded import Coded
from garrulax.core.codes import E2M1, E4M3_MAX, NF4

#: The forms of `gx.quantise`, and the group of each if none is asked for; -1 is a whole row.
GROUPS = {"int8": -1, "int4": 128, "nf4": 64, "fp8": -1, "mxfp4": 32, "w8a8": -1}
#: The group of tables, which are otherwise a whole row.
TABLE_GROUPS = {"nf4": 64, "mxfp4": 32, "int4": 32}
_ROWS = 4096  # of a table at a time
_LEAST = 6.1e-5  # the least normal number of float16


@dataclasses.dataclass(frozen=True)
class Grid:
    """The codes of one group of each row: number = scale * (code - zero), code in 0..top.

    Attributes:
        scale: float32 [rows, 1].
        zero: float32 [rows, 1], a whole number.
        top: The greatest code.
    """

    scale: np.ndarray
    zero: np.ndarray
    top: int

    def codes(self, w: np.ndarray) -> np.ndarray:
        """The nearest codes of numbers [rows, n], as float32."""
        return np.clip(np.round(w / self.scale) + self.zero, 0, self.top)

    def numbers(self, codes: np.ndarray) -> np.ndarray:
        """The numbers of codes."""
        return self.scale * (codes - self.zero)


def find_grid(w: np.ndarray, bits: int, symmetric: bool, *, shrink: bool = False, narrow: bool = False) -> Grid:
    """The grid of a group.

    Args:
        w: float32 [rows, n].
        bits: Of a code.
        symmetric: Whether zero is the middle of the codes.
        shrink: Whether narrower ranges are tried, down to a fifth, for a smaller error (exponent 2.4).
        narrow: Whether the scale is rounded to float16, as it will be stored.
    """
    top = (1 << bits) - 1
    low, high = np.minimum(w.min(1, keepdims=True), 0), np.maximum(w.max(1, keepdims=True), 0)
    if symmetric:
        high = np.maximum(np.abs(low), high)
        low = np.where(low < 0, -high, low)
    blank = (low == 0) & (high == 0)
    low, high = np.where(blank, np.float32(-1), low), np.where(blank, np.float32(1), high)

    def grid(low: np.ndarray, high: np.ndarray) -> Grid:
        scale = (high - low) / np.float32(top)
        scale = scale.astype(np.float16).astype(np.float32) if narrow else scale
        zero = np.full_like(scale, (top + 1) / 2) if symmetric else np.round(-low / scale)
        return Grid(scale, zero, top)

    best = grid(low, high)
    if not shrink:
        return best
    least = np.full_like(best.scale, np.inf)
    for step in range(80):
        share = 1 - step / 100
        tried = grid(np.float32(share) * low, np.float32(share) * high)
        if symmetric:
            tried = dataclasses.replace(tried, zero=grid(low, high).zero)
        error = (np.abs(tried.numbers(tried.codes(w)) - w) ** np.float32(2.4)).sum(1, keepdims=True)
        better = error < least
        least = np.where(better, error, least)
        best = Grid(np.where(better, tried.scale, best.scale), np.where(better, tried.zero, best.zero), top)
    return best


def fits_float16(w: np.ndarray, bits: int, group: int) -> bool:
    """Whether the scales of the groups of a matrix [rows, n] are normal numbers of float16."""
    sizes = np.abs(in_groups(w, group)).max(-1)
    least = sizes[sizes > 0].min(initial=1.0) / (1 << bits)
    return bool(least > _LEAST and sizes.max(initial=0.0) < 6e4)


def in_groups(w: np.ndarray, group: int) -> np.ndarray:
    """[rows, groups, group], with zeros after the last input."""
    missing = -w.shape[1] % group
    return np.pad(w, ((0, 0), (0, missing))).reshape(len(w), -1, group)


def to_coded(codes: np.ndarray, scale: np.ndarray, zero: np.ndarray, group: int, bits: int, symmetric: bool) -> Coded:
    """The matrix of codes 0..top [rows, n]; scale and zero are [rows, groups]."""
    whole = codes.astype(np.uint8)
    if symmetric:
        return Coded(whole if bits == 4 else (whole ^ np.uint8(128)).view(np.int8), scale, None, group, bits=bits)
    return Coded(whole, scale, zero.astype(np.uint8), group, bits=bits)


def nearest(w: np.ndarray, kind: str, group: int, symmetric: bool = True) -> Coded:
    """Rounds every number of a matrix to the nearest code.

    Args:
        w: float32 [outputs, inputs].
        kind: A key of `GROUPS`.
        group: Inputs that share a scale; -1 is all of them.
        symmetric: For integers, whether there are no zero points.
    """
    group = w.shape[1] if group == -1 else min(group, w.shape[1])
    if kind == "w8a8":
        return dataclasses.replace(_nearest_int(w, 8, group, True), activations=8)
    if kind.startswith("int"):
        return _nearest_int(w, int(kind[3:]), group, symmetric)
    groups = in_groups(w, group)
    largest = np.abs(groups).max(-1, keepdims=True)
    if kind == "mxfp4":
        exponent = np.floor(np.log2(np.where(largest > 0, largest, 1))) - 2
        scale = np.ldexp(np.float32(1), np.clip(exponent, -127, 127).astype(np.int32))
        codes = np.clip(groups / scale, -6, 6).astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 15
    else:
        scale = (largest / np.float32(E4M3_MAX if kind == "fp8" else 1)).astype(np.float32)
        scale = np.where(scale > 0, scale, np.float32(1))
        if group < w.shape[1] and fits_float16(w, 9 if kind == "fp8" else 0, group):
            scale = scale.astype(np.float16).astype(np.float32)
        if kind == "fp8":
            codes = np.clip(groups / scale, -E4M3_MAX, E4M3_MAX).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
        else:
            table = np.asarray(NF4, np.float32)
            codes = np.searchsorted((table[1:] + table[:-1]) / 2, groups / scale).astype(np.uint8)
    codes = codes.reshape(len(w), -1)[:, : w.shape[1]]
    form = {"fp8": ("e4m3", 8, ()), "nf4": ("table", 4, NF4), "mxfp4": ("table", 4, E2M1)}[kind]
    return Coded(codes, _short(scale[..., 0]), None, group, None, *form)


def nearest_table(w: np.ndarray, kind: str) -> Coded:
    """`nearest` of a table of embeddings, with the group of `TABLE_GROUPS`; int8 codes get a factor a column too.

    Some columns of such tables have much larger numbers than the others, to which the one scale of a row then leaves
    few codes. Dividing every column by the square root of its root mean square halves the relative error (SmolLM2-135M:
    0.6 % in place of 1.2 %).

    Args:
        w: float32 [rows, width].
        kind: A key of `GROUPS`.
    """
    if kind != "int8":
        return nearest(w, kind, TABLE_GROUPS.get(kind, -1))
    squares = np.zeros(w.shape[1])  # summed in parts, since a copy of a large table in float64 takes gigabytes
    for at in range(0, len(w), _ROWS):
        squares += np.square(w[at : at + _ROWS], dtype=np.float64).sum(axis=0)
    factors = np.where(squares > 0, (squares / len(w)) ** 0.25, 1).astype(np.float32)
    return dataclasses.replace(nearest(w / factors, kind, -1), factors=factors)


def _nearest_int(w: np.ndarray, bits: int, group: int, symmetric: bool) -> Coded:
    narrow = group < w.shape[1] and fits_float16(w, bits, group)
    found = [w[:, at : at + group] for at in range(0, w.shape[1], group)]
    grids = [find_grid(part, bits, symmetric, narrow=narrow) for part in found]
    codes = np.concatenate([grid.codes(part) for grid, part in zip(grids, found, strict=True)], axis=1)
    scale, zero = (np.concatenate(parts, axis=1) for parts in zip(*((g.scale, g.zero) for g in grids), strict=True))
    return to_coded(codes, _short(scale) if narrow else scale, zero, group, bits, symmetric)


def _short(scale: np.ndarray) -> np.ndarray:
    """float16 if that is exact."""
    with np.errstate(over="ignore"):
        half = scale.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32), scale) else scale
