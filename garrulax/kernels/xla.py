"""Attention that XLA compiles, on any platform: chunks of queries against chunks of keys, memory O(T).

The outer loop (a scan) runs over chunks of queries. For each, inner loops run over the chunks of keys that it attends
to: first those where every pair attends, which need no mask, then those where some do. Chunks where no pair attends are
not visited. Several tricks below are for XLA:CPU; each says what it avoids.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from garrulax.core.dtypes import at_least_float32, int32_indices
from garrulax.kernels import blocks, chunk
from garrulax.kernels.call import Gradients, LogSumExp, Operands, Options
from garrulax.kernels.mask import KRange
from garrulax.kernels.passes import ForwardBackward


@dataclasses.dataclass(frozen=True)
class Chunked(ForwardBackward):
    """Attention in chunks, for any platform and request. A small request is computed without a loop.

    Attributes:
        scores: Greatest number of scores in a chunk, over its batch rows and heads. By default they fit into the
            caches of a CPU.
    """

    scores: int = 2**19
    auto_partitionable = True

    def unsupported_reason(self, options: Options, operands: Operands) -> str | None:
        return None

    def forward(self, options: Options, operands: Operands) -> tuple[jax.Array, LogSumExp]:
        o = _with_indices(operands)
        if self._is_small(o):
            out, lse = chunk.normalise(chunk.partial_softmax(options, _heads_first(o), chunk.mask_of(options, o)))
            return out.swapaxes(1, 2).astype(o.query.dtype), lse
        grid = _ChunkGrid.of(o, self.scores // o.query.shape[2])
        options, o = grid.arrange_streams(options, o)
        order = _column_order(options, o, grid)

        def row(results, i):
            queries = grid.queries(o, i)

            def step(masked, column, state):
                part = grid.keys(queries, i, column)
                mask = _materialise(chunk.mask_of(options, part), i) if masked else None
                return chunk.merge(state, chunk.partial_softmax(options, part, mask))

            out, lse = chunk.normalise(_loop_over_columns(order, i, step, chunk.empty_softmax(queries)))
            out = out.swapaxes(1, 2).astype(o.query.dtype)  # [b, t, H, Cv]
            b, first = grid.start(i)
            # Where the last chunk of queries overlaps the one before, this writes the same values again.
            lse = jax.tree.map(lambda x, part: _write(x, part, b, 0, first), results[1], lse)
            return (_write(results[0], _to_bits(out), b, first, 0, 0), lse), None

        (B, T, H, _), C = o.query.shape, o.value.shape[-1]
        dtype = at_least_float32(o.query.dtype)
        # Every entry of the output is written, so any value may be the first. Zeros would be the same in all layers of
        # a model: XLA:CPU then copies them for all layers before the first, and all copies exist at once.
        unwritten = jnp.broadcast_to(o.query[..., :1], (B, T, H, C))
        results = _to_bits(unwritten), LogSumExp.rounded(jnp.zeros((B, H, T), dtype))
        (out, lse), _ = jax.lax.scan(row, results, jnp.arange(grid.total, dtype=jnp.int32))
        return _from_bits(out, o.query.dtype), lse

    def backward(
        self, options: Options, operands: Operands, lse: LogSumExp, delta: jax.Array, cotangent: jax.Array
    ) -> Gradients:
        o = _with_indices(operands)
        if self._is_small(o):
            first = _heads_first(o)
            inputs = chunk.gradient_inputs(first.query, o.key.shape[2], lse, delta, cotangent.swapaxes(1, 2))
            part = chunk.gradients(options, first, inputs, chunk.mask_of(options, o))
            return _like_operands(part._replace(query=part.query.swapaxes(1, 2)), operands)
        grid = _ChunkGrid.of(o, self.scores // o.query.shape[2])
        options, o = grid.arrange_streams(options, o)
        order = _column_order(options, o, grid)

        def row(sums, i):
            queries = grid.queries(o, i)
            inputs = grid.gradient_inputs(queries, lse, delta, cotangent, i)

            def step(masked, column, carry):  # the gradient of these queries [b, H, t, C], and the sums
                part = grid.keys(queries, i, column)
                mask = _materialise(chunk.mask_of(options, part), i) if masked else None
                more = chunk.gradients(options, part, inputs, mask)
                return carry[0] + more.query, grid.add(carry[1], more, i, column)

            carry = jnp.zeros(queries.query.shape, delta.dtype), sums
            query, sums = _loop_over_columns(order, i, step, carry)
            return sums._replace(query=_add(sums.query, query.swapaxes(1, 2), *grid.start(i), 0, 0)), None

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, delta.dtype), _learned(o))
        key, value = (x.transpose(0, 2, 3, 1) for x in (zeros.key, zeros.value))  # [B, K, C, S], as `chunk.gradients`
        rows = jnp.arange(grid.total, dtype=jnp.int32)
        sums, _ = jax.lax.scan(row, zeros._replace(key=key, value=value), rows)
        return _like_operands(sums, operands)

    def _is_small(self, o: Operands) -> bool:
        """Whether all scores fit into one chunk, or are few beside the keys, as in decoding."""
        scores = o.query.shape[0] * o.query.shape[2] * o.query.shape[1] * o.key.shape[1]
        return scores <= max(self.scores, o.key.size // 4)


class _ChunkGrid(NamedTuple):
    """A request cut into chunks: groups of b batch rows, and in each `rows` x `columns` chunks of t queries and s keys.

    Rows are counted through all groups: row i is row i % rows of group i // rows, and there are `total` rows.

    All chunks have one static size. Where a length is no multiple of it, the last chunk is moved back to end with the
    last token and overlaps the chunk before. Tokens in both are handled once: a repeated key is masked in the last
    chunk (`arrange_streams`), a repeated query gives the same output twice and no gradient the second time
    (`gradient_inputs`).
    """

    b: int
    t: int
    s: int
    rows: int
    columns: int
    total: int

    @classmethod
    def of(cls, o: Operands, pairs: int) -> "_ChunkGrid":
        """Chunks of at most `pairs` pairs: several batch rows each if the rows are short, else nearly square."""
        (B, T), S = o.query.shape[:2], o.key.shape[1]
        b = max((n for n in range(1, B + 1) if B % n == 0 and n * T * S <= pairs), default=1)
        t = _chunk_size(T, max(math.isqrt(pairs), pairs // S))
        s = _chunk_size(S, pairs // t)
        rows = -(-T // t)
        return cls(b, t, s, rows, -(-S // s), B // b * rows)

    def arrange_streams(self, options: Options, o: Operands) -> tuple[Options, Operands]:
        """The request with its streams copied chunk after chunk, [B, rows·t] and [B, columns·s].

        Tokens in the overlap of two chunks are copied twice; a further stream masks the second copy of a key.
        """
        queries, _ = _tokens_of_chunks(o.query.shape[1], self.t)
        keys, repeated = _tokens_of_chunks(o.key.shape[1], self.s)
        query_streams = {name: x[:, queries] for name, x in o.query_streams.items()}
        key_streams = {name: x[:, keys] for name, x in o.key_streams.items()}
        if repeated.any():
            valid = jnp.asarray(~repeated, jnp.int32)
            key_streams[blocks.VALID_KEY] = jnp.broadcast_to(valid, (len(o.key), len(repeated)))
            options = dataclasses.replace(options, rule=options.rule & KRange(blocks.VALID_KEY, 1, 1))
        return options, dataclasses.replace(o, query_streams=query_streams, key_streams=key_streams)

    def start(self, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        """First batch row and first query of row i."""
        return i // self.rows * self.b, i % self.rows * self.t

    def queries(self, o: Operands, i: jax.Array) -> Operands:
        """The operands with the queries of row i only, query [b, H, t, C]."""
        at, n = self.start(i), self.t
        small = (
            {name: self._slice(x, at, n) for name, x in o.query_streams.items()},
            None if o.seeds is None else self._slice(o.seeds, (at[0], 0), o.seeds.shape[1]),
        )
        streams, seeds = _materialise(small, i)
        query = self._slice(o.query, at, n).swapaxes(1, 2)
        return dataclasses.replace(o, query=query, query_streams=streams, seeds=seeds)

    def keys(self, o: Operands, i: jax.Array, column: jax.Array | int) -> Operands:
        """The result of `queries` with the keys of a column only, key [b, K, s, C], and the bias of both."""
        at, n = (self.start(i)[0], column * self.s), self.s
        small = (
            {name: self._slice(x, at, n) for name, x in o.key_streams.items()},
            None
            if o.bias is None
            else self._slice(self._slice(o.bias, self.start(i), self.t, axis=2), (0, at[1]), n, axis=3),
        )
        streams, bias = _materialise(small, i)
        key, value = (self._slice(x, at, n).swapaxes(1, 2) for x in (o.key, o.value))
        return dataclasses.replace(o, key=key, value=value, key_streams=streams, bias=bias)

    def gradient_inputs(
        self, queries: Operands, lse: LogSumExp, delta: jax.Array, cotangent: jax.Array, i: jax.Array
    ) -> chunk.GradientInputs:
        """`chunk.GradientInputs` of the queries of row i."""
        at, n = self.start(i), self.t
        _, repeated = _tokens_of_chunks(delta.shape[2], n)
        top, rest, delta = (self._slice(x, at, n, axis=2) for x in (lse.top, lse.rest, delta))
        if repeated.any():  # with this lse the probabilities of a repeated query are 0, so it adds no gradient
            top = jnp.where(self._slice(jnp.asarray(repeated)[None], (0, at[1]), n), jnp.inf, top)
        lse = LogSumExp(top, rest)
        lse, delta = _materialise((lse, delta), i)
        cotangent = self._slice(cotangent, at, n).swapaxes(1, 2)  # [b, H, t, Cv]
        return chunk.gradient_inputs(queries.query, queries.key.shape[2], lse, delta, cotangent)

    def add(self, sums: Gradients, part: Gradients, i: jax.Array, column: jax.Array | int) -> Gradients:
        """The sums plus a chunk's gradients, except those of the queries, which the loop over columns carries."""
        (b, query), key = self.start(i), column * self.s
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

    def _slice(self, x: jax.Array, at: tuple[Any, Any], size: int, axis: int = 1) -> jax.Array:
        """b batch rows from at[0] on, and `size` entries of an axis from at[1] on.

        `dynamic_slice` clamps a start so that the slice ends within x. This moves the last chunk back, as described
        above, and selects the whole of an axis of size 1, as a bias may have.
        """
        start, sizes = [at[0]] + [0] * (x.ndim - 1), [min(self.b, len(x)), *x.shape[1:]]
        start[axis], sizes[axis] = at[1], min(size, x.shape[axis])
        return _from_bits(jax.lax.dynamic_slice(_to_bits(x), int32_indices(*start), sizes), x.dtype)


