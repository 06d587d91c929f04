"""Trees of drafts for Medusa: which of the likeliest tokens of each head are verified together.

A path (i, j, ...) is the token that head 0 ranks i-th, after it the token that head 1 ranks j-th, and so on, counted
from 0. Each path of a tree is a draft, and the path without its last entry is its parent.
"""

import heapq
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

Path = tuple[int, ...]

#: The 63 drafts that Cai et al. 2024 (arXiv 2401.10774, section 2.3.3) use for Vicuna-7B: the list `mc_sim_7b_63` in
#: medusa/model/medusa_choices.py of FasterDecoding/Medusa. The best come first, and the first n are a tree too.
PATHS_63: tuple[Path, ...] = (
    (0,), (0, 0), (1,), (0, 1), (2,), (0, 0, 0), (1, 0), (0, 2), (3,), (0, 3), (4,), (0, 4), (2, 0), (0, 5), (0, 0, 1),
    (5,), (0, 6), (6,), (0, 7), (0, 1, 0), (1, 1), (7,), (0, 8), (0, 0, 2), (3, 0), (0, 9), (8,), (9,), (1, 0, 0),
    (0, 2, 0), (1, 2), (0, 0, 3), (4, 0), (2, 1), (0, 0, 4), (0, 0, 5), (0, 0, 0, 0), (0, 1, 1), (0, 0, 6), (0, 3, 0),
    (5, 0), (1, 3), (0, 0, 7), (0, 0, 8), (0, 0, 9), (6, 0), (0, 4, 0), (1, 4), (7, 0), (0, 1, 2), (2, 0, 0), (3, 1),
    (2, 2), (8, 0), (0, 5, 0), (1, 5), (1, 0, 1), (0, 2, 1), (9, 0), (0, 6, 0), (0, 0, 0, 1), (1, 6), (0, 7, 0),
)  # fmt: skip


class DraftTree(NamedTuple):
    """A tree of drafts as static data, those of smaller depth first.

    Attributes:
        parents: The draft before each, -1 for one that follows the last token, as in `interface.Proposer`.
        head: The head that guesses each draft.
        rank: The rank of each draft among the guesses of its head.
    """

    parents: tuple[int, ...]
    head: tuple[int, ...]
    rank: tuple[int, ...]

    @property
    def depth(self) -> int:
        """Length of the longest path."""
        return max(self.head) + 1

    def guesses(self, head: int) -> int:
        """Number of the likeliest tokens of each head that the tree uses."""
        return max((rank for i, rank in zip(self.head, self.rank, strict=True) if i == head), default=-1) + 1


def tree_of(paths: Iterable[Sequence[int]]) -> DraftTree:
    """The tree that has these paths, in any order.

    Raises:
        ValueError: `paths` are no paths, there is none, one is empty, appears twice or has a negative entry, or its
            parent is missing.
    """
    try:
        listed = [tuple(path) for path in paths]
    except TypeError:
        listed = []
    if not listed or () in listed:
        raise ValueError("a tree is a list of paths such as [(0,), (0, 0), (1,)], of at least one entry each")
    if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for path in listed for i in path):
        raise ValueError("the entries of a path are ranks of guesses: whole numbers of at least 0")
    ordered = sorted(listed, key=lambda path: (len(path), path))
    index: dict[Path, int] = {(): -1}
    for path in ordered:
        if path in index:
            raise ValueError(f"the tree lists the path {path} twice")
        if path[:-1] not in index:
            raise ValueError(f"the tree has the path {path}, but not its parent {path[:-1]}")
        index[path] = len(index) - 1
    return DraftTree(
        tuple(index[path[:-1]] for path in ordered),
        tuple(len(path) - 1 for path in ordered),
        tuple(path[-1] for path in ordered),
    )


def number_of_paths(heads: int, ranks: int) -> int:
    """The number of all paths of heads with so many guesses each."""
    return sum(ranks ** (i + 1) for i in range(heads))


def best_paths(accuracy: Sequence[Sequence[float]] | np.ndarray, drafts: int) -> list[Path]:
    """The paths of which most tokens are expected to be accepted, if heads are right independently of one another.

    The expected number is the sum over paths of the product of the accuracies along them (Cai et al. 2024, section
    2.3.3). No path is better than its parent or a sibling of lower rank, so that the best ones are a tree.

    Args:
        accuracy: [k, r], entry [i, j] is how often head i's guess of rank j is right (`MedusaHeads.accuracy`).
        drafts: Number of paths.

    Returns:
        The paths, best first.

    Raises:
        ValueError: `accuracy` has not two axes or is no share, or has fewer paths.

    Example:
        >>> from garrulax.sampling.speculate.medusa_trees import best_paths
        >>> best_paths([[0.6, 0.2], [0.5, 0.1]], 3)
        [(0,), (0, 0), (1,)]
    """
    table = np.asarray(accuracy, np.float64)
    if table.ndim != 2 or not table.size or not ((table >= 0) & (table <= 1)).all():
        raise ValueError("accuracy must be shares from 0 to 1, one row a head and one column a rank")
    table = np.minimum.accumulate(table, axis=1)  # counted on few tokens, a rank may seem better than the one before
    heads, ranks = table.shape
    waiting: list[tuple[float, Path]] = [(-table[0, 0], (0,))]
    found: list[Path] = []
    while waiting and len(found) < drafts:
        value, path = heapq.heappop(waiting)
        found.append(path)
        head, rank = len(path) - 1, path[-1]
        if rank + 1 < ranks:
            before = float(np.prod([table[i, j] for i, j in enumerate(path[:-1])]))
            heapq.heappush(waiting, (-before * table[head, rank + 1], (*path[:-1], rank + 1)))
        if head + 1 < heads:
            heapq.heappush(waiting, (value * table[head + 1, 0], (*path, 0)))
    if len(found) < drafts:
        raise ValueError(f"{heads} heads with {ranks} guesses each have {len(found)} paths, not {drafts}")
    return found
