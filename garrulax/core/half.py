"""Products with bfloat16 weights, and rows of bfloat16 tables, on CPUs: in blocks, from the bits.

XLA:CPU computes in float32. It would convert a whole weight, and in a loop, such as that over decoding steps, all
weights before the loop: twice their memory, and the time of several steps in every call. Here a loop over blocks of the
weight converts one block at a time. It slices the bits as uint16, since XLA:CPU converts a bfloat16 array before it
slices it.

Sampling and scoring on a CPU compute in float32 with such weights (`HalfWeight`): rounding every activation to bfloat16
costs time there and accuracy everywhere. `forward` of bfloat16 parameters computes in bfloat16.

Where the CPU multiplies bfloat16 numbers, the products are those of `core.digits`, without blocks.
"""

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from garrulax.core import digits
from garrulax.core.leaf import Leaf
from garrulax.core.letters import letters, sides

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
    by_blocks = functools.partial(_by_blocks, first=first)
    # `applies` saw the default device; the program may be compiled for another one.
    return jax.lax.platform_dependent(x, w, cpu=by_blocks, default=functools.partial(plain_dot, first=first))


@dot.defjvp
def _dot_jvp(first, primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    return dot(x, w, first), plain_dot(dx, w, first) + plain_dot(x, dw, first)


def plain_dot(x: jax.Array, w: jax.Array, first: bool) -> jax.Array:
    """`dot`, of any dtype, as one product."""
    return jax.lax.dot_general(x, w, (((1,), (0 if first else 1,)), ((), ())))


def _by_blocks(x: jax.Array, w: jax.Array, first: bool) -> jax.Array:
    if len(x) > 1 and digits.has("bfloat16"):  # XLA multiplies a matrix and a vector by code of its own, in float32
        return digits.times_bfloat16(x, w, 0 if first else 1).astype(x.dtype)
    return (_over_inputs if first else _over_outputs)(x.astype(jnp.float32), _to_bits(w)).astype(x.dtype)


def _over_inputs(wide: jax.Array, bits: jax.Array) -> jax.Array:
    """Sums the products of blocks of inputs: float32 [M, N] of float32 [M, n] and bits [n, N]."""
    size, count = _blocks(bits)

    def add(i, total):
        start = jnp.minimum(i * size, len(bits) - size)  # the last block overlaps the one before it,
        repeated = jax.lax.broadcasted_iota(jnp.int32, (1, size), 1) + start < i * size  # whose inputs count once
        part = jnp.where(repeated, 0, jax.lax.dynamic_slice_in_dim(wide, start, size, axis=1))
        return total + plain_dot(part, _block(bits, start, size), True)

    zero = jnp.zeros((len(wide), bits.shape[1]), jnp.float32)
    return jax.lax.fori_loop(np.int32(0), np.int32(count), add, zero)


def _over_outputs(wide: jax.Array, bits: jax.Array) -> jax.Array:
    """Writes the products of blocks of outputs side by side: float32 [M, N] of float32 [M, n] and bits [N, n]."""
    size, count = _blocks(bits)

    def write(i, out):
        start = jnp.minimum(i * size, len(bits) - size)
        part = plain_dot(wide, _block(bits, start, size), False)
        return jax.lax.dynamic_update_slice_in_dim(out, part, start, axis=1)

    zero = jnp.zeros((len(wide), len(bits)), jnp.float32)
    return jax.lax.fori_loop(np.int32(0), np.int32(count), write, zero)


def _blocks(w: jax.Array) -> tuple[int, int]:
    """Rows of a block of w, and the number of blocks: at least 2, or XLA would take the loop apart."""
    size = min(max(1, BLOCK // w.shape[1]), -(-w.shape[0] // 2))
    return size, -(-w.shape[0] // size)


def _block(bits: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """Rows of the weight as float32."""
    return _widened(jax.lax.dynamic_slice_in_dim(bits, start, size))


def _widened(bits: jax.Array) -> jax.Array:
    """The float32 numbers of bits: a bfloat16 is the upper half of one."""
    return jax.lax.bitcast_convert_type(bits.astype(jnp.uint32) << 16, jnp.float32)


@jax.custom_jvp
def rows(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows of a bfloat16 table [V, D]; NaN for an id outside 0..V-1."""
    return jax.lax.bitcast_convert_type(_picked(_to_bits(table), ids), jnp.bfloat16)


@rows.defjvp
def _rows_jvp(primals, tangents):
    (table, ids), (d_table, _) = primals, tangents
    return rows(table, ids), d_table.at[ids].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def _picked(bits: jax.Array, ids: jax.Array) -> jax.Array:
    return bits.at[ids].get(mode="fill", fill_value=_NAN, wrap_negative_indices=False)


def _to_bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint16)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HalfWeight(Leaf):
    """A bfloat16 weight in the memory of one CPU, which is multiplied in float32.

    Attributes:
        bits: uint16, of the shape of the weight.
        numbers: The same memory as bfloat16, which products read where the CPU multiplies such numbers; or None.
        to: Name of the dtype of looked-up rows.
    """

    kind: ClassVar[str] = "a bfloat16 weight"

    bits: jax.Array
    numbers: jax.Array | None = None
    to: str = dataclasses.field(default="float32", metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.bits.shape

    @property
    def dtype(self) -> np.dtype:
        """Of the computation."""
        return np.dtype(self.to)

    def einsum(self, spec: str, x: jax.Array) -> jax.Array:
        """The product with activations, in x's dtype."""
        s = sides(*letters(spec))
        if s is None:
            return jnp.einsum(spec, x, self.dense(x.dtype))
        inner = math.prod(x.shape[len(s.rows) :])
        x2 = x.reshape(-1, inner)
        shape = (inner, -1) if s.first else (-1, inner)
        bits = self.bits.reshape(shape)
        if digits.has("bfloat16"):
            numbers = jax.lax.bitcast_convert_type(bits, jnp.bfloat16) if self.numbers is None else self.numbers
            y = digits.times_bfloat16(x2.astype(jnp.float32), numbers.reshape(shape), 0 if s.first else 1)
        elif self.size >= LEAST and len(x2) <= MOST_ROWS:
            y = (_over_inputs if s.first else _over_outputs)(x2.astype(jnp.float32), bits)
        else:
            y = plain_dot(x2.astype(jnp.float32), _widened(bits), s.first)
        outer = self.shape[len(s.contracted) :] if s.first else self.shape[: len(s.columns)]
        return y.astype(x.dtype).reshape(*x.shape[: len(s.rows)], *outer)

    def lookup(self, ids: jax.Array) -> jax.Array:
        """Rows of a table [V, D]; NaN for an id outside 0..V-1."""
        return _widened(_picked(self.bits, ids)).astype(self.dtype)

    def dense(self, dtype: Any = None) -> jax.Array:
        """The weight as one array."""
        return _widened(self.bits).astype(self.dtype if dtype is None else dtype)

    def astype(self, dtype: Any) -> "HalfWeight":
        """The same bits, of which rows are looked up in another dtype."""
        return dataclasses.replace(self, to=np.dtype(dtype).name)

    def shardings(self, place: NamedSharding) -> "HalfWeight":
        """Raises ValueError: such weights are on one CPU."""
        raise ValueError("a bfloat16 weight as bits is on one CPU: shard the bfloat16 array")


def as_bits(tree: Any, stacked: bool = True) -> Any:
    """bfloat16 arrays in the memory of one CPU as uint16, without a copy; other leaves unchanged.

    A program whose arguments are the bits slices the weights, and looks up their rows, where they lie. One whose
    arguments are bfloat16 converts them first, but for products on CPUs that multiply such numbers.

    Args:
        tree: Parameters.
        stacked: Whether there may be stacked layers in it, which have to be sliced. Without, matrices become
            `HalfWeight`s of both, the bits and the array itself, where products read the latter.
    """

    def one(x: Any) -> Any:
        if isinstance(x, jax.ShapeDtypeStruct) and x.dtype == jnp.bfloat16 and jax.default_backend() == "cpu":
            return both(jax.ShapeDtypeStruct(x.shape, np.uint16), x)
        if not isinstance(x, jax.Array) or x.dtype != jnp.bfloat16 or len(x.devices()) > 1:
            return x
        (device,) = x.devices()
        if device.platform != "cpu":
            return x
        return both(jax.device_put(np.asarray(x).view(np.uint16), device if x.committed else None, may_alias=True), x)

    def both(bits: Any, numbers: Any) -> Any:
        return bits if stacked or bits.ndim < 2 or not digits.has("bfloat16") else HalfWeight(bits, numbers)

    return jax.tree.map(one, tree)


def from_bits(tree: Any) -> Any:
    """Parameters with which a program computes in float32 from what `as_bits` returned: vectors become float32."""

    def one(x: Any) -> Any:
        if isinstance(x, HalfWeight) or x.dtype != jnp.uint16:
            return x
        return HalfWeight(x) if x.ndim > 1 else _widened(x)

    return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, HalfWeight))