class _ColumnOrder(NamedTuple):
    """The columns that each row visits.

    Attributes:
        order: int32 [total, columns]: first the columns where every pair attends, then those where only some do.
        full: int32 [total]: number of columns where every pair attends.
        active: int32 [total]: number of columns where any pair attends.
    """

    order: jax.Array
    full: jax.Array
    active: jax.Array


def _column_order(options: Options, o: Operands, grid: _ChunkGrid) -> _ColumnOrder:
    shape = (o.query.shape[0], grid.rows, grid.columns)
    some, every = blocks.block_map(options.rule, o.query_streams, o.key_streams, grid.t, grid.s, shape)
    some, every = (x.reshape(-1, grid.b, *shape[1:]) for x in (some, some & every))  # [groups, b, rows, columns]
    some, every = (x.reshape(-1, grid.columns) for x in (some.any(axis=1), every.all(axis=1)))  # [total, columns]
    order = jnp.argsort(2 - some.astype(jnp.int32) - every.astype(jnp.int32), axis=1, stable=True).astype(jnp.int32)
    return _ColumnOrder(order, every.sum(axis=1, dtype=jnp.int32), some.sum(axis=1, dtype=jnp.int32))


def _loop_over_columns(
    order: _ColumnOrder, i: jax.Array, step: Callable[[bool, jax.Array | int, Any], Any], state: Any
) -> Any:
    """state = step(masked, column, state) for each column that row i visits, in two loops, since `masked` is static."""
    if order.order.shape[1] == 1:
        # XLA hoists a loop body that does not depend on the loop index, and then runs it even for a trip count of 0.
        # The only column is therefore visited without a loop, with its mask.
        return step(True, 0, state)

    def body(masked):
        return lambda j, state: step(masked, order.order[i, j], state)

    state = jax.lax.fori_loop(0, order.full[i], body(False), state)
    return jax.lax.fori_loop(order.full[i], order.active[i], body(True), state)


