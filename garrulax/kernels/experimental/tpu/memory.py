"""How large the blocks of a request may be: the vector memory (VMEM) of a chip, and what the kernels need of it.

The compiler counts two buffers for the block of each array, the scratch, and what its registers cannot hold: tiles of
scores. `needed` adds these up, and `choose_sizes` takes the largest blocks whose sum fits. Letters of shapes: see
`layout`.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from garrulax.kernels.call import Operands
from garrulax.kernels.experimental.tpu.layout import GROUP_ROWS, LANES, SUBLANES, heads_of_part

MIB = 1 << 20
BLOCKS = (1024, 512, 256, 128)  # keys of a block, and queries of a block times query heads of a part
CHUNK = 512  # keys of a block whose scores are computed together, at most
TILES = 4  # tiles of scores in float32 that stand in memory at once: as compiled, 3.2 at most


@dataclasses.dataclass(frozen=True)
class VectorMemory:
    """The vector memory of a core.

    Attributes:
        limit: Bytes that a kernel may use; the rest is the compiler's.
        span: Bytes for the gradients of keys and values; longer texts take several passes over spans of keys.
    """

    limit: int
    span: int


SMALL, LARGE = VectorMemory(15 * MIB, 4 * MIB), VectorMemory(56 * MIB, 16 * MIB)
SMALL_CHIPS = ("TPU v2", "TPU v3", "TPU v4", "TPU v4 lite")  # 16 MiB a core; later ones have 64 MiB or more


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How a request is divided.

    Attributes:
        heads: Query heads of a part.
        block_q: Queries of a block, a multiple of 128.
        block_k: Keys of a block, a multiple of 128.
        chunk: Keys of a block whose scores are computed together; divides block_k.
        span: Keys whose gradients are computed in one pass: whole blocks, in passes of equal size.
    """

    heads: int
    block_q: int
    block_k: int
    chunk: int
    span: int


def vector_memory(device: Any) -> VectorMemory:
    """That of a device, real or abstract; of one that is no TPU, where kernels are interpreted, that of most TPUs."""
    return SMALL if device.device_kind in SMALL_CHIPS else LARGE


def choose_sizes(
    operands: Operands, memory: VectorMemory, block_q: int | None, block_k: int | None, span: int
) -> Sizes:
    """The largest sizes that fit, or the smallest if none does.

    Args:
        operands: Of the request; they may be abstract.
        memory: Of the chip.
        block_q: Queries of a block, if they are given.
        block_k: Keys of a block, if they are given.
        span: Bytes for the gradients of keys and values.
    """
    found = [_sizes(operands, block, block_q, block_k, span) for block in BLOCKS]
    return next((sizes for sizes in found if needed(operands, sizes) <= memory.limit), found[-1])


def _sizes(o: Operands, block: int, block_q: int | None, block_k: int | None, span: int) -> Sizes:
    heads = heads_of_part(o.query.shape[2] // o.key.shape[2], block // LANES)
    queries = block_q or max(LANES, min(_padded_length(o.query.shape[1]), block // _power_of_two(heads)))
    keys = block_k or min(_padded_length(o.key.shape[1]), block)
    columns = math.ceil(o.key.shape[1] / keys)
    passes = math.ceil(columns / max(1, span // (4 * keys * sum(_widths(o)))))
    return Sizes(
        heads, queries, keys, math.gcd(min(CHUNK, max(LANES, block // 2)), keys), math.ceil(columns / passes) * keys
    )


def needed(operands: Operands, sizes: Sizes) -> int:
    """Bytes of vector memory that the kernel takes which needs most: the backward one, or that for a bias' gradient."""
    o, s = operands, sizes
    C, Cv = _widths(o)
    rows, item = s.heads * s.block_q, 2 if o.query.dtype == jnp.bfloat16 else 4  # float16 is computed as float32
    bias = 0
    if o.bias is not None:
        heads, queries = (1 if n == 1 else own for n, own in zip(o.bias.shape[1:3], (s.heads, s.block_q), strict=True))
        bias = heads * max(queries, SUBLANES) * s.block_k * 4
    read = item * (rows + s.block_k) * (C + Cv) + 4 * SUBLANES * (s.block_q + s.block_k) + bias
    tiles = TILES * 4 * min(rows, max(GROUP_ROWS, s.block_q)) * s.chunk
    of_queries, of_keys = 4 * rows * C, 4 * s.span * (C + Cv)
    return 2 * read + tiles + max(3 * of_queries + of_keys, 2 * bias)


def _widths(o: Operands) -> tuple[int, int]:
    """Widths of keys and values, as multiples of 128."""
    C, Cv = (n + -n % LANES for n in (o.key.shape[3], o.value.shape[3]))
    return C, Cv


def _padded_length(length: int) -> int:
    """The least power of two times 128 that is not below the length."""
    return LANES * _power_of_two(math.ceil(length / LANES))


def _power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length()
