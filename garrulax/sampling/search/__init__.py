"""Search for probable sequences: beam search, diverse beam search, contrastive search, the best of several samples.

`generate` and `fill` take a description of the search, such as `beam(4)`.
"""

from garrulax.sampling.search.kinds import (
    BeamSearch,
    BestOf,
    ContrastiveSearch,
    Search,
    beam,
    best_of,
    check,
    contrastive,
    diverse_beam,
)

__all__ = [
    "BeamSearch",
    "BestOf",
    "ContrastiveSearch",
    "Search",
    "beam",
    "best_of",
    "check",
    "contrastive",
    "diverse_beam",
]
