"""Queries that see the keys of other devices: attention over a sequence that a mesh splits, inside `shard_map`.

Both ways move as many bytes. Of n devices each receives the n - 1 other parts of keys and values in the forward pass,
and in the backward pass again, with as many sums of gradients. What differs is memory and time: `Gathered` holds the
keys of all devices at once and calls its implementation once, after they have arrived; `Ring` holds two parts,
computes on one while the next arrives, and pays with n calls, whose outputs are merged in float32. `way` decides.

Positions and ranks are streams, so that a mask means the same on a part. The order of the tokens is free: under a
causal mask the devices of late tokens have the most to do, and the ring skips parts of which a device sees nothing.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from garrulax.kernels.blocks import block_map
from garrulax.kernels.call import Gradients, Implementation, Operands, Options
from garrulax.kernels.parts import merge
from garrulax.kernels.passes import TwoPasses

Axes = tuple[str, ...]


WAYS = ("gather", "ring")


def way(options: Options, operands: Operands, parts: int) -> str:
    """ "gather" or "ring", for a sequence in that many parts.

    Gathered keys and values of K heads are 2·K·C numbers a token of the whole sequence; a feed-forward layer of the
    usual width 4·H·C holds 4·H·C a token of its part. While parts·K <= 2·H the keys are no more than that layer, so
    gathering them raises no peak, and one call beats many. The ring cannot drop the same probabilities as one device,
    since `dropout.kept` goes by places in the whole.
    """
    H, K = operands.query.shape[2], operands.key.shape[2]
    return "gather" if options.dropout or parts * K <= 2 * H else "ring"


def across(
    inner: Implementation, name: str | None, axes: Axes, parts: int, options: Options, operands: Operands
) -> Implementation:
    """`inner` for queries that see the keys of all devices along the axes, by the way of that name or as `way` says."""
    if not isinstance(inner, TwoPasses):
        return Ring(inner, axes, parts) if name == "ring" else Whole(inner, axes, parts)
    chosen = name or way(options, operands, parts)
    return Ring(inner, axes, parts) if chosen == "ring" else Gathered(inner, axes, parts)


@dataclasses.dataclass(frozen=True)
class Whole:
    """An implementation that JAX differentiates, given the keys of all devices.

    inner: the implementation. axes, parts: what splits the sequence, and into how many parts.
    """

    inner: Implementation
    axes: Axes
    parts: int

    def unsupported_reason(self, options: Options, operands: Operands) -> str | None:
        """What `inner` says to the gathered request."""
        return self.inner.unsupported_reason(options, _lengthened(operands, self.parts))

    def __call__(self, options: Options, operands: Operands) -> jax.Array:
        """Output of this device's queries."""
        return self.inner(options, _gathered(operands, self.axes))


