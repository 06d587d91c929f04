"""Low-rank adaptation (LoRA, Hu et al. 2022): frozen weights, each with a trained pair of small matrices beside it.

    y = x W + s (x A) B,  A [inputs, r],  B [r, outputs],  s = alpha / r

`attach` puts pairs beside chosen weights; one matrix of each begins at zero, so that the model computes what it did.
`split` takes the trained arrays out of a tree of parameters and `join` puts them back, so that only they get gradients,
optimizer state and checkpoints. `merge` adds the pairs to their weights.

Variants: s = alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023), and DoRA (Liu et al. 2024), which also trains the length of
every column of the weight.

Letters: r rank, B rows of a batch, L layers.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from garrulax.core.dtypes import at_least_float32
from garrulax.core.einsum import einsum, gather, lookup
from garrulax.core.leaf import Leaf, Tree, map_weights, weights
from garrulax.core.letters import letters

#: The arrays of a pair that are trained, as `split` names them.
TRAINED = ("a", "b", "magnitude", "bias")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lora(Leaf):
    """A weight and its pair of low rank.

    The pair cuts the dimensions of the weight in two: a has the first and the rank, b the rank and the others. Of a
    matrix such as [D, H, C] the first are the inputs. Of a table [V, D], of embeddings or of an output head, they are
    the rows.

    Stacked layers are the leading axis of all arrays. Where every row of a batch has a pair of its own
    (`core.lora_rows`), a, b and scale have the axis of the rows next.

    Attributes:
        base: The weight, an array or another leaf.
        a: [first dimensions, r].
        b: [r, other dimensions].
        scale: float32 scalar, s.
        magnitude: Of DoRA, [other dimensions], the lengths of the columns of the weight; None without.
        bias: Added to the output times s, [other dimensions]; None without.
    """

    base: Any
    a: Any
    b: Any
    scale: Any
    magnitude: Any = None
    bias: Any = None

    kind = "LoRA adapters"
    advice = "merge them with gx.merge, or save them alone with gx.save_adapter"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return tuple(self.base.shape)

    @property
    def dtype(self) -> np.dtype:
        """Of the weight."""
        return np.dtype(self.base.dtype)

    @property
    def _extra(self) -> int:
        """Dimensions of the pair beyond those of the weight and the rank, twice: 1 if stacked, 2 more for rows."""
        return self.a.ndim + self.b.ndim - 2 - self.base.ndim

    @property
    def stacked(self) -> bool:
        """Whether the layers are stacked."""
        return self._extra % 2 == 1

    @property
    def by_row(self) -> bool:
        """Whether every row of a batch has a pair of its own."""
        return self._extra >= 2

    @property
    def first(self) -> int:
        """Number of dimensions of one layer's weight that `a` has."""
        return self.a.ndim - 1 - self.stacked - self.by_row

    @property
    def rank(self) -> int:
        """r, the greatest of all layers and rows."""
        return self.a.shape[-1]

    def einsum(self, spec: str, x: jax.Array) -> jax.Array:
        """The product with the weight and that with the pair, which is computed in x's dtype too."""
        left, right, out = letters(spec)
        pair = [(self.a, f"{right[: self.first]}r"), (self.b, f"r{right[self.first :]}")]
        (one, into), (other, back) = pair if set(right[: self.first]) <= set(left) else pair[::-1]
        middle = left.removesuffix(into.replace("r", "")) + "r"
        multiply = _by_row if self.by_row else einsum
        y = multiply(f"{middle},{back}->{out}", multiply(f"{left},{into}->{middle}", x, one), other)
        return self._column_lengths(einsum(spec, x, self.base) + self._scaled(y))

    def _scaled(self, y: jax.Array) -> jax.Array:
        """s (y + bias)."""
        if self.bias is not None:
            y = y + gather(self.bias, y)
        scale = self.scale.astype(y.dtype)
        return y * (scale.reshape(-1, *(1,) * (y.ndim - 1)) if self.by_row else scale)

    def _column_lengths(self, y: jax.Array) -> jax.Array:
        """The product with DoRA's weight: the columns of the sum have the trained lengths."""
        if self.magnitude is None:
            return y
        factor = self.magnitude / jax.lax.stop_gradient(column_lengths(self._sum(), self.first))
        return y * gather(factor, y)

    def lookup(self, ids: jax.Array) -> jax.Array:
        """Rows of the table."""
        axes = "BTUV"[: ids.ndim]
        if self.by_row:
            rows = jnp.broadcast_to(ids, (len(self.a), *ids.shape[1:]))
            low = jax.vmap(lambda a, b, i: jnp.matmul(lookup(a, i), b))(self.a, self.b, rows)
        else:
            low = einsum(f"{axes}r,rD->{axes}D", lookup(self.a, ids), self.b)
        y = lookup(self.base, ids)
        return y + self._scaled(low.astype(y.dtype))

    def dense(self, dtype: Any = None) -> jax.Array:
        """The sum of the weight and the product of the pair, computed in at least float32."""
        if self.by_row or self.bias is not None:
            what = "adapters of several rows" if self.by_row else "an adapter with lora_bias, a bias of its own,"
            raise ValueError(f"{what} cannot become one weight")
        dense = jax.vmap(Lora._dense)(self) if self.stacked else self._dense()
        return dense.astype(self.dtype if dtype is None else dtype)

    def _dense(self) -> jax.Array:
        total = self._sum()
        if self.magnitude is None:
            return total
        return total * (self.magnitude / column_lengths(total, self.first)).astype(total.dtype)

    def _sum(self) -> jax.Array:
        dtype = at_least_float32(self.dtype)
        base = self.base.dense(dtype) if isinstance(self.base, Leaf) else self.base.astype(dtype)
        return base + self.scale.astype(dtype) * jnp.tensordot(self.a.astype(dtype), self.b.astype(dtype), 1)

    def astype(self, dtype: Any) -> "Lora":
        """The weight in another dtype; the pair keeps its own, and is cast when it is multiplied."""
        return dataclasses.replace(self, base=self.base.astype(dtype))

    def shardings(self, place: NamedSharding) -> "Lora":
        """Pairs are sharded as the dimensions of the weight that they have; the rank is not."""
        axes = tuple(place.spec) + (None,) * (self.ndim - len(place.spec))
        layers, axes = axes[: self.stacked], axes[self.stacked :]
        rows = (None,) * self.by_row

        def at(*entries: Any) -> NamedSharding:
            return NamedSharding(place.mesh, P(*layers, *entries))

        others = at(*axes[self.first :])
        return Lora(
            self.base.shardings(place) if isinstance(self.base, Leaf) else place,
            at(*rows, *axes[: self.first], None),
            at(*rows, None, *axes[self.first :]),
            at(*rows),
            None if self.magnitude is None else others,
            None if self.bias is None else others,
        )


