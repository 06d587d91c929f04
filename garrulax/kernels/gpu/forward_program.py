"""The parts that the forward kernels for Hopper and Blackwell share: arguments, block lists, results, the launch."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from garrulax.kernels.call import Operands, Options
from garrulax.kernels.gpu import memory, scores
from garrulax.kernels.gpu.block_lists import BlockLists
from garrulax.kernels.gpu.scores import LOG2E, ScoreBlock, ScoreExtras, Tile

# Maximum of a row before its first key. Finite, because -inf - (-inf) is NaN; exp2(-inf - LOWEST) is 0.
LOWEST = -(2.0**100)


class ForwardInputs(NamedTuple):
    """References to the operands in global memory.

    Attributes:
        query: [B, T, H, C].
        key: [B, S, K, C].
        value: [B, S, K, Cv].
        query_streams: int32 [B, T] by name.
        key_streams: int32 [B, streams, S], sorted by name; None where there are none.
        lists: The blocks to visit, one row of blocks for the queries of one program.
        extra: Optional inputs of scores.
    """

    query: Any
    key: Any
    value: Any
    query_streams: dict[str, Any]
    key_streams: Any
    lists: BlockLists
    extra: ScoreExtras


class Row(NamedTuple):
    """One of the rows of blocks that a program computes one after another. All fields are int32 scalars.

    Attributes:
        number: Number of rows that the program computed before this one.
        batch: Index of the sequence.
        head: Index of the query head.
        index: Index of the row of blocks within the sequence.
        full: Number of full blocks.
        count: Number of all blocks, at least one.
        before: Number of blocks in the rows before. Block i is in slot (before + i) % slots of the ring.
    """

    number: Any
    batch: Any
    head: Any
    index: Any
    full: Any
    count: Any
    before: Any


@dataclasses.dataclass(frozen=True)
class ForwardProgram(abc.ABC):
    """One warpgroup (128 threads) of a program, at one of its rows of blocks.

    Subclasses define `run`, which gives every warpgroup its work.

    Attributes:
        options: The static part of the request.
        tile: How a tile of scores lies in registers; its rows are the queries of one warpgroup.
        block_q: Queries of the program.
        block_k: Keys of a block.
        stages: Slots of the ring of keys and values.
        names: Of the key streams, in their order in the stacked array.
        inputs: References to the operands.
        out: Reference to the output, [B, T, H, Cv].
        lse: Reference to the log-sum-exp of each query, float32 [B, H, T], natural logarithm.
        scratch: Shared memory and barriers of the program.
        index: Of the warpgroup, int32 scalar.
        program: Index of the program, int32 scalar.
        programs: Number of programs.
        row: The row of blocks that it computes now.
    """

    options: Options
    tile: Tile
    block_q: int
    block_k: int
    stages: int
    names: tuple[str, ...]
    inputs: ForwardInputs
    out: Any
    lse: Any
    scratch: Any
    index: Any
    program: Any
    programs: int
    row: Row

    @abc.abstractmethod
    def run(self) -> None:
        """Does the work of this warpgroup."""

    def each_row(self, work: Callable[[Any], Row]) -> Row:
        """Computes the program's rows one after another.

        Rows are assigned to programs from the longest to the shortest. In each round every program gets one row: in the
        order of programs in even rounds, in the reverse order in odd ones. All programs then get about as many blocks.

        Args:
            work: Function of the program with `row` set. It computes the row and returns `following()`, which it calls
                before the row ends, so that the loads from global memory are done when the next row begins.

        Returns:
            What the last call of `work` returned: its `before` is the number of blocks of all rows.
        """
        if self.programs == self._rows:
            return work(self)
        rounds, left = divmod(self._rows, self.programs)
        mine = rounds + (self._place(jnp.int32(rounds)) < left).astype(jnp.int32)
        return jax.lax.fori_loop(0, mine, lambda _, row: work(dataclasses.replace(self, row=row)), self.row)

    def following(self) -> Row:
        """The program's next row. After the last one it is any row, but `before` is right."""
        return self._row(self.row.number + 1, self.row.before + self.row.count)

    def first_row(self) -> Row:
        """The first row of the program."""
        return self._row(jnp.int32(0), jnp.int32(0))

    @property
    def _rows(self) -> int:
        """Number of rows of all programs."""
        batch, rows = self.inputs.lists.order.shape
        return rows * batch * self.inputs.query.shape[2]

    def _place(self, number: Any) -> Any:
        """The program's place in a round."""
        backwards = self.programs - 1 - self.program
        return jnp.where(jax.lax.rem(number, jnp.int32(2)) == 0, self.program, backwards)

    def _row(self, number: Any, before: Any) -> Row:
        """The program's row with this number; any row if it has fewer."""
        (batches, _), heads = self.inputs.lists.order.shape, self.inputs.query.shape[2]
        place = jnp.minimum(number * self.programs + self._place(number), self._rows - 1)
        # The head changes fastest: heads that share keys run at the same time and find them in the L2 cache.
        head, rest = jax.lax.rem(place, jnp.int32(heads)), jax.lax.div(place, jnp.int32(heads))
        batch, rank = jax.lax.rem(rest, jnp.int32(batches)), jax.lax.div(rest, jnp.int32(batches))
        lists = self.inputs.lists
        index = lists.order[batch, rank]
        full, count = lists.counts[batch, index, 0], lists.counts[batch, index, 1]
        # A row without blocks visits one, in which nothing attends.
        return Row(number, batch, head, index, full, jnp.maximum(count, 1), before)

    @property
    def head(self) -> Any:
        """Index of the query head."""
        return self.row.head

    @property
    def batch(self) -> Any:
        """Index of the sequence."""
        return self.row.batch

    def queries_of(self, warpgroup: Any) -> Any:
        """The slice of the queries that a warpgroup computes."""
        rows = self.tile.shape[0]
        return pl.ds(self.row.index * self.block_q + warpgroup * rows, rows)

    @property
    def queries(self) -> Any:
        """The slice of this warpgroup's queries."""
        return self.queries_of(self.index)

    @property
    def counts(self) -> tuple[Any, Any]:
        """Number of full blocks of the row, and number of all its blocks."""
        return self.row.full, self.row.count

    @property
    def kv_head(self) -> Any:
        """The key/value head that the query head reads."""
        group = self.inputs.query.shape[2] // self.inputs.key.shape[2]
        return jax.lax.div(self.head, jnp.int32(group))

    def slot(self, i: Any) -> Any:
        """The slot of the ring in which block i of the row lies."""
        return memory.ring_slot(self.row.before + i, self.stages)

    def key_start(self, i: Any) -> Any:
        """Index of the first key of block i of the row."""
        return self.inputs.lists.columns[self.batch, self.row.index, i] * self.block_k

    def load_query_streams(self) -> dict[str, jax.Array]:
        """Streams of the warpgroup's queries, in registers for the whole row."""
        return {
            name: self.tile.load_queries(ref.at[self.batch, self.queries])
            for name, ref in self.inputs.query_streams.items()
        }

    def block(self, i: Any, query: dict[str, jax.Array], masked: bool, start: int = 0) -> ScoreBlock:
        """The keys of block i from `start` on, as many as a tile has; their streams must be in shared memory."""
        wanted = scores.needed_streams(self.options, self.inputs.extra, masked).key
        slot, keys = self.slot(i), pl.ds(start, self.tile.shape[1])
        # Sorted, because the order of a set changes from process to process, and with it the compiled kernel.
        key = {
            name: self.tile.load_keys(self.scratch.streams.at[slot, self.names.index(name), keys])
            for name in sorted(wanted)
        }
        return ScoreBlock(self.tile, self.batch, self.head, self.queries.start, self.key_start(i) + start, query, key)

    def vector(self, x: float) -> jax.Array:
        """float32, one entry a query, all of them x."""
        return plgpu.layout_cast(jnp.full((self.tile.shape[0],), x, jnp.float32), self.tile.query_layout())

    def write(self, buffer: Any, attended: jax.Array, top: jax.Array, total: jax.Array) -> None:
        """Starts to write the output, which is in shared memory, and the lse to global memory.

        Before shared memory is written again, and before the program ends, `plgpu.wait_smem_to_gmem` must have waited.

        Args:
            buffer: Reference [queries, Cv] in shared memory with the output.
            attended: bool, one entry a query: whether it attends to any key.
            top: float32, each query's greatest score, in base 2.
            total: float32, the sum of exp2(score - top), 1 where a query attends to nothing.
        """
        s, span = self.scratch, self.queries
        s.lse.at[self.index][...] = jnp.where(attended, (top + jnp.log2(total)) / LOG2E, -jnp.inf)
        # The copy engine (TMA) does not see plain writes to shared memory before this fence.
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffer, self.out.at[self.batch, span, self.head])
        plgpu.copy_smem_to_gmem(s.lse.at[self.index], self.lse.at[self.batch, self.head, span])


