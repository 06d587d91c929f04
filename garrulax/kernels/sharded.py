"""Attention on a mesh: `jax.shard_map` around any implementation.

Every device computes its own batch rows, heads and queries. XLA's partitioner could split the chunked implementation,
but not a Pallas kernel. It would also sum the gradient of an array that devices share once per chunk; here it is summed
once per call.

In Explicit mode the types of the operands say which rows and heads a device has. In Auto mode they do not: there rows
are split over `data` and `fsdp`, and heads over `tensor` (`core.auto_mesh`). Left to itself, the partitioner gathers
the heads of a whole cache, since their axis is merged with that of the rows for a product.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from garrulax.core.auto_mesh import dividing
from garrulax.core.sharding import axis_names, spec_of
from garrulax.core.strategies import BATCH_AXES, TENSOR_AXIS
from garrulax.kernels import dropout, passes
from garrulax.kernels.call import Implementation, Operands, Options
from garrulax.kernels.passes import ForwardBackward
from garrulax.kernels.sequence import STRATEGIES, over_sequence, sum_over_devices

Axes = tuple[str, ...]
LEARNED = ("query", "key", "value", "bias", "steps", "sinks")  # operands that get a gradient


@dataclasses.dataclass(frozen=True)
class MeshLayout:
    """How a mesh splits a request.

    Attributes:
        mesh: The mesh in the query's type; its Explicit axes count, or all where all are Auto.
        batch: Mesh axes that split the batch, B.
        queries: Mesh axes that split the queries, T.
        heads: Mesh axes that split the query heads, H.
        keys: Mesh axes that split the keys, S: those of `queries`, or none.
    """

    mesh: AbstractMesh
    batch: Axes
    queries: Axes
    heads: Axes
    keys: Axes

    def local_options(self, options: Options) -> Options:
        """The options of a device's part. If queries are split, a part does not begin with query 0, so not causal."""
        return dataclasses.replace(options, causal=options.causal and not self.queries)

    def parts(self, axes: Axes) -> int:
        """Into how many parts the axes split a dimension."""
        return math.prod(self.mesh.shape[name] for name in axes)

    def operand_specs(self, o: Operands) -> Any:
        """PartitionSpecs of the operands.

        The bias is split by batch, heads and queries, never by keys. If the parts of the heads do not divide K, key
        heads are not split: each device selects those that its queries read (`_head_selector`).
        """
        b, t, s, h = (axes or None for axes in (self.batch, self.queries, self.keys, self.heads))
        kv = P(b, s, h if o.key.shape[2] % self.parts(self.heads) == 0 else None, None)
        shape = (1, 1, 1, 1) if o.bias is None else o.bias.shape
        bias = P(*(axes if size > 1 else None for size, axes in zip(shape, (b, h, t, None), strict=True)))
        specs: dict[str, Any] = {
            "query": P(b, t, h, None),
            "key": kv,
            "value": kv,
            "query_streams": {name: P(b, t) for name in o.query_streams},
            "key_streams": {name: P(b, s) for name in o.key_streams},
            "bias": bias,
            "slopes": P(h),
            "steps": P(None, h),
            "seeds": P(b, h),
            "sinks": P(h),
        }
        given: dict[str, Any] = {name: spec for name, spec in specs.items() if getattr(o, name) is not None}
        return Operands(**given)

    def output_specs(self) -> tuple[P, P]:
        """PartitionSpecs of the output [B, T, H, Cv] and of lse [B, H, T]."""
        b, t, h = (axes or None for axes in (self.batch, self.queries, self.heads))
        return P(b, t, h, None), P(b, h, t)

    def reshard(self, o: Operands) -> Operands:
        """The operands, sharded by `operand_specs`."""
        specs = self.operand_specs(o)
        if not self.mesh.explicit_axes:
            return o  # `shard_map` says it
        return jax.tree.map(lambda x, spec: jax.sharding.reshard(x, NamedSharding(self.mesh, spec)), o, specs)

    def replicated_axes(self, spec: P) -> Axes:
        """Axes over whose devices an operand of that spec is replicated: its gradient is summed over them."""
        own = {name for entry in spec for name in axis_names(entry)}
        return tuple(a for a in (*self.batch, *self.queries, *self.heads) if a not in own)

    def shard_map(self, f: Any, in_specs: Any, out_specs: Any) -> Any:
        """`jax.shard_map` of f over the axes that count.

        Without its check that replicated outputs are equal on all devices: kernels do not declare over which axes
        their outputs vary.
        """
        names = frozenset(self.mesh.explicit_axes or self.mesh.axis_names)
        return jax.shard_map(
            f, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, axis_names=names, check_vma=False
        )


