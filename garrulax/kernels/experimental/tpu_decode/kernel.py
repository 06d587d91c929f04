"""The decoding kernel: each step adds one block of one sequence's cache to the running softmax of all its heads.

The grid is (splits, steps). The steps of a sequence follow one another, so its softmax stays in VMEM, and each output
is written once, at the sequence's last step. Scores are in base 2. Letters of shapes: see `layout`.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from garrulax.kernels.call import Options
from garrulax.kernels.decode.call import DecodeOperands
from garrulax.kernels.experimental.tpu_decode import step_list
from garrulax.kernels.experimental.tpu_decode.layout import LANES, LOG2_E, DecodeSpecs, TpuDecodePlan, kernel_inputs
from garrulax.kernels.experimental.tpu_decode.step_list import DecodeSteps
from garrulax.kernels.mask import Streams
from garrulax.kernels.parts import merge

LOWEST = -0.7 * float(np.finfo(np.float32).max)  # score of a pair that does not attend; differences stay finite
AHEAD = 4  # heads whose scores are computed ahead of the softmax, to keep the matrix unit busy during it


@dataclasses.dataclass(frozen=True)
class DecodeBody:
    """The static part of the kernel's body.

    Attributes:
        plan: Of the call.
        options: Of the request.
        inputs: Names of the inputs, in order.
        key_names: Names of the key streams, in the order of their rows.
        dtype: Of the query; keys, values and probabilities are multiplied in it.
    """

    plan: TpuDecodePlan
    options: Options
    inputs: tuple[str, ...]
    key_names: tuple[str, ...]
    dtype: Any


class DecodeCarry(NamedTuple):
    """References to the running softmax, which scratch memory keeps from step to step.

    Attributes:
        top: float32 [K, rows, 128], the greatest score so far, the same in all lanes.
        total: float32 [K, rows, 128], the sum of exp2(score - top) so far, the same in all lanes.
        output: float32 [K, rows, Cv], the sum of exp2(score - top) * value so far.
    """

    top: Any
    total: Any
    output: Any


def call_kernel(
    plan: TpuDecodePlan, options: Options, streams: Streams, steps: DecodeSteps, c: DecodeOperands
) -> tuple[jax.Array, jax.Array]:
    """Output and lse; see `decode.Implementation`.

    Args:
        plan: Of the call.
        options: Of the request, with the rule of `step_list.ordered_streams`.
        streams: Key streams of `step_list.ordered_streams`.
        steps: The steps of the grid.
        c: The arrays of the request.
    """
    (B, T, H, _), (_, K, _, Cv) = c.query.shape, c.value.shape
    specs = DecodeSpecs(plan, B)
    inputs = kernel_inputs(plan, specs, streams, c)
    body = DecodeBody(plan, options, tuple(inputs), tuple(sorted(streams)), c.query.dtype)
    out, lse = pl.pallas_call(
        functools.partial(_kernel, body),
        out_shape=[jax.ShapeDtypeStruct((plan.splits, B, K, plan.rows, n), jnp.float32) for n in (Cv, LANES)],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(plan.splits, steps.most),
            in_specs=[spec for _, spec in inputs.values()],
            out_specs=[specs.of_split(K, plan.rows, n) for n in (Cv, LANES)],
            scratch_shapes=[pltpu.VMEM((K, plan.rows, n), jnp.float32) for n in (LANES, LANES, Cv)],
        ),
        # Splits are independent and may run on several cores; the steps of a split run in order.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=plan.vmem_bytes
        ),
        interpret=plan.interpret,
        name="decode",
    )(steps.words, steps.pages, step_list.lengths_of(c), *[x for x, _ in inputs.values()])
    out = out[:, :, :, : H // K * T].reshape(-1, B, H, T, Cv).swapaxes(2, 3)  # [splits, B, T, H, Cv]
    lse = lse[:, :, :, : H // K * T, 0].reshape(-1, B, H, T)
    if plan.splits == 1:
        return out[0].astype(c.query.dtype), lse[0]
    # A split without a step of a sequence wrote nothing there: its memory may hold anything.
    written = steps.shared > 0  # [splits, B]
    out = jnp.where(written[:, :, None, None, None], out, 0)
    out, lse = merge(out, jnp.where(written[:, :, None, None], lse, -jnp.inf))
    return out.astype(c.query.dtype), lse


def _kernel(body: DecodeBody, words: Any, _pages: Any, lengths: Any, *refs: Any) -> None:
    """One step. words, _pages: as in `DecodeSteps`; the page numbers are for the block specs only. lengths: [B]."""
    x = dict(zip(body.inputs, refs, strict=False))
    out, lse, *scratch = refs[len(body.inputs) :]
    carry = DecodeCarry(*scratch)
    word = words[pl.program_id(0) * (words.shape[0] // body.plan.splits) + pl.program_id(1)]
    pl.when((word & step_list.FIRST) != 0)(functools.partial(_start, carry))
    flags = word & (step_list.PARTIAL | step_list.IDLE)
    inside = lengths[step_list.row_of(word)] - step_list.column_of(word) * body.plan.size
    pl.when(flags == 0)(functools.partial(_block, body, x, carry, None))
    pl.when(flags == step_list.PARTIAL)(functools.partial(_block, body, x, carry, inside))
    pl.when((word & step_list.LAST) != 0)(functools.partial(_finish, carry, out, lse))


def _start(carry: DecodeCarry) -> None:
    carry.top[...] = jnp.full_like(carry.top, LOWEST)
    carry.total[...] = jnp.zeros_like(carry.total)
    carry.output[...] = jnp.zeros_like(carry.output)


def _block(body: DecodeBody, x: dict[str, Any], carry: DecodeCarry, inside: jax.Array | None) -> None:
    """Adds a block to the softmax of every key/value head.

    Args:
        body: Static part of the kernel.
        x: References to the inputs, by name.
        carry: References to the running softmax.
        inside: int32 scalar, the first slots of the block that lie within the sequence's length, where the mask has to
            be evaluated; None for a block in which all pairs attend.
    """
    plan, K = body.plan, carry.top.shape[0]
    q, k = _streams(body, x)
    attends = None if inside is None else body.options.rule.evaluate(q, k)  # [rows, size]
    distance = (k["position"] - q["position"]).astype(jnp.float32) if "slopes" in x else None

    def scores(h):
        return _scores(body, x, h, attends, distance)

    # The matrix unit computes the scores of later heads while the vector units compute this head's softmax.
    waiting = [scores(h) for h in range(min(AHEAD, K))]
    for h in range(K):
        if h + AHEAD < K:
            waiting.append(scores(h + AHEAD))
        s = waiting[h]  # [rows, size]
        # The softmax so far is relative to the greatest score so far: `fade` makes it relative to the new one.
        top = carry.top[h]
        new = jnp.maximum(top, s.max(axis=1, keepdims=True))  # [rows, 128]
        carry.top[h] = new
        p = jnp.exp2(s - _widen(new, plan.size))
        fade = jnp.exp2(top - new)
        carry.total[h] = fade * carry.total[h] + p.sum(axis=1, keepdims=True)
        if "value_scales" in x:
            p = p * x["value_scales"][0, h : h + 1]
            p = p if attends is None else jnp.where(attends, p, 0)  # a scale that does not count may be NaN
        value = _slots(plan, x, "value", h)  # [size, Cv], or transposed
        axis = int("value" in plan.transposed)
        if inside is not None:
            # Slots behind the length may hold NaN or infinity, which a probability of 0 does not cancel.
            value = jnp.where(jax.lax.broadcasted_iota(jnp.int32, value.shape, axis) < inside, value, 0)
        output = carry.output[h] * _widen(fade, carry.output.shape[2])  # [rows, Cv]
        carry.output[h] = output + _product(p.astype(body.dtype), value.astype(body.dtype), axis)


def _streams(body: DecodeBody, x: dict[str, Any]) -> tuple[Streams, Streams]:
    """Query streams [rows, 1] and key streams [rows, size] of the block."""
    q = {name: x["query_streams"][0, :, i : i + 1] for i, name in enumerate(body.plan.query_names)}
    k = {name: x["key_streams"][0, i : i + 1] for i, name in enumerate(body.key_names)}
    return q, {name: jnp.broadcast_to(s, (body.plan.rows, body.plan.size)) for name, s in k.items()}


def _slots(plan: TpuDecodePlan, x: dict[str, Any], name: str, h: int) -> jax.Array:
    """Keys or values of the step's slots for a key/value head: [size, width], or [width, size] if transposed."""
    if plan.pages:
        pages = [x[f"{name}{j}"][0, h] for j in range(plan.pages)]
        return jnp.concatenate(pages, axis=int(name in plan.transposed)) if len(pages) > 1 else pages[0]
    return x[name][0, h]


