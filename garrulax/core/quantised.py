"""Quantised weights: integers or narrow floats with scales, which are multiplied without a float copy of the weight.

On CPUs that multiply int8 numbers, int8 codes with a scale a row are multiplied as they are, by the digits of the
activations (`core.digits`). Otherwise a loop over blocks of rows of codes converts one block at a time: XLA:CPU would
convert a whole weight, and in a loop, such as that over decoding steps, all weights before the loop: several times the
memory of the codes, and the time of several steps. Other platforms convert the codes while they multiply.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from garrulax.core import codes as coding
from garrulax.core import digits
from garrulax.core import einsum as products
from garrulax.core.codes import Form
from garrulax.core.dtypes import at_least_float32
from garrulax.core.leaf import Leaf
from garrulax.core.letters import letters, sides

LEAST = 1 << 16  # numbers of a weight that is worth a loop
BLOCK = 1 << 17  # numbers of a block: 512 KB in float32, a part of the L2 cache, so that the product reads it there
SHARED_BLOCK = 1 << 20  # of a block of a large weight: so many that all cores convert a part


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantised(Leaf):
    """A quantised weight. Where layers are stacked, every array has their axis in front.

    Attributes:
        codes: uint8 or int8 [outputs, bytes of a row]; see `core.codes`.
        scale: float16 or float32 [outputs, groups].
        offset: Zero points (integers) or minima (floats) of the groups, of the shape of `scale`; None if symmetric.
        order: int32 [groups * group]: the input that each code of a row belongs to, and the number of inputs where it
            belongs to none; None where the inputs are in order.
        factors: float32 [inputs], by which the activations are multiplied first (AWQ, SmoothQuant, int8 tables), or
            None.
        form: The static part.
    """

    kind: ClassVar[str] = "a quantised weight"
    advice: ClassVar[str] = "make plain weights of it with gx.dequantise"

    codes: jax.Array
    scale: jax.Array
    offset: jax.Array | None
    order: jax.Array | None
    factors: jax.Array | None
    form: Form = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight, with the axis of the layers first where they are stacked."""
        return (*self.codes.shape[:-2], *self.form.shape)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the weight that it stands for."""
        return np.dtype(jnp.dtype(self.form.dtype))

    def astype(self, dtype: Any) -> "Quantised":
        """The same codes, which stand for a weight of another dtype."""
        return dataclasses.replace(self, form=dataclasses.replace(self.form, dtype=np.dtype(dtype).name))

    def dense(self, dtype: Any = None) -> jax.Array:
        """The weight as one array."""
        f = self.form
        rows = self._rows(
            coding.restore(coding.decode(self.codes, self.scale, self.offset, f), f), self.codes.shape[:-2]
        )
        rows = rows.astype(self.dtype if dtype is None else dtype)
        lead = self.codes.shape[:-2]
        if f.first:
            rows = jnp.moveaxis(rows, -1, -2)
        return rows.reshape(*lead, *f.shape)

    def _rows(self, numbers: jax.Array, lead: tuple[int, ...]) -> jax.Array:
        """Rows [*lead, n, groups * group] in the order of the inputs, times the factors."""
        inputs = self.form.inputs
        if self.order is None:
            numbers = numbers[..., :inputs]
        else:  # codes that belong to no input are last
            places = jnp.argsort(self.order, axis=-1)[..., :inputs]
            numbers = jnp.take_along_axis(
                numbers, places.reshape(*lead, *(1,) * (numbers.ndim - 1 - len(lead)), inputs), -1
            )
        if self.factors is None:
            return numbers
        return numbers * self.factors.reshape(*lead, *(1,) * (numbers.ndim - 1 - len(lead)), inputs)

    def lookup(self, ids: jax.Array) -> jax.Array:
        """Rows of a table [V, D]; NaN for an id outside 0..V-1."""
        pick = functools.partial(_pick, ids=ids)
        numbers = coding.decode(
            pick(self.codes, fill=0), pick(self.scale, fill=np.nan),
            None if self.offset is None else pick(self.offset, fill=0), self.form,
        )  # fmt: skip
        return self._rows(coding.restore(numbers, self.form), ()).astype(self.dtype)

    def einsum(self, spec: str, x: jax.Array) -> jax.Array:
        """The product with activations, in x's dtype."""
        s = sides(*letters(spec))
        own = s is not None and s.first == self.form.first and x.shape[len(s.rows) :] == self.form.inner
        if s is None or not own or products.on_mesh(x):
            return products.einsum(spec, self._as_multiplied(x), self.dense(x.dtype))
        x2 = jnp.asarray(x).reshape(-1, self.form.inputs)
        y = _product(x2, jax.tree.map(jnp.asarray, self))
        return y.reshape(*x.shape[: len(s.rows)], *self.form.outer)

    def _as_multiplied(self, x: jax.Array) -> jax.Array:
        """The activations [..., *inner], rounded as the form says: for products that are computed otherwise."""
        if not self.form.activations:
            return x
        axes = tuple(range(x.ndim - len(self.form.inner), x.ndim))
        factors = 1 if self.factors is None else self.factors.reshape(self.form.inner)
        whole, step = _rounded(x.astype(jnp.float32) * factors, axes)
        return (whole * step / factors).astype(x.dtype)

    def shardings(self, place: NamedSharding) -> "Quantised":
        """The sharding of each array, for that of the plain weight.

        Raises:
            ValueError: A part of the inputs would be cut within a group, or in an order of their own.
        """
        f, mesh = self.form, place.mesh
        spec = (*place.spec, *(None,) * (self.ndim - len(place.spec)))
        lead = spec[: self.ndim - len(f.shape)]
        own = spec[len(lead) :]
        count = len(f.inner) if f.first else len(f.outer)
        inner, outer = (own[:count], own[count:]) if f.first else (own[count:], own[:count])
        across = _merged(inner, "inputs")
        down = _merged(outer, "outputs")
        groups = self.scale.shape[-1]
        parts = math.prod(mesh.shape[name] for name in products.axis_names(across))
        if parts > 1 and (self.order is not None or groups % parts or groups * f.group != f.inputs):
            raise ValueError(
                f"a sharding over {parts} devices would cut a group of a quantised weight: it has {groups} groups of "
                f"{f.group} for {f.inputs} inputs{'' if self.order is None else ' in an order of their own'}: quantise "
                "with another group, or use rules that do not shard this dimension"
            )

        def of(array: jax.Array | None, *axes: Any) -> Any:
            return None if array is None else NamedSharding(mesh, P(*lead, *axes))

        return Quantised(
            of(self.codes, down, across), of(self.scale, down, across), of(self.offset, down, across),
            of(self.order, None), of(self.factors, across), f,
        )  # fmt: skip


