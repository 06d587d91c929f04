"""Matrix products of one warpgroup on Hopper.

The tensor cores of Hopper work asynchronously (`wgmma`): a warpgroup starts a product of its 64 rows, goes on, and
waits for the result in its registers later. Pallas' interpreter multiplies only what lies in shared memory, so that an
interpreted kernel computes plain products in the same places.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from garrulax.kernels.blocks import pad_axis
from garrulax.kernels.call import Operands

ROWS = 64  # of the product of one warpgroup, a property of `wgmma`
STEP = 16  # entries that one instruction sums over, so that widths must be multiples of it


@dataclasses.dataclass
class _PlainAccumulator:
    value: jax.Array


def accumulate(body: Callable[..., None], *initial: jax.Array, interpret: bool) -> tuple[jax.Array, ...]:
    """Runs body(*accumulators) and returns the accumulators' values after all products that it has started.

    Args:
        body: Starts products with `multiply`.
        initial: The accumulators' first values, float32 [64, columns].
        interpret: Whether the kernel is interpreted.
    """
    if interpret:
        plain = [_PlainAccumulator(x) for x in initial]
        body(*plain)
        return tuple(x.value for x in plain)
    # The end of `run_state` waits for the products.
    return pl.run_state(lambda accumulators: body(*accumulators))(tuple(plgpu.ACC.init(x) for x in initial))


def multiply(accumulator: Any, left: Any, right: Any, *, transposed: bool = False) -> None:
    """Starts accumulator += left @ right.

    Args:
        accumulator: One of those that `accumulate` gives to its body.
        left: [64, N], a reference in shared memory, or an array in registers.
        right: [N, columns], a reference in shared memory; [columns, N] where `transposed`.
        transposed: Whether the transpose of `right` is taken, which costs the tensor cores nothing.
    """
    if not isinstance(accumulator, _PlainAccumulator):
        return plgpu.wgmma(accumulator, left, right.T if transposed else right)
    a, b = (x[...].astype(jnp.float32) for x in (left, right))
    accumulator.value += jnp.dot(a, b.T if transposed else b)


def value(accumulator: Any, *, unfinished: int = 0) -> jax.Array:
    """The accumulator's value once all products but the last `unfinished` ones are done; products end in order."""
    if not isinstance(accumulator, _PlainAccumulator):
        return plgpu.wgmma_accumulator_load(accumulator, wait_n=unfinished)
    return accumulator.value


def zeros(rows: int, columns: int) -> jax.Array:
    """A float32 tile of zeros in the layout of an accumulator."""
    return plgpu.layout_cast(jnp.zeros((rows, columns), jnp.float32), plgpu.Layout.WGMMA)


def pad_widths(operands: Operands) -> Operands:
    """The request with zeros behind queries, keys and values up to a multiple of `STEP`: they change no product."""

    def pad(x):
        return pad_axis(x, -x.shape[3] % STEP, 3)

    o = operands
    return dataclasses.replace(o, query=pad(o.query), key=pad(o.key), value=pad(o.value))
