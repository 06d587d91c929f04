"""Attention that XLA compiles, on any platform: chunks of queries against chunks of keys, memory O(T)."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from garrulax.kernels import blocks, chunk
from garrulax.kernels.call import NOTHING, Gradients, Operands, Options
from garrulax.kernels.mask import KRange
from garrulax.kernels.passes import TwoPasses


@dataclasses.dataclass(frozen=True)
class Chunked(TwoPasses):
    """For any platform and request.

    A small request is computed at once, without a loop. In a longer one, chunks in which nobody attends are skipped,
    and where everybody does, no mask is evaluated.

    scores: of a chunk, over its batch rows and heads, at most: so many that they stay in a CPU's caches.
    """

    scores: int = 2**19
    partitioned = True

    def unsupported_reason(self, options: Options, operands: Operands) -> str | None:
        """It computes everything."""
        return None

    def forward(self, options: Options, operands: Operands) -> tuple[jax.Array, jax.Array]:
        """As `TwoPasses.forward`."""
        o = _indexed(operands)
        if self._at_once(o):
            out, lse = chunk.finish(chunk.attend(options, _heads_first(o), chunk.seen(options, o)))
            return out.swapaxes(1, 2).astype(o.query.dtype), lse
        grid = _Grid.of(o, self.scores // o.query.shape[2])
        options, o = grid.fit(options, o)
        schedule = _schedule(options, o, grid)

        def row(done, i):
            queries = grid.queries(o, i)

            def step(masked, column, state):
                part = grid.keys(queries, i, column)
                seen = _held(chunk.seen(options, part), i) if masked else None
                return chunk.join(state, chunk.attend(options, part, seen))

            out, lse = chunk.finish(_fold(schedule, i, step, chunk.nothing(queries)))
            out = out.swapaxes(1, 2).astype(o.query.dtype)
            b, first = grid.row(i)
            return (_put(done[0], _bits(out), b, first, 0, 0), _put(done[1], lse, b, 0, first)), None

        (B, T, H, _), C = o.query.shape, o.value.shape[-1]
        dtype = jnp.promote_types(o.query.dtype, jnp.float32)
        empty = _bits(jnp.zeros((B, T, H, C), o.query.dtype)), jnp.zeros((B, H, T), dtype)
        (out, lse), _ = jax.lax.scan(row, empty, jnp.arange(grid.total, dtype=jnp.int32))
        return _floats(out, o.query.dtype), lse

    def backward(
        self, options: Options, operands: Operands, lse: jax.Array, delta: jax.Array, cotangent: jax.Array
    ) -> Gradients:
        """As `TwoPasses.backward`."""
        o = _indexed(operands)
        if self._at_once(o):
            first = _heads_first(o)
            pull = chunk.pull(first.query, o.key.shape[2], lse, delta, cotangent.swapaxes(1, 2))
            part = chunk.pull_back(options, first, pull, chunk.seen(options, o))
            return _finished(part._replace(query=part.query.swapaxes(1, 2)), operands)
        grid = _Grid.of(o, self.scores // o.query.shape[2])
        options, o = grid.fit(options, o)
        schedule = _schedule(options, o, grid)

        def row(sums, i):
            queries = grid.queries(o, i)
            pull = grid.pull(queries, lse, delta, cotangent, i)

            def step(masked, column, carry):
                part = grid.keys(queries, i, column)
                seen = _held(chunk.seen(options, part), i) if masked else None
                more = chunk.pull_back(options, part, pull, seen)
                return carry[0] + more.query, grid.add(carry[1], more, i, column)

            query, sums = _fold(schedule, i, step, (jnp.zeros(queries.query.shape, lse.dtype), sums))
            return sums._replace(query=_add(sums.query, query.swapaxes(1, 2), *grid.row(i), 0, 0)), None

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, lse.dtype), _differentiated(o))
        key, value = (x.transpose(0, 2, 3, 1) for x in (zeros.key, zeros.value))
        return _finished(
            jax.lax.scan(row, zeros._replace(key=key, value=value), jnp.arange(grid.total, dtype=jnp.int32))[0],
            operands,
        )

    def _at_once(self, o: Operands) -> bool:
        """Whether the scores are few, or take less memory than the keys, as those of a few queries do."""
        scores = o.query.shape[0] * o.query.shape[2] * o.query.shape[1] * o.key.shape[1]
        return scores <= max(self.scores, o.key.size // 4)


class _Grid(NamedTuple):
    """The pairs of a request as groups of b batch rows, and in each `rows` x `columns` chunks of t queries and s keys.
    Rows are counted through the groups, `total` in all: row i is row i % rows of group i // rows. Where a length is no
    multiple of the chunk, the last chunk ends with the last token, and begins in the one before."""

    b: int
    t: int
    s: int
    rows: int
    columns: int
    total: int

    @classmethod
    def of(cls, o: Operands, pairs: int) -> "_Grid":
        """Chunks of at most that many pairs: several batch rows where they are short, else about square ones."""
        (B, T), S = o.query.shape[:2], o.key.shape[1]
        b = max((n for n in range(1, B + 1) if B % n == 0 and n * T * S <= pairs), default=1)
        t = _even(T, max(math.isqrt(pairs), pairs // S))
        s = _even(S, pairs // t)
        rows = -(-T // t)
        return cls(b, t, s, rows, -(-S // s), B // b * rows)

    def fit(self, options: Options, o: Operands) -> tuple[Options, Operands]:
        """The request with streams in the chunks' places; a key that two chunks have is seen in the first only."""
        (queries, _), (keys, again) = _places(o.query.shape[1], self.t), _places(o.key.shape[1], self.s)
        query_streams = {name: x[:, queries] for name, x in o.query_streams.items()}
        key_streams = {name: x[:, keys] for name, x in o.key_streams.items()}
        if again.any():
            key_streams[blocks.LIVE] = jnp.broadcast_to(jnp.asarray(~again, jnp.int32), (len(o.key), len(again)))
            options = dataclasses.replace(options, rule=options.rule & KRange(blocks.LIVE, 1, 1))
        return options, dataclasses.replace(o, query_streams=query_streams, key_streams=key_streams)

    def row(self, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        """First batch row and first query of row i."""
        return i // self.rows * self.b, i % self.rows * self.t

    def queries(self, o: Operands, i: jax.Array) -> Operands:
        """The operands with the queries of row i, heads first."""
        at, n = self.row(i), self.t
        small = (
            {name: self._cut(x, at, n) for name, x in o.query_streams.items()},
            None if o.seeds is None else self._cut(o.seeds, (at[0], 0), o.seeds.shape[1]),
        )
        streams, seeds = _held(small, i)
        query = self._cut(o.query, at, n).swapaxes(1, 2)
        return dataclasses.replace(o, query=query, query_streams=streams, seeds=seeds)

    def keys(self, o: Operands, i: jax.Array, column: jax.Array | int) -> Operands:
        """The operands of `queries` with the keys of a column, heads first."""
        at, n = (self.row(i)[0], column * self.s), self.s
        small = (
            {name: self._cut(x, at, n) for name, x in o.key_streams.items()},
            None
            if o.bias is None
            else self._cut(self._cut(o.bias, self.row(i), self.t, axis=2), (0, at[1]), n, axis=3),
        )
        streams, bias = _held(small, i)
        key, value = (self._cut(x, at, n).swapaxes(1, 2) for x in (o.key, o.value))
        return dataclasses.replace(o, key=key, value=value, key_streams=streams, bias=bias)

    def pull(
        self, queries: Operands, lse: jax.Array, delta: jax.Array, cotangent: jax.Array, i: jax.Array
    ) -> chunk.Pull:
        """What the backward pass knows of the queries of row i. A query that two rows have pulls in the first only."""
        at, n = self.row(i), self.t
        _, again = _places(lse.shape[2], n)
        lse, delta = self._cut(lse, at, n, axis=2), self._cut(delta, at, n, axis=2)
        if again.any():
            lse = jnp.where(self._cut(jnp.asarray(again)[None], (0, at[1]), n), NOTHING, lse)
        lse, delta = _held((lse, delta), i)
        return chunk.pull(queries.query, queries.key.shape[2], lse, delta, self._cut(cotangent, at, n).swapaxes(1, 2))

    def add(self, sums: Gradients, part: Gradients, i: jax.Array, column: jax.Array | int) -> Gradients:
        """The sums with what a chunk of row i adds to the gradients of all but the queries."""
        (b, query), key = self.row(i), column * self.s
        bias = sums.bias
        if bias is not None and part.bias is not None:
            bias = _add(bias, part.bias, b, 0, query, key)
        return Gradients(
            sums.query,
            _add(sums.key, part.key, b, 0, 0, key),
            _add(sums.value, part.value, b, 0, 0, key),
            bias,
            None if sums.steps is None or part.steps is None else sums.steps + part.steps,
        )

    def _cut(self, x: jax.Array, at: tuple[Any, Any], size: int, axis: int = 1) -> jax.Array:
        """A group's batch rows from at[0] on, and `size` entries of an axis from at[1] on. XLA clamps where a cut
        starts, so that a last chunk ends with the last token and the axes of size 1 of a bias stay whole."""
        start, sizes = [at[0]] + [0] * (x.ndim - 1), [min(self.b, len(x)), *x.shape[1:]]
        start[axis], sizes[axis] = at[1], min(size, x.shape[axis])
        return _floats(jax.lax.dynamic_slice(_bits(x), _index(*start), sizes), x.dtype)


class _Schedule(NamedTuple):
    """Which columns each row visits.

    order: int32 [B·rows, columns]: first those where everybody attends, then those where some do.
    full, some: int32 [B·rows]: how many of the first, and of both.
    """

    order: jax.Array
    full: jax.Array
    some: jax.Array


def _schedule(options: Options, o: Operands, grid: _Grid) -> _Schedule:
    shape = (o.query.shape[0], grid.rows, grid.columns)
    some, every = blocks.block_map(options.rule, o.query_streams, o.key_streams, grid.t, grid.s, shape)
    some, every = (x.reshape(-1, grid.b, *shape[1:]) for x in (some, some & every))
    some, every = (x.reshape(-1, grid.columns) for x in (some.any(axis=1), every.all(axis=1)))
    order = jnp.argsort(2 - some.astype(jnp.int32) - every, axis=1, stable=True).astype(jnp.int32)
    return _Schedule(order, every.sum(axis=1, dtype=jnp.int32), some.sum(axis=1, dtype=jnp.int32))


def _fold(schedule: _Schedule, i: jax.Array, step: Callable[[bool, jax.Array | int, Any], Any], state: Any) -> Any:
    """step(masked, column, state) for each column that row i visits; whether one needs the mask is static."""
    if schedule.order.shape[1] == 1:  # a loop's body that is the same each time, XLA would run even where no time is
        return step(True, 0, state)

    def run(masked):
        return lambda j, state: step(masked, schedule.order[i, j], state)

    state = jax.lax.fori_loop(0, schedule.full[i], run(False), state)
    return jax.lax.fori_loop(schedule.full[i], schedule.some[i], run(True), state)


def _even(length: int, most: int) -> int:
    """The size of the fewest equal chunks of at most that many tokens; a multiple of 16 where they are several."""
    most = max(16, most // 16 * 16)
    return length if length <= most else -(-length // (-(-length // most) * 16)) * 16


def _places(length: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Which token stands in each place of the chunks, and whether the chunk before has it too."""
    start = np.arange(0, length, size)[:, None]
    index = np.minimum(start, length - size) + np.arange(size)
    return index.ravel(), (index < start).ravel()


def _put(x: jax.Array, part: jax.Array, *start: jax.Array | int) -> jax.Array:
    """x with a part of it replaced."""
    return jax.lax.dynamic_update_slice(x, part, _index(*start))


def _add(x: jax.Array, more: jax.Array, *start: jax.Array | int) -> jax.Array:
    """x with `more` added to a part of it."""
    return _put(x, jax.lax.dynamic_slice(x, _index(*start), more.shape) + more, *start)


def _index(*start: jax.Array | int) -> tuple[jax.Array, ...]:
    """Starts of one dtype, also where integers are int64 by default."""
    return tuple(jnp.asarray(i, jnp.int32) for i in start)


def _held(x: Any, i: jax.Array) -> Any:
    """x, in memory: where a loop over scores reads small arrays in the middle of large ones, by an index like i, LLVM
    does not vectorise it, and its exponentials take seven times as long. (A barrier does not outlive XLA:CPU's passes
    before fusion in jax 0.10.)"""
    return jax.lax.cond(i >= 0, lambda: x, lambda: jax.tree.map(jnp.zeros_like, x))


def _bits(x: jax.Array) -> jax.Array:
    """16-bit floats as integers: XLA:CPU would make float32 of a whole array to cut a piece out of it."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def _floats(bits: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, dtype) if bits.dtype != dtype else bits


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


def _differentiated(o: Operands) -> Gradients:
    return Gradients(o.query, o.key, o.value, o.bias, o.steps)


def _finished(sums: Gradients, o: Operands) -> Gradients:
    """Gradients as the operands are, of sums whose key and value are turned, [B, K, C, S]."""
    back = jax.lax.optimization_barrier((sums.key, sums.value))
    sums = sums._replace(key=back[0].transpose(0, 3, 1, 2), value=back[1].transpose(0, 3, 1, 2))
    return jax.tree.map(lambda x, y: x.astype(y.dtype), sums, _differentiated(o))