def _merged(axes: tuple[Any, ...], what: str) -> Any:
    """The mesh axes of several dimensions that become one: only the first may be sharded."""
    if any(axis is not None for axis in axes[1:]):
        raise ValueError(f"only the first dimension of the {what} of a quantised weight can be sharded, not {axes}")
    return axes[0] if axes else None


def _pick(array: jax.Array, ids: jax.Array, fill: Any) -> jax.Array:
    return jnp.asarray(array).at[ids].get(mode="fill", fill_value=fill, wrap_negative_indices=False)


@jax.custom_vjp
def _product(x: jax.Array, w: Quantised) -> jax.Array:
    """The product [M, outputs] in x's dtype of x [M, inputs] and a weight of one layer."""
    return _by_platform(_FORWARD_OF_INTEGERS if w.form.activations else _FORWARD, x, w)


def _product_forward(x: jax.Array, w: Quantised) -> tuple[jax.Array, Quantised]:
    return _product(x, w), w


def _product_backward(w: Quantised, dy: jax.Array) -> tuple[jax.Array, Quantised]:
    """The gradient for x, through rounded activations too. That for the weight is zero: `train` refuses to train it."""

    def none(a: jax.Array) -> Any:
        return jnp.zeros_like(a) if jnp.issubdtype(a.dtype, jnp.floating) else np.zeros(a.shape, jax.dtypes.float0)

    return _by_platform(_BACKWARD, dy, w), jax.tree.map(none, w)


_product.defvjp(_product_forward, _product_backward)


def _by_platform(table: dict[str, Callable], x: jax.Array, w: Quantised) -> jax.Array:
    """Calls the function of the platform that the program is compiled for; the default one for small weights."""
    if w.size < LEAST:
        return table["default"](x, w)
    return jax.lax.platform_dependent(x, w, **table)


