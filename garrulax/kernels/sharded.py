"""Attention on a mesh in Explicit mode: every device computes its own rows, heads and queries, in `jax.shard_map`
around any implementation.

The partitioner of XLA could split the chunked implementation, but no Pallas kernel; and a gradient of something that
several devices share is summed over them here, once, where the partitioner would do so in every chunk.
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

from garrulax.kernels import dropout
from garrulax.kernels import passes as two_passes
from garrulax.kernels.call import Implementation, Operands, Options
from garrulax.kernels.passes import TwoPasses
from garrulax.kernels.sequence import WAYS, across, summed

Axes = tuple[str, ...]
LEARNED = ("query", "key", "value", "bias", "steps", "sinks")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which mesh axes split what.

    mesh: the one in the query's type; its Explicit axes count. batch, queries, heads: the axes of the query's
    dimensions B, T and H. keys: those of S, the same as of T or none.
    """

    mesh: AbstractMesh
    batch: Axes
    queries: Axes
    heads: Axes
    keys: Axes

    def options(self, options: Options) -> Options:
        """The options of a device's part: of split queries it is not known which is the first."""
        return dataclasses.replace(options, causal=options.causal and not self.queries)

    def ways(self, axes: Axes) -> int:
        """How many parts the axes make."""
        return math.prod(self.mesh.shape[name] for name in axes)

    def specs(self, o: Operands) -> Any:
        """PartitionSpecs of the operands. A bias stays whole along the keys: its queries and heads are split. Keys of
        fewer heads than parts stay whole along the heads, of which every device takes those that its queries read."""
        b, t, s, h = (axes or None for axes in (self.batch, self.queries, self.keys, self.heads))
        kv = P(b, s, h if o.key.shape[2] % self.ways(self.heads) == 0 else None, None)
        shape = (1, 1, 1, 1) if o.bias is None else o.bias.shape
        of_bias = P(*(axes if size > 1 else None for size, axes in zip(shape, (b, h, t, None), strict=True)))
        specs: dict[str, Any] = {
            "query": P(b, t, h, None),
            "key": kv,
            "value": kv,
            "query_streams": {name: P(b, t) for name in o.query_streams},
            "key_streams": {name: P(b, s) for name in o.key_streams},
            "bias": of_bias,
            "slopes": P(h),
            "steps": P(None, h),
            "seeds": P(b, h),
            "sinks": P(h),
        }
        given: dict[str, Any] = {name: spec for name, spec in specs.items() if getattr(o, name) is not None}
        return Operands(**given)

    def outputs(self) -> tuple[P, P]:
        """PartitionSpecs of the output [B, T, H, Cv] and of lse [B, H, T]."""
        b, t, h = (axes or None for axes in (self.batch, self.queries, self.heads))
        return P(b, t, h, None), P(b, h, t)

    def placed(self, o: Operands) -> Operands:
        """The operands, sharded by `specs`."""
        return jax.tree.map(lambda x, spec: jax.sharding.reshard(x, NamedSharding(self.mesh, spec)), o, self.specs(o))

    def sharing(self, spec: P) -> Axes:
        """The axes over whose devices an operand of that spec is shared, so that its gradient is summed over them."""
        own = {name for entry in spec for name in _names(entry)}
        return tuple(a for a in (*self.batch, *self.queries, *self.heads) if a not in own)

    def map(self, f: Any, in_specs: Any, out_specs: Any) -> Any:
        """f of every device's own parts. What f gives is not checked to be the same where it is shared: kernels do
        not say over which axes their outputs vary."""
        names = frozenset(self.mesh.explicit_axes)
        return jax.shard_map(
            f, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, axis_names=names, check_vma=False
        )


def plan(operands: Operands) -> Plan | None:
    """How the query's type and the keys' say that the request is split; None without a mesh in Explicit mode."""
    mesh = jax.typeof(operands.query).sharding.mesh
    if mesh.empty or not mesh.explicit_axes:
        return None
    batch, queries, heads, _ = map(_names, _spec(operands.query))
    same = _names(_spec(operands.key)[1]) == queries
    return Plan(mesh, batch, queries, heads, queries if same else ())


