"""Attention on TPUs: Pallas kernels for training, forward and backward, with any mask as a list of active blocks."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from garrulax.kernels.blocks import pad_axis, pad_to_blocks
from garrulax.kernels.call import EMPTY_ROW_LSE, Gradients, Operands, Options
from garrulax.kernels.passes import ForwardBackward
from garrulax.kernels.tpu import added, backward, forward, plan
from garrulax.kernels.tpu.plan import LANES
from garrulax.kernels.tpu.schedule import ENTRIES, SIDE

DTYPES = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True)
class Kernel(ForwardBackward):
    """For float32, bfloat16 and float16 (computed as float32), any widths and lengths.

    block_q, block_k: tokens of a block, multiples of 128; None is what fits the request. chunk: keys of a block that
    are computed at once. span_bytes: of VMEM, for the gradients of keys and values; longer texts take several passes.
    interpret: True, or `pltpu.InterpretParams`, to run where there is no TPU.
    """

    block_q: int | None = None
    block_k: int | None = None
    chunk: int = 512
    span_bytes: int = 16 << 20
    interpret: Any = False

    def unsupported_reason(self, options: Options, operands: Operands) -> str | None:
        """Why not, or None."""
        o = operands
        dtypes = {str(x.dtype) for x in (o.query, o.key, o.value)}
        if len(dtypes) > 1 or not dtypes <= set(DTYPES):
            return f"it takes queries, keys and values of one of the dtypes {', '.join(DTYPES)}, not {sorted(dtypes)}"
        block_q, block_k = self.blocks(operands)
        rows, columns = math.ceil(o.query.shape[1] / block_q), math.ceil(o.key.shape[1] / block_k)
        if o.steps is not None or o.bias is not None:
            columns += -columns % LANES  # of these there is an array in scalar memory, which has whole lanes
        if max(rows, columns) > SIDE or o.query.shape[0] * rows * columns > ENTRIES:
            return (
                f"{o.query.shape[0]} x {rows} x {columns} blocks are more than its list holds: "
                f"{SIDE} a side, {ENTRIES} together; larger block_q and block_k make fewer"
            )
        return None

    def blocks(self, operands: Operands) -> tuple[int, int]:
        """Tokens of a block of queries and of keys."""
        T, H = operands.query.shape[1:3]
        S, K = operands.key.shape[1:3]
        block_q = self.block_q or max(LANES, min(_whole(T), 1024 // _power(H // K)))
        return block_q, self.block_k or min(_whole(S), 1024)

    def forward(self, options: Options, operands: Operands) -> tuple[jax.Array, jax.Array]:
        """As `ForwardBackward.forward`."""
        B, T, H, _ = operands.query.shape
        out, lse = forward.forward(*self._cut(options, operands))
        out = plan.by_token(out, T, operands.value.shape[3]).astype(operands.query.dtype)
        return out, lse.reshape(B, H, -1)[:, :, :T]

    def backward(
        self, options: Options, operands: Operands, lse: jax.Array, delta: jax.Array, cotangent: jax.Array
    ) -> Gradients:
        """As `ForwardBackward.backward`."""
        o = operands
        B, T, H, C = o.query.shape
        S, K = o.key.shape[1:3]
        span = self._span(operands)
        p, filled = self._cut(options, operands, span)
        more = filled.query.shape[1] - T
        rows = {
            "cotangent": plan.by_head(pad_axis(cotangent.astype(filled.query.dtype), more), K),
            "lse": jnp.pad(lse, ((0, 0), (0, 0), (0, more)), constant_values=EMPTY_ROW_LSE).reshape(B, K, H // K, -1),
            "delta": pad_axis(delta, more, 2).reshape(B, K, H // K, -1),
        }
        dq, dk, dv = backward.by_spans(p, filled, rows, span)
        dbias = dsteps = None
        if o.bias is not None and filled.bias is not None:
            dbias = added.bias_gradient(p, filled, filled.bias, rows)[:, :, : o.bias.shape[2], :S].astype(o.bias.dtype)
        if o.steps is not None:
            dsteps = added.steps_gradient(p, filled, o.steps, rows).astype(o.steps.dtype)
        dq, dk, dv = (
            plan.by_token(dq, T, C),
            *(plan.by_token(x[:, :, None], S, n) for x, n in ((dk, C), (dv, o.value.shape[3]))),
        )
        return Gradients(dq.astype(o.query.dtype), dk.astype(o.key.dtype), dv.astype(o.value.dtype), dbias, dsteps)

    def _span(self, operands: Operands) -> int:
        """Keys whose gradients are computed together: whole blocks, as equally many as possible each time."""
        _, block_k = self.blocks(operands)
        bytes_of_block = 4 * block_k * sum(n + -n % LANES for n in (operands.key.shape[3], operands.value.shape[3]))
        columns = math.ceil(operands.key.shape[1] / block_k)
        times = math.ceil(columns / max(1, self.span_bytes // bytes_of_block))
        return math.ceil(columns / times) * block_k

    def _cut(self, options: Options, operands: Operands, keys: int | None = None) -> tuple[plan.Plan, Operands]:
        """The plan and the request filled up to whole blocks, and to a multiple of so many keys."""
        if operands.query.dtype == jnp.float16:
            q, k, v = (x.astype(jnp.float32) for x in (operands.query, operands.key, operands.value))
            operands = dataclasses.replace(operands, query=q, key=k, value=v)
        block_q, block_k = self.blocks(operands)
        options, operands = pad_to_blocks(options, operands, block_q, keys or block_k)
        chunk = math.gcd(self.chunk, block_k)
        return plan.planned(options, operands, block_q, block_k, chunk, self.interpret), operands


def _whole(length: int) -> int:
    """The least power of two times 128 that holds the length."""
    return LANES * _power(math.ceil(length / LANES))


def _power(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length()