@dataclasses.dataclass(frozen=True)
class Gathered(TwoPasses):
    """All-gathers keys, values and their streams before each pass; gradients of keys are reduce-scattered behind the
    backward pass. Only a device's own part is kept in between. Fields as of `Whole`."""

    inner: TwoPasses
    axes: Axes
    parts: int

    def unsupported_reason(self, options: Options, operands: Operands) -> str | None:
        """What `inner` says to the gathered request."""
        return self.inner.unsupported_reason(options, _lengthened(operands, self.parts))

    def forward(self, options: Options, operands: Operands) -> tuple[jax.Array, jax.Array]:
        """As `TwoPasses.forward`."""
        return self.inner.forward(options, _gathered(operands, self.axes))

    def backward(
        self, options: Options, operands: Operands, lse: jax.Array, delta: jax.Array, cotangent: jax.Array
    ) -> Gradients:
        """As `TwoPasses.backward`."""
        found = self.inner.backward(options, _gathered(operands, self.axes), lse, delta, cotangent)
        return found._replace(key=self._own(found.key), value=self._own(found.value))

    def _own(self, x: jax.Array) -> jax.Array:
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return jax.lax.psum_scatter(x.astype(wide), self.axes, scatter_dimension=1, tiled=True).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Ring(TwoPasses):
    """Every device passes its part of keys and values to the next, `parts` times; outputs are merged by their lse, and
    the gradients of a part travel with it (Liu et al. 2023, arXiv 2310.01889). Fields as of `Whole`."""

    inner: Any
    axes: Axes
    parts: int

    def unsupported_reason(self, options: Options, operands: Operands) -> str | None:
        """Dropout, an implementation that is not of two passes, and what `inner` says to one part."""
        if not isinstance(self.inner, TwoPasses):
            return "a ring merges outputs by their lse, which only implementations of two passes give"
        if options.dropout:
            return "a ring would drop other probabilities than one device: gather the keys"
        length = operands.key.shape[1]
        bias = None if operands.bias is None else _sized(operands.bias, 3, length)
        return self.inner.unsupported_reason(options, dataclasses.replace(operands, bias=bias))

    def forward(self, options: Options, operands: Operands) -> tuple[jax.Array, jax.Array]:
        """As `TwoPasses.forward`."""
        run = self._over(options, operands, lambda part: self.inner.forward(options, part), self._nothing_seen)
        travelling = operands.key, operands.value, operands.key_streams
        first = run(travelling, 0)
        whole = first[0].astype(jnp.promote_types(first[0].dtype, jnp.float32)), first[1]

        def step(carry, i):
            whole, travelling = carry
            coming = self._passed_on(travelling)  # under way while this part is computed
            part = run(travelling, i)
            merged = merge((whole[0], part[0].astype(whole[0].dtype)), (whole[1], part[1]))
            return (merged, coming), None

        carry = (whole, self._passed_on(travelling))
        ((out, lse), _), _ = jax.lax.scan(step, carry, jnp.arange(1, self.parts))
        return out.astype(operands.query.dtype), lse

    def backward(
        self, options: Options, operands: Operands, lse: jax.Array, delta: jax.Array, cotangent: jax.Array
    ) -> Gradients:
        """As `TwoPasses.backward`."""

        def gradients(part):
            return self.inner.backward(options, part, lse, delta, cotangent)

        run = self._over(options, operands, gradients, _zeros)
        travelling = operands.key, operands.value, operands.key_streams
        total = self._placed(run(travelling, 0), operands, 0)

        def step(carry, i):
            total, travelling = carry
            coming = self._passed_on(travelling)
            total = total._replace(**self._passed_on({"key": total.key, "value": total.value}))
            found = self._placed(run(travelling, i), operands, i)
            return (jax.tree.map(jnp.add, total, found), coming), None

        carry = (total, self._passed_on(travelling))
        (total, _), _ = jax.lax.scan(step, carry, jnp.arange(1, self.parts))
        total = total._replace(**self._passed_on({"key": total.key, "value": total.value}))  # home
        like = Gradients(operands.query, operands.key, operands.value, operands.bias, operands.steps)
        return jax.tree.map(lambda x, y: x.astype(y.dtype), total, like)

    def _over(self, options: Options, o: Operands, compute: Callable, without: Callable) -> Callable:
        """(travelling, i) -> what `compute` makes of this device's queries and the part that it holds in step i, or
        `without` of the shapes of that where no query sees a key of it."""

        def run(travelling, i):
            key, value, streams = travelling
            part = dataclasses.replace(o, key=key, value=value, key_streams=streams, bias=self._bias(o.bias, key, i))
            rows, columns = o.query.shape[1], key.shape[1]
            seen, _ = block_map(options.rule, o.query_streams, streams, rows, columns, (key.shape[0], 1, 1))
            shapes = jax.eval_shape(compute, part)
            return jax.lax.cond(seen.any(), compute, lambda _: without(shapes), part)

        return run

    def _bias(self, bias: jax.Array | None, key: jax.Array, i: Any) -> jax.Array | None:
        if bias is None:
            return None
        return jax.lax.dynamic_slice_in_dim(bias, self._start(key, i), key.shape[1], axis=3)

    def _placed(self, found: Gradients, o: Operands, i: Any) -> Gradients:
        """The gradients of step i, to be added up: in at least float32, that of the bias in its place."""
        found = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), found)
        if o.bias is None or found.bias is None:
            return found
        bias = jnp.zeros(o.bias.shape, found.bias.dtype)
        start = self._start(o.key, i)
        return found._replace(bias=jax.lax.dynamic_update_slice_in_dim(bias, found.bias, start, axis=3))

    def _start(self, key: jax.Array, i: Any) -> jax.Array:
        """The place, in the whole sequence, of the first key of the part that is here in step i."""
        return (jax.lax.axis_index(self.axes) - i) % self.parts * key.shape[1]

    def _passed_on(self, tree: Any) -> Any:
        ring = [(i, (i + 1) % self.parts) for i in range(self.parts)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axes, ring), tree)

    @staticmethod
    def _nothing_seen(shapes: tuple) -> tuple[jax.Array, jax.Array]:
        out, lse = shapes
        return jnp.zeros(out.shape, out.dtype), jnp.full(lse.shape, -jnp.inf, lse.dtype)


def summed(x: jax.Array, axes: Axes) -> jax.Array:
    """x summed over the devices along the axes, in at least float32."""
    if not axes:
        return x
    return jax.lax.psum(x.astype(jnp.promote_types(x.dtype, jnp.float32)), axes).astype(x.dtype)


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def _gathered(o: Operands, axes: Axes) -> Operands:
    def whole(x):
        return jax.lax.all_gather(x, axes, axis=1, tiled=True)

    streams = {name: whole(s) for name, s in o.key_streams.items()}
    return dataclasses.replace(o, key=whole(o.key), value=whole(o.value), key_streams=streams)


def _lengthened(o: Operands, parts: int) -> Operands:
    """The shapes that `_gathered` makes."""
    length = o.key.shape[1] * parts
    streams = {name: _sized(s, 1, length) for name, s in o.key_streams.items()}
    return dataclasses.replace(o, key=_sized(o.key, 1, length), value=_sized(o.value, 1, length), key_streams=streams)


def _sized(x: Any, axis: int, size: int) -> Any:
    return jax.ShapeDtypeStruct((*x.shape[:axis], size, *x.shape[axis + 1 :]), x.dtype)
