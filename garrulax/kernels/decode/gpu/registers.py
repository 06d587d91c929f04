"""Operations of a warpgroup of the decoding kernels on registers, shared memory and tensor cores."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from garrulax.kernels.gpu import memory
from garrulax.kernels.gpu.products import ROWS

MASKED = -1e30  # score of a pair that does not attend: finite, so that the difference of two is 0 and not NaN

TILE = plgpu.Layout.WGMMA
ROW, COLUMN = TILE.reduce(1), TILE.reduce(0)  # layouts of vectors with one entry a row, or a column, of a tile


class TensorCoreOps:
    """The operations on a device."""

    @staticmethod
    def place(x: jax.Array, layout: Any) -> jax.Array:
        """x in registers of that layout."""
        return plgpu.layout_cast(x, layout)

    @staticmethod
    def load(ref: Any, layout: Any) -> jax.Array:
        """A vector of global or shared memory, in registers of that layout."""
        return memory.load(ref, layout)

    @staticmethod
    def widened(ref: Any, dtype: Any) -> jax.Array:
        """Entries of 8 bits in shared memory, exactly converted to a wider dtype."""
        x = memory.load(ref, plgpu.Layout.WGMMA_UPCAST_2X, optimized=True)
        if x.dtype != jnp.int8:  # there is no instruction from 8 bits of floating point to bfloat16
            x = x.astype(jnp.float32)
        return x.astype(dtype)

    @staticmethod
    def scores(q: Any, k: Any) -> jax.Array:
        """q [64, C] times k [block, C] transposed, references in shared memory: float32 [64, block]."""

        def product(acc):
            plgpu.wgmma(acc, q, k.T)
            return acc[...]

        return pl.run_scoped(product, plgpu.ACC((ROWS, k.shape[0]), jnp.float32))

    @staticmethod
    def add(acc: jax.Array, p: jax.Array, v: Any) -> jax.Array:
        """acc [64, Cv] plus p [64, block] in registers times v [block, Cv] in shared memory."""
        return pl.run_state(lambda ref: plgpu.wgmma(ref, p, v))(plgpu.ACC.init(acc))


class InterpretedOps(TensorCoreOps):
    """The same operations for the interpreter, which has no layouts and no `run_state`."""

    @staticmethod
    def place(x: jax.Array, layout: Any) -> jax.Array:
        """x."""
        return x

    @staticmethod
    def load(ref: Any, layout: Any) -> jax.Array:
        """A vector."""
        return ref[...]

    @staticmethod
    def widened(ref: Any, dtype: Any) -> jax.Array:
        """Entries of 8 bits in a wider dtype."""
        return ref[...].astype(dtype)

    @staticmethod
    def scores(q: Any, k: Any) -> jax.Array:
        """q times k transposed, float32."""
        return jnp.dot(q[...].astype(jnp.float32), k[...].astype(jnp.float32).T)

    @staticmethod
    def add(acc: jax.Array, p: jax.Array, v: Any) -> jax.Array:
        """acc plus p times v."""
        return acc + jnp.dot(p.astype(jnp.float32), v[...].astype(jnp.float32))


def broadcast(x: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    """A vector along that axis of a tile, broadcast to the tile's shape."""
    return lax.broadcast_in_dim(x, shape, [axis])


def initial_softmax(ops: type[TensorCoreOps], columns: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """An online softmax before the first key, float32: sums [64, columns], maximum and sum of exponentials [64]."""
    sums = ops.place(jnp.zeros((ROWS, columns), jnp.float32), TILE)
    return sums, ops.place(jnp.full((ROWS,), MASKED, jnp.float32), ROW), ops.place(jnp.zeros((ROWS,), jnp.float32), ROW)


def normalised(sums: jax.Array, top: jax.Array, total: jax.Array, nothing: float) -> tuple[jax.Array, jax.Array]:
    """The output [64, columns] and the lse [64] in base 2; 0 and `nothing` where a row attends to nothing."""
    empty = top <= MASKED / 2
    total = jnp.where(empty, 1.0, total)
    share = jnp.where(empty, 0.0, 1.0 / total)
    return sums * broadcast(share, sums.shape, 0), jnp.where(empty, nothing, top + jnp.log2(total))
