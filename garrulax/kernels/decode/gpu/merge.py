"""Putting pieces together again: the second program of `decode.gpu`."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from garrulax.kernels.decode.gpu.registers import LOG2E, ROW, ROWS, Tensor, empty_rows, finished, operand, spread

STAGES = 8


def merged(
    on: type[Tensor], out: jax.Array, lse: jax.Array, first: jax.Array, parts: jax.Array, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """Results [B, R, Cv] of dtype and lse [B, R] float32, natural logarithm, of those of pieces: float32 [I, R, Cv] and
    [I, R], base 2 (NEVER where a row saw nothing); R is a multiple of ROWS.

    first, parts: int32 [B], the first piece of each sequence and how many follow each other. Of none: 0 and -inf.
    """
    (_, R, width), B = out.shape, first.shape[0]
    chunk = min(width, 32 if width % 32 == 0 else 16)

    def decode_merge(out, lse, first, parts, result, result_lse, **own):
        _program(on, out, lse, first, parts, result, result_lse, own)

    return plgpu.kernel(
        decode_merge,
        out_type=[jax.ShapeDtypeStruct((B, R, width), dtype), jax.ShapeDtypeStruct((B, R), jnp.float32)],
        scratch_types={
            "part": operand((STAGES, ROWS, chunk), out.dtype),
            "part lse": plgpu.SMEM((STAGES, ROWS), jnp.float32),
            "ready": plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            "whole": operand((ROWS, chunk), jnp.dtype(dtype)),
            "whole lse": plgpu.SMEM((ROWS,), jnp.float32),
        },
        grid=(B, R // ROWS, width // chunk),
        grid_names=("sequence", "tile", "column"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(out, lse, first, parts)


def _program(
    on: type[Tensor], out: Any, lse: Any, first: Any, parts: Any, result: Any, result_lse: Any, own: dict[str, Any]
) -> None:
    """One tile of one sequence: its pieces in turn, weighed by their lse. Arrays as of `merged`."""
    sequence, tile, column = (lax.axis_index(name) for name in ("sequence", "tile", "column"))
    begin, count = first[sequence], parts[sequence]
    chunk = own["whole"].shape[1]
    rows, columns = pl.ds(tile * ROWS, ROWS), pl.ds(column * chunk, chunk)

    def fetch(i):
        @pl.when(i < count)
        def _():
            slot = lax.rem(i, jnp.int32(STAGES))
            plgpu.copy_gmem_to_smem(out.at[begin + i, rows, columns], own["part"].at[slot], own["ready"].at[slot])
            plgpu.copy_gmem_to_smem(lse.at[begin + i, rows], own["part lse"].at[slot], own["ready"].at[slot])

    pl.loop(0, STAGES)(fetch)

    def step(i, carry):
        sums, top, total = carry
        slot = lax.rem(i, jnp.int32(STAGES))
        plgpu.barrier_wait(own["ready"].at[slot])
        x, weight = own["part"][slot], on.load(own["part lse"].at[slot], ROW)
        plgpu.commit_smem()
        fetch(i + STAGES)
        above = jnp.maximum(top, weight)
        shrink, weight = jnp.exp2(top - above), jnp.exp2(weight - above)
        sums = sums * spread(shrink, sums.shape, 0) + x * spread(weight, sums.shape, 0)
        return sums, above, total * shrink + weight

    sums, top, total = lax.fori_loop(0, count, step, empty_rows(on, chunk))
    sums, bits = finished(sums, top, total, -jnp.inf)
    own["whole"][...] = sums.astype(own["whole"].dtype)
    own["whole lse"][...] = bits / LOG2E
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(own["whole"], result.at[sequence, rows, columns])

    @pl.when(column == 0)
    def _():
        plgpu.copy_smem_to_gmem(own["whole lse"], result_lse.at[sequence, rows])

    plgpu.wait_smem_to_gmem(0)
