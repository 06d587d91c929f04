"""Parameters that keep the codes of a checkpoint."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from garrulax.core.coded import Coded
from garrulax.core.quantised import Quantised
from garrulax.core.spec import ParamSpec
from garrulax.hub import streaming
from garrulax.hub.tensors import StoredTensor


def keeps_codes(s: ParamSpec, tensors: Sequence[StoredTensor]) -> bool:
    """Whether a parameter can be a `Quantised`: a matrix or table that is rows of quantised tensors."""
    return s.role != "vector" and all(tensor.quantised for tensor in tensors) and output_rows(s) is not None


def read_codes(s: ParamSpec, tensors: Sequence[StoredTensor], dtype: str) -> Any:
    """The parameter of numpy arrays.

    Args:
        s: The parameter.
        tensors: Its stored tensors: one, or one a layer.
        dtype: Of the weight that it stands for.

    Returns:
        A `Quantised`, stacked if the ParamSpec is; or a list of one a layer, if the layers are of different forms.

    Raises:
        ValueError: The tensors of one are damaged.
    """
    leaves = (_leaf(s, tensor.coded(), dtype) for tensor in tensors)  # type: ignore[attr-defined]
    return _stacked(leaves, len(tensors)) if s.layers else next(leaves)


def _leaf(s: ParamSpec, coded: Coded, dtype: str) -> Quantised:
    rows = output_rows(s)
    assert rows is not None
    if not np.array_equal(rows, np.arange(len(coded.codes))):
        coded = coded.rows(rows)
    inner, outer = sides(s)
    leaf = coded.leaf(inner, outer, s.role == "matrix", dtype)
    return jax.tree.map(_aligned, leaf)


def _aligned(x: np.ndarray) -> np.ndarray:
    out = streaming.empty(x.shape, x.dtype)
    out[...] = x
    return out


def sides(s: ParamSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes of the contracted dimensions, and of the others. A table is multiplied from its last dimension."""
    if s.role == "embedding":
        return s.layer_shape[1:], s.layer_shape[:1]
    return s.layer_shape[: s.inputs], s.layer_shape[s.inputs :]


def output_rows(s: ParamSpec) -> np.ndarray | None:
    """The row of the stored matrix [outputs, inputs] of each output; None if the parameter is no set of whole rows."""
    layout = s.layout
    if len(layout.stored_shape) != 2:
        return None
    width = layout.stored_shape[1]
    steps = np.cumprod((1, *layout.split[:0:-1]))[::-1]
    starts = [i if isinstance(i, int) else (i.start or 0) for i in layout.index]
    kept = [at for at, i in enumerate(layout.index) if not isinstance(i, int)]
    first = sum(int(step) * start for step, start in zip(steps, starts, strict=True))
    own = [int(steps[kept[i]]) for i in layout.order]  # of each dimension of the parameter
    across, down = (own[1:], own[:1]) if s.role == "embedding" else (own[: s.inputs], own[s.inputs :])
    inner, outer = sides(s)
    if not np.array_equal(_places(inner, across), np.arange(width)):
        return None
    places = _places(outer, down) + first
    return places // width if not (places % width).any() else None


def _places(sizes: Sequence[int], steps: Sequence[int]) -> np.ndarray:
    """The places in the flattened stored matrix of a run of dimensions."""
    found = np.zeros((), np.int64)
    for size, step in zip(sizes, steps, strict=True):
        found = found[..., None] + np.arange(size) * step
    return found.reshape(-1)


def _stacked(leaves: Any, count: int) -> Quantised | list[Quantised]:
    """The layers on a leading axis, or as they are if their forms differ. Memory holds one layer besides the result."""
    first = next(leaves)
    whole = jax.tree.map(lambda x: streaming.empty((count, *x.shape), x.dtype), first)

    def put(i: int, leaf: Quantised) -> None:
        jax.tree.map(lambda target, x: target.__setitem__(i, x), whole, leaf)

    put(0, first)
    for i, leaf in enumerate(leaves, 1):
        leaf = _with_order(leaf, first)
        if not _alike(first, leaf):
            before = [jax.tree.map(lambda x, n=n: x[n], whole) for n in range(i)]
            return [*before, leaf, *leaves]
        put(i, leaf)
    return whole


def _with_order(leaf: Quantised, like: Quantised) -> Quantised:
    """The leaf with the order of its inputs spelt out, where another layer's has one."""
    if leaf.order is None and like.order is not None and leaf.form == like.form:
        size = leaf.scale.shape[-1] * leaf.form.group
        order = np.minimum(np.arange(size, dtype=np.int32), np.int32(leaf.form.inputs))
        return dataclasses.replace(leaf, order=order)  # type: ignore[arg-type]
    return leaf


def _alike(a: Quantised, b: Quantised) -> bool:
    def fields(w: Quantised) -> Any:
        return jax.tree.structure(w)

    return fields(a) == fields(b) and all(
        (x.shape, x.dtype) == (y.shape, y.dtype) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
