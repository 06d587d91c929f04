"""Keys and values in the memory of the host, of which a program reads and writes a few entries.

JAX types each array with its memory, and an operation takes arrays of one memory only. Here the host computes on what
is in its memory (`compute_on`), so that only indices and entries are moved. These functions use `jax.lax`, because
`jax.numpy` makes constants on the device.

Letters: L layers, B rows, K key/value heads, S slots, C width of a head, n rows, T slots that are read or written.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import compute_on

KIND = "pinned_host"  # JAX's name of the memory

#: Whether JAX is one before 0.12: XLA for TPUs compiles only the form that `compute_on` had there.
COMPILES_FOR_TPUS = hasattr(compute_on, "compute_on2")

_HOST, _DEVICE = jax.memory.Space.Host, jax.memory.Space.Device
_MODE = jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS  # the others compare indices with constants on the device


def _by_host(function: Callable[..., jax.Array], *args: jax.Array) -> jax.Array:
    """function(*args), computed by the host of what is in its memory; the result stays there."""
    if COMPILES_FOR_TPUS:
        with compute_on.compute_on("device_host"):
            return function(*args)
    decorate: Any = compute_on.compute_on
    return decorate(function, compute_type="device_host", out_memory_spaces=_HOST)(*args)


def is_on_host(x: jax.Array) -> bool:
    """Whether an array, or one of a program that is traced, is in the memory of the host."""
    return jax.typeof(x).memory_space == _HOST


def to_host(x: jax.Array) -> jax.Array:
    """x in the memory of the host."""
    return jax.device_put(x, _HOST)


def to_device(x: jax.Array) -> jax.Array:
    """A copy on the device of x, which is in the memory of the host."""
    flat = _by_host(lambda x: jax.lax.reshape(x, (x.size,)), x)
    return jax.device_put(flat, _DEVICE).reshape(x.shape)


def _flat_to_host(x: jax.Array) -> jax.Array:
    """A copy of x in the memory of the host. It moves flat, as in `to_device`: XLA:TPU fails to move some shapes."""
    return _by_host(lambda flat: jax.lax.reshape(flat, x.shape), to_host(x.reshape(-1)))


def zeros(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Zeros in the memory of the host. Only one number comes from the device."""
    return _by_host(lambda zero: jax.lax.broadcast(zero, shape), to_host(jnp.zeros((), dtype)))


def indices(x: jax.Array, layer: jax.Array | int, rows: jax.Array, slots: jax.Array) -> jax.Array:
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
    parts.append((slots, (0, 1, 2)))

    def joined(*moved: jax.Array) -> jax.Array:
        pairs = zip(moved, (axes for _, axes in parts), strict=True)
        return jax.lax.concatenate([jax.lax.broadcast_in_dim(part, shape, axes) for part, axes in pairs], 3)

    # Joined where they are small: on a TPU the last axis would take 128 entries.
    return _by_host(joined, *(_flat_to_host(part) for part, _ in parts))


def read(x: jax.Array, where: jax.Array) -> jax.Array:
    """The entries [n, K, T, C] of some places, moved to the device.

    Args:
        x: In the memory of the host, as in `indices`.
        where: From `indices`; all must be in x.
    """
    axes = tuple(range(x.ndim - 1))
    numbers = jax.lax.GatherDimensionNumbers(offset_dims=(3,), collapsed_slice_dims=axes, start_index_map=axes)
    sizes = (*(1 for _ in axes), x.shape[-1])
    return to_device(_by_host(lambda x, where: jax.lax.gather(x, where, numbers, sizes, mode=_MODE), x, where))


def read_slices(x: jax.Array, where: jax.Array, count: int) -> jax.Array:
    """The entries [n, K, count, C] from some places on, which stay in the memory of the host.

    Args:
        x: In the memory of the host, as in `indices`.
        where: From `indices`, with a T of 1.
        count: Number of slots. They must be in x.
    """
    axes = tuple(range(x.ndim - 1))
    numbers = jax.lax.GatherDimensionNumbers(offset_dims=(2, 3), collapsed_slice_dims=axes[:-1], start_index_map=axes)
    sizes = (*(1 for _ in axes[1:]), count, x.shape[-1])

    def gather(x: jax.Array, where: jax.Array) -> jax.Array:
        return jax.lax.gather(x, jax.lax.squeeze(where, (2,)), numbers, sizes, mode=_MODE)

    return _by_host(gather, x, where)


def write_slices(x: jax.Array, where: jax.Array, new: jax.Array) -> jax.Array:
    """x with new entries from some places on.

    Args:
        x: In the memory of the host, as in `indices`.
        where: From `indices`, with a T of 1.
        new: [n, K, count, C], in either memory. They must fit.
    """
    axes = tuple(range(x.ndim - 1))
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(2, 3), inserted_window_dims=axes[:-1], scatter_dims_to_operand_dims=axes
    )

    def scatter(x: jax.Array, where: jax.Array, new: jax.Array) -> jax.Array:
        where, new = jax.lax.squeeze(where, (2,)), jax.lax.convert_element_type(new, x.dtype)
        return jax.lax.scatter(x, where, new, numbers, mode=_MODE)

    return _by_host(scatter, x, where, new if is_on_host(new) else _flat_to_host(new))


def grow(x: jax.Array, slots: int) -> jax.Array:
    """x, as in `indices`, with zeros behind its slots, `slots` in all."""
    more = [(0, slots - x.shape[-2] if axis == x.ndim - 2 else 0, 0) for axis in range(x.ndim)]
    return _by_host(lambda x, zero: jax.lax.pad(x, zero, more), x, to_host(jnp.zeros((), x.dtype)))


def copy_rows(
    x: jax.Array, rows: jax.Array, part: jax.Array, sources: jax.Array, heads: int, layer: jax.Array | int = 0
) -> jax.Array:
    """x with rows of another array in its first slots, which the host copies.

    Args:
        x: In the memory of the host, as in `indices`.
        rows: int32 [n], the rows of x that are written.
        part: Another such array, with at most as many slots.
        sources: int32 [n], the rows of it that are read.
        heads: K.
        layer: Number of the layer, in those of the two that have several.
    """
    start = jnp.zeros((len(rows), heads, 1), jnp.int32)
    found = read_slices(part, indices(part, layer, sources, start), part.shape[-2])
    return write_slices(x, indices(x, layer, rows, start), found)