def _columns(x: jax.Array, w: Quantised) -> list[jax.Array]:
    """The activations [M, inputs] in the order of the codes; see `codes.arrange`."""
    count = w.scale.shape[-1] * w.form.group
    x = _times_factors(x, w)
    if w.order is not None:
        x = x.at[:, w.order].get(mode="fill", fill_value=0)
    elif count != x.shape[1]:
        x = jnp.pad(x, ((0, 0), (0, count - x.shape[1])))
    return coding.arrange(x, w.form)


def _inputs(parts: list[jax.Array], w: Quantised) -> jax.Array:
    """The transpose of `_columns`."""
    x = coding.restore(parts, w.form)
    if w.order is not None:
        x = jnp.zeros((len(x), w.form.inputs), x.dtype).at[:, w.order].add(x, mode="drop")
    return _times_factors(x[:, : w.form.inputs], w)


def _times_factors(x: jax.Array, w: Quantised) -> jax.Array:
    """The activations [M, inputs] times the factors, rounded once."""
    if w.factors is None:
        return x
    wide = at_least_float32(x.dtype)
    return (x.astype(wide) * w.factors[None].astype(wide)).astype(x.dtype)


def _whole(x: jax.Array, w: Quantised) -> jax.Array:
    """The product, with the weight converted by one expression, which the compiler can fuse with it."""
    numbers = coding.decode(w.codes, w.scale, w.offset, w.form)
    return _sum(_dot(part, n.astype(x.dtype), 1) for part, n in zip(_columns(x, w), numbers, strict=True))


def _scaled_after(x: jax.Array, w: Quantised) -> jax.Array:
    """`_whole`, with int8 codes that are scaled after the product: any dtype has them exactly.

    XLA:GPU fuses a conversion with a product if it is one step; with a scale in it the weight would be written in x's
    dtype before it is multiplied.
    """
    if not _is_int8_with_row_scales(w):
        return _whole(x, w)
    (columns,), wide = _columns(x, w), at_least_float32(x.dtype)
    y = jax.lax.dot_general(
        columns, w.codes.astype(x.dtype), (((1,), (1,)), ((), ())), preferred_element_type=wide
    )  # fmt: skip
    return (y * w.scale.astype(wide).T).astype(x.dtype)


def _whole_backward(dy: jax.Array, w: Quantised) -> jax.Array:
    numbers = coding.decode(w.codes, w.scale, w.offset, w.form)
    return _inputs([_dot(dy, n.astype(dy.dtype), 0) for n in numbers], w)


def _by_blocks(x: jax.Array, w: Quantised) -> jax.Array:
    """The product, with a block of rows converted at a time.

    The block is on the left, [n, inputs] by [inputs, M]: XLA:CPU multiplies faster so than by a transposed block.
    """
    parts = [part.T for part in _columns(x.astype(jnp.float32), w)]
    w = dataclasses.replace(w, scale=w.scale.astype(jnp.float32))
    size, count = _blocks(w.form)

    def write(i: jax.Array, out: jax.Array) -> jax.Array:
        start = jnp.minimum(i * size, w.form.outputs - size)  # the last block overlaps the one before it
        y = _sum(_dot(n, part, 0) for part, n in zip(parts, _block(start, size, w), strict=True))
        return jax.lax.dynamic_update_slice_in_dim(out, y, start, axis=0)

    zero = jnp.zeros((w.form.outputs, x.shape[0]), jnp.float32)
    return jax.lax.fori_loop(np.int32(0), np.int32(count), write, zero).T.astype(x.dtype)


def _integers(x: jax.Array, w: Quantised) -> jax.Array:
    """The product of a form with rounded activations: of int8 numbers, summed in int32."""
    (columns,) = _columns(x.astype(jnp.float32), w)
    whole, step = _rounded(columns, (1,))
    y = jax.lax.dot_general(
        whole.astype(jnp.int8), w.codes, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
    )  # fmt: skip
    return (y.astype(jnp.float32) * step * w.scale.astype(jnp.float32).T).astype(x.dtype)