def column_lengths(w: jax.Array, inputs: int) -> jax.Array:
    """The Euclidean lengths of the columns of a weight [inputs, outputs]: [outputs]."""
    return jnp.sqrt(jnp.sum(jnp.square(w), axis=tuple(range(inputs))))


def _by_row(spec: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """`einsum` where each row of x has its own weight, on one device."""
    left, right, out = letters(spec)
    return jnp.einsum(f"{left},{left[0]}{right}->{out}", x, w.astype(x.dtype))


def scale_of(rank: int, alpha: float, rslora: bool) -> float:
    """The factor of a pair's product."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def check_size(rank: Any, alpha: Any) -> None:
    """Raises ValueError for a rank or alpha that no adapter can have."""
    if isinstance(rank, bool) or not isinstance(rank, int | np.integer) or rank < 1:
        raise ValueError(f"rank={rank!r} must be a whole number of at least 1")
    number = isinstance(alpha, int | float | np.number) and not isinstance(alpha, bool)
    if not number or not math.isfinite(alpha) or alpha <= 0:
        raise ValueError(f"alpha={alpha!r} must be a number above 0")


def make_pair(
    base: Any, first: int, layers: int, zero: str, rank: int, scale: float, key: jax.Array, dora: bool = False
) -> Lora:
    """A weight with a new pair, whose product is zero.

    Args:
        base: The weight: an array or a leaf.
        first: Number of dimensions of one layer's weight that belong to `a`.
        layers: Number of stacked layers, or 0.
        zero: Which matrix of the pair is zero, "a" or "b". The other is uniform in +-1/sqrt(its inputs), as PyTorch
            initialises linear layers; beside a zero `a`, of a table, it is normal.
        rank: r.
        scale: s.
        key: PRNG key.
        dora: Whether it has magnitudes.
    """
    shape = tuple(base.shape)[1:] if layers else tuple(base.shape)
    inputs, outputs = shape[:first], shape[first:]
    dtype = at_least_float32(base.dtype)

    def draw(k: jax.Array) -> jax.Array:
        if zero == "a":
            return jax.random.normal(k, (rank, *outputs), dtype)
        bound = 1 / math.sqrt(math.prod(inputs))
        return jax.random.uniform(k, (*inputs, rank), dtype, -bound, bound)

    drawn = jax.vmap(draw)(jax.random.split(key, layers)) if layers else draw(key)
    axes = (layers,) if layers else ()
    a, b = (drawn, jnp.zeros((*axes, rank, *outputs), dtype))
    if zero == "a":
        a, b = jnp.zeros((*axes, *inputs, rank), dtype), drawn
    pair = Lora(base, a, b, jnp.full(axes, scale, jnp.float32))
    if not dora:
        return pair
    return dataclasses.replace(pair, magnitude=_lengths(pair, first))


def _lengths(pair: Lora, first: int) -> jax.Array:
    one = lambda w: column_lengths(w._sum(), first)  # noqa: E731
    return jax.vmap(one)(pair) if pair.stacked else one(pair)


def has_pairs(params: Tree) -> bool:
    """Whether a tree of parameters has adapters."""
    return any(isinstance(w, Lora) for w in weights(params))


def merge(params: Tree) -> Tree:
    """The parameters with every pair added to its weight, in at least float32, in the dtype of the weight.

    Raises:
        ValueError: A weight is quantised, so that the sum would be rounded to few bits; or an adapter has a bias of its
            own.
    """

    def one(w: Any) -> Any:
        if not isinstance(w, Lora):
            return w
        if isinstance(w.base, Leaf):
            raise ValueError(f"the weights below the adapters are {w.base.kind}: {w.base.advice}, and then merge")
        return w.dense()

    return map_weights(one, params)


def split(params: Tree, whole: Collection[str] = ()) -> tuple[Tree, Tree]:
    """The trained arrays of a tree of parameters, and the tree without them.

    Args:
        params: Parameters with adapters, stacked or unstacked.
        whole: Paths of parameters that are trained as a whole, such as "norm/scale" or "tokens".

    Returns:
        Nested dicts with the trained arrays alone, in which a pair is a dict of the names in `TRAINED`; and the frozen
        rest, for `join`.
    """
    trained, frozen = _split(params, "", frozenset(whole))
    return ({} if trained is None else trained), frozen


def _split(w: Any, path: str, whole: frozenset[str]) -> tuple[Any, Any]:
    if isinstance(w, Lora):
        arrays = {name: getattr(w, name) for name in TRAINED if getattr(w, name) is not None}
        return arrays, dataclasses.replace(w, **dict.fromkeys(arrays))
    if path in whole:
        return w, None
    if isinstance(w, Mapping):
        parts = {k: _split(v, f"{path}/{k}".lstrip("/"), whole) for k, v in w.items()}
        found = {k: t for k, (t, _) in parts.items() if t is not None}
        return found or None, {k: f for k, (_, f) in parts.items()}
    if isinstance(w, tuple):
        layers = [_split(v, path, whole) for v in w]
        trained = tuple(t for t, _ in layers)
        return (None if all(t is None for t in trained) else trained), tuple(f for _, f in layers)
    return None, w


def join(trained: Tree, frozen: Tree) -> Tree:
    """The parameters whose parts `split` returned."""
    if isinstance(frozen, Lora):
        return dataclasses.replace(frozen, **(trained or {}))
    if isinstance(frozen, Mapping):
        return {k: join(None if trained is None else trained.get(k), v) for k, v in frozen.items()}
    if isinstance(frozen, tuple):
        return tuple(join(t, f) for t, f in zip(trained or (None,) * len(frozen), frozen, strict=True))
    return trained if frozen is None else frozen
