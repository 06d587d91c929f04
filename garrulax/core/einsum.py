"""Products of activations with weight leaves, the same on one device and on a mesh."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from garrulax.core import half
from garrulax.core.leaf import Leaf
from garrulax.core.letters import letters, sides
from garrulax.core.sharding import Entry, axis_names, is_explicit, spec_of
from garrulax.core.strategies import BATCH_AXES, TENSOR_AXIS


def einsum(spec: str, x: jax.Array, w: jax.Array | Leaf) -> jax.Array:
    """`jnp.einsum(spec, x, w)` of activations and a weight.

    On one device the letters are merged, so that the product is of two matrices: XLA:CPU multiplies [B·T, D] by
    [D, F] 1.4 times faster than [B, T, D] by [D, F] (in the backward pass). On a mesh in Explicit mode the output
    keeps the shardings of its letters, weights are gathered over the axes of the batch (FSDP), and a contraction over
    a sharded letter is summed across its axis (tensor parallelism). Tokens that `tensor` splits (sequence parallelism)
    are gathered for a weight whose outputs it splits; the sum that follows is split again where it is added to them.

    Args:
        spec: Letters of x, w and the result, such as "BTD,DHC->BTHC".
        x: Activations, contracted letters last.
        w: Weight, contracted letters first ("BTD,DHC->BTHC") or last ("BTD,VD->BTV"); a `Leaf` multiplies itself.

    Returns:
        The product in x's dtype.

    Raises:
        ValueError: A letter has two sizes.
    """
    check_sizes(spec, x, w)
    if isinstance(w, Leaf):
        return w.einsum(spec, x)
    left, right, out = letters(spec)
    w = w.astype(x.dtype)
    if on_mesh(x):
        return _sharded(left, right, out, x, w)
    return _matmul(left, right, out, x, w, None)


def product(spec: str, x: jax.Array, w: jax.Array, dot: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
    """`einsum` on one device by a function of two matrices.

    Args:
        spec: As in `einsum`; a spec with the contracted letters last is multiplied as `einsum` does.
        x: Activations.
        w: Weight.
        dot: The product of x [M, n] and the weight as a matrix [n, N]: [M, N].

    Raises:
        ValueError: The activations are on a mesh.
    """
    if on_mesh(x):
        raise ValueError(f"einsum {spec!r}: a weight with a product of its own cannot be multiplied on a mesh")
    return _matmul(*letters(spec), x, w.astype(x.dtype), dot)


def on_mesh(x: jax.Array) -> bool:
    """Whether the type of x says how it is sharded (a mesh in Explicit mode)."""
    mesh = jax.typeof(x).sharding.mesh
    return is_explicit(mesh)


def check_sizes(spec: str, x: jax.Array, w: jax.Array | Leaf) -> None:
    """Raises ValueError if the spec does not fit the shapes."""
    left, right, _ = letters(spec)
    if len(left) != x.ndim or len(right) != w.ndim:
        raise ValueError(f"einsum {spec!r} does not fit shapes {x.shape} and {w.shape}")
    sizes = dict(zip(left, x.shape, strict=True))
    for letter, size in zip(right, w.shape, strict=True):
        if sizes.setdefault(letter, size) != size:
            raise ValueError(f"einsum {spec!r}: {letter} is {sizes[letter]} in {x.shape} and {size} in {w.shape}")


def _matmul(left: str, right: str, out: str, x: jax.Array, w: jax.Array, own: Callable | None) -> jax.Array:
    s = sides(left, right, out)
    if s is None:
        return jnp.einsum(f"{left},{right}->{out}", x, w)
    first, inner = s.first, math.prod(x.shape[len(s.rows) :])
    x2 = x.reshape(-1, inner)
    w2 = w.reshape(inner, -1) if first else w.reshape(-1, inner)
    if own is not None and first:
        y = own(x2, w2)
    else:
        y = (half.dot if half.applies(x2, w2) else half.plain_dot)(x2, w2, first)
    w_out = w.shape[len(s.contracted) :] if first else w.shape[: len(s.columns)]
    return y.reshape(*x.shape[: len(s.rows)], *w_out)


def _sharded(left: str, right: str, out: str, x: jax.Array, w: jax.Array) -> jax.Array:
    of_x, of_w = dict(zip(left, spec_of(x), strict=True)), dict(zip(right, spec_of(w), strict=True))
    if TENSOR_AXIS in {axis for letter in right if letter not in left for axis in axis_names(of_w[letter])}:
        of_x = {letter: _without(TENSOR_AXIS, entry) if letter in out else entry for letter, entry in of_x.items()}
        x = jax.sharding.reshard(x, P(*of_x.values()))  # gathers what sequence parallelism split
    gathered = {axis for letter in left if letter in out for axis in axis_names(of_x[letter])} | set(BATCH_AXES)

    def keep(letter, axes):
        if letter in of_x:  # contracted: sharded like x, or not at all
            return of_x[letter]
        return None if gathered & set(axis_names(axes)) else axes

    of_w = {letter: keep(letter, axes) for letter, axes in of_w.items()}
    w = jax.sharding.reshard(w, P(*(of_w[letter] for letter in right)))
    sharding = P(*({**of_w, **of_x}[letter] for letter in out))
    return jnp.einsum(f"{left},{right}->{out}", x, w, out_sharding=sharding)


def _without(axis: str, entry: Entry) -> Entry:
    """An entry of a PartitionSpec without one mesh axis."""
    names = tuple(name for name in axis_names(entry) if name != axis)
    return names[0] if len(names) == 1 else names or None


def whole_tokens(x: jax.Array) -> jax.Array:
    """x [..., T] with the tokens that sequence parallelism splits gathered: once, for what many layers read."""
    mesh = jax.typeof(x).sharding.mesh
    if not is_explicit(mesh):
        return x
    return jax.sharding.reshard(x, P(*spec_of(x)[:-1], _without(TENSOR_AXIS, spec_of(x)[-1])))


def like_tokens(x: jax.Array, other: jax.Array) -> jax.Array:
    """x [B or 1, T, ...] with its tokens split over the mesh as those of `other` [B, T, ...] are."""
    mesh = jax.typeof(other).sharding.mesh
    if not is_explicit(mesh):
        return x
    return jax.sharding.reshard(x, P(spec_of(x)[0], spec_of(other)[1]))


def gather(w: jax.Array | Leaf, x: jax.Array) -> jax.Array:
    """A small weight (scale, bias) for products and sums with x, complete on every device.

    It gets x's dtype, and axes of size 1 in front until it has as many axes as x, so that nothing is promoted.
    """
    if isinstance(w, Leaf):
        w = w.dense(x.dtype)
    w = jax.lax.expand_dims(jnp.asarray(w, x.dtype), range(x.ndim - w.ndim))
    mesh = jax.typeof(w).sharding.mesh
    if not is_explicit(mesh):
        return w
    return jax.sharding.reshard(w, P(*(None for _ in w.shape)))


def lookup(table: jax.Array | Leaf, ids: jax.Array) -> jax.Array:
    """Rows of a table; an id outside 0..V-1 gives NaN, never another row.

    On a mesh the table is gathered, but over `tensor`: there each device looks up the ids of its own rows, and the
    results are summed.

    Args:
        table: [V, D]; a `Leaf` looks itself up.
        ids: Integers [...].

    Returns:
        [..., D], sharded like the ids, with D complete on every device.
    """
    return table.lookup(ids) if isinstance(table, Leaf) else _lookup(jnp.asarray(table), ids)


def _lookup(table: jax.Array, ids: jax.Array) -> jax.Array:
    mesh = jax.typeof(table).sharding.mesh
    if mesh.empty and table.dtype == jnp.bfloat16:
        return half.rows(table, ids)
    if not is_explicit(mesh):
        return _rows(table, ids)
    by_rows, wanted = TENSOR_AXIS in axis_names(spec_of(table)[0]), P(*spec_of(ids), None)
    ids = whole_tokens(ids) if by_rows else ids
    of_table, of_ids = P(TENSOR_AXIS if by_rows else None, None), P(*spec_of(ids))

    def device(table, ids):
        if not by_rows:
            return _rows(table, ids)
        own = ids - jax.lax.axis_index(TENSOR_AXIS) * len(table)
        rows = jnp.where(((own >= 0) & (own < len(table)))[..., None], _rows(table, own), 0)
        known = (ids >= 0) & (ids < len(table) * mesh.shape[TENSOR_AXIS])
        return jnp.where(known[..., None], jax.lax.psum(rows, TENSOR_AXIS), jnp.nan)

    # A `shard_map` of its own: the partitioner would do the same, but not within the `shard_map` of a pipeline.
    run = jax.shard_map(
        device,
        in_specs=(of_table, of_ids),
        out_specs=P(*of_ids, None),
        axis_names=set(mesh.explicit_axes),
    )
    return jax.sharding.reshard(run(jax.sharding.reshard(table, of_table), ids), wanted)


def _rows(table: jax.Array, ids: jax.Array) -> jax.Array:
    return table.at[ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
