"""Attention over a sequence that a mesh splits: queries attend to keys of other devices. Runs inside `shard_map`.

There are two strategies (context parallelism). In the forward pass each of n devices receives the keys and values of
the n - 1 others; in the backward pass it receives them again, and as many sums of gradients. They differ in memory and
time:

- gathering (`AllGather`, `AllGatherPasses`) holds the keys of all devices at once and calls its implementation once,
  after they have arrived;
- the ring (`RingPasses`) holds the keys of two devices and computes on one while the next arrives. It pays with n
  calls, whose outputs are merged in float32, and with one message a pass that nobody reads.

Compiled for TPUs the ring waits for no keys, but its merging takes longer than gathering would, and its memory does not
grow with the number of devices (docs/parallel.md has a table; a test compiles both).

`choose_strategy` decides. Ranks and positions are streams, so a mask keeps its meaning on a part of the sequence.
Tokens may be in any order: the ring skips parts that no query of the device attends to.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from garrulax.core.dtypes import at_least_float32
from garrulax.kernels.blocks import block_map
from garrulax.kernels.call import Gradients, Implementation, LogSumExp, Operands, Options
from garrulax.kernels.parts import merge_parts
from garrulax.kernels.passes import ForwardBackward

Axes = tuple[str, ...]

STRATEGIES = ("gather", "ring")
#: Bytes that gathering may take in place of a ring: a sixteenth of the memory of the smallest TPU.
MOST_GATHERED = 2**30


def choose_strategy(options: Options, operands: Operands, parts: int) -> str:
    """The strategy for a sequence in that many parts: "gather" or "ring".

    Gathering, which is faster, while it is affordable: while what is gathered takes up to `MOST_GATHERED` bytes, or is
    no larger than the activations of a feed-forward layer. These take 4·H·C numbers per token of a part, and gathered
    keys and values of K heads 2·K·C per token of the whole sequence: they do not raise the peak of memory while
    parts·K <= 2·H. The ring does not support dropout, whose hash depends on places in the whole sequence.

    Args:
        options: Static part of the request.
        operands: A device's part of the arrays.
        parts: The number of parts.
    """
    H, K = operands.query.shape[2], operands.key.shape[2]
    affordable = parts * K <= 2 * H or gathered_bytes(operands, parts) <= MOST_GATHERED
    return "gather" if options.dropout or affordable else "ring"


def gathered_bytes(operands: Operands, parts: int) -> int:
    """Bytes of the keys and values of all devices, and of their gradients, in float32 at least.

    Args:
        operands: A device's part of the arrays.
        parts: The number of parts.
    """
    x, y = operands.key, operands.value
    numbers = math.prod(x.shape) + math.prod(y.shape)
    return parts * numbers * (x.dtype.itemsize + at_least_float32(x.dtype).itemsize)


def check_strategy(name: str, options: Options) -> None:
    """Raises ValueError for a name that is not in `STRATEGIES`, and for a ring with dropout."""
    if name not in STRATEGIES:
        raise ValueError(f"context_parallel={name!r}: choose from {', '.join(STRATEGIES)}, or leave it out")
    if name == "ring" and options.dropout:
        raise ValueError(
            "context_parallel=ring would drop other probabilities of attention than one device: use gather, or no "
            "dropout"
        )


def over_sequence(
    inner: Implementation, strategy: str | None, axes: Axes, parts: int, options: Options, operands: Operands
) -> Implementation:
    """`inner`, made to attend to the keys of all devices along the axes.

    Args:
        inner: Computes a device's queries over the keys that it is given.
        strategy: One of `STRATEGIES`, or None, which leaves it to `choose_strategy`.
        axes: Mesh axes that split the sequence.
        parts: The number of parts.
        options: Static part of the request.
        operands: A device's part of the arrays.
    """
    if not isinstance(inner, ForwardBackward):
        return RingPasses(inner, axes, parts) if strategy == "ring" else AllGather(inner, axes, parts)
    chosen = strategy or choose_strategy(options, operands, parts)
    return RingPasses(inner, axes, parts) if chosen == "ring" else AllGatherPasses(inner, axes, parts)


@dataclasses.dataclass(frozen=True)
class AllGather:
    """Gathers the keys of all devices for an implementation that JAX differentiates.

    Attributes:
        inner: The implementation.
        axes: Mesh axes that split the sequence.
        parts: The number of parts.
    """

    inner: Implementation
    axes: Axes
    parts: int

    def unsupported_reason(self, options: Options, operands: Operands) -> str | None:
        """Why `inner` cannot compute the gathered request, or None where it can."""
        return self.inner.unsupported_reason(options, _gathered_shapes(operands, self.parts))

    def __call__(self, options: Options, operands: Operands) -> jax.Array:
        """Output of this device's queries, [B, T, H, Cv]."""
        return self.inner(options, _gather(operands, self.axes))


