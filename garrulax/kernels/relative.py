"""T5's relative position bias: a learned number for every bucket of distances and head."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct


@struct.dataclass
class Relative:
    """A bias that depends on the distance (key position - query position) in steps.

    steps: float [len(starts) + 1, H]: what is added from one start to the next; the first is below all starts.
    starts: ascending distances at which the next step begins, static.
    """

    steps: jax.Array
    starts: tuple[int, ...] = struct.field(pytree_node=False)


def t5(table: jax.Array, *, bidirectional: bool, max_distance: int = 128) -> Relative:
    """The bias of T5's table [buckets, H]: half of a side's buckets are one distance each, the others grow
    logarithmically up to max_distance, beyond which all distances share the last (Raffel et al. 2020, arXiv
    1910.10683, 2.1; the bounds are those of the mesh-tensorflow code).

    bidirectional: later keys have half of the buckets; otherwise they share the bucket of distance 0.
    Raises ValueError for a table without a bucket for longer distances, and for a max_distance below those that have a
    bucket each.
    """
    count = table.shape[0]
    exact = (count // 2 if bidirectional else count) // 2
    if table.ndim != 2 or exact < 1 or max_distance <= exact:
        raise ValueError(f"a table {table.shape} has no logarithmic buckets up to {max_distance}")
    distance = np.arange(-max_distance - 1, max_distance + 2)
    bucket = _bucket(distance, count, bidirectional, max_distance)
    changes = np.flatnonzero(np.diff(bucket)) + 1
    rows = bucket[np.concatenate([[0], changes])]
    return Relative(jnp.asarray(table)[rows], tuple(int(d) for d in distance[changes]))


def _bucket(distance: np.ndarray, count: int, bidirectional: bool, max_distance: int) -> np.ndarray:
    base = np.zeros_like(distance)
    if bidirectional:
        count //= 2
        base = np.where(distance > 0, count, 0)
        back = np.abs(distance)
    else:
        back = np.maximum(-distance, 0)
    exact = count // 2
    # In float32 throughout, as trained models have it: in float64 a few distances fall into another bucket.
    log = np.log(np.maximum(back, exact).astype(np.float32) / np.float32(exact))
    log = log / np.float32(math.log(max_distance / exact)) * np.float32(count - exact)
    return base + np.where(back < exact, back, np.minimum(exact + log.astype(int), count - 1))
