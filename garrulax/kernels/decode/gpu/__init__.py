"""Decoding attention on Hopper GPUs, in Pallas' Mosaic dialect.

Decoding reads the cache once and computes little: what counts is that enough bytes are under way at any time. A
program is one warpgroup with a ring of key and value blocks that TMA fills ahead of it, and two programs share a
multiprocessor, so that one computes while the other waits. The queries of all heads that share keys, G·T of them, are
the 64 rows of its products; where they are fewer the tensor cores waste work, but take a quarter of the time that the
bytes take. Blocks that nobody sees are not read, and masks are evaluated only in blocks that they cut.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from garrulax.kernels.blocks import pad_axis
from garrulax.kernels.call import Options
from garrulax.kernels.decode import QUANTISED
from garrulax.kernels.decode.call import DecodeOperands
from garrulax.kernels.decode.gpu.merge import merged
from garrulax.kernels.decode.gpu.pieces import active, pieces
from garrulax.kernels.decode.gpu.program import Sizes, program, scratch
from garrulax.kernels.decode.gpu.registers import ROWS, Plain, Tensor
from garrulax.kernels.mask import Streams


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Decoding attention for NVIDIA GPUs of compute capability 9.0 (H100, H200).

    block: keys a step, a multiple of 64. stages: blocks in the ring; None makes it 64 KiB, or 48 KiB of a quantised
    cache. programs: how many run at once. waves: how many times as many pieces all sequences are cut into, so that few
    programs are left alone at the end. least: blocks of a piece, unless too few pieces are left for all programs.
    interpret: products as XLA's, for the interpreter, which has no `wgmma` of registers.

    Entries of the cache that no query sees must be finite.
    """

    block: int = 64
    stages: int | None = None
    programs: int = 264
    waves: int = 4
    least: int = 8
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
        return None

    def __call__(self, options: Options, cached: DecodeOperands) -> tuple[jax.Array, jax.Array]:
        """Output [B, T, H, Cv] in the query's dtype and lse [B, H, T] float32 in natural logarithm; 0 and -inf where a
        query sees nothing. Sinks are not in them."""
        (B, T, H, _), K, Cv = cached.query.shape, cached.key.shape[1], cached.value.shape[3]
        s = _sizes(self, cached)
        cached, lengths = _filled(cached, self.block)
        pages, streams = _in_order(cached, lengths, s)
        blocks, counts = active(options.rule, cached.query_streams, streams, lengths, s.block, (B, pages.shape[1]))
        pages = jnp.take_along_axis(pages, blocks[..., None] >> 1, axis=1)
        fewest = max(1, self.programs // (K * s.tiles))
        cut, first, parts = pieces(counts, aim=self.waves * fewest, fewest=fewest, least=self.least)
        schedule = {"blocks": blocks, "pages": pages, "lengths": lengths, **cut._asdict()}
        on = Plain if self.interpret else Tensor
        out, lse = _call(s, options, on, cached, streams, schedule)
        out, lse = merged(on, out, lse, first, parts, cached.query.dtype)
        rows, G = K * s.tiles * s.rows, H // K
        out = out[:, :rows].reshape(B, K, -1, Cv)[:, :, : G * T].reshape(B, H, T, Cv)
        lse = lse[:, :rows].reshape(B, K, -1)[:, :, : G * T].reshape(B, H, T)
        return out.swapaxes(1, 2), lse


def _sizes(kernel: Kernel, cached: DecodeOperands) -> Sizes:
    (_, T, H, C), (_, K, page, Cv) = cached.query.shape, cached.value.shape
    rows, block = H // K * T, kernel.block
    quantised = cached.key.dtype.itemsize == 1
    bytes_of_block, ring = block * (C + Cv) * cached.key.dtype.itemsize, 49152 if quantised else 65536
    return Sizes(
        block=block,
        stages=kernel.stages or max(2, -(-ring // bytes_of_block)),
        heads=K,
        width=C,
        value_width=Cv,
        tiles=-(-rows // ROWS),
        rows=min(-(-rows // 8) * 8, ROWS),
        page=max(page, block) if cached.table is None else page,
        copies=1 if cached.table is None else max(1, block // page),
        chunk=math.gcd(Cv, 32),
        quantised=quantised,
    )


def _filled(cached: DecodeOperands, block: int) -> tuple[DecodeOperands, jax.Array]:
    """The request with a contiguous cache of at least one block, and lengths int32 [B]."""
    c, slots = cached, cached.key.shape[2]
    whole = slots if c.table is None else slots * c.table.shape[1]
    lengths = jnp.full(c.query.shape[0], whole, jnp.int32) if c.lengths is None else jnp.minimum(c.lengths, whole)
    more = max(0, block - slots) if c.table is None else 0
    filled: dict[str, Any] = {name: pad_axis(getattr(c, name), more, 2) for name in ("key", "value")}
    if c.key_scales is not None and c.value_scales is not None:
        filled |= {"key_scales": pad_axis(c.key_scales, more, 2), "value_scales": pad_axis(c.value_scales, more, 2)}
    streams = {name: pad_axis(x, more) for name, x in c.key_streams.items()}
    return dataclasses.replace(c, key_streams=streams, **filled), lengths


def _in_order(cached: DecodeOperands, lengths: jax.Array, s: Sizes) -> tuple[jax.Array, Streams]:
    """Of B sequences of N blocks: pages int32 [B, N, copies], and their slots' streams int32 [B, N·block].

    A contiguous cache is one of B pages."""
    B, per = cached.query.shape[0], -(-s.page // s.block)
    if cached.table is None:
        pages = jnp.broadcast_to(jnp.arange(B, dtype=jnp.int32)[:, None, None], (B, per, 1))
        return pages, {name: pad_axis(x, -s.page % s.block, mode="edge") for name, x in cached.key_streams.items()}
    table = pad_axis(cached.table, -cached.table.shape[1] % s.copies)
    used = jnp.arange(table.shape[1], dtype=jnp.int32) * s.page < lengths[:, None]
    table = jnp.where(used, table, 0)
    streams = {name: x[table].reshape(B, -1) for name, x in cached.key_streams.items()}
    return jnp.repeat(table, per, axis=1).reshape(B, -1, s.copies), streams


def _rows(x: jax.Array, s: Sizes) -> jax.Array:
    """x [B, K, G·T, ...] filled up to whole tiles: [B·K, tiles·ROWS, ...]."""
    x = pad_axis(x, s.tiles * ROWS - x.shape[2], 2)
    return x.reshape(-1, *x.shape[2:])


def _call(
    s: Sizes,
    options: Options,
    on: type[Tensor],
    cached: DecodeOperands,
    streams: Streams,
    schedule: dict[str, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Of I pieces: output [I, R, Cv] and lse [I, R] in base 2, float32. R is K·tiles·rows filled up."""
    (B, T, H, C), K, c = cached.query.shape, s.heads, cached
    G, count = H // K, schedule["start"].shape[0]
    operands = {
        "query": _rows(c.query.reshape(B, T, K, G, C).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, C), s),
        "key": c.key.reshape(-1, *c.key.shape[2:]),
        "value": c.value.reshape(-1, *c.value.shape[2:]),
        **schedule,
        **{f"queries' {name}": _rows(jnp.tile(x, (1, G))[:, None], s) for name, x in c.query_streams.items()},
        **{f"keys' {name}": x for name, x in streams.items()},
    }
    if c.slopes is not None:
        operands["slopes"] = _rows(jnp.repeat(c.slopes.astype(jnp.float32), T).reshape(1, K, G * T), s)
    if c.key_scales is not None and c.value_scales is not None:
        operands["key scales"] = c.key_scales.reshape(-1, c.key.shape[2])
        operands["value scales"] = c.value_scales.reshape(-1, c.key.shape[2])
    names, rows = (*operands, "out", "lse"), -(-K * s.tiles * s.rows // ROWS) * ROWS

    def decode_attention(*refs, **scratch):
        program(s, options, on, dict(zip(names, refs, strict=True)), scratch)

    return plgpu.kernel(
        decode_attention,
        out_type=[
            jax.ShapeDtypeStruct((count, rows, s.value_width), jnp.float32),
            jax.ShapeDtypeStruct((count, rows), jnp.float32),
        ],
        scratch_types=scratch(s, c.query.dtype, c.key.dtype),
        grid=(count, K, s.tiles),
        grid_names=("piece", "head", "tile"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*operands.values())