@dataclasses.dataclass(frozen=True)
class AllGatherPasses(ForwardBackward):
    """Gathers the keys of all devices before each pass, and reduce-scatters their gradients after the backward pass.

    Between the passes a device keeps only its own part; with `AllGather`, JAX keeps the keys of all devices.

    Attributes:
        inner: The implementation.
        axes: Mesh axes that split the sequence.
        parts: The number of parts.
    """

    inner: ForwardBackward
    axes: Axes
    parts: int

    def unsupported_reason(self, options: Options, operands: Operands) -> str | None:
        return self.inner.unsupported_reason(options, _gathered_shapes(operands, self.parts))

    def forward(self, options: Options, operands: Operands) -> tuple[jax.Array, LogSumExp]:
        return self.inner.forward(options, _gather(operands, self.axes))

    def backward(
        self, options: Options, operands: Operands, lse: LogSumExp, delta: jax.Array, cotangent: jax.Array
    ) -> Gradients:
        result = self.inner.backward(options, _gather(operands, self.axes), lse, delta, cotangent)
        return result._replace(key=self._scatter(result.key), value=self._scatter(result.value))

    def _scatter(self, x: jax.Array) -> jax.Array:
        """Sums gradients [B, S·parts, K, C] over the devices; each keeps its own [B, S, K, C]."""
        wide = at_least_float32(x.dtype)
        return jax.lax.psum_scatter(x.astype(wide), self.axes, scatter_dimension=1, tiled=True).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class RingPasses(ForwardBackward):
    """Ring attention (Liu et al. 2023, arXiv 2310.01889).

    In each of `parts` steps a device computes on the keys and values that it holds and passes them on to the next
    device. Outputs are merged by their lse. In the backward pass the gradients of keys and values travel with them.

    Attributes:
        inner: The implementation; `unsupported_reason` says why it must be a `ForwardBackward`.
        axes: Mesh axes that split the sequence.
        parts: The number of parts.
    """

    inner: Any
    axes: Axes
    parts: int

    def unsupported_reason(self, options: Options, operands: Operands) -> str | None:
        if not isinstance(self.inner, ForwardBackward):
            return "a ring merges outputs by their lse, which only implementations of two passes give"
        if options.dropout:
            return "a ring would drop other probabilities than one device: gather the keys"
        length = operands.key.shape[1]
        bias = None if operands.bias is None else _with_size(operands.bias, 3, length)
        return self.inner.unsupported_reason(options, dataclasses.replace(operands, bias=bias))

    def forward(self, options: Options, operands: Operands) -> tuple[jax.Array, LogSumExp]:
        def compute(part):
            return self.inner.forward(options, part)

        run = self._unless_masked(options, operands, compute, _empty_output)
        travelling = operands.key, operands.value, operands.key_streams
        out, lse = run(travelling, 0)  # the device's own keys
        wide = at_least_float32(out.dtype)

        def step(carry, i):
            (out, lse), travelling = carry
            arriving = self._pass_on(travelling)  # may arrive while `part` is computed
            part = run(travelling, i)
            both = jax.tree.map(lambda x, y: jnp.stack([x, y.astype(x.dtype)]), (out, lse), part)
            return (merge_parts(*both), arriving), None

        carry = ((out.astype(wide), lse), self._pass_on(travelling))
        ((out, lse), _), _ = jax.lax.scan(step, carry, jnp.arange(1, self.parts, dtype=jnp.int32))
        return out.astype(operands.query.dtype), lse

    def backward(
        self, options: Options, operands: Operands, lse: LogSumExp, delta: jax.Array, cotangent: jax.Array
    ) -> Gradients:
        def compute(part):
            return self.inner.backward(options, part, lse, delta, cotangent)

        run = self._unless_masked(options, operands, compute, _zeros)
        travelling = operands.key, operands.value, operands.key_streams
        total = self._summand(run(travelling, 0), operands, 0)

        def step(carry, i):
            total, travelling = carry
            arriving = self._pass_on(travelling)
            total = self._pass_on_key_gradients(total)
            part = self._summand(run(travelling, i), operands, i)
            return (jax.tree.map(jnp.add, total, part), arriving), None

        carry = (total, self._pass_on(travelling))
        (total, _), _ = jax.lax.scan(step, carry, jnp.arange(1, self.parts, dtype=jnp.int32))
        total = self._pass_on_key_gradients(total)  # the last of `parts` moves brings them back to their device
        like = Gradients(operands.query, operands.key, operands.value, operands.bias, operands.steps)
        return jax.tree.map(lambda x, y: x.astype(y.dtype), total, like)

    def _unless_masked(self, options: Options, o: Operands, compute: Callable, empty: Callable) -> Callable:
        """A function of (travelling, i), where `travelling` is the part of keys that the device holds in step i.

        It returns `compute` of the device's queries over them, or `empty` of the result's shapes if no query attends to
        any of those keys.
        """

        def run(travelling, i):
            key, value, streams = travelling
            bias = self._bias(o.bias, key, i)
            part = dataclasses.replace(o, key=key, value=value, key_streams=streams, bias=bias)
            rows, columns = o.query.shape[1], key.shape[1]  # all pairs of a batch row as one block
            some, _ = block_map(options.rule, o.query_streams, streams, rows, columns, (key.shape[0], 1, 1))
            shapes = jax.eval_shape(compute, part)
            return jax.lax.cond(some.any(), compute, lambda _: empty(shapes), part)

        return run

    def _bias(self, bias: jax.Array | None, key: jax.Array, i: Any) -> jax.Array | None:
        """The bias [., ., ., S] of the keys held in step i, from that of the whole sequence."""
        if bias is None:
            return None
        return jax.lax.dynamic_slice_in_dim(bias, self._first_key(key, i), key.shape[1], axis=3)

    def _summand(self, part: Gradients, o: Operands, i: Any) -> Gradients:
        """The gradients of step i in at least float32; that of the bias padded with zeros to the whole sequence."""
        part = jax.tree.map(lambda x: x.astype(at_least_float32(x.dtype)), part)
        if o.bias is None or part.bias is None:
            return part
        bias = jnp.zeros(o.bias.shape, part.bias.dtype)
        start = self._first_key(o.key, i)
        return part._replace(bias=jax.lax.dynamic_update_slice_in_dim(bias, part.bias, start, axis=3))

    def _first_key(self, key: jax.Array, i: Any) -> jax.Array:
        """Index, in the whole sequence, of the first key that the device holds in step i."""
        return (jax.lax.axis_index(self.axes) - i) % self.parts * key.shape[1]

    def _pass_on(self, tree: Any) -> Any:
        """Sends arrays to the next device of the ring, and returns those of the previous one."""
        ring = [(i, (i + 1) % self.parts) for i in range(self.parts)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axes, ring), tree)

    def _pass_on_key_gradients(self, total: Gradients) -> Gradients:
        return total._replace(**self._pass_on({"key": total.key, "value": total.value}))


