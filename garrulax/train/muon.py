"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon), its work shared by the devices of a mesh.

Newton-Schulz iterations multiply a whole matrix with itself. A mesh splits matrices, and left to the partitioner many
devices would gather and multiply the same ones. Here each device gets whole matrices of its own: those of one shape,
of all layers and parameters, are divided among the devices by an all-to-all, orthogonalised where they are, and sent
back. A device sends and receives what it holds, and nothing is computed twice. Only where the devices do not divide
the number of matrices do zeros fill up the rest.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from garrulax.core import spec
from garrulax.core.sharding import axis_names, spec_of
from garrulax.core.spec import ParamSpec, Tree, is_spec, map_specs

COEFFICIENTS, EPS = (3.4445, -4.7750, 2.0315), 1e-8  # of the Newton-Schulz iterations, as in Optax
WIDE = (2, 2, 1)  # five steps: so many on the Gram matrix of a wide matrix before it is computed anew

Axes = tuple[str, ...]


def scale_by_muon(momentum: float, specs: Tree) -> optax.GradientTransformation:
    """Replaces gradients by their orthogonalised Nesterov momentum; every layer of a stack is a matrix of its own.

    The state is that of `optax.contrib.scale_by_muon`, and on CPUs the numbers agree with it up to rounding.
    `orthogonalised` describes how numbers are rounded on other platforms.

    Args:
        momentum: Decay rate of the momentum.
        specs: ParamSpec tree of the parameters. Gradients of those that are no matrices must be masked.
    """
    matrices = jax.tree.leaves(map_specs(lambda s: s if s.role == "matrix" else None, specs), is_leaf=is_spec)

    def init(params: Tree) -> optax.contrib.MuonState:
        mu = jax.tree.map(jnp.zeros_like, params)
        return optax.contrib.MuonState(jnp.zeros((), jnp.int32), mu, jnp.asarray(COEFFICIENTS))

    def update(updates: Tree, state: optax.contrib.MuonState, params: Tree | None = None) -> tuple[Tree, Any]:
        def nesterov(m, g):
            first, second = (1 - jnp.asarray(momentum, m.dtype) ** (state.count + i).astype(m.dtype) for i in (1, 2))
            return momentum * m / second + (1 - momentum) * g / first  # divided as Adam divides its first steps

        mu = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, state.mu, updates)
        leaves, tree = jax.tree.flatten(jax.tree.map(nesterov, mu, updates))
        new = jax.tree.unflatten(tree, orthogonalised(leaves, matrices))
        return new, optax.contrib.MuonState(state.count + 1, mu, state.ns_coeffs)

    return optax.GradientTransformation(init, update)


def orthogonalised(arrays: list[jax.Array], specs: list[ParamSpec]) -> list[jax.Array]:
    """The matrices in these arrays with their singular values brought near 1, each by Newton-Schulz iterations.

    The platform for which the program is lowered decides about the numbers: on CPUs, where products of bfloat16 are
    slow, everything is computed in the dtype of the arrays. Elsewhere float32 is rounded to bfloat16 first, on a mesh
    before it is sent, and products of bfloat16 are summed in float32. float64 is float64 everywhere.

    Args:
        arrays: Arrays of the shapes of `specs`, in at least float32.
        specs: ParamSpecs of matrices: they say which dimensions are layers, inputs and outputs.

    Returns:
        Arrays of the same shapes, dtypes and, on a mesh in Explicit mode, of the same shardings.
    """
    same, rounded = (functools.partial(_orthogonalised, specs=specs, half=half) for half in (False, True))
    return jax.lax.platform_dependent(arrays, cpu=same, default=rounded)


def newton_schulz(x: jax.Array) -> jax.Array:
    """Matrices with singular values near 1, by five steps of a quintic iteration.

    A step is x ← (a I + b g + c g²) x with the Gram matrix g = x xᵀ. The Gram matrix of the result is a polynomial of
    g, so that several steps need x only at their end ("Gram Newton-Schulz", Zhang, Amsel, Chen & Dao 2026). Wide
    matrices take two steps at a time, and g is computed anew between them: 4 m² n + 10 m³ operations for two steps, of
    which single ones take 8 m² n + 4 m³. Rounding errors of g grow by up to a² = 12 a step. In bfloat16 pairs are as
    near to float64 as single steps; three at once fail for matrices with a large mean, five for most.

    Args:
        x: [N, m, n], m <= n. Products are in its dtype; those of bfloat16 are summed in float32.

    Returns:
        [N, m, n] in the dtype of x.
    """
    first, *others = _counts(*x.shape[1:])
    x = _steps(x, first, normalise=True)
    for count in others:
        x = _steps(x, count, normalise=False)
    return x