@dataclasses.dataclass(frozen=True)
class Sharded:
    """An implementation on every device of a mesh; without a mesh, that implementation.

    inner: what computes a device's part.
    sequence: how queries see the keys of other devices where the mesh splits the sequence: "gather", "ring", or None,
    which leaves it to `sequence.way`.
    """

    inner: Implementation
    sequence: str | None = None

    def __post_init__(self):
        if self.sequence not in (None, *WAYS):
            raise ValueError(f"unknown way across a sequence {self.sequence!r}: choose from {', '.join(WAYS)}")

    def unsupported_reason(self, options: Options, operands: Operands) -> str | None:
        """What `inner` says to a device's part of the request; Auto axes, where XLA cannot split `inner`."""
        mesh = jax.typeof(operands.query).sharding.mesh
        if any(mesh.shape[name] > 1 for name in mesh.auto_axes) and not getattr(self.inner, "partitioned", True):
            return f"a kernel cannot be split over mesh axes in Auto mode: make {', '.join(mesh.auto_axes)} Explicit"
        p = plan(operands)
        if p is None:
            return self.inner.unsupported_reason(options, operands)
        options = p.options(options)
        return self._part(p, options, operands).unsupported_reason(options, _local(p, operands))

    def __call__(self, options: Options, operands: Operands) -> jax.Array:
        """Output [B, T, H, Cv] in the query's dtype and sharding; differentiable, 0 where a query sees nothing."""
        p = plan(operands)
        if p is None:
            return self.inner(options, operands)
        options = p.options(options)
        part, operands = self._part(p, options, operands), p.placed(operands)
        if isinstance(part, TwoPasses):
            return _attention(part, p, options, operands)
        own = _chooser(p, operands)

        def one(o):
            return part(options, _in_place(p, o, own(o.key), own(o.value)))

        return p.map(one, (p.specs(operands),), p.outputs()[0])(operands)

    def _part(self, p: Plan, options: Options, operands: Operands) -> Implementation:
        if not p.keys:
            return self.inner
        return across(self.inner, self.sequence, p.keys, p.ways(p.keys), options, operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attention(part: TwoPasses, p: Plan, options: Options, operands: Operands) -> jax.Array:
    return _run(part, p, options, operands)[0]


def _run(part, p, options, operands):
    own = _chooser(p, operands)

    def one(o):
        return two_passes.forward(part, options, _in_place(p, o, own(o.key), own(o.value)))

    return p.map(one, (p.specs(operands),), p.outputs())(operands)


def _forward(part, p, options, operands):
    out, lse = _run(part, p, options, operands)
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return out, (operands, out, lse)


def _backward(part, p, options, residuals, cotangent):
    operands, out, lse = residuals
    specs, own = p.specs(operands), _chooser(p, operands)
    learned = {name: getattr(specs, name) for name in LEARNED if getattr(operands, name) is not None}

    def one(o, out, lse, cotangent):
        (key, value), back = jax.vjp(lambda *kv: tuple(own(x) for x in kv), o.key, o.value)
        found = two_passes.backward(part, options, _in_place(p, o, key, value), out, lse, cotangent)
        key, value = back((found.key, found.value))
        found = dataclasses.replace(found, key=key, value=value)
        return {name: summed(getattr(found, name), p.sharing(spec)) for name, spec in learned.items()}

    of_out, of_lse = p.outputs()
    gradients = p.map(one, (specs, of_out, of_lse, of_out), learned)(operands, out, lse, cotangent)
    return (dataclasses.replace(jax.tree.map(two_passes.no_gradient, operands), **gradients),)


_attention.defvjp(_forward, _backward)


def _chooser(p: Plan, operands: Operands) -> Callable[[jax.Array], jax.Array]:
    """What a device takes of its part [B, S, K, C] of keys or values: where K is not a multiple of the parts of the
    heads, those that its queries read, repeated to whole groups."""
    K, ways = operands.key.shape[2], p.ways(p.heads)
    if K % ways == 0:
        return lambda x: x
    every = math.lcm(K, ways)

    def own(x):
        mine = jax.lax.axis_index(p.heads) * (every // ways) + jnp.arange(every // ways)
        return jnp.take(x, mine * K // every, axis=2)

    return own


def _in_place(p: Plan, o: Operands, key: jax.Array, value: jax.Array) -> Operands:
    """A device's part with these of its keys and values, and seeds that know where in the sequence its queries are."""
    if o.seeds is None or not p.queries:
        return dataclasses.replace(o, key=key, value=value)
    seeds = dropout.moved(o.seeds, jax.lax.axis_index(p.queries) * o.query.shape[1])
    return dataclasses.replace(o, key=key, value=value, seeds=seeds)


def _local(p: Plan, o: Operands) -> Operands:
    """A device's part of the operands, abstract."""
    part = jax.tree.map(functools.partial(_cut, p), o, p.specs(o))
    K, ways = o.key.shape[2], p.ways(p.heads)
    if K % ways == 0:
        return part
    heads = math.lcm(K, ways) // ways
    key, value = (jax.ShapeDtypeStruct((*x.shape[:2], heads, x.shape[3]), x.dtype) for x in (part.key, part.value))
    return dataclasses.replace(part, key=key, value=value)


def _cut(p: Plan, x: jax.Array, spec: P) -> jax.ShapeDtypeStruct:
    sizes = (n // p.ways(_names(entry)) for n, entry in zip(x.shape, spec, strict=True))
    return jax.ShapeDtypeStruct(tuple(sizes), x.dtype)


def _spec(x: jax.Array) -> tuple:
    spec = tuple(jax.typeof(x).sharding.spec)
    return spec + (None,) * (x.ndim - len(spec))


def _names(axes: str | Axes | None) -> Axes:
    return () if axes is None else axes if isinstance(axes, tuple) else (axes,)
