"""Attention that XLA compiles, on any platform: chunks of queries against chunks of keys, memory O(T)."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from garrulax.kernels import blocks, chunk
from garrulax.kernels.call import Gradients, Operands, Options
from garrulax.kernels.mask import Rule
from garrulax.kernels.passes import TwoPasses


@dataclasses.dataclass(frozen=True)
class Chunked(TwoPasses):
    """For any platform and request.

    A request of at most block_q x block_k pairs a head is computed at once, without a loop. In a longer one, chunks
    in which nobody attends are skipped, and where everybody does, no mask is evaluated.

    block_q, block_k: the most queries and keys of a chunk.
    """

    block_q: int = 512
    block_k: int = 512

    def refusal(self, options: Options, operands: Operands) -> str | None:
        """It computes everything."""
        return None

    def forward(self, options: Options, operands: Operands) -> tuple[jax.Array, jax.Array]:
        """As `TwoPasses.forward`."""
        o = _indexed(operands)
        B, T, H, _ = o.query.shape
        grid = self._grid(o)
        if grid is None:
            out, lse = chunk.finish(chunk.attend(options, _heads_first(o), masked=True))
            return out.swapaxes(1, 2).astype(o.query.dtype), lse
        options, o = blocks.fill_up(options, o, grid.t, grid.s)
        schedule = _schedule(options.rule, o, grid)

        def row(_, i):
            queries = grid.queries(o, i)

            def step(masked, column, state):
                return chunk.join(state, chunk.attend(options, grid.keys(queries, i, column), masked))

            out, lse = chunk.finish(_fold(schedule, i, step, chunk.nothing(queries)))
            return None, (out.swapaxes(1, 2).astype(o.query.dtype), lse)

        _, (out, lse) = jax.lax.scan(row, None, jnp.arange(B * grid.rows))
        lse = lse.reshape(B, grid.rows, H, grid.t).swapaxes(1, 2).reshape(B, H, -1)
        return out.reshape(B, -1, H, out.shape[-1])[:, :T], lse[..., :T]

    def backward(
        self, options: Options, operands: Operands, lse: jax.Array, delta: jax.Array, cotangent: jax.Array
    ) -> Gradients:
        """As `TwoPasses.backward`."""
        o = _indexed(operands)
        B, T, _, _ = o.query.shape
        grid = self._grid(o)
        if grid is None:
            pull = chunk.Pull(lse, delta, cotangent.swapaxes(1, 2))
            sums = chunk.pull_back(options, _heads_first(o), pull, masked=True)
            query, key, value = (x.swapaxes(1, 2) for x in sums[:3])
            return _gradients(sums._replace(query=query, key=key, value=value), operands)
        options, o = blocks.fill_up(options, o, grid.t, grid.s)
        schedule = _schedule(options.rule, o, grid)
        more = -T % grid.t
        given = blocks.fill(lse, more, 2), blocks.fill(delta, more, 2), blocks.fill(cotangent, more)

        def row(sums, i):
            queries, pull = grid.queries(o, i), grid.pull(*given, i)

            def step(masked, column, carry):
                query, sums = carry
                part = chunk.pull_back(options, grid.keys(queries, i, column), pull, masked)
                return query + part.query, grid.add(sums, part, i, column)

            query = jnp.zeros(queries.query.shape, lse.dtype)
            query, sums = _fold(schedule, i, step, (query, sums))
            return sums, query.swapaxes(1, 2).astype(o.query.dtype)

        zeros = (None if x is None else jnp.zeros(x.shape, lse.dtype) for x in (o.key, o.value, o.bias, o.steps))
        sums, query = jax.lax.scan(row, Gradients(jnp.zeros(()), *zeros), jnp.arange(B * grid.rows))
        return _gradients(sums._replace(query=query.reshape(o.query.shape)), operands)

    def _grid(self, o: Operands) -> "_Grid | None":
        """The chunks of a request; None where it is one."""
        T, S = o.query.shape[1], o.key.shape[1]
        if self.block_q * self.block_k >= T * S:
            return None
        t, s = _even(T, self.block_q), _even(S, self.block_k)
        return _Grid(t, s, -(-T // t), -(-S // s))


class _Grid(NamedTuple):
    """The pairs of every batch row as `rows` x `columns` chunks of t queries and s keys. Rows are counted through:
    row i is row i % rows of batch row i // rows."""

    t: int
    s: int
    rows: int
    columns: int

    def queries(self, o: Operands, i: jax.Array) -> Operands:
        """The operands with the queries of row i, heads first."""
        at, n = self._row(i), self.t
        return dataclasses.replace(
            o,
            query=_cut(o.query, at, n).swapaxes(1, 2),
            query_streams={name: _cut(x, at, n) for name, x in o.query_streams.items()},
            bias=None if o.bias is None else _cut(o.bias, at, n, axis=2),
            seeds=None if o.seeds is None else _cut(o.seeds, (at[0], 0), o.seeds.shape[1]),
        )

    def keys(self, o: Operands, i: jax.Array, column: jax.Array) -> Operands:
        """The operands of `queries` with the keys of a column, heads first."""
        at, n = self._column(i, column), self.s
        return dataclasses.replace(
            o,
            key=_cut(o.key, at, n).swapaxes(1, 2),
            value=_cut(o.value, at, n).swapaxes(1, 2),
            key_streams={name: _cut(x, at, n) for name, x in o.key_streams.items()},
            bias=None if o.bias is None else _cut(o.bias, at, n, axis=3),
        )

    def pull(self, lse: jax.Array, delta: jax.Array, cotangent: jax.Array, i: jax.Array) -> chunk.Pull:
        """What the backward pass knows of the queries of row i."""
        at, n = self._row(i), self.t
        return chunk.Pull(_cut(lse, at, n, 2), _cut(delta, at, n, 2), _cut(cotangent, at, n).swapaxes(1, 2))

    def add(self, sums: Gradients, part: Gradients, i: jax.Array, column: jax.Array) -> Gradients:
        """The sums, in the operands' shapes, with the gradients of a chunk of row i added in their place."""
        keys, (b, first) = self._column(i, column), self._row(i)

        def added(x, more, *start):
            return jax.lax.dynamic_update_slice(x, jax.lax.dynamic_slice(x, start, more.shape) + more, start)

        return sums._replace(
            key=added(sums.key, part.key.swapaxes(1, 2), *keys, 0, 0),
            value=added(sums.value, part.value.swapaxes(1, 2), *keys, 0, 0),
            bias=None if sums.bias is None else added(sums.bias, part.bias, b, 0, first, keys[1]),
            steps=jax.tree.map(jnp.add, sums.steps, part.steps),
        )

    def _row(self, i):
        return i // self.rows, i % self.rows * self.t

    def _column(self, i, column):
        return i // self.rows, column * self.s


