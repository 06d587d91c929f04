"""Products with bfloat16 weights, and rows of bfloat16 tables, on CPUs: in blocks, from the bits.

XLA:CPU computes in float32. It would convert a whole weight, and in a loop, such as that over decoding steps, all
weights before the loop: twice their memory, and the time of several steps in every call. Here a loop over blocks of the
weight converts one block at a time. It slices the bits as uint16, since XLA:CPU converts a bfloat16 array before it
slices it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 1 << 16  # numbers of a block: 256 KB in float32, a part of the L2 cache, so that the product reads it there
LEAST = 1 << 16  # numbers of a weight that is worth a loop
MOST_ROWS = 4096  # of x; with more, a converted weight is small beside the activations
_NAN = 0x7FC0  # its bits


def applies(x: jax.Array, w: jax.Array) -> bool:
    """Whether `dot` is for these operands: bfloat16 on CPUs without a mesh, a large weight, not too many rows."""
    half = x.dtype == w.dtype == jnp.bfloat16 and jax.default_backend() == "cpu"
    return half and x.shape[0] <= MOST_ROWS and w.size >= LEAST and jax.typeof(w).sharding.mesh.empty


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def dot(x: jax.Array, w: jax.Array, first: bool) -> jax.Array:
    """The product [M, N] in bfloat16 of x [M, n] and w: [n, N] if `first`, else [N, n]."""
    by_blocks = _over_inputs if first else _over_outputs
    # `applies` saw the default device; the program may be compiled for another one.
    return jax.lax.platform_dependent(x, w, cpu=by_blocks, default=functools.partial(plain_dot, first=first))


@dot.defjvp
def _dot_jvp(first, primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    return dot(x, w, first), plain_dot(dx, w, first) + plain_dot(x, dw, first)


def plain_dot(x: jax.Array, w: jax.Array, first: bool) -> jax.Array:
    """`dot`, of any dtype, as one product."""
    return jax.lax.dot_general(x, w, (((1,), (0 if first else 1,)), ((), ())))


def _over_inputs(x: jax.Array, w: jax.Array) -> jax.Array:
    """Sums the products of blocks of inputs."""
    size, count = _blocks(w)
    bits, wide = _to_bits(w), x.astype(jnp.float32)

    def add(i, total):
        start = jnp.minimum(i * size, w.shape[0] - size)  # the last block overlaps the one before it,
        repeated = jax.lax.broadcasted_iota(jnp.int32, (1, size), 1) + start < i * size  # whose inputs count once
        part = jnp.where(repeated, 0, jax.lax.dynamic_slice_in_dim(wide, start, size, axis=1))
        return total + plain_dot(part, _block(bits, start, size), True)

    zero = jnp.zeros((x.shape[0], w.shape[1]), jnp.float32)
    return jax.lax.fori_loop(np.int32(0), np.int32(count), add, zero).astype(x.dtype)


def _over_outputs(x: jax.Array, w: jax.Array) -> jax.Array:
    """Writes the products of blocks of outputs side by side."""
    size, count = _blocks(w)
    bits, wide = _to_bits(w), x.astype(jnp.float32)

    def write(i, out):
        start = jnp.minimum(i * size, w.shape[0] - size)
        part = plain_dot(wide, _block(bits, start, size), False)
        return jax.lax.dynamic_update_slice_in_dim(out, part, start, axis=1)

    zero = jnp.zeros((x.shape[0], w.shape[0]), jnp.float32)
    return jax.lax.fori_loop(np.int32(0), np.int32(count), write, zero).astype(x.dtype)


def _blocks(w: jax.Array) -> tuple[int, int]:
    """Rows of a block of w, and the number of blocks: at least 2, or XLA would take the loop apart."""
    size = min(max(1, BLOCK // w.shape[1]), -(-w.shape[0] // 2))
    return size, -(-w.shape[0] // size)


def _block(bits: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """Rows of the weight as float32: a bfloat16 is the upper half of one."""
    rows = jax.lax.dynamic_slice_in_dim(bits, start, size)
    return jax.lax.bitcast_convert_type(rows.astype(jnp.uint32) << 16, jnp.float32)


@jax.custom_jvp
def rows(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows of a bfloat16 table [V, D]; NaN for an id outside 0..V-1."""
    picked = _to_bits(table).at[ids].get(mode="fill", fill_value=_NAN, wrap_negative_indices=False)
    return jax.lax.bitcast_convert_type(picked, jnp.bfloat16)


@rows.defjvp
def _rows_jvp(primals, tangents):
    (table, ids), (d_table, _) = primals, tangents
    return rows(table, ids), d_table.at[ids].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def _to_bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint16)


def as_bits(tree: Any) -> Any:
    """bfloat16 arrays in the memory of one CPU as uint16, without a copy; other leaves unchanged.

    A program whose arguments are the bits reads the weights where they lie. One whose arguments are bfloat16 copies
    them first.
    """

    def one(x: Any) -> Any:
        if isinstance(x, jax.ShapeDtypeStruct) and x.dtype == jnp.bfloat16 and jax.default_backend() == "cpu":
            return jax.ShapeDtypeStruct(x.shape, np.uint16)
        if not isinstance(x, jax.Array) or x.dtype != jnp.bfloat16 or len(x.devices()) > 1:
            return x
        (device,) = x.devices()
        if device.platform != "cpu":
            return x
        return jax.device_put(np.asarray(x).view(np.uint16), device if x.committed else None, may_alias=True)

    return jax.tree.map(one, tree)


def from_bits(tree: Any) -> Any:
    """The inverse of `as_bits`, inside a program."""
    return jax.tree.map(lambda x: jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x, tree)