def _chunk_size(length: int, most: int) -> int:
    """Size of the chunks if a length is cut into as few equal ones as possible, of at most `most` tokens each.

    Rounded up to a multiple of 16 if there are several chunks.
    """
    most = max(16, most // 16 * 16)
    return length if length <= most else -(-length // (-(-length // most) * 16)) * 16


def _tokens_of_chunks(length: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of all chunks, one chunk after the other, and whether each is also in the chunk before."""
    start = np.arange(0, length, size)[:, None]
    index = np.minimum(start, length - size) + np.arange(size)  # [chunks, size]
    return index.ravel(), (index < start).ravel()


def _write(x: jax.Array, part: jax.Array, *start: jax.Array | int) -> jax.Array:
    """x with a slice replaced by `part`."""
    return jax.lax.dynamic_update_slice(x, part, int32_indices(*start))


def _add(x: jax.Array, part: jax.Array, *start: jax.Array | int) -> jax.Array:
    """x with `part` added to a slice."""
    return _write(x, jax.lax.dynamic_slice(x, int32_indices(*start), part.shape) + part, *start)


def _materialise(x: Any, i: jax.Array) -> Any:
    """x, written to memory; i is any index, which is never negative.

    Otherwise XLA:CPU fuses the small slices of x into the loop over scores. LLVM does not vectorise that loop then, and
    exp costs seven times as much. The `cond`, of which the first branch is always taken, is a border that XLA does not
    fuse across; `optimization_barrier` is none, since XLA:CPU (jax 0.10) drops it before fusion.
    """
    return jax.lax.cond(i >= 0, lambda: x, lambda: jax.tree.map(jnp.zeros_like, x))


def _to_bits(x: jax.Array) -> jax.Array:
    """16-bit floats as uint16, other arrays unchanged.

    XLA:CPU has no bfloat16 arithmetic and converts to float32. To slice bfloat16 it would convert the whole array every
    time; integers it slices as they are.
    """
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def _from_bits(bits: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The inverse of `_to_bits`."""
    return jax.lax.bitcast_convert_type(bits, dtype) if bits.dtype != dtype else bits


def _with_indices(o: Operands) -> Operands:
    """The operands with the indices of the tokens as streams, if dropout needs them."""
    if o.seeds is None:
        return o
    query, key = (
        {**streams, chunk.INDEX: jax.lax.broadcasted_iota(jnp.int32, x.shape[:2], 1)}
        for streams, x in ((o.query_streams, o.query), (o.key_streams, o.key))
    )
    return dataclasses.replace(o, query_streams=query, key_streams=key)


def _heads_first(o: Operands) -> Operands:
    """Query [B, H, T, C], key [B, K, S, C] and value [B, K, S, Cv], the order of axes of `kernels.chunk`."""
    query, key, value = (x.swapaxes(1, 2) for x in (o.query, o.key, o.value))
    return dataclasses.replace(o, query=query, key=key, value=value)


def _learned(o: Operands) -> Gradients:
    """The operands that get a gradient."""
    return Gradients(o.query, o.key, o.value, o.bias, o.steps)


def _like_operands(sums: Gradients, o: Operands) -> Gradients:
    """Gradients in the operands' axes and dtypes, from sums in which key and value are [B, K, C, S]."""
    # The barrier keeps XLA from moving the transposition into the products of the loop.
    key, value = jax.lax.optimization_barrier((sums.key, sums.value))
    sums = sums._replace(key=key.transpose(0, 3, 1, 2), value=value.transpose(0, 3, 1, 2))
    return jax.tree.map(lambda x, y: x.astype(y.dtype), sums, _learned(o))