class _Schedule(NamedTuple):
    """Which columns each row visits.

    order: int32 [B·rows, columns]: first those where everybody attends, then those where some do.
    full, some: int32 [B·rows]: how many of the first, and of both.
    """

    order: jax.Array
    full: jax.Array
    some: jax.Array


def _schedule(rule: Rule, o: Operands, grid: _Grid) -> _Schedule:
    shape = (o.query.shape[0], grid.rows, grid.columns)
    some, every = blocks.block_map(rule, o.query_streams, o.key_streams, grid.t, grid.s, shape)
    some, every = (x.reshape(-1, grid.columns) for x in (some, some & every))
    order = jnp.argsort(2 - some.astype(jnp.int32) - every, axis=1, stable=True).astype(jnp.int32)
    return _Schedule(order, every.sum(axis=1, dtype=jnp.int32), some.sum(axis=1, dtype=jnp.int32))


def _fold(schedule: _Schedule, i: jax.Array, step: Callable[[bool, jax.Array, Any], Any], state: Any) -> Any:
    """step(masked, column, state) for each column that row i visits; whether one needs the mask is static."""

    def run(masked):
        return lambda j, state: step(masked, schedule.order[i, j], state)

    state = jax.lax.fori_loop(0, schedule.full[i], run(False), state)
    return jax.lax.fori_loop(schedule.full[i], schedule.some[i], run(True), state)


def _even(length: int, most: int) -> int:
    """The size of as few equal chunks as cover the length with at most `most` tokens each; a multiple of 16 where
    they are several."""
    count = -(-length // most)
    return length if count == 1 else -(-length // (16 * count)) * 16


def _cut(x: jax.Array, at: tuple[Any, Any], size: int, axis: int = 1) -> jax.Array:
    """`size` entries of an axis from at[1] on, of batch row at[0]. Starts are clamped, so that the axes of size 1,
    over which a bias is the same, stay whole."""
    start, sizes = [at[0]] + [0] * (x.ndim - 1), [1, *x.shape[1:]]
    start[axis], sizes[axis] = at[1], min(size, x.shape[axis])
    return jax.lax.dynamic_slice(x, start, sizes)


def _indexed(o: Operands) -> Operands:
    """The operands with the tokens' indices as streams where dropout needs them."""
    if o.seeds is None:
        return o
    query, key = (
        {**streams, chunk.INDEX: jax.lax.broadcasted_iota(jnp.int32, x.shape[:2], 1)}
        for streams, x in ((o.query_streams, o.query), (o.key_streams, o.key))
    )
    return dataclasses.replace(o, query_streams=query, key_streams=key)


def _heads_first(o: Operands) -> Operands:
    query, key, value = (x.swapaxes(1, 2) for x in (o.query, o.key, o.value))
    return dataclasses.replace(o, query=query, key=key, value=value)


def _gradients(sums: Gradients, o: Operands) -> Gradients:
    """The sums in the shapes, without what filled them up, and the dtypes of the operands."""

    def cast(x, y):
        return None if y is None else x[tuple(slice(n) for n in y.shape)].astype(y.dtype)

    return jax.tree.map(cast, sums, Gradients(o.query, o.key, o.value, o.bias, o.steps))
