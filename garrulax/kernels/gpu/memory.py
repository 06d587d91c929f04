"""Shared memory: buffers for the operands of matrix products, rings of such buffers, loads and stores.

A ring lets copies run ahead of the computation. It has a few slots; block i of a list lies in slot i % slots. Every
slot has two barriers: one says that a copy into the slot has arrived, the other that every reader is done with it, so
that the next copy may overwrite it.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

SHARED_MEMORY = 227 * 1024  # bytes that a program may use on sm_90 and sm_100

_load: Any = plgpu.load  # untyped, because its arguments changed with jax 0.11


def operand(dtype: Any, *shape: int) -> Any:
    """Shared memory for operands of matrix products, in the swizzled tiles that the tensor cores read.

    Rows are cut into tiles of the widest swizzle that divides them: 128, 64 or 32 bytes, and at most 64 entries.

    Args:
        dtype: Of 1, 2 or 4 bytes.
        shape: The last axis is a row of at least 32 bytes, and a multiple of 16 entries.
    """
    entries = math.gcd(64, shape[-1])
    while entries * dtype.itemsize > 128:
        entries //= 2
    transforms = plgpu.TilingTransform((8, entries)), plgpu.SwizzleTransform(entries * dtype.itemsize)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def load(ref: Any, layout: Any, *, optimized: bool = False) -> jax.Array:
    """The entries of a reference in global or shared memory, in registers of that layout.

    `optimized` refuses a layout for which there is no fast way to load.
    """
    return _load(ref, layout=layout, optimized=optimized)


def store(shared: Any, x: jax.Array, target: Any) -> None:
    """Writes registers to global memory, through shared memory that nobody reads any more."""
    shared[...] = x.astype(shared.dtype)
    # The copy engine (TMA) does not see plain writes to shared memory before this fence.
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(shared, target)
    plgpu.wait_smem_to_gmem(0)


def opaque_zero(i: Any) -> Any:
    """0, computed from a block's number i < 2**30 so that the compiler cannot tell.

    Added to an index into shared memory, it ties that index to the loop. Otherwise the compiler computes the
    descriptors of all of a tile's products before the loop and keeps them, which takes up to 64 registers a thread.
    """
    return lax.shift_right_logical(i, jnp.int32(30))


def ring_slot(i: Any, slots: int) -> Any:
    """Index of the slot in which block i lies."""
    return lax.rem(i, jnp.int32(slots)) if slots > 1 else opaque_zero(i)


def wait_until_free(barrier: Any, i: Any, slots: int) -> None:
    """Waits until all readers are done with the block that has the slot of block i; at once in the first round."""

    @pl.when(i >= slots)
    def wait() -> None:
        plgpu.barrier_wait(barrier.at[ring_slot(i, slots)])


def drain(barrier: Any, count: Any, slots: int) -> None:
    """Waits until all readers are done with the last blocks of `count`, for which no later copy has waited.

    A program must have awaited every completion of its barriers when it ends.
    """

    @pl.loop(jnp.maximum(count - slots, 0), count)
    def wait(i: Any) -> None:
        plgpu.barrier_wait(barrier.at[ring_slot(i, slots)])
