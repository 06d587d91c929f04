"""Attention on TPUs: Pallas kernels for training, forward and backward, which visit only the active blocks of a mask.

`layout` divides a request into blocks, `schedule` lists the active ones, `scores` is the arithmetic on a tile of
scores, `forward`, `backward` and `bias_gradients` are the kernels.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from garrulax.kernels import large_scores
from garrulax.kernels.blocks import pad_axis, pad_to_blocks
from garrulax.kernels.call import EMPTY_ROW_LSE, Gradients, LogSumExp, Operands, Options
from garrulax.kernels.experimental.tpu import backward, bias_gradients, forward, layout
from garrulax.kernels.experimental.tpu.layout import LANES, TpuPlan
from garrulax.kernels.experimental.tpu.schedule import MAX_ENTRIES, MAX_SIDE
from garrulax.kernels.passes import ForwardBackward

DTYPES = ("bfloat16", "float16", "float32")
BLOCK = 1024  # default keys of a block, and default queries of a block times query heads of a key/value head


@dataclasses.dataclass(frozen=True)
class TpuAttention(ForwardBackward):
    """Attention for TPUs, of float32, bfloat16 or float16 (computed as float32), with any widths and lengths.

    Attributes:
        block_q: Queries of a block, a multiple of 128; None chooses by the request.
        block_k: Keys of a block, a multiple of 128; None chooses by the request.
        chunk: Keys of a block whose scores are computed together.
        span_bytes: VMEM for the gradients of keys and values; longer texts take several passes over spans of keys.
        interpret: True, or `pltpu.InterpretParams`, to run without a TPU.
    """

    block_q: int | None = None
    block_k: int | None = None
    chunk: int = 512
    span_bytes: int = 16 << 20
    interpret: Any = False

    def unsupported_reason(self, options: Options, operands: Operands) -> str | None:
        """Why it cannot compute a request (operands may be abstract), or None."""
        o = operands
        dtypes = {str(x.dtype) for x in (o.query, o.key, o.value)}
        if len(dtypes) > 1 or not dtypes <= set(DTYPES):
            return f"it takes queries, keys and values of one of the dtypes {', '.join(DTYPES)}, not {sorted(dtypes)}"
        block_q, block_k = self.blocks(operands)
        rows, columns = math.ceil(o.query.shape[1] / block_q), math.ceil(o.key.shape[1] / block_k)
        if o.steps is not None or o.bias is not None:
            # Their kernels read an array [B, rows, columns] from scalar memory, where rows of it take whole lanes.
            columns += -columns % LANES
        if max(rows, columns) > MAX_SIDE or o.query.shape[0] * rows * columns > MAX_ENTRIES:
            return (
                f"{o.query.shape[0]} x {rows} x {columns} blocks are more than its list holds: "
                f"{MAX_SIDE} a side, {MAX_ENTRIES} together; larger block_q and block_k make fewer"
            )
        return None

    def blocks(self, operands: Operands) -> tuple[int, int]:
        """Queries and keys of a block."""
        T, H = operands.query.shape[1:3]
        S, K = operands.key.shape[1:3]
        block_q = self.block_q or max(LANES, min(_padded_length(T), BLOCK // _power_of_two(H // K)))
        return block_q, self.block_k or min(_padded_length(S), BLOCK)

    def forward(self, options: Options, operands: Operands) -> tuple[jax.Array, LogSumExp]:
        """See `ForwardBackward.forward`."""
        B, T, H, _ = operands.query.shape
        out, lse = forward.forward(*self._whole_blocks(options, operands))  # [B, K, G, T', Cv'], [B, K, G, T']
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
        B, T, H, C = o.query.shape
        S, K = o.key.shape[1:3]
        span = self._span(operands)
        plan, padded = self._whole_blocks(options, operands, span)
        more = padded.query.shape[1] - T
        rows = {
            "cotangent": layout.by_head(pad_axis(cotangent.astype(padded.query.dtype), more), K),
            # Queries of the padding get the lse of queries without keys, which makes their probabilities 0.
            "lse": jnp.pad(lse.value, ((0, 0), (0, 0), (0, more)), constant_values=EMPTY_ROW_LSE).reshape(
                B, K, H // K, -1
            ),
            "delta": pad_axis(delta, more, 2).reshape(B, K, H // K, -1),
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

    def _span(self, operands: Operands) -> int:
        """Keys whose gradients are computed in one pass: whole blocks, in passes of equal size."""
        _, block_k = self.blocks(operands)
        block_bytes = 4 * block_k * sum(n + -n % LANES for n in (operands.key.shape[3], operands.value.shape[3]))
        columns = math.ceil(operands.key.shape[1] / block_k)
        passes = math.ceil(columns / max(1, self.span_bytes // block_bytes))
        return math.ceil(columns / passes) * block_k

    def _whole_blocks(self, options: Options, operands: Operands, keys: int | None = None) -> tuple[TpuPlan, Operands]:
        """The plan, and the request padded to whole blocks and, if given, to a multiple of `keys` keys."""
        if operands.query.dtype == jnp.float16:  # which the matrix unit does not know
            q, k, v = (x.astype(jnp.float32) for x in (operands.query, operands.key, operands.value))
            operands = dataclasses.replace(operands, query=q, key=k, value=v)
        block_q, block_k = self.blocks(operands)
        options, operands = pad_to_blocks(options, operands, block_q, keys or block_k)
        chunk = math.gcd(self.chunk, block_k)
        return layout.make_plan(options, operands, block_q, block_k, chunk, self.interpret), operands


def _padded_length(length: int) -> int:
    """The least power of two times 128 that is not below the length."""
    return LANES * _power_of_two(math.ceil(length / LANES))


def _power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length()
