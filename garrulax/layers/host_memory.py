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


def fetched(x: jax.Array) -> jax.Array:
    """x, of the memory of the host, on the device."""
    with compute_on("device_host"):
        flat = jax.lax.reshape(x, (x.size,))
    return jax.device_put(flat, _DEVICE).reshape(x.shape)


def _sent(x: jax.Array) -> jax.Array:
    """x, of the device, in the memory of the host. Flat, as in `fetched`: XLA:TPU fails to move some other shapes."""
    flat = to_host(x.reshape(-1))
    with compute_on("device_host"):
        return jax.lax.reshape(flat, x.shape)


def zeros(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Zeros in the memory of the host, of which the device has none."""
    zero = to_host(jnp.zeros((), dtype))
    with compute_on("device_host"):
        return jax.lax.broadcast(zero, shape)


def places(x: jax.Array, layer: jax.Array | int, rows: jax.Array, slots: jax.Array) -> jax.Array:
    """Indices into an array of a cache, in the memory of the host.

    Args:
        x: [L, B, K, S, C], or [B·K, S, C].
        layer: Number of the layer, int32 scalar; not read where x has one layer.
        rows: int32 [n].
        slots: int32 [n, K, T], slots of each head of each row.

    Returns:
        int32 [n, K, T, 4], or [n, K, T, 2] for one layer: index on each axis of x but the last.
    """
    shape, heads = (*slots.shape, 1), jnp.arange(slots.shape[1], dtype=jnp.int32)
    if x.ndim == 3:
        parts: list[tuple[jax.Array, tuple[int, ...]]] = [(rows[:, None] * len(heads) + heads[None], (0, 1))]
    else:
        parts = [(jnp.asarray(layer, jnp.int32), ()), (rows, (0,)), (heads, (1,))]
    moved = [(_sent(part), axes) for part, axes in (*parts, (slots, (0, 1, 2)))]
    with compute_on("device_host"):  # where they are small: on a TPU the last axis would take 128 entries
        return jax.lax.concatenate([jax.lax.broadcast_in_dim(part, shape, axes) for part, axes in moved], 3)


def read(x: jax.Array, where: jax.Array) -> jax.Array:
    """The entries [n, K, T, C] of some places, moved to the device.

    Args:
        x: In the memory of the host, as in `places`.
        where: From `places`; all must be in x.
    """
    axes = tuple(range(x.ndim - 1))
    numbers = jax.lax.GatherDimensionNumbers(offset_dims=(3,), collapsed_slice_dims=axes, start_index_map=axes)
    with compute_on("device_host"):
        found = jax.lax.gather(x, where, numbers, (*(1 for _ in axes), x.shape[-1]), mode=_MODE)
    return fetched(found)


def read_on(x: jax.Array, where: jax.Array, count: int) -> jax.Array:
    """The entries [n, K, count, C] from some places on, which stay in the memory of the host.

    Args:
        x: In the memory of the host, as in `places`.
        where: From `places`, with a T of 1.
        count: Number of slots. They must be in x.
    """
    axes = tuple(range(x.ndim - 1))
    numbers = jax.lax.GatherDimensionNumbers(offset_dims=(2, 3), collapsed_slice_dims=axes[:-1], start_index_map=axes)
    with compute_on("device_host"):
        where = jax.lax.squeeze(where, (2,))
        return jax.lax.gather(x, where, numbers, (*(1 for _ in axes[1:]), count, x.shape[-1]), mode=_MODE)


def write_on(x: jax.Array, where: jax.Array, new: jax.Array) -> jax.Array:
    """x with new entries from some places on.

    Args:
        x: In the memory of the host, as in `places`.
        where: From `places`, with a T of 1.
        new: [n, K, count, C], in either memory. They must fit.
    """
    axes = tuple(range(x.ndim - 1))
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(2, 3), inserted_window_dims=axes[:-1], scatter_dims_to_operand_dims=axes
    )
    new = new if is_on_host(new) else _sent(new)
    with compute_on("device_host"):
        where, new = jax.lax.squeeze(where, (2,)), jax.lax.convert_element_type(new, x.dtype)
        return jax.lax.scatter(x, where, new, numbers, mode=_MODE)


def longer(x: jax.Array, slots: int) -> jax.Array:
    """x, as in `places`, with zeros behind its slots, `slots` in all."""
    zero = to_host(jnp.zeros((), x.dtype))
    more = [(0, slots - x.shape[-2] if axis == x.ndim - 2 else 0, 0) for axis in range(x.ndim)]
    with compute_on("device_host"):
        return jax.lax.pad(x, zero, more)


def copy_rows(
    x: jax.Array, rows: jax.Array, part: jax.Array, sources: jax.Array, heads: int, layer: jax.Array | int = 0
) -> jax.Array:
    """x with rows of another array in its first slots, which the host copies.

    Args:
        x: In the memory of the host, as in `places`.
        rows: int32 [n], the rows of x that are written.
        part: Another such array, with at most as many slots.
        sources: int32 [n], the rows of it that are read.
        heads: K.
        layer: Number of the layer, in those of the two that have several.
    """
    start = jnp.zeros((len(rows), heads, 1), jnp.int32)
    found = read_on(part, places(part, layer, sources, start), part.shape[-2])
    return write_on(x, places(x, layer, rows, start), found)
