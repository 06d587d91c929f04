"""Decoding attention on Hopper GPUs, in Pallas' Mosaic GPU dialect.

Decoding reads the cache once and computes little: its speed depends on how many bytes are on their way from memory at
any time. A program is one warpgroup with a ring of blocks of keys and values, which the copy engine (TMA) fills ahead
of it. Two programs share a multiprocessor, so that one computes while the other waits.

The queries of all G heads that share keys, G * T of them, are rows of the same products, so that the cache is read
once for all of them. The tensor cores multiply 64 rows at a time. With fewer queries most of their work is wasted, but
it takes a quarter of the time that reading takes. Blocks to which nobody attends are not read, and the mask is
evaluated only in blocks in which not every pair attends.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from garrulax.kernels.blocks import pad_axis
from garrulax.kernels.call import Options
from garrulax.kernels.decode import QUANTISED
from garrulax.kernels.decode.call import DecodeOperands
from garrulax.kernels.decode.gpu.merge import merge_splits
from garrulax.kernels.decode.gpu.program import DecodeSizes, decode_split, scratch_types
from garrulax.kernels.decode.gpu.registers import InterpretedOps, TensorCoreOps
from garrulax.kernels.decode.gpu.splits import active_blocks, split_blocks, whole_sequences
from garrulax.kernels.gpu.memory import SHARED_MEMORY
from garrulax.kernels.gpu.products import ROWS
from garrulax.kernels.mask import Streams


@dataclasses.dataclass(frozen=True)
class HopperDecoding:
    """Decoding attention for NVIDIA GPUs of compute capability 9.0 (H100, H200).

    Entries of the cache to which no query attends must be finite.

    Attributes:
        block: Keys of a step, a multiple of 64.
        stages: Slots of the ring; None makes the ring 64 KiB, or 48 KiB of a quantised cache.
        programs: How many run at once on the device.
        waves: How many times that number all sequences are split into, so that few programs run alone at the end.
        least: Blocks of a split, unless there are then too few splits for all programs.
        whole: A cache of up to so many blocks a sequence is not split: the second kernel and the lists for both would
            take longer than a program that reads all of them.
        interpret: Computes products by XLA, for the interpreter, which cannot multiply registers (`wgmma`).
    """

    block: int = 64
    stages: int | None = None
    programs: int = 264
    waves: int = 4
    least: int = 8
    whole: int = 8
    interpret: bool = False

    def unsupported_reason(self, options: Options, cached: DecodeOperands) -> str | None:
        """Why it cannot compute this request (arrays may be abstract), or None where it can."""
        c = cached
        if c.query.dtype not in (jnp.bfloat16, jnp.float16):
            return f"queries of {c.query.dtype}: the tensor cores take bfloat16 and float16"
        quantised = c.key.dtype in QUANTISED
        if c.key.dtype != c.value.dtype or not (quantised or c.key.dtype == c.query.dtype):
            return f"a cache of {c.key.dtype} and {c.value.dtype} under queries of {c.query.dtype}"
        if quantised and c.query.dtype != jnp.bfloat16:
            return (
                f"a quantised cache under queries of {c.query.dtype}: probabilities times scales need bfloat16's range"
            )
        for width in (c.key.shape[3], c.value.shape[3]):
            step = 32 if quantised else 16
            if width % step or width > 256:
                return f"a head width of {width}: not a multiple of {step} up to 256"
        page = c.key.shape[2]
        if c.table is not None and page % self.block and (page % 8 or self.block % page):
            return f"pages of {page} slots, neither a multiple of {self.block} nor 8, 16 or 32"
        if c.steps is not None:
            return "a learned bias in steps of the distance"
        if not self.interpret and jax.__version_info__ < (0, 11):
            return f"it needs the Mosaic GPU of jax 0.11 or newer, and this is jax {jax.__version__}"
        return None

    def __call__(self, options: Options, cached: DecodeOperands) -> tuple[jax.Array, jax.Array]:
        """Attention over the cache, without sinks.

        Args:
            options: The static part of the request.
            cached: Its arrays.

        Returns:
            Output [B, T, H, Cv] in the query's dtype and lse [B, H, T], float32, natural logarithm; 0 and -inf where a
            query attends to nothing.
        """
        with jax.enable_x64(False):  # indices in the kernel would be int64, which the GPU's kernels do not take
            return self._compute(options, cached)

    def _compute(self, options: Options, cached: DecodeOperands) -> tuple[jax.Array, jax.Array]:
        (B, T, H, _), K, Cv = cached.query.shape, cached.key.shape[1], cached.value.shape[3]
        s = _sizes(self, cached)
        cached, lengths = _at_least_a_block(cached, self.block)
        pages, streams = _in_order(cached, lengths, s)
        shape = B, pages.shape[1]
        ops = InterpretedOps if self.interpret else TensorCoreOps
        if shape[1] <= self.whole and s.tiles == 1:
            blocks, splits = whole_sequences(options.rule, cached.query_streams, streams, lengths, s.block, shape)
            schedule = {"blocks": blocks, "pages": pages, "lengths": lengths, **splits._asdict()}
            s = _unsplit(s, self, cached, shape)
            out, lse = _decode_splits(s, options, ops, cached, streams, schedule)
            lse = lse.reshape(B, K, ROWS)[:, :, : s.queries]
            return out.reshape(B, H, T, Cv).swapaxes(1, 2), lse.reshape(B, H, T)
        blocks, counts = active_blocks(options.rule, cached.query_streams, streams, lengths, s.block, shape)
        pages = jnp.take_along_axis(pages, blocks[..., None] >> 1, axis=1)  # [B, N, copies], in the order of blocks
        fewest = max(1, self.programs // (K * s.tiles))  # a split is K * tiles programs
        splits, first, parts = split_blocks(counts, aim=self.waves * fewest, fewest=fewest, least=self.least)
        schedule = {"blocks": blocks, "pages": pages, "lengths": lengths, **splits._asdict()}
        out, lse = _decode_splits(s, options, ops, cached, streams, schedule)
        out, lse = merge_splits(ops, out, lse, first, parts, cached.query.dtype)
        rows, G = K * s.tiles * s.rows, H // K
        # [B, K * tiles * rows, Cv] -> [B, K, G * T, Cv] -> [B, H, T, Cv] -> [B, T, H, Cv]
        out = out[:, :rows].reshape(B, K, -1, Cv)[:, :, : G * T].reshape(B, H, T, Cv)
        lse = lse[:, :rows].reshape(B, K, -1)[:, :, : G * T].reshape(B, H, T)
        return out.swapaxes(1, 2), lse


def _sizes(kernel: HopperDecoding, cached: DecodeOperands) -> DecodeSizes:
    (_, T, H, C), (_, K, page, Cv) = cached.query.shape, cached.value.shape
    rows, block = H // K * T, kernel.block
    quantised = cached.key.dtype.itemsize == 1
    # A quantised cache leaves less to its rings, since its converted blocks take shared memory, too.
    bytes_of_block, ring = block * (C + Cv) * cached.key.dtype.itemsize, 49152 if quantised else 65536
    return DecodeSizes(
        block=block,
        stages=kernel.stages or max(2, -(-ring // bytes_of_block)),
        heads=K,
        width=C,
        value_width=Cv,
        tiles=-(-rows // ROWS),
        queries=rows,
        rows=min(-(-rows // 8) * 8, ROWS),
        page=max(page, block) if cached.table is None else page,
        copies=1 if cached.table is None else max(1, block // page),
        chunk=math.gcd(Cv, 32),
        quantised=quantised,
        split=True,
    )


def _unsplit(s: DecodeSizes, kernel: HopperDecoding, cached: DecodeOperands, shape: tuple[int, int]) -> DecodeSizes:
    """The sizes of programs that compute a sequence each, of `shape` [B, N]: sequences and blocks of each."""
    (B, blocks), size = shape, cached.query.dtype.itemsize
    stages, chunk = s.stages, math.gcd(s.value_width, 64)
    if B * s.heads <= kernel.programs // 2:  # each has a multiprocessor, and its shared memory, to itself
        both, chunk = s.width + s.value_width, s.value_width
        other = (ROWS + (s.block if s.quantised else 0)) * both * size + 4096
        stages = max(stages, min(2 * stages, (SHARED_MEMORY - other) // (s.block * both * cached.key.dtype.itemsize)))
    return s._replace(stages=max(2, min(stages, blocks)), split=False, chunk=chunk)


def _at_least_a_block(cached: DecodeOperands, block: int) -> tuple[DecodeOperands, jax.Array]:
    """The request, a contiguous cache filled up to one block if it is shorter, and lengths int32 [B]."""
    c, slots = cached, cached.key.shape[2]
    capacity = slots if c.table is None else slots * c.table.shape[1]
    whole = np.full(c.query.shape[0], capacity, np.int32)  # a constant of the program: no kernel computes it
    lengths = jnp.asarray(whole) if c.lengths is None else jnp.minimum(c.lengths, capacity)
    more = max(0, block - slots) if c.table is None else 0
    filled: dict[str, Any] = {name: pad_axis(getattr(c, name), more, 2) for name in ("key", "value")}
    if c.key_scales is not None and c.value_scales is not None:
        filled |= {"key_scales": pad_axis(c.key_scales, more, 2), "value_scales": pad_axis(c.value_scales, more, 2)}
    streams = {name: pad_axis(x, more) for name, x in c.key_streams.items()}
    return dataclasses.replace(c, key_streams=streams, **filled), lengths


def _in_order(cached: DecodeOperands, lengths: jax.Array, s: DecodeSizes) -> tuple[jax.Array, Streams]:
    """Pages of each block and key streams, both in the order of each sequence: int32 [B, N, copies], [B, N * block].

    A contiguous cache counts as one page a sequence.
    """
    B, per = cached.query.shape[0], -(-s.page // s.block)  # per: blocks of a page
    if cached.table is None:
        pages = np.broadcast_to(np.arange(B, dtype=np.int32)[:, None, None], (B, per, 1))
        return jnp.asarray(pages), {
            name: pad_axis(x, -s.page % s.block, mode="edge") for name, x in cached.key_streams.items()
        }
    table = pad_axis(cached.table, -cached.table.shape[1] % s.copies)
    # Entries behind a length may be no pages at all: page 0 can always be read.
    used = jnp.arange(table.shape[1], dtype=jnp.int32) * s.page < lengths[:, None]
    table = jnp.where(used, table, 0)
    streams = {name: x[table].reshape(B, -1) for name, x in cached.key_streams.items()}
    return jnp.repeat(table, per, axis=1).reshape(B, -1, s.copies), streams


def _tiled_rows(x: jax.Array, s: DecodeSizes, rows: int = ROWS) -> jax.Array:
    """x [B, K, G * T, ...] filled up to whole tiles of so many rows: [B * K, tiles * rows, ...]."""
    x = pad_axis(x, s.tiles * rows - x.shape[2], 2)
    return x.reshape(-1, *x.shape[2:])


def _decode_splits(
    s: DecodeSizes,
    options: Options,
    ops: type[TensorCoreOps],
    cached: DecodeOperands,
    streams: Streams,
    schedule: dict[str, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Runs the first kernel.

    Args:
        s: The sizes.
        options: The static part of the request.
        ops: Operations of a warpgroup.
        cached: The request's arrays.
        streams: Of the keys, in the order of each sequence.
        schedule: The lists of blocks and their splits, by the names of `program.decode_split`.

    Returns:
        Of I splits, float32: output [I, R, Cv] and lse [I, R] in base 2; R is K * tiles * rows, filled up to whole
        tiles of 64. Of whole sequences the results: output [B, K * G * T, Cv] in the query's dtype, and lse [B, K * 64]
        in base e, 64 of each head, of which the first G * T count.
    """
    (B, T, H, C), K, c = cached.query.shape, s.heads, cached
    G, count = H // K, schedule["start"].shape[0]
    # [B, T, H, C] -> [B, K, G * T, C]
    query = c.query.reshape(B, T, K, G, C).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, C)
    arrays = {
        "query": _tiled_rows(query, s, s.rows),
        "key": c.key.reshape(-1, *c.key.shape[2:]),
        "value": c.value.reshape(-1, *c.value.shape[2:]),
        **schedule,
        **{f"queries' {name}": _tiled_rows(jnp.tile(x, (1, G))[:, None], s) for name, x in c.query_streams.items()},
        **{f"keys' {name}": x for name, x in streams.items()},
    }
    if c.slopes is not None:
        arrays["slopes"] = _tiled_rows(jnp.repeat(c.slopes.astype(jnp.float32), T).reshape(1, K, G * T), s)
    if c.key_scales is not None and c.value_scales is not None:
        arrays["key scales"] = c.key_scales.reshape(-1, c.key.shape[2])
        arrays["value scales"] = c.value_scales.reshape(-1, c.key.shape[2])
    names, rows = (*arrays, "out", "lse"), -(-K * s.tiles * s.rows // ROWS) * ROWS
    out_type = [
        jax.ShapeDtypeStruct((count, rows, s.value_width), jnp.float32),
        jax.ShapeDtypeStruct((count, rows), jnp.float32),
    ]
    if not s.split:
        out_type = [
            jax.ShapeDtypeStruct((count, K * s.queries, s.value_width), c.query.dtype),
            jax.ShapeDtypeStruct((count, K * ROWS), jnp.float32),
        ]

    def decode_attention(*refs, **scratch):
        decode_split(s, options, ops, dict(zip(names, refs, strict=True)), scratch)

    return plgpu.kernel(
        decode_attention,
        out_type=out_type,
        scratch_types=scratch_types(s, c.query.dtype, c.key.dtype),
        grid=(count, K, s.tiles),
        grid_names=("split", "head", "tile"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*arrays.values())
