"""GPTQ (Frantar et al. 2022, arXiv 2210.17323), as the authors' code computes it (IST-DASLab/gptq, gptq.py).

The columns of a weight are rounded one after another. The error of a column is spread over the columns that are still
to come, weighted by the inverse of the Hessian of the squared output error, X^T X of the inputs. Everything is float32:
rounding errors of other orders move codes that lie between two.
"""

import dataclasses

import numpy as np

from garrulax.core.coded import Coded
from garrulax.quantisation.grid import Grid, find_grid, fits_float16, to_coded


@dataclasses.dataclass(frozen=True)
class Rounded:
    """A matrix that GPTQ rounded.

    Attributes:
        numbers: float32 [outputs, inputs].
        codes: The codes of it, 0..top.
        scale: float32 [outputs, groups], in the order in which the groups were made.
        zero: Likewise.
        groups: The group of each input; None if they are in order.
        loss: The sum of the squared output errors, in the Hessian's units.
    """

    numbers: np.ndarray
    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    groups: np.ndarray | None
    loss: float


def gptq(
    w: np.ndarray,
    hessian: np.ndarray,
    bits: int,
    *,
    group: int = -1,
    symmetric: bool = True,
    act_order: bool = False,
    static_groups: bool = False,
    damping: float = 0.01,
    block: int = 128,
    shrink: bool = False,
    narrow: bool = False,
) -> Rounded:
    """Rounds a matrix.

    Args:
        w: float32 [outputs, inputs].
        hessian: float32 [inputs, inputs], X^T X of the inputs in any scale.
        bits: Of a code.
        group: Inputs that share a scale; -1 is all of them.
        symmetric: Whether zero is the middle of the codes.
        act_order: Whether columns are rounded by falling diagonal of the Hessian. Groups are then of this order, unless
            `static_groups`.
        static_groups: Whether the grids are found before any column is rounded, for groups in the order of the inputs.
        damping: Share of the mean of the diagonal that is added to it.
        block: Columns whose errors are spread at once over later ones.
        shrink: As in `find_grid`.
        narrow: As in `find_grid`.

    Raises:
        ValueError: The Hessian is not finite, or not positive definite after the damping.
    """
    w, h, inputs = w.copy(), hessian.astype(np.float32), w.shape[1]
    group = inputs if group == -1 else min(group, inputs)

    def grid_of(part: np.ndarray) -> Grid:
        return find_grid(part, bits, symmetric, shrink=shrink, narrow=narrow)

    whole = group == inputs
    grids = [grid_of(w)] if whole else []  # with the numbers of dead inputs, which the other groups are made without
    dead = np.diag(h) == 0  # inputs that are always zero
    h[dead, dead] = 1
    w[:, dead] = 0
    if static_groups and not whole:
        grids = [grid_of(w[:, at : at + group]) for at in range(0, inputs, group)]
    order = np.argsort(-np.diag(h), kind="stable") if act_order else np.arange(inputs)
    w, h = w[:, order], h[np.ix_(order, order)]
    h[np.diag_indices(inputs)] += np.float32(damping) * np.mean(np.diag(h))
    factor = _inverse_factor(h)
    rounded, codes, loss = np.zeros_like(w), np.zeros_like(w), 0.0
    for start in range(0, inputs, block):
        end = min(start + block, inputs)
        part, errors = w[:, start:end].copy(), np.zeros((len(w), end - start), np.float32)
        for i in range(end - start):
            at = start + i
            if not static_groups and not whole and at % group == 0:
                grids.append(grid_of(w[:, at : at + group]))  # of the array that is updated between blocks only
            grid = grids[order[at] // group if static_groups and act_order else at // group]
            column, pivot = part[:, i : i + 1], factor[at, at]
            code = grid.codes(column)
            codes[:, at : at + 1], rounded[:, at : at + 1] = code, grid.numbers(code)
            error = (column - rounded[:, at : at + 1]) / pivot
            loss += float((error**2).sum()) / 2
            part[:, i:] -= error * factor[at : at + 1, at:end]
            errors[:, i : i + 1] = error
        w[:, end:] -= errors @ factor[start:end, end:]
    back = np.argsort(order, kind="stable")
    moved = act_order and not static_groups and not whole
    return Rounded(
        rounded[:, back], codes[:, back], np.concatenate([g.scale for g in grids], 1),
        np.concatenate([g.zero for g in grids], 1), back // group if moved else None, loss,
    )  # fmt: skip


def gptq_coded(
    w: np.ndarray, hessian: np.ndarray, bits: int, group: int, symmetric: bool, act_order: bool, damping: float
) -> Coded:
    """`gptq` as codes, with scales in float16 where that has the numbers."""
    group = w.shape[1] if group == -1 else min(group, w.shape[1])
    narrow = group < w.shape[1] and fits_float16(w, bits, group)
    found = gptq(
        w, hessian, bits, group=group, symmetric=symmetric, act_order=act_order, damping=damping, narrow=narrow
    )  # fmt: skip
    scale = found.scale.astype(np.float16) if narrow else found.scale
    return dataclasses.replace(to_coded(found.codes, scale, found.zero, group, bits, symmetric), groups=found.groups)


def _inverse_factor(h: np.ndarray) -> np.ndarray:
    """The upper Cholesky factor of the inverse of a matrix."""
    try:
        lower = np.linalg.cholesky(h)
        half = np.linalg.inv(lower).astype(np.float32)
        return np.ascontiguousarray(np.linalg.cholesky(half.T @ half).T)
    except np.linalg.LinAlgError as error:
        raise ValueError(
            "the inputs of the calibration texts do not give a usable Hessian: give more text, or a greater damping"
        ) from error