def _counts(rows: int, columns: int) -> tuple[int, ...]:
    """Numbers of steps between which the Gram matrix is computed anew: where operations are fewest."""
    return WIDE if columns > 1.5 * rows else (1,) * sum(WIDE)


def newton_schulz_flops(rows: int, columns: int) -> int:
    """FLOPs of the products with which `newton_schulz` computes one matrix; rows <= columns."""
    counts = _counts(rows, columns)
    of_gram = sum(count + 3 * (count - 1) for count in counts)  # squares; what the next step needs; their product
    return 4 * rows**2 * columns * len(counts) + 2 * rows**3 * of_gram


def flops_a_device(specs: Tree, places: Tree | None = None) -> int:
    """FLOPs of the products with which one device orthogonalises its share of the matrices of a model.

    Args:
        specs: ParamSpec tree of the parameters.
        places: Their NamedShardings (`core.sharding.shardings`); None is one device.
    """
    groups: dict[Any, int] = {}
    named = spec.named_specs(specs)
    shares = {} if places is None else dict(zip(named, jax.tree.leaves(places), strict=True))
    for name, s in named.items():
        if s.role == "matrix":
            place = shares.get(name)
            sizes = {} if place is None else dict(place.mesh.shape)
            split = _split(s, (None,) * len(s.shape) if place is None else (*place.spec, *(None,) * len(s.shape)))
            count = math.prod(s.shape[: 1 if s.layers else 0]) // math.prod(sizes[axis] for axis in split.layers)
            parts = math.prod(size for axis, size in sizes.items() if axis not in split.layers)
            groups[(split, parts)] = groups.get((split, parts), 0) + count
    return sum(-(-count // parts) * newton_schulz_flops(*split.whole) for (split, parts), count in groups.items())


def _steps(x: jax.Array, count: int, normalise: bool) -> jax.Array:
    """x after some steps, which are computed on its Gram matrix; before them x is divided by its norm, if asked."""
    wide = functools.partial(jnp.asarray, dtype=jnp.promote_types(x.dtype, jnp.float32))  # for all but products
    a, b, c = (wide(k) for k in COEFFICIENTS)
    identity = jnp.eye(x.shape[1], dtype=a.dtype)
    gram, scale = x @ x.mT, wide(1.0)
    if normalise:  # the norm is that of the trace: x is neither read nor written for it
        trace = jnp.sum(jnp.diagonal(gram, axis1=1, axis2=2), axis=1, dtype=scale.dtype)[:, None, None]
        scale = 1 / (jnp.sqrt(trace) + wide(EPS))
        gram = (wide(gram) * scale * scale).astype(x.dtype)
    factors: list[jax.Array] = []
    for i in range(count):
        last = i == count - 1
        factor = a * identity + b * wide(gram) + c * wide(gram @ gram)
        factors.append((factor * scale if last else factor).astype(x.dtype))
        if not last:
            gram = (factors[i] @ gram) @ factors[i]
    return functools.reduce(lambda product, factor: factor @ product, factors) @ x


def _orthogonalised(arrays: list[jax.Array], specs: list[ParamSpec], half: bool) -> list[jax.Array]:
    mesh = jax.sharding.get_abstract_mesh()
    dtypes = [x.dtype for x in arrays]
    arrays = [x.astype(jnp.bfloat16) if half and x.dtype == jnp.float32 else x for x in arrays]
    if mesh.empty or not mesh.are_all_axes_explicit:
        new = [_alone(x, s) for x, s in zip(arrays, specs, strict=True)]
    else:
        new = _on_mesh(arrays, specs, dict(mesh.shape))
    return [x.astype(dtype) for x, dtype in zip(new, dtypes, strict=True)]


def _alone(x: jax.Array, s: ParamSpec) -> jax.Array:
    """On one device: the layers of a parameter fill it, and to join parameters would cost copies."""
    block = _block(x, s, (None,) * x.ndim)
    return block.restored(newton_schulz(block.array)).reshape(x.shape)


def _on_mesh(arrays: list[jax.Array], specs: list[ParamSpec], sizes: dict[str, int]) -> list[jax.Array]:
    entries = [spec_of(x) for x in arrays]

    def device(parts):
        blocks = [_block(x, s, e) for x, s, e in zip(parts, specs, entries, strict=True)]
        groups: dict[Any, list[int]] = {}
        for i, block in enumerate(blocks):
            groups.setdefault(block.group, []).append(i)
        out = list(parts)
        for members in groups.values():
            stack = jnp.concatenate([blocks[i].array for i in members])
            new, done = _shared(stack, blocks[members[0]].split, sizes), 0
            for i in members:
                count = len(blocks[i].array)
                out[i] = blocks[i].restored(new[done : done + count]).reshape(parts[i].shape)
                done += count
        return out

    shards = [P(*e) for e in entries]
    return jax.shard_map(device, in_specs=(shards,), out_specs=shards, check_vma=False)(arrays)


@dataclasses.dataclass(frozen=True)
class _Split:
    """How a mesh splits a stack of matrices, which have no more rows than columns.

    The rows of a matrix of several input dimensions may be in another order than in the array, the same on all devices:
    orthogonalisation commutes with that.

    Attributes:
        whole: Rows and columns of the whole matrix.
        rows: Mesh axes that split the rows.
        columns: Mesh axes that split the columns.
        layers: Mesh axes that split the stack.
        turned: Whether rows are outputs.
    """

    whole: tuple[int, int]
    rows: Axes
    columns: Axes
    layers: Axes
    turned: bool = dataclasses.field(compare=False)  # those that differ in it alone are exchanged together


@dataclasses.dataclass(frozen=True)
class _Block:
    """A device's part of a stack of matrices.

    Attributes:
        array: [N, rows of the device, columns of the device].
        split: What they are parts of.
    """

    array: jax.Array
    split: _Split

    @property
    def group(self) -> Any:
        """Blocks of one group can be exchanged together."""
        return self.split, self.array.dtype

    def restored(self, x: jax.Array) -> jax.Array:
        """x like `array`, as [N, inputs, outputs]."""
        return x.mT if self.split.turned else x


def _dimensions(s: ParamSpec) -> tuple[slice, slice, slice]:
    """Those of layers, inputs and outputs."""
    first = 1 if s.layers else 0
    return slice(first), slice(first, first + s.inputs), slice(first + s.inputs, len(s.shape))


def _split(s: ParamSpec, entries: tuple[Any, ...]) -> _Split:
    """How the entries of a PartitionSpec split the matrices of a parameter."""
    dimensions = _dimensions(s)
    by_layers, by_inputs, by_outputs = (
        tuple(name for entry in entries[part] for name in axis_names(entry)) for part in dimensions
    )
    m, n = (math.prod(s.shape[part]) for part in dimensions[1:])
    if m > n or (m == n and by_inputs > by_outputs):  # square ones so that parameters split both ways share a group
        return _Split((n, m), by_outputs, by_inputs, by_layers, True)
    return _Split((m, n), by_inputs, by_outputs, by_layers, False)


def _block(x: jax.Array, s: ParamSpec, entries: tuple[Any, ...]) -> _Block:
    _, inputs, outputs = _dimensions(s)
    split = _split(s, entries)
    x = x.reshape(-1, math.prod(x.shape[inputs]), math.prod(x.shape[outputs]))
    return _Block(x.mT if split.turned else x, split)


def _shared(stack: jax.Array, like: _Split, sizes: dict[str, int]) -> jax.Array:
    """`newton_schulz` of a stack whose matrices are split as those of `like`, each computed by one device."""
    copies = tuple(name for name in sizes if name not in {*like.rows, *like.columns, *like.layers})
    count, parts = len(stack), math.prod(sizes[name] for name in (*copies, *like.rows, *like.columns))
    # XLA:CPU (jax 0.10) fails to compile an all-to-all some of whose operands it knows to be zeros.
    stack = jax.lax.optimization_barrier(jnp.pad(stack, ((0, -count % parts), (0, 0), (0, 0))))
    if copies:
        own = len(stack) // math.prod(sizes[name] for name in copies)
        stack = jax.lax.dynamic_slice_in_dim(stack, jax.lax.axis_index(copies) * own, own)
    for axes, dimension in ((like.rows, 1), (like.columns, 2)):
        if axes:
            stack = jax.lax.all_to_all(stack, axes, 0, dimension, tiled=True)
    stack = newton_schulz(stack)
    for axes, dimension in ((like.columns, 2), (like.rows, 1)):
        if axes:
            stack = jax.lax.all_to_all(stack, axes, dimension, 0, tiled=True)
    if copies:
        stack = jax.lax.all_gather(stack, copies, tiled=True)
    return stack[:count]
