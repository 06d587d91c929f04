"""What a warpgroup of `decode.gpu` does with registers, shared memory and tensor cores."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64  # of the products of a warpgroup
NEVER = -1e30  # score of what is not seen: finite, so that the difference of two is 0
LOG2E = math.log2(math.e)

_load: Any = plgpu.load  # whose arguments changed with JAX 0.11

TILE = plgpu.Layout.WGMMA
ROW, COLUMN = TILE.reduce(1), TILE.reduce(0)


def operand(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory of rows in the widest layout that `wgmma` reads such rows in, of at most 64 entries."""
    entries = next(n for n in (64, 32, 16) if shape[-1] % n == 0 and n * dtype.itemsize in (32, 64, 128))
    transforms = plgpu.TilingTransform((8, entries)), plgpu.SwizzleTransform(entries * dtype.itemsize)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


class Tensor:
    """What a warpgroup does with registers and tensor cores."""

    @staticmethod
    def place(x: jax.Array, layout: Any) -> jax.Array:
        """x in that layout of registers."""
        return plgpu.layout_cast(x, layout)

    @staticmethod
    def load(ref: Any, layout: Any) -> jax.Array:
        """A vector of global memory."""
        return _load(ref, layout=layout, optimized=False)

    @staticmethod
    def widened(ref: Any, dtype: Any) -> jax.Array:
        """Entries of 8 bits in shared memory in a wider dtype, exactly."""
        x = _load(ref, layout=plgpu.Layout.WGMMA_UPCAST_2X)
        if x.dtype != jnp.int8:  # there is no instruction from 8 bits of floating point to bfloat16
            x = x.astype(jnp.float32)
        return x.astype(dtype)

    @staticmethod
    def scores(q: Any, k: Any) -> jax.Array:
        """q [ROWS, C] times k [block, C], transposed: float32 [ROWS, block]."""

        def product(acc):
            plgpu.wgmma(acc, q, k.T)
            return acc[...]

        return pl.run_scoped(product, plgpu.ACC((ROWS, k.shape[0]), jnp.float32))

    @staticmethod
    def add(acc: jax.Array, p: jax.Array, v: Any) -> jax.Array:
        """acc [ROWS, Cv] plus p [ROWS, block] times v [block, Cv]."""
        return pl.run_state(lambda ref: plgpu.wgmma(ref, p, v))(plgpu.ACC.init(acc))


class Plain(Tensor):
    """The same for the interpreter, which knows no layouts and no `run_state`."""

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
        """As `Tensor.widened`."""
        return ref[...].astype(dtype)

    @staticmethod
    def scores(q: Any, k: Any) -> jax.Array:
        """As `Tensor.scores`."""
        return jnp.dot(q[...].astype(jnp.float32), k[...].astype(jnp.float32).T)

    @staticmethod
    def add(acc: jax.Array, p: jax.Array, v: Any) -> jax.Array:
        """As `Tensor.add`."""
        return acc + jnp.dot(p.astype(jnp.float32), v[...].astype(jnp.float32))


def spread(x: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    """A vector along that axis of a tile."""
    return lax.broadcast_in_dim(x, shape, [axis])


def empty_rows(on: type[Tensor], columns: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What a softmax begins with: sums [ROWS, columns], scores' greatest and exponentials' sum [ROWS]."""
    sums = on.place(jnp.zeros((ROWS, columns), jnp.float32), TILE)
    return sums, on.place(jnp.full((ROWS,), NEVER, jnp.float32), ROW), on.place(jnp.zeros((ROWS,), jnp.float32), ROW)


def finished(sums: jax.Array, top: jax.Array, total: jax.Array, nothing: float) -> tuple[jax.Array, jax.Array]:
    """Averages and lse in base 2; 0 and `nothing` where a row saw nothing."""
    empty = top <= NEVER / 2
    total = jnp.where(empty, 1.0, total)
    share = jnp.where(empty, 0.0, 1.0 / total)
    return sums * spread(share, sums.shape, 0), jnp.where(empty, nothing, top + jnp.log2(total))