def mesh_layout(operands: Operands) -> MeshLayout | None:
    """The layout on the mesh in the type of the query; None without one, and for one in Auto mode without our axes."""
    mesh = jax.typeof(operands.query).sharding.mesh
    if mesh.empty:
        return None
    if mesh.are_all_axes_auto:
        B, _, H, _ = operands.query.shape
        rows, heads = dividing(mesh, B, BATCH_AXES), dividing(mesh, H, (TENSOR_AXIS,))
        ours = {*BATCH_AXES, TENSOR_AXIS} & set(mesh.axis_names)
        return MeshLayout(mesh, rows, (), heads, ()) if ours else None
    if not mesh.explicit_axes:
        return None
    batch, queries, heads, _ = map(axis_names, spec_of(operands.query))
    same = axis_names(spec_of(operands.key)[1]) == queries
    return MeshLayout(mesh, batch, queries, heads, queries if same else ())


@dataclasses.dataclass(frozen=True)
class Sharded:
    """An implementation on every device of a mesh; without a mesh, the implementation itself.

    Attributes:
        inner: The implementation; it computes a device's part.
        sequence: Strategy for queries that attend to keys of other devices, if the mesh splits the sequence: "gather",
            "ring", or None, which leaves it to `sequence.choose_strategy`.
    """

    inner: Implementation
    sequence: str | None = None

    def __post_init__(self):
        if self.sequence not in (None, *STRATEGIES):
            raise ValueError(f"unknown strategy {self.sequence!r} for a sequence: choose from {', '.join(STRATEGIES)}")

    def unsupported_reason(self, options: Options, operands: Operands) -> str | None:
        """Why `inner` cannot compute a device's part, or XLA cannot split `inner` over Auto axes; None if both can."""
        mesh, layout = jax.typeof(operands.query).sharding.mesh, mesh_layout(operands)
        partitionable = getattr(self.inner, "auto_partitionable", True)
        if (
            (layout is None or mesh.explicit_axes)
            and any(mesh.shape[name] > 1 for name in mesh.auto_axes)
            and not partitionable
        ):
            return f"a kernel cannot be split over mesh axes in Auto mode: make {', '.join(mesh.auto_axes)} Explicit"
        if layout is None:
            return self.inner.unsupported_reason(options, operands)
        options = layout.local_options(options)
        local = self._local_implementation(layout, options, operands)
        return local.unsupported_reason(options, _local_shapes(layout, operands))

    def __call__(self, options: Options, operands: Operands) -> jax.Array:
        """Output [B, T, H, Cv] in the query's dtype and sharding, differentiable; 0 where a query attends to no key."""
        layout = mesh_layout(operands)
        if layout is None:
            return self.inner(options, operands)
        options = layout.local_options(options)
        local, operands = self._local_implementation(layout, options, operands), layout.reshard(operands)
        if isinstance(local, ForwardBackward):
            return _attention(local, layout, options, operands)
        select = _head_selector(layout, operands)

        def on_device(o):
            return local(options, _local_operands(layout, o, select(o.key), select(o.value)))

        return layout.shard_map(on_device, (layout.operand_specs(operands),), layout.output_specs()[0])(operands)

    def _local_implementation(self, layout: MeshLayout, options: Options, operands: Operands) -> Implementation:
        if not layout.keys:
            return self.inner
        strategy = self.sequence or options.context_parallel
        return over_sequence(self.inner, strategy, layout.keys, layout.parts(layout.keys), options, operands)