def _scores(
    body: DecodeBody, x: dict[str, Any], h: int, attends: jax.Array | None, distance: jax.Array | None
) -> jax.Array:
    """Scores [rows, size] of a key/value head in base 2."""
    options, plan = body.options, body.plan
    s = _product(x["query"][0, h], _slots(plan, x, "key", h).astype(body.dtype), int("key" not in plan.transposed))
    if "key_scales" in x:
        s = s * x["key_scales"][0, h : h + 1]
    if options.softcap is None:
        s = s * (options.scale * LOG2_E)
    else:
        s = jnp.tanh(s * (options.scale / options.softcap)) * (options.softcap * LOG2_E)
    if distance is not None:
        s = s + x["slopes"][h] * distance  # the slopes are multiplied by LOG2_E already
    return s if attends is None else jnp.where(attends, s, LOWEST)


def _finish(carry: DecodeCarry, out: Any, lse: Any) -> None:
    """Writes the output and lse of the step's sequence.

    A query that attends to nothing has `top` at LOWEST, and in its sums exp2(LOWEST - LOWEST) = 1 for each masked pair:
    they are discarded.
    """
    width = carry.output.shape[2]
    for h in range(carry.top.shape[0]):
        empty = carry.top[h] <= LOWEST / 2
        divisor = jnp.where(empty, 1, carry.total[h])
        out[0, 0, h] = jnp.where(_widen(empty, width), 0, carry.output[h] / _widen(divisor, width))
        lse[0, 0, h] = jnp.where(empty, -jnp.inf, (carry.top[h] + jnp.log2(divisor)) / LOG2_E)


def _product(x: jax.Array, y: jax.Array, axis: int) -> jax.Array:
    """x times y over the last axis of x and this axis of y, in float32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        x, y, (((1,), (axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _widen(x: jax.Array, width: int) -> jax.Array:
    """x [rows, 128], which is the same in every lane, as [rows, width]."""
    if width > x.shape[1]:
        x = jnp.tile(x, (1, -(-width // x.shape[1])))
    return x[:, :width]
