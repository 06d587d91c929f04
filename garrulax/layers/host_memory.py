"""Keys and values in the memory of the host, of which a program reads and writes a few entries.

JAX types each array with its memory, and an operation takes arrays of one memory only. Here the host computes on what
is in its memory (`compute_on`), so that only indices and entries are moved. These functions use `jax.lax`, because
`jax.numpy` makes constants on the device.

Letters: L layers, B rows, K key/value heads, S slots, C width of a head, n rows, T slots that are read or written.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.compute_on import compute_on

KIND = "pinned_host"  # JAX's name of the memory

_HOST, _DEVICE = jax.memory.Space.Host, jax.memory.Space.Device
_MODE = jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS  # the others compare indices with constants on the device


def is_on_host(x: jax.Array) -> bool:
    """Whether an array, or one of a program that is traced, is in the memory of the host."""
    return jax.typeof(x).memory_space == _HOST


def to_host(x: jax.Array) -> jax.Array:
    """x in the memory of the host."""
    return jax.device_put(x, _HOST)


def to_device(x: jax.Array) -> jax.Array:
    """x in the memory of the device."""
    return jax.device_put(x, _DEVICE)


def zeros(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Zeros in the memory of the host, of which the device has none."""
    zero = to_host(jnp.zeros((), dtype))
    with compute_on("device_host"):
        return jax.lax.broadcast(zero, shape)


def places(x: jax.Array, layer: jax.Array | int, rows: jax.Array, slots: jax.Array) -> jax.Array:
    """Indices into an array of a cache.

    Args:
        x: [L, B, K, S, C], or [B·K, S, C].
        layer: Number of the layer, int32 scalar; not read where x has one layer.
        rows: int32 [n].
        slots: int32 [n, K, T], or with 1 for n: slots of each head of each row.

    Returns:
        int32 [n, K, T, 4], or [n, K, T, 2] for one layer: index on each axis of x but the last.
    """
    heads = slots.shape[1]
    row, head = rows[:, None, None], jnp.arange(heads, dtype=jnp.int32)[None, :, None]
    parts = (row * heads + head,) if x.ndim == 3 else (jnp.asarray(layer, jnp.int32)[None, None, None], row, head)
    return jnp.stack(jnp.broadcast_arrays(*parts, slots), axis=-1)


def read(x: jax.Array, where: jax.Array, count: int = 1) -> jax.Array:
    """The entries of some places, in the memory of the host.

    Args:
        x: In the memory of the host, as in `places`.
        where: From `places`; all must be in x.
        count: Number of slots that are read from each place on.

    Returns:
        [n, K, T, count, C].
    """
    axes = x.ndim - 1
    numbers = jax.lax.GatherDimensionNumbers(
        offset_dims=(3, 4), collapsed_slice_dims=tuple(range(axes - 1)), start_index_map=tuple(range(axes))
    )
    where, sizes = to_host(where), (*(1,) * (axes - 1), count, x.shape[-1])
    with compute_on("device_host"):
        return jax.lax.gather(x, where, numbers, sizes, mode=_MODE)


def write(x: jax.Array, where: jax.Array, new: jax.Array) -> jax.Array:
    """x with new entries from some places on.

    Args:
        x: In the memory of the host, as in `places`.
        where: From `places`.
        new: [n, K, T, count, C], the entries of as many slots from each place on, in either memory. They must fit.
    """
    axes = x.ndim - 1
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(3, 4),
        inserted_window_dims=tuple(range(axes - 1)),
        scatter_dims_to_operand_dims=tuple(range(axes)),
    )
    where, new = to_host(where), to_host(new)
    with compute_on("device_host"):
        return jax.lax.scatter(x, where, jax.lax.convert_element_type(new, x.dtype), numbers, mode=_MODE)


def longer(x: jax.Array, slots: int) -> jax.Array:
    """x, as in `places`, with zeros behind its slots, `slots` in all."""
    zero = to_host(jnp.zeros((), x.dtype))
    more = [(0, slots - x.shape[-2] if axis == x.ndim - 2 else 0, 0) for axis in range(x.ndim)]
    with compute_on("device_host"):
        return jax.lax.pad(x, zero, more)


def copy_rows(
    x: jax.Array, rows: jax.Array, part: jax.Array, sources: jax.Array, heads: int, layer: jax.Array | int = 0
) -> jax.Array:
    """x with rows of another array in its first slots. The host copies them one after another.

    Args:
        x: In the memory of the host, as in `places`.
        rows: int32 [n], the rows of x that are written.
        part: Another such array, with at most as many slots.
        sources: int32 [n], the rows of it that are read.
        heads: K.
        layer: Number of the layer, in those of the two that have several.
    """
    start = jnp.zeros((1, heads, 1), jnp.int32)

    def one(i: jax.Array, x: jax.Array) -> jax.Array:
        to, source = (jax.lax.dynamic_slice_in_dim(numbers, i, 1) for numbers in (rows, sources))
        new = read(part, places(part, layer, source, start), part.shape[-2])
        return write(x, places(x, layer, to, start), new)

    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(len(rows)), one, x)
