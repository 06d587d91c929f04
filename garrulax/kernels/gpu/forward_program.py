"""The parts that the forward kernels for Hopper and Blackwell share: arguments, block lists, results, the launch."""

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


@dataclasses.dataclass(frozen=True)
class ForwardProgram:
    """One warpgroup (128 threads) of a program, which computes one row of blocks of one head.

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
        head: Of the query, int32 scalar.
        batch: Index of the sequence, int32 scalar.
        row: Index of the row of blocks, int32 scalar.
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
    head: Any
    batch: Any
    row: Any

    def run(self) -> None:
        """Does the work of this warpgroup."""
        raise NotImplementedError

    def queries_of(self, warpgroup: Any) -> Any:
        """The slice of the queries that a warpgroup computes."""
        rows = self.tile.shape[0]
        return pl.ds(self.row * self.block_q + warpgroup * rows, rows)

    @property
    def queries(self) -> Any:
        """The slice of this warpgroup's queries."""
        return self.queries_of(self.index)

    @property
    def counts(self) -> tuple[Any, Any]:
        """How many full blocks the row has, and how many blocks in all."""
        counts = self.inputs.lists.counts
        return counts[self.batch, self.row, 0], counts[self.batch, self.row, 1]

    @property
    def kv_head(self) -> Any:
        """The key/value head that the query head reads."""
        group = self.inputs.query.shape[2] // self.inputs.key.shape[2]
        return jax.lax.div(self.head, jnp.int32(group))

    def slot(self, i: Any) -> Any:
        """The slot of the ring in which block i of the row lies."""
        return memory.ring_slot(i, self.stages)

    def key_start(self, i: Any) -> Any:
        """Index of the first key of block i of the row."""
        return self.inputs.lists.columns[self.batch, self.row, i] * self.block_k

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
        """Writes the output, which is in shared memory, and the lse to global memory.

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
        # Shared memory must live until the copies have read it.
        plgpu.wait_smem_to_gmem(0)


def launch(
    program: Callable[..., ForwardProgram],
    operands: Operands,
    lists: BlockLists,
    block_q: int,
    warpgroups: int,
    scratch: Any,
) -> tuple[jax.Array, jax.Array]:
    """Runs a forward kernel.

    Args:
        program: Makes a `ForwardProgram` of the fields that are not static.
        operands: With lengths that are multiples of the blocks.
        lists: The blocks to visit.
        block_q: Queries of a program.
        warpgroups: Of a program.
        scratch: The types of the program's scratch, a NamedTuple.

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

    def attention_forward(*refs):
        inputs, (out, lse, scratch) = jax.tree.unflatten(tree, refs[: len(leaves)]), refs[len(leaves) :]
        index = jax.lax.axis_index("warpgroup")
        head, batch = jax.lax.axis_index("head"), jax.lax.axis_index("batch")
        row = inputs.lists.order[batch, jax.lax.axis_index("row")]
        program(
            names=tuple(sorted(o.key_streams)),
            inputs=inputs,
            out=out,
            lse=lse,
            scratch=scratch,
            index=index,
            head=head,
            batch=batch,
            row=row,
        ).run()

    kernel = plgpu.kernel(
        attention_forward,
        out_type=(
            jax.ShapeDtypeStruct((B, T, H, o.value.shape[3]), o.query.dtype),
            jax.ShapeDtypeStruct((B, H, T), jnp.float32),
        ),
        # The last axis changes fastest: heads that share keys run at the same time and find them in the L2 cache.
        # The first changes slowest, and its order is by length: programs with long lists start first.
        grid=(T // block_q, B, H),
        grid_names=("row", "batch", "head"),
        num_threads=warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        scratch_types=[scratch],
    )
    return kernel(*leaves)
