"""Matrix products of a warpgroup: the tensor cores' asynchronous ones, or, where a kernel is interpreted (the
interpreter multiplies only what lies in shared memory), plain ones in the same places."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


@dataclasses.dataclass
class _Held:
    value: jax.Array


def accumulate(body: Callable[..., None], *initial: jax.Array, interpret: bool) -> tuple[jax.Array, ...]:
    """Runs body(*accumulators), which start as `initial`, float32 tiles, and returns what they hold when all products
    are done. `interpret`: plain products."""
    if interpret:
        held = [_Held(x) for x in initial]
        body(*held)
        return tuple(x.value for x in held)
    return pl.run_state(lambda accumulators: body(*accumulators))(tuple(plgpu.ACC.init(x) for x in initial))


def multiply(accumulator: Any, left: Any, right: Any, *, transposed: bool = False) -> None:
    """Begins accumulator += left @ right. left: a reference in shared memory, or an array in registers. right: a
    reference in shared memory; its transpose is taken where `transposed`."""
    if not isinstance(accumulator, _Held):
        return plgpu.wgmma(accumulator, left, right.T if transposed else right)
    a, b = (x[...].astype(jnp.float32) for x in (left, right))
    accumulator.value += jnp.dot(a, b.T if transposed else b)


def value(accumulator: Any, *, unfinished: int = 0) -> jax.Array:
    """What the accumulator holds when all products are done but the last `unfinished` ones."""
    if not isinstance(accumulator, _Held):
        return plgpu.wgmma_accumulator_load(accumulator, wait_n=unfinished)
    return accumulator.value


def zeros(rows: int, columns: int) -> jax.Array:
    """An empty accumulator."""
    return plgpu.layout_cast(jnp.zeros((rows, columns), jnp.float32), plgpu.Layout.WGMMA)
