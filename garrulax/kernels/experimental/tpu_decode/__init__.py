"""Decoding attention on TPUs: one pass over the active blocks of the cache, all heads of a block at once.

`step_list` lists the active blocks, `layout` has sizes and block specs, `kernel` is the kernel.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from garrulax.kernels.call import Options
from garrulax.kernels.decode.call import DecodeOperands
from garrulax.kernels.experimental.tpu_decode import layout, step_list
from garrulax.kernels.experimental.tpu_decode.kernel import call_kernel
from garrulax.kernels.experimental.tpu_decode.layout import TILE_ROWS, TpuDecodePlan
from garrulax.kernels.experimental.tpu_decode.step_list import DecodeSteps
from garrulax.kernels.mask import Rule, Streams

MAX_WORDS = 1 << 17  # int32 words that the list of steps may take: half of scalar memory
MAX_ROWS = 1024  # rows of a key/value head, each a query head and a query


@dataclasses.dataclass(frozen=True)
class TpuDecode:
    """Decoding attention for TPUs; scores are in float32.

    Attributes:
        step_bytes: Bytes of keys and values that a step reads, about.
        most_keys: Slots that a step reads at most.
        splits: Number of parts into which each sequence is divided, for chips whose cores share a grid.
        vmem_bytes: Vector memory that the kernel may use.
        interpret: True, or `pltpu.InterpretParams`, to run without a TPU.
    """

    step_bytes: int = 1 << 21
    most_keys: int = 1024
    splits: int = 1
    vmem_bytes: int = 48 << 20
    interpret: Any = False

    def unsupported_reason(self, options: Options, cached: DecodeOperands) -> str | None:
        """See `decode.Implementation`."""
        c = cached
        plan = self.plan(c)
        dtypes = {x.dtype for x in (c.query, c.key)}
        page = c.key.shape[2]
        if c.steps is not None:
            return "it has no relative bias in steps"
        if not dtypes <= set(TILE_ROWS):
            return f"it has no {', '.join(sorted(map(str, dtypes)))}"
        if c.table is not None and page % TILE_ROWS[c.key.dtype]:
            return f"pages of {page} slots are no multiple of {TILE_ROWS[c.key.dtype]}, as {c.key.dtype} needs"
        if plan.rows > MAX_ROWS:
            return f"{c.query.shape[1]} queries of {c.query.shape[2]} heads make {plan.rows} rows, above {MAX_ROWS}"
        if plan.columns >= step_list.MAX_COLUMNS or c.query.shape[0] >= step_list.MAX_ROWS:
            return f"{c.query.shape[0]} sequences of {plan.columns} blocks are more than a step's word can address"
        heads, widths = c.key.shape[1], c.key.shape[3] + c.value.shape[3]
        # Two buffers: the kernel computes one block while the pipeline copies the next.
        vmem = 2 * heads * plan.size * widths * c.key.dtype.itemsize
        if vmem > self.vmem_bytes // 2:
            return f"{plan.size} slots of {heads} heads of widths {widths} in all do not fit into vector memory"
        words = self.splits * c.query.shape[0] * plan.columns * (1 + plan.pages)
        if words > MAX_WORDS:
            return f"the {words} words of its list of steps do not fit into scalar memory ({MAX_WORDS})"
        return None

    def __call__(self, options: Options, cached: DecodeOperands) -> tuple[jax.Array, jax.Array]:
        """See `decode.Implementation`."""
        plan = self.plan(cached)
        rule, streams = step_list.ordered_streams(options, cached, plan.size)
        steps = self.steps(plan, rule, streams, cached)
        return call_kernel(plan, dataclasses.replace(options, rule=rule), streams, steps, cached)

    def steps(self, plan: TpuDecodePlan, rule: Rule, streams: Streams, cached: DecodeOperands) -> DecodeSteps:
        """The steps of a call.

        Args:
            plan: Of the call.
            rule: As from `step_list.ordered_streams`.
            streams: Key streams, as from `step_list.ordered_streams`.
            cached: The arrays of the request.
        """
        B, n = cached.query.shape[0], plan.pages
        # With pages, the mask decides for each of them, so that inactive pages of an active block are not read.
        shape = (B, plan.columns * max(n, 1))
        active, full = step_list.block_activity(rule, cached.query_streams, streams, plan.size // max(n, 1), shape)
        if cached.table is None:
            return step_list.decode_steps(active, full, self.splits)
        table = jnp.pad(cached.table, ((0, 0), (0, shape[1] - cached.table.shape[1])))
        active, full, table = (x.reshape(B, plan.columns, n) for x in (active, full, table))
        return step_list.decode_steps(active, full, self.splits, table)

    def plan(self, cached: DecodeOperands) -> TpuDecodePlan:
        """The sizes of a call."""
        return layout.make_plan(cached, self.step_bytes, self.most_keys, self.splits, self.vmem_bytes, self.interpret)