def sum_over_devices(x: jax.Array, axes: Axes) -> jax.Array:
    """x summed over the devices along the axes, in at least float32."""
    if not axes:
        return x
    return jax.lax.psum(x.astype(at_least_float32(x.dtype)), axes).astype(x.dtype)


def _empty_output(shapes: tuple) -> tuple[jax.Array, LogSumExp]:
    """Output and lse of queries that attend to no key."""
    out, lse = shapes
    nothing = jnp.full(lse.top.shape, -jnp.inf, lse.top.dtype)
    return jnp.zeros(out.shape, out.dtype), LogSumExp.rounded(nothing)


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def _gather(o: Operands, axes: Axes) -> Operands:
    """The operands with the keys, values and key streams of all devices, [B, S·parts, ...]."""

    def gather(x):
        return jax.lax.all_gather(x, axes, axis=1, tiled=True)

    streams = {name: gather(s) for name, s in o.key_streams.items()}
    return dataclasses.replace(o, key=gather(o.key), value=gather(o.value), key_streams=streams)


def _gathered_shapes(o: Operands, parts: int) -> Operands:
    """The result of `_gather`, abstract."""
    length = o.key.shape[1] * parts
    streams = {name: _with_size(s, 1, length) for name, s in o.key_streams.items()}
    key, value = (_with_size(x, 1, length) for x in (o.key, o.value))
    return dataclasses.replace(o, key=key, value=value, key_streams=streams)


def _with_size(x: Any, axis: int, size: int) -> Any:
    """The type of x with another size of one axis."""
    return jax.ShapeDtypeStruct((*x.shape[:axis], size, *x.shape[axis + 1 :]), x.dtype)
