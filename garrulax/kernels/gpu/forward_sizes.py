"""How the forward pass on Hopper is divided."""

from typing import NamedTuple

from garrulax.kernels import picking
from garrulax.kernels.call import Operands, Options
from garrulax.kernels.gpu import memory
from garrulax.kernels.gpu.products import ROWS
from garrulax.kernels.mask import All


class HopperForwardSizes(NamedTuple):
    """How the forward pass is divided.

    Attributes:
        block_k: Keys of a block.
        stages: Slots of the ring, how many blocks of keys and values are in shared memory.
        warpgroups: That compute, 64 queries each.
        own_output: Whether the output on its way to global memory has shared memory of its own, so that the next
            queries can arrive meanwhile; otherwise it takes the place of the queries.
        programs: How many programs compute the rows, as many as the GPU has multiprocessors; None is a program a row.
    """

    block_k: int
    stages: int
    warpgroups: int = 2
    own_output: bool = True
    programs: int | None = 132

    @property
    def block_q(self) -> int:
        """Queries of a row of blocks."""
        return self.warpgroups * ROWS


def choose_sizes(options: Options, operands: Operands) -> HopperForwardSizes:
    """Sizes for a request whose heads have widths that are multiples of 16.

    Blocks have 128 keys where two of them fit into shared memory and the optional inputs of scores into registers,
    else 64. Where heads are narrow the exponentials take as long as the products, and a third warpgroup has work while
    the others wait; but then rows have 192 queries, of which a mask with many edges (packed documents, windows) wastes
    more, and the length must be worth filling them.
    """
    o = operands
    length, width, value_width = o.query.shape[1], o.query.shape[3], o.value.shape[3]
    few_edges = (options.causal or isinstance(options.rule, All)) and o.slopes is None
    fills = length % (3 * ROWS) == 0 or length >= 2**14
    groups = 3 if max(width, value_width) <= 64 and few_edges and fills else 2
    programs = picking.multiprocessors(picking.target_device(o), 132)  # 132: of an H100 and an H200
    # Bytes of one key in the ring; filling up a length to whole blocks adds a stream.
    key_bytes = 2 * (width + value_width) + 4 * (len(o.key_streams) + 1)
    light = o.bias is None and o.steps is None and o.seeds is None

    def sizes(block_k: int, own_output: bool) -> HopperForwardSizes:
        tiles = groups * ROWS * 2 * (width + (value_width if own_output else 0))  # bytes of queries and output
        left = memory.SHARED_MEMORY - 4096 - tiles  # 4096: barriers, lse, Mosaic GPU's own needs
        # Without an output of its own a row cannot begin before the last one is written: then nothing is gained.
        several = programs if own_output else None
        return HopperForwardSizes(block_k, min(4, left // (block_k * key_bytes)), groups, own_output, several)

    shared = (True, False) if width == value_width else (True,)
    wanted = [sizes(block_k, own) for block_k in (128, 64) for own in shared]
    fitting = [s for s in wanted if (light or s.block_k == 64) and s.stages >= 2]
    return fitting[0] if fitting else wanted[-1]
