"""The parts that the two backward kernels share.

Both have programs of three warpgroups. The first two compute, and the third fetches. A program owns a tile of tokens
of one side, whose gradients it sums up in registers, and visits blocks of the other side, which come through a ring in
shared memory.
"""

import dataclasses
from typing import Any, NamedTuple

from jax.experimental import pallas as pl

from garrulax.kernels.call import Options
from garrulax.kernels.gpu import scores
from garrulax.kernels.gpu.block_lists import BlockLists
from garrulax.kernels.gpu.products import ROWS
from garrulax.kernels.gpu.scores import ScoreExtras, Tile
from garrulax.kernels.mask import Streams


class BackwardInputs(NamedTuple):
    """References to the operands in global memory.

    Attributes:
        query: [B, T, H, C].
        key: [B, S, K, C].
        value: [B, S, K, Cv].
        cotangent: [B, T, H, Cv], of the output, in the query's dtype.
        lse: float32 [B, H, T], in base 2.
        delta: float32 [B, H, T], sum of output * cotangent over the width.
        own_streams: int32 [B, tokens] by name, of the side of which a program owns a tile.
        visited_streams: int32 [B, streams, tokens], sorted by name, of the side whose blocks it visits; None where
            there are none.
        extra: Optional inputs of scores.
        lists: The blocks to visit.
    """

    query: Any
    key: Any
    value: Any
    cotangent: Any
    lse: Any
    delta: Any
    own_streams: Streams
    visited_streams: Any
    extra: ScoreExtras
    lists: BlockLists


@dataclasses.dataclass(frozen=True)
class BackwardProgram:
    """One program, as its warpgroups know it.

    Attributes:
        options: The static part of the request.
        tile: How a tile of scores lies in registers: 64 own tokens by the tokens of a block.
        names: Of the visited side's streams, in their order in the stacked array.
        interpret: Whether the kernel is interpreted.
        inputs: References to the operands.
        scratch: References to shared memory and barriers, by name.
        batch: Index of the sequence, int32 scalar.
        head: That owns the tile, int32 scalar: a key/value head or a query head.
        row: Index of the tile, int32 scalar.
        start: Index of the first own token, int32 scalar.
    """

    options: Options
    tile: Tile
    names: list[str]
    interpret: bool
    inputs: BackwardInputs
    scratch: Any
    batch: Any
    head: Any
    row: Any
    start: Any

    def own_streams(self, start: Any) -> Streams:
        """All streams of the 64 own tokens from `start` on, in registers while the program visits its blocks."""
        reads = scores.needed_streams(self.options, self.inputs.extra, True)
        own, span = self.inputs.own_streams, pl.ds(start, ROWS)
        wanted, load = (
            (reads.query, self.tile.load_queries) if self.tile.query_axis == 0 else (reads.key, self.tile.load_keys)
        )
        return {name: load(own[name].at[self.batch, span]) for name in sorted(wanted)}

    def visited_streams(self, slot: Any, masked: bool) -> Streams:
        """The streams that scores read of the block in that slot of the ring, in registers."""
        reads, ref = scores.needed_streams(self.options, self.inputs.extra, masked), self.scratch
        wanted, load = (
            (reads.key, self.tile.load_keys) if self.tile.query_axis == 0 else (reads.query, self.tile.load_queries)
        )
        return {name: load(ref.streams.at[slot, self.names.index(name)]) for name in sorted(wanted)}
