"""How a request is divided into blocks, and how its arrays are laid out for the kernels.

The query heads of a key/value head are divided into parts, which a kernel computes as if each had a key/value head of
its own: the memory of a step does not grow with the number of query heads that share one.

Letters of shapes: B sequences, K key/value heads, N parts of query heads (K times `TpuPlan.parts`), G query heads of a
part, T queries, S keys, C and Cv widths of keys and values; in the kernels g query heads of a group, q queries and k
keys of a block, s queries of a strip, c keys of a chunk. All lengths are multiples of the block sizes here, and widths
multiples of 128.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from garrulax.kernels.blocks import block_bounds, block_map, pad_axis
from garrulax.kernels.call import Operands, Options
from garrulax.kernels.experimental.tpu.schedule import block_schedule, column, row

LANES = 128  # a vector register has 8 sublanes x 128 lanes of 32 bits
SUBLANES = 8
STRIP = 256  # queries that are masked together, at most
GROUP_ROWS = 1024  # rows of the query matrix of a group, at most: enough to keep the matrix unit busy

Named = dict[str, Any]  # arrays, their shapes, their block specs or, inside a kernel, references to them, by name


@dataclasses.dataclass(frozen=True)
class TpuPlan:
    """The static part of a kernel call.

    Attributes:
        options: The static part of the request.
        block_q: Queries of a block.
        block_k: Keys of a block.
        chunk: Keys of a block whose scores are computed together; divides block_k.
        parts: Parts into which the query heads of a key/value head are divided.
        heads: Query heads of a part (G).
        group: Query heads that are multiplied by a chunk of keys in one product; divides `heads`.
        strip: Queries whose scores are masked together; divides block_q. The heads of a group share the mask.
        query_names: Names of the query streams, in the order of their rows.
        key_names: Names of the key streams, in the order of their rows.
        vmem: Bytes of vector memory that a kernel may use.
        precision: Of the matrix products.
        interpret: Passed to `pallas_call`.
    """

    options: Options
    block_q: int
    block_k: int
    chunk: int
    parts: int
    heads: int
    group: int
    strip: int
    query_names: tuple[str, ...]
    key_names: tuple[str, ...]
    vmem: int
    precision: jax.lax.Precision
    interpret: Any

    def dot(self, x: jax.Array, y: jax.Array, over: tuple[int, int]) -> jax.Array:
        """Product of two matrices over axis over[0] of x and axis over[1] of y, summed in float32."""
        dimensions = ((over[:1], over[1:]), ((), ()))
        return jax.lax.dot_general(x, y, dimensions, precision=self.precision, preferred_element_type=jnp.float32)


class BlockIndex(NamedTuple):
    """The block that a step of a grid computes: sequence, part of the query heads, row (of queries) and column (of
    keys)."""

    batch: Any
    part: Any
    row: Any
    column: Any


def make_plan(
    options: Options, operands: Operands, heads: int, block_q: int, block_k: int, chunk: int, vmem: int, interpret: Any
) -> TpuPlan:
    """The plan of a request whose lengths are multiples of the block sizes; arguments as in `TpuPlan`."""
    # The largest group that divides the heads and whose query matrix has at most GROUP_ROWS rows.
    group = max(g for g in range(1, heads + 1) if heads % g == 0 and (g == 1 or g * block_q <= GROUP_ROWS))
    exact = operands.query.dtype == jnp.float32
    return TpuPlan(
        options=options,
        block_q=block_q,
        block_k=block_k,
        chunk=chunk,
        parts=operands.query.shape[2] // operands.key.shape[2] // heads,
        heads=heads,
        group=group,
        strip=math.gcd(STRIP, block_q),
        query_names=tuple(sorted(operands.query_streams)),
        key_names=tuple(sorted(operands.key_streams)),
        vmem=vmem,
        precision=jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
        interpret=interpret,
    )


def heads_of_part(heads: int, most: int) -> int:
    """The number of query heads of a part: the largest divisor of `heads`, those of a key/value head, up to `most`."""
    return max(n for n in range(1, most + 1) if heads % n == 0)


def by_head(x: jax.Array, heads: int) -> jax.Array:
    """x [B, T, N·heads, C] as [B, N, heads, T, C], with the width padded to a multiple of 128."""
    x = x.reshape(*x.shape[:2], -1, heads, x.shape[3])  # [B, T, N, G, C]
    return pad_axis(x.transpose(0, 2, 3, 1, 4), -x.shape[4] % LANES, axis=4)


def by_token(x: jax.Array, length: int, width: int) -> jax.Array:
    """The inverse of `by_head`: x [B, N, G, T, C] as [B, length, N·G, width], without the padding."""
    x = x[:, :, :, :length, :width].transpose(0, 3, 1, 2, 4)  # [B, T, N, G, C]
    return x.reshape(*x.shape[:2], -1, width)


def stack_streams(streams: dict[str, jax.Array], names: Sequence[str], like: jax.Array) -> jax.Array:
    """Streams [B, T] as one int32 array [B, rows, T], with the number of rows padded to a multiple of 8.

    Args:
        streams: int32 [B, T] by name.
        names: Names of the streams, in the order of the rows.
        like: [B, T, ...], an array that gives the shape where there is no stream.
    """
    if not names:
        return jnp.zeros((like.shape[0], SUBLANES, like.shape[1]), jnp.int32)
    x = jnp.stack([streams[name] for name in names], axis=1)
    return pad_axis(x, -x.shape[1] % SUBLANES)


def kernel_arrays(plan: TpuPlan, operands: Operands) -> Named:
    """The arrays of a request, in the layouts that the kernels read through block specs."""
    o = operands
    x = {
        "query": by_head(o.query, plan.heads),  # [B, N, G, T, C]
        "key": by_head(o.key, 1)[:, :, 0],  # [B, K, S, C]
        "value": by_head(o.value, 1)[:, :, 0],  # [B, K, S, Cv]
        "query_streams": stack_streams(o.query_streams, plan.query_names, o.query),  # [B, rows, T]
        "key_streams": stack_streams(o.key_streams, plan.key_names, o.key),  # [B, rows, S]
    }
    if o.bias is not None:
        shared = o.bias.shape[1] == 1
        heads = (1, 1) if shared else (-1, plan.heads)
        x["bias"] = o.bias.reshape(o.bias.shape[0], *heads, *o.bias.shape[2:])  # [B|1, N|1, G|1, T|1, S]
    return x


def block_activity(plan: TpuPlan, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """Which blocks are active and which are full: bool [B, rows, columns] each, by `blocks.block_map`."""
    o = operands
    shape = (o.query.shape[0], o.query.shape[1] // plan.block_q, o.key.shape[1] // plan.block_k)
    return block_map(plan.options.rule, o.query_streams, o.key_streams, plan.block_q, plan.block_k, shape)


def kernel_scalars(plan: TpuPlan, operands: Operands, first_key: Any = 0) -> Named:
    """The arrays that the kernels read from scalar memory, without the list of blocks.

    Args:
        plan: Of the call.
        operands: Of the request.
        first_key: Index of the first key of the operands among all keys of the request, for dropout.
    """
    o, x = operands, {}
    if o.slopes is not None:
        x["slopes"] = o.slopes  # [H]
        x["origin"] = o.query_streams["position"][:, :: plan.block_q]  # [B, rows]: position of each block's first query
    if o.seeds is not None:
        x["seeds"] = o.seeds  # [B, H]
        x["first_key"] = jnp.reshape(jnp.asarray(first_key, jnp.int32), (1,))
    if o.steps is not None:
        # The range of steps that the distances of each block lie in, two numbers in one word: most blocks are far from
        # the diagonal and lie in one step.
        q, k = (
            block_bounds(o.query_streams["position"], plan.block_q),
            block_bounds(o.key_streams["position"], plan.block_k),
        )
        starts = jnp.array(plan.options.starts, jnp.int32)
        low, high = k.low[:, None, :] - q.high[:, :, None], k.high[:, None, :] - q.low[:, :, None]  # [B, rows, columns]
        low, high = (jnp.searchsorted(starts, d, side="right").astype(jnp.int32) for d in (low, high))
        x["starts"], x["steps"], x["steps_in_block"] = starts, o.steps.astype(jnp.float32), low | high << 16
    return x


def with_schedule(plan: TpuPlan, operands: Operands, scalars: Named) -> tuple[Named, jax.Array]:
    """The scalars with the list of active blocks added, and the length of the list."""
    s = block_schedule(*block_activity(plan, operands))
    return {"words": s.words, "batch": s.batch, **scalars}, s.length


def scheduled_block(part: Any, step: Any, scalars: Named) -> BlockIndex:
    """The block of a step of the grid (parts of query heads, active blocks)."""
    word = scalars["words"][step]
    return BlockIndex(scalars["batch"][step], part, row(word), column(word))


def block_specs(plan: TpuPlan, x: Named, index: Callable[..., BlockIndex]) -> Named:
    """The block of each array that a step of the grid reads or writes.

    The pipeline evaluates these one step ahead, on scalars that are in scalar memory before the kernel starts
    ("prefetch"), and copies the next blocks while the present ones are computed: each array has two buffers in VMEM. A
    block whose index does not change between two steps is not copied again, such as the queries along a row.

    Args:
        plan: Of the call.
        x: Arrays, or their shapes, by name.
        index: The block of a step, from the indices of the grid and the scalars.
    """
    G, q, k = plan.heads, plan.block_q, plan.block_k

    def spec(shape, of_block):
        return pl.BlockSpec(shape, lambda *grid: of_block(index(*grid)))

    def spec_of(name):
        width = x[name].shape[-1]
        match name:
            case "query" | "output" | "cotangent" | "dquery":  # of [B, N, G, T, width]
                return spec((1, 1, G, q, width), lambda i: (i.batch, i.part, 0, i.row, 0))
            case "key" | "value":  # of [B, K, S, width]
                return spec((1, 1, k, width), lambda i: (i.batch, i.part // plan.parts, i.column, 0))
            case "lse" | "delta":  # of [B, N, G, T]
                return spec((1, 1, G, q), lambda i: (i.batch, i.part, 0, i.row))
            case "query_streams":  # of [B, rows, T]
                return spec((1, x[name].shape[1], q), lambda i: (i.batch, 0, i.row))
            case "key_streams":  # of [B, rows, S]
                return spec((1, x[name].shape[1], k), lambda i: (i.batch, 0, i.column))
            case "bias" | "dbias":  # of [B|1, N|1, G|1, T|1, S]
                B, N, heads, T = x[name].shape[:4]
                return spec(
                    (1, 1, heads, 1 if T == 1 else q, k),
                    lambda i: (i.batch if B > 1 else 0, i.part if N > 1 else 0, 0, i.row if T > 1 else 0, i.column),
                )
        raise KeyError(name)

    return {name: spec_of(name) for name in x}


def launch(
    body: Callable[..., None],
    name: str,
    plan: TpuPlan,
    grid: tuple[Any, ...],
    parallel: int,
    inputs: tuple[Named, Named, Named],
    outputs: tuple[Named, Named],
    scratch: Named,
) -> Named:
    """Calls one kernel.

    Args:
        body: The kernel, from four dicts of references: scalars, inputs, outputs and scratch.
        name: Of the kernel, for profiles.
        plan: Of the call.
        grid: The number of steps of each axis, the last axis fastest.
        parallel: Number of leading axes whose steps are independent, so that cores may share them. The steps of the
            other axes run in order, since they add to the same scratch or output.
        inputs: Scalars, arrays, and block specs of the arrays.
        outputs: Shapes and block specs.
        scratch: Buffers that keep their contents from step to step.

    Returns:
        The outputs by name.
    """
    order: list[Literal["parallel", "arbitrary"]] = ["parallel"] * parallel
    order += ["arbitrary"] * (len(grid) - parallel)
    return pl.pallas_call(
        body,
        out_shape=outputs[0],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=grid, in_specs=[inputs[2]], out_specs=outputs[1], scratch_shapes=[scratch]
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=order, vmem_limit_bytes=plan.vmem),
        interpret=plan.interpret,
        name=name,
    )(inputs[0], inputs[1])
