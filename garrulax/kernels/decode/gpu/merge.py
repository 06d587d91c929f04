"""The second kernel of decoding attention: merges the results of the splits of each sequence."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from garrulax.kernels.decode.gpu.registers import ROW, TensorCoreOps, broadcast, initial_softmax, normalised
from garrulax.kernels.gpu import memory
from garrulax.kernels.gpu.products import ROWS
from garrulax.kernels.gpu.scores import LOG2E

STAGES = 8  # slots of the ring of results: a program copies that many splits ahead


def merge_splits(
    ops: type[TensorCoreOps], out: jax.Array, lse: jax.Array, first: jax.Array, parts: jax.Array, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """Merges the results of I splits of B sequences.

    Args:
        ops: Operations of a warpgroup.
        out: float32 [I, R, Cv], the output of each split, normalised by itself; R is a multiple of 64.
        lse: float32 [I, R], in base 2; MASKED where a row attends to nothing.
        first: int32 [B], the first split of each sequence.
        parts: int32 [B], how many splits each sequence has; they follow each other.
        dtype: Of the output.

    Returns:
        Output [B, R, Cv] and lse [B, R], float32, natural logarithm; 0 and -inf where a row attends to nothing.
    """
    (_, R, width), B = out.shape, first.shape[0]
    chunk = min(width, 32 if width % 32 == 0 else 16)

    def decode_merge(out, lse, first, parts, result, result_lse, **scratch):
        _merge(ops, out, lse, first, parts, result, result_lse, scratch)

    return plgpu.kernel(
        decode_merge,
        out_type=[jax.ShapeDtypeStruct((B, R, width), dtype), jax.ShapeDtypeStruct((B, R), jnp.float32)],
        scratch_types={
            "part": memory.operand(out.dtype, STAGES, ROWS, chunk),
            "part lse": plgpu.SMEM((STAGES, ROWS), jnp.float32),
            "ready": plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),  # by slot: output and lse have arrived
            "whole": memory.operand(jnp.dtype(dtype), ROWS, chunk),
            "whole lse": plgpu.SMEM((ROWS,), jnp.float32),
        },
        grid=(B, R // ROWS, width // chunk),
        grid_names=("sequence", "tile", "column"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(out, lse, first, parts)


def _merge(
    ops: type[TensorCoreOps],
    out: Any,
    lse: Any,
    first: Any,
    parts: Any,
    result: Any,
    result_lse: Any,
    scratch: dict[str, Any],
) -> None:
    """One program: 64 rows and a chunk of columns of one sequence; references as in `merge_splits`."""
    sequence, tile, column = (lax.axis_index(name) for name in ("sequence", "tile", "column"))
    begin, count = first[sequence], parts[sequence]
    chunk = scratch["whole"].shape[1]
    rows, columns = pl.ds(tile * ROWS, ROWS), pl.ds(column * chunk, chunk)

    def fetch(i):
        @pl.when(i < count)
        def copy():
            slot = lax.rem(i, jnp.int32(STAGES))
            ready = scratch["ready"].at[slot]
            plgpu.copy_gmem_to_smem(out.at[begin + i, rows, columns], scratch["part"].at[slot], ready)
            plgpu.copy_gmem_to_smem(lse.at[begin + i, rows], scratch["part lse"].at[slot], ready)

    pl.loop(0, STAGES)(fetch)

    def step(i, carry):
        """An online softmax whose scores are the splits' lse and whose values are their outputs."""
        sums, top, total = carry  # [64, chunk], [64], [64]
        slot = lax.rem(i, jnp.int32(STAGES))
        plgpu.barrier_wait(scratch["ready"].at[slot])
        x, weight = scratch["part"][slot], ops.load(scratch["part lse"].at[slot], ROW)
        # All 128 threads must have read the slot before the next copy overwrites it.
        plgpu.commit_smem()
        fetch(i + STAGES)
        new = jnp.maximum(top, weight)
        decay, weight = jnp.exp2(top - new), jnp.exp2(weight - new)
        sums = sums * broadcast(decay, sums.shape, 0) + x * broadcast(weight, sums.shape, 0)
        return sums, new, total * decay + weight

    sums, top, total = lax.fori_loop(0, count, step, initial_softmax(ops, chunk))
    sums, bits = normalised(sums, top, total, -jnp.inf)
    scratch["whole"][...] = sums.astype(scratch["whole"].dtype)
    scratch["whole lse"][...] = bits / LOG2E
    # The copy engine (TMA) does not see plain writes to shared memory before this fence.
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(scratch["whole"], result.at[sequence, rows, columns])

    # Programs of all columns know the lse, and one of them is enough to write it.
    @pl.when(column == 0)
    def write_lse():
        plgpu.copy_smem_to_gmem(scratch["whole lse"], result_lse.at[sequence, rows])

    plgpu.wait_smem_to_gmem(0)