def launch(
    program: Callable[..., ForwardProgram],
    operands: Operands,
    lists: BlockLists,
    block_q: int,
    warpgroups: int,
    scratch: Any,
    programs: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Runs a forward kernel.

    Args:
        program: Makes a `ForwardProgram` of the fields that are not static.
        operands: With lengths that are multiples of the blocks.
        lists: The blocks to visit.
        block_q: Queries of a program.
        warpgroups: Of a program.
        scratch: The types of the program's scratch, a NamedTuple.
        programs: How many programs compute the rows; None is a program a row.

    Returns:
        Output [B, T, H, Cv] and lse [B, H, T], float32, natural logarithm.
    """
    o = operands
    B, T, H, _ = o.query.shape
    streams = scores.stack_streams(o.key_streams)
    extra = scores.score_extras(o)
    leaves, tree = jax.tree.flatten(
        ForwardInputs(o.query, o.key, o.value, dict(o.query_streams), streams, lists, extra)
    )

    rows = T // block_q * B * H
    programs = rows if programs is None else min(programs, rows)

    def attention_forward(*refs):
        inputs, (out, lse, scratch) = jax.tree.unflatten(tree, refs[: len(leaves)]), refs[len(leaves) :]
        warpgroup = program(
            names=tuple(sorted(o.key_streams)),
            inputs=inputs,
            out=out,
            lse=lse,
            scratch=scratch,
            index=jax.lax.axis_index("warpgroup"),
            program=jax.lax.axis_index("program"),
            programs=programs,
            row=None,
        )
        dataclasses.replace(warpgroup, row=warpgroup.first_row()).run()

    kernel = plgpu.kernel(
        attention_forward,
        out_type=(
            jax.ShapeDtypeStruct((B, T, H, o.value.shape[3]), o.query.dtype),
            jax.ShapeDtypeStruct((B, H, T), jnp.float32),
        ),
        grid=(programs,),
        grid_names=("program",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        scratch_types=[scratch],
    )
    return kernel(*leaves)
