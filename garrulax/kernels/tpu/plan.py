"""How a request is cut up for the kernels, and their operands in the layouts that they read."""

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
from garrulax.kernels.tpu.schedule import Schedule, column, row, schedule

LANES = 128
SUBLANES = 8
STRIP = 256
ROWS = 1024  # of all heads of a group
VMEM = 56 << 20  # bytes that a kernel may use: the least of the chips has 64 MiB a core

Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static part of a call of a kernel.

    block_q, block_k: tokens of a block. heads: query heads of a key/value head. group: how many of them are multiplied
    at once, with a chunk of keys; strip: queries whose scores are then treated together.
    query_names, key_names: streams in the order of their rows.
    """

    options: Options
    block_q: int
    block_k: int
    chunk: int
    heads: int
    group: int
    strip: int
    query_names: tuple[str, ...]
    key_names: tuple[str, ...]
    precision: jax.lax.Precision
    interpret: Any

    def dot(self, x: jax.Array, y: jax.Array, over: tuple[int, int]) -> jax.Array:
        """Product of two matrices over one axis of each, summed in float32."""
        dimensions = ((over[:1], over[1:]), ((), ()))
        return jax.lax.dot_general(x, y, dimensions, precision=self.precision, preferred_element_type=jnp.float32)


class Place(NamedTuple):
    """Which block a step of a grid computes."""

    batch: Any
    head: Any
    row: Any
    column: Any


def planned(options: Options, operands: Operands, block_q: int, block_k: int, chunk: int, interpret: Any) -> Plan:
    """The plan of a request of whole blocks."""
    heads = operands.query.shape[2] // operands.key.shape[2]
    group = max(g for g in range(1, heads + 1) if heads % g == 0 and (g == 1 or g * block_q <= ROWS))
    exact = operands.query.dtype == jnp.float32
    return Plan(
        options=options,
        block_q=block_q,
        block_k=block_k,
        chunk=chunk,
        heads=heads,
        group=group,
        strip=math.gcd(STRIP, block_q),
        query_names=tuple(sorted(operands.query_streams)),
        key_names=tuple(sorted(operands.key_streams)),
        precision=jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
        interpret=interpret,
    )


def by_head(x: jax.Array, heads: int) -> jax.Array:
    """[B, K, G, T, C] of [B, T, K·G, C], the width filled up to whole lanes."""
    x = x.reshape(*x.shape[:2], heads, -1, x.shape[3])
    return pad_axis(x.transpose(0, 2, 3, 1, 4), -x.shape[4] % LANES, axis=4)


def by_token(x: jax.Array, length: int, width: int) -> jax.Array:
    """[B, length, K·G, width] of [B, K, G, T, C]: `by_head` undone."""
    x = x[:, :, :, :length, :width].transpose(0, 3, 1, 2, 4)
    return x.reshape(*x.shape[:2], -1, width)


def stacked(streams: dict[str, jax.Array], names: Sequence[str], like: jax.Array) -> jax.Array:
    """Streams [B, T] as int32 [B, rows, T], the rows whole sublanes. like: [B, T, ...], for a request without any."""
    if not names:
        return jnp.zeros((like.shape[0], SUBLANES, like.shape[1]), jnp.int32)
    x = jnp.stack([streams[name] for name in names], axis=1)
    return pad_axis(x, -x.shape[1] % SUBLANES)


def arrays(plan: Plan, operands: Operands) -> Arrays:
    """Operands as kernels read them. Filled-up rows and columns are in all of them."""
    o = operands
    K = o.key.shape[2]
    x = {
        "query": by_head(o.query, K),
        "key": by_head(o.key, K)[:, :, 0],
        "value": by_head(o.value, K)[:, :, 0],
        "query_streams": stacked(o.query_streams, plan.query_names, o.query),
        "key_streams": stacked(o.key_streams, plan.key_names, o.key),
    }
    if o.bias is not None:
        shared = o.bias.shape[1] == 1
        heads = (1, 1) if shared else (K, plan.heads)
        x["bias"] = o.bias.reshape(o.bias.shape[0], *heads, *o.bias.shape[2:])
    return x


def activity(plan: Plan, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """The request's `blocks.block_map`."""
    o = operands
    shape = (o.query.shape[0], o.query.shape[1] // plan.block_q, o.key.shape[1] // plan.block_k)
    return block_map(plan.options.rule, o.query_streams, o.key_streams, plan.block_q, plan.block_k, shape)


def scalars(plan: Plan, operands: Operands, first_key: Any = 0) -> Arrays:
    """What kernels read from scalar memory, but for the schedule.

    first_key: index of the first of the given keys among all of the request.
    """
    o, x = operands, {}
    if o.slopes is not None:
        x["slopes"] = o.slopes
        x["origin"] = o.query_streams["position"][:, :: plan.block_q]
    if o.seeds is not None:
        x["seeds"] = o.seeds
        x["first_key"] = jnp.reshape(jnp.asarray(first_key, jnp.int32), (1,))
    if o.steps is not None:
        q, k = (
            block_bounds(o.query_streams["position"], plan.block_q),
            block_bounds(o.key_streams["position"], plan.block_k),
        )
        starts = jnp.array(plan.options.starts, jnp.int32)
        low, high = k.low[:, None, :] - q.high[:, :, None], k.high[:, None, :] - q.low[:, :, None]
        low, high = (jnp.searchsorted(starts, d, side="right").astype(jnp.int32) for d in (low, high))
        x["starts"], x["steps"], x["steps_met"] = starts, o.steps.astype(jnp.float32), low | high << 16
    return x


def scheduled(plan: Plan, operands: Operands, more: Arrays) -> tuple[Arrays, jax.Array]:
    """Scalars of a kernel that walks along the schedule, and the length of its walk."""
    s: Schedule = schedule(*activity(plan, operands))
    return {"words": s.words, "batch": s.batch, **more}, s.length


def listed(head: Any, step: Any, s: Arrays) -> Place:
    """The place of a step of a grid of (key/value heads, blocks of the schedule)."""
    word = s["words"][step]
    return Place(s["batch"][step], head, row(word), column(word))


def specs(plan: Plan, x: Arrays, place: Callable[..., Place]) -> Arrays:
    """Which block of every array a step reads or writes. place: of the grid's indices and the scalars."""
    G, q, k = plan.heads, plan.block_q, plan.block_k

    def spec(shape, index):
        return pl.BlockSpec(shape, lambda *grid: index(place(*grid)))

    def spec_of(name):
        width = x[name].shape[-1]
        match name:
            case "query" | "output" | "cotangent" | "dquery":
                return spec((1, 1, G, q, width), lambda p: (p.batch, p.head, 0, p.row, 0))
            case "key" | "value":
                return spec((1, 1, k, width), lambda p: (p.batch, p.head, p.column, 0))
            case "lse" | "delta":
                return spec((1, 1, G, q), lambda p: (p.batch, p.head, 0, p.row))
            case "query_streams":
                return spec((1, x[name].shape[1], q), lambda p: (p.batch, 0, p.row))
            case "key_streams":
                return spec((1, x[name].shape[1], k), lambda p: (p.batch, 0, p.column))
            case "bias" | "dbias":
                B, K, heads, T = x[name].shape[:4]
                return spec(
                    (1, 1, heads, 1 if T == 1 else q, k),
                    lambda p: (p.batch if B > 1 else 0, p.head if K > 1 else 0, 0, p.row if T > 1 else 0, p.column),
                )
        raise KeyError(name)

    return {name: spec_of(name) for name in x}


def launch(
    body: Callable[..., None],
    name: str,
    plan: Plan,
    grid: tuple[Any, ...],
    parallel: int,
    inputs: tuple[Arrays, Arrays, Arrays],
    outputs: tuple[Arrays, Arrays],
    scratch: Arrays,
) -> Arrays:
    """One kernel. body: of references to scalars, inputs, outputs and scratch, each a dict.

    parallel: how many leading axes of the grid may be computed in any order. inputs: scalars, arrays and the specs of
    the arrays. outputs: shapes and specs.
    """
    order: list[Literal["parallel", "arbitrary"]] = ["parallel"] * parallel
    order += ["arbitrary"] * (len(grid) - parallel)
    return pl.pallas_call(
        body,
        out_shape=outputs[0],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=grid, in_specs=[inputs[2]], out_specs=outputs[1], scratch_shapes=[scratch]
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=order, vmem_limit_bytes=VMEM),
        interpret=plan.interpret,
        name=name,
    )(inputs[0], inputs[1])