def _on_cpu(x: jax.Array, w: Quantised) -> jax.Array:
    """The product by int8 digits of the activations for int8 codes with a scale a row, else by blocks."""
    if not _has_int8_products(w, w.form.inputs):
        return _by_blocks(x, w)
    (columns,) = _columns(x.astype(jnp.float32), w)
    return (digits.times_int8(columns, w.codes, 1) * w.scale.astype(jnp.float32).T).astype(x.dtype)


def _on_cpu_backward(dy: jax.Array, w: Quantised) -> jax.Array:
    if not _has_int8_products(w, w.form.outputs):
        return _by_blocks_backward(dy, w)
    scaled = dy.astype(jnp.float32) * w.scale.astype(jnp.float32).T
    return _inputs([digits.times_int8(scaled, w.codes, 0)], w).astype(dy.dtype)


def _has_int8_products(w: Quantised, summed: int) -> bool:
    """Whether the codes can be multiplied as they are on the CPU of this machine, in sums of so many products."""
    return _is_int8_with_row_scales(w) and digits.has("int8") and digits.can_be_summed(summed)


def _is_int8_with_row_scales(w: Quantised) -> bool:
    """Whether the weight is int8 codes, each row times one scale."""
    return w.form.kind == "int" and w.form.bits == 8 and w.offset is None and w.scale.shape[-1] == 1


def _integers_on_cpu(x: jax.Array, w: Quantised) -> jax.Array:
    """`_integers`; by the blocks of `_by_blocks` where XLA:CPU would widen the weight."""
    if _has_int8_products(w, w.form.inputs):
        return _integers(x, w)
    whole, step = _rounded(_times_factors(x.astype(jnp.float32), w), (1,))
    return (_by_blocks(whole, dataclasses.replace(w, factors=None)) * step).astype(x.dtype)


def _rounded(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """float32 whole numbers -127..127, and what they are multiplied by: for each row the largest of `axes` / 127."""
    step = jnp.max(jnp.abs(x), axis=axes, keepdims=True) / np.float32(127)
    return jnp.round(x / jnp.where(step == 0, np.float32(1), step)), step


def _by_blocks_backward(dy: jax.Array, w: Quantised) -> jax.Array:
    size, count = _blocks(w.form)
    wide = dy.astype(jnp.float32)

    def add(i: jax.Array, totals: list[jax.Array]) -> list[jax.Array]:
        start = jnp.minimum(i * size, w.form.outputs - size)
        repeated = jax.lax.broadcasted_iota(jnp.int32, (1, size), 1) + start < i * size  # rows that were counted before
        part = jnp.where(repeated, 0, jax.lax.dynamic_slice_in_dim(wide, start, size, axis=1))
        return [total + _dot(part, n, 0) for total, n in zip(totals, _block(start, size, w), strict=True)]

    zero = [jnp.zeros((dy.shape[0], w.codes.shape[-1]), jnp.float32) for _ in range(coding.halves(w.form))]
    totals = jax.lax.fori_loop(np.int32(0), np.int32(count), add, zero)
    return _inputs(totals, w).astype(dy.dtype)


def _blocks(form: Form) -> tuple[int, int]:
    """Rows of a block, and the number of blocks: at least 2, or XLA would take the loop apart."""
    numbers = SHARED_BLOCK if form.inputs * form.outputs >= 4 * SHARED_BLOCK else BLOCK
    size = min(max(1, numbers // form.inputs), -(-form.outputs // 2))
    return size, -(-form.outputs // size)


def _block(start: jax.Array, size: int, w: Quantised) -> list[jax.Array]:
    """The numbers of `size` rows."""
    cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size)
    return coding.decode(cut(w.codes), cut(w.scale), None if w.offset is None else cut(w.offset), w.form)


def _dot(x: jax.Array, w: jax.Array, contracted: int) -> jax.Array:
    return jax.lax.dot_general(x, w, (((1,), (contracted,)), ((), ())))


def _sum(parts: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(operator.add, parts)


_FORWARD = {"cpu": _on_cpu, "cuda": _scaled_after, "default": _whole}
_FORWARD_OF_INTEGERS = {"cpu": _integers_on_cpu, "default": _integers}
_BACKWARD = {"cpu": _on_cpu_backward, "default": _whole_backward}
