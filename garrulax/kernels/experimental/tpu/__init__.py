"""Attention on TPUs: Pallas kernels for training, forward and backward, which visit only the active blocks of a mask.

`memory` chooses the size of blocks, `layout` divides a request into them, `schedule` lists the active ones, `scores` is
the arithmetic on a tile of scores, `forward`, `backward` and `bias_gradients` are the kernels.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from garrulax.kernels import large_scores
from garrulax.kernels.blocks import pad_axis, pad_to_blocks
from garrulax.kernels.call import EMPTY_ROW_LSE, Gradients, LogSumExp, Operands, Options
from garrulax.kernels.experimental.tpu import backward, bias_gradients, forward, layout, memory
from garrulax.kernels.experimental.tpu.layout import LANES, TpuPlan
from garrulax.kernels.experimental.tpu.schedule import MAX_ENTRIES, MAX_SIDE
from garrulax.kernels.passes import ForwardBackward
from garrulax.kernels.picking import target_device

DTYPES = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True)
class TpuAttention(ForwardBackward):
    """Attention for TPUs, of float32, bfloat16 or float16 (computed as float32), with any widths and lengths.

    Attributes:
        block_q: Queries of a block, a multiple of 128; None chooses by the request and the chip.
        block_k: Keys of a block, a multiple of 128; None chooses by the request and the chip.
        chunk: Keys of a block whose scores are computed together; None chooses.
        span_bytes: VMEM for the gradients of keys and values; longer texts take several passes over spans of keys. None
            chooses by the chip.
        interpret: True, or `pltpu.InterpretParams`, to run without a TPU.
    """

    block_q: int | None = None
    block_k: int | None = None
    chunk: int | None = None
    span_bytes: int | None = None
    interpret: Any = False

    def unsupported_reason(self, options: Options, operands: Operands) -> str | None:
        """Why it cannot compute a request (operands may be abstract), or None."""
        o = operands
        dtypes = {str(x.dtype) for x in (o.query, o.key, o.value)}
        if len(dtypes) > 1 or not dtypes <= set(DTYPES):
            return f"it takes queries, keys and values of one of the dtypes {', '.join(DTYPES)}, not {sorted(dtypes)}"
        sizes, most = self.sizes(operands), self._memory(operands).limit
        if (bytes_needed := memory.needed(operands, sizes)) > most:
            return f"a block would take {bytes_needed / memory.MIB:.0f} of {most / memory.MIB:.0f} MiB of vector memory"
        rows, columns = math.ceil(o.query.shape[1] / sizes.block_q), math.ceil(o.key.shape[1] / sizes.block_k)
        if o.steps is not None or o.bias is not None:
            # Their kernels read an array [B, rows, columns] from scalar memory, where rows of it take whole lanes.
            columns += -columns % LANES
        if max(rows, columns) > MAX_SIDE or o.query.shape[0] * rows * columns > MAX_ENTRIES:
            return (
                f"{o.query.shape[0]} x {rows} x {columns} blocks are more than its list holds: "
                f"{MAX_SIDE} a side, {MAX_ENTRIES} together; larger block_q and block_k make fewer"
            )
        return None

    def sizes(self, operands: Operands) -> memory.Sizes:
        """How a request is divided on its device; operands may be abstract."""
        of_chip = self._memory(operands)
        sizes = memory.choose_sizes(operands, of_chip, self.block_q, self.block_k, self.span_bytes or of_chip.span)
        return sizes if self.chunk is None else dataclasses.replace(sizes, chunk=math.gcd(self.chunk, sizes.block_k))

    def _memory(self, operands: Operands) -> memory.VectorMemory:
        return memory.vector_memory(target_device((operands,)))

    def forward(self, options: Options, operands: Operands) -> tuple[jax.Array, LogSumExp]:
        """See `ForwardBackward.forward`."""
        B, T, H, _ = operands.query.shape
        out, lse = forward.forward(*self._whole_blocks(options, operands))  # [B, N, G, T', Cv'], [B, N, G, T']
        out = layout.by_token(out, T, operands.value.shape[3]).astype(operands.query.dtype)
        return out, LogSumExp.rounded(lse.reshape(B, H, -1)[:, :, :T])

    def backward(
        self, options: Options, operands: Operands, lse: LogSumExp, delta: jax.Array, cotangent: jax.Array
    ) -> Gradients:
        """See `ForwardBackward.backward`."""
        if operands.bias is None:
            return self._backward(options, operands, lse, delta, cotangent)
        return large_scores.backward_or_xla(self._backward, options, operands, lse, delta, cotangent)

    def _backward(
        self, options: Options, operands: Operands, lse: LogSumExp, delta: jax.Array, cotangent: jax.Array
    ) -> Gradients:
        o = operands
        B, T, _, C = o.query.shape
        S = o.key.shape[1]
        span = self.sizes(operands).span
        plan, padded = self._whole_blocks(options, operands, span)
        more = padded.query.shape[1] - T
        rows = {
            "cotangent": layout.by_head(pad_axis(cotangent.astype(padded.query.dtype), more), plan.heads),
            # Queries of the padding get the lse of queries without keys, which makes their probabilities 0.
            "lse": jnp.pad(lse.value, ((0, 0), (0, 0), (0, more)), constant_values=EMPTY_ROW_LSE).reshape(
                B, -1, plan.heads, T + more
            ),
            "delta": pad_axis(delta, more, 2).reshape(B, -1, plan.heads, T + more),
        }
        dq, dk, dv = backward.by_spans(plan, padded, rows, span)
        dbias = dsteps = None
        if o.bias is not None and padded.bias is not None:
            dbias = bias_gradients.bias_gradient(plan, padded, padded.bias, rows)
            dbias = dbias[:, :, : o.bias.shape[2], :S].astype(o.bias.dtype)
        if o.steps is not None:
            dsteps = bias_gradients.steps_gradient(plan, padded, o.steps, rows).astype(o.steps.dtype)
        dq = layout.by_token(dq, T, C)
        dk, dv = (layout.by_token(x[:, :, None], S, n) for x, n in ((dk, C), (dv, o.value.shape[3])))
        return Gradients(dq.astype(o.query.dtype), dk.astype(o.key.dtype), dv.astype(o.value.dtype), dbias, dsteps)

    def _whole_blocks(self, options: Options, operands: Operands, keys: int | None = None) -> tuple[TpuPlan, Operands]:
        """The plan, and the request padded to whole blocks and, if given, to a multiple of `keys` keys."""
        s, vmem = self.sizes(operands), self._memory(operands).limit
        if operands.query.dtype == jnp.float16:  # which the matrix unit does not know
            q, k, v = (x.astype(jnp.float32) for x in (operands.query, operands.key, operands.value))
            operands = dataclasses.replace(operands, query=q, key=k, value=v)
        options, operands = pad_to_blocks(options, operands, s.block_q, keys or s.block_k)
        plan = layout.make_plan(options, operands, s.heads, s.block_q, s.block_k, s.chunk, vmem, self.interpret)
        return plan, operands
