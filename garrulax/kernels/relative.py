"""T5's relative position bias: a learned number for each head and bucket of distances."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Relative:
    """A bias that depends on the distance (key position - query position) and is constant between two starts.

    Attributes:
        steps: float [len(starts) + 1, H]: steps[0] where distance < starts[0], steps[i] where starts[i - 1] <= distance
            < starts[i], the last one from the last start on.
        starts: Ascending distances; static.
    """

    steps: jax.Array
    starts: tuple[int, ...] = dataclasses.field(metadata={"static": True})


def t5(table: jax.Array, *, bidirectional: bool, max_distance: int = 128) -> Relative:
    """T5's bias (Raffel et al. 2020, arXiv 1910.10683, section 2.1; bounds of the mesh-tensorflow code).

    Half of the buckets for a direction hold one distance each. The others grow logarithmically up to max_distance; all
    longer distances share the last one.

    Args:
        table: [buckets, H], the bias of each bucket and head.
        bidirectional: If True, half of the buckets are for keys after the query; if False, such keys share the bucket
            of distance 0.
        max_distance: Distance at which the last bucket begins.

    Returns:
        The bias, for `attention(relative=...)`.

    Raises:
        ValueError: For a table without logarithmic buckets, or a max_distance within the buckets of one distance.
    """
    count = table.shape[0]
    exact = (count // 2 if bidirectional else count) // 2
    if table.ndim != 2 or exact < 1 or max_distance <= exact:
        raise ValueError(f"a table {table.shape} has no logarithmic buckets up to {max_distance}")
    distance = np.arange(-max_distance - 1, max_distance + 2)
    bucket = _bucket(distance, count, bidirectional, max_distance)
    changes = np.flatnonzero(np.diff(bucket)) + 1  # where a bucket begins
    rows = bucket[np.concatenate([[0], changes])]
    return Relative(jnp.asarray(table)[rows], tuple(int(d) for d in distance[changes]))


def _bucket(distance: np.ndarray, count: int, bidirectional: bool, max_distance: int) -> np.ndarray:
    """The bucket of each distance."""
    base = np.zeros_like(distance)
    if bidirectional:
        count //= 2
        base = np.where(distance > 0, count, 0)
        back = np.abs(distance)
    else:
        back = np.maximum(-distance, 0)
    exact = count // 2
    # float32 as in the code with which models were trained: float64 puts a few distances into another bucket.
    log = np.log(np.maximum(back, exact).astype(np.float32) / np.float32(exact))
    log = log / np.float32(math.log(max_distance / exact)) * np.float32(count - exact)
    return base + np.where(back < exact, back, np.minimum(exact + log.astype(int), count - 1))