# The derivative is defined around `shard_map`, not within it: the backward pass can then sum each gradient over devices
# exactly once, and its residuals are ordinary sharded arrays.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attention(local: ForwardBackward, layout: MeshLayout, options: Options, operands: Operands) -> jax.Array:
    return _run(local, layout, options, operands)[0]


def _run(local, layout, options, operands):
    select = _head_selector(layout, operands)

    def on_device(o):
        return passes.forward(local, options, _local_operands(layout, o, select(o.key), select(o.value)))

    return layout.shard_map(on_device, (layout.operand_specs(operands),), layout.output_specs())(operands)


def _forward(local, layout, options, operands):
    out, lse = _run(local, layout, options, operands)
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return out, (operands, out, lse)


def _backward(local, layout, options, residuals, cotangent):
    operands, out, lse = residuals
    specs, select = layout.operand_specs(operands), _head_selector(layout, operands)
    learned = {name: getattr(specs, name) for name in LEARNED if getattr(operands, name) is not None}

    def on_device(o, out, lse, cotangent):
        # `transpose` adds the gradients of selected, perhaps repeated, heads up to those of the heads that o has.
        (key, value), transpose = jax.vjp(lambda *kv: tuple(select(x) for x in kv), o.key, o.value)
        result = passes.backward(local, options, _local_operands(layout, o, key, value), out, lse, cotangent)
        key, value = transpose((result.key, result.value))
        result = dataclasses.replace(result, key=key, value=value)
        return {
            name: sum_over_devices(getattr(result, name), layout.replicated_axes(spec))
            for name, spec in learned.items()
        }

    out_spec, lse_spec = layout.output_specs()
    run = layout.shard_map(on_device, (specs, out_spec, lse_spec, out_spec), learned)
    gradients = run(operands, out, lse, cotangent)
    return (dataclasses.replace(jax.tree.map(passes.zero_cotangent, operands), **gradients),)


_attention.defvjp(_forward, _backward)


def _head_selector(layout: MeshLayout, operands: Operands) -> Callable[[jax.Array], jax.Array]:
    """A function from a device's keys or values [B, S, K', C] to those of the heads that its queries read.

    If the parts of the heads divide K, key heads are split like query heads (K' = K / parts), and it is the identity.
    Otherwise every device has all K heads (K' = K). With n = lcm(K, parts), head j of n is key head j * K // n, and a
    device takes n / parts consecutive ones: as many for each of its query heads, which grouped attention needs.
    """
    K, parts = operands.key.shape[2], layout.parts(layout.heads)
    if K % parts == 0:
        return lambda x: x
    every = math.lcm(K, parts)

    def select(x):
        mine = jax.lax.axis_index(layout.heads) * (every // parts) + jnp.arange(every // parts, dtype=jnp.int32)
        return jnp.take(x, mine * K // every, axis=2)

    return select


def _local_operands(layout: MeshLayout, o: Operands, key: jax.Array, value: jax.Array) -> Operands:
    """A device's operands with these keys and values, and with seeds shifted to where its queries begin."""
    if o.seeds is None or not layout.queries:
        return dataclasses.replace(o, key=key, value=value)
    seeds = dropout.shift_seed(o.seeds, jax.lax.axis_index(layout.queries) * o.query.shape[1])
    return dataclasses.replace(o, key=key, value=value, seeds=seeds)


def _local_shapes(layout: MeshLayout, o: Operands) -> Operands:
    """A device's operands, abstract."""
    local = jax.tree.map(functools.partial(_local_shape, layout), o, layout.operand_specs(o))
    K, parts = o.key.shape[2], layout.parts(layout.heads)
    if K % parts == 0:
        return local
    heads = math.lcm(K, parts) // parts  # see `_head_selector`
    key, value = (jax.ShapeDtypeStruct((*x.shape[:2], heads, x.shape[3]), x.dtype) for x in (local.key, local.value))
    return dataclasses.replace(local, key=key, value=value)


def _local_shape(layout: MeshLayout, x: jax.Array, spec: P) -> jax.ShapeDtypeStruct:
    sizes = (n // layout.parts(axis_names(entry)) for n, entry in zip(x.shape, spec, strict=True))
    return jax.ShapeDtypeStruct(tuple(sizes), x.dtype)
