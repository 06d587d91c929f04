"""Attention on NVIDIA GPUs, in Pallas' Mosaic GPU dialect.

The kernels for Hopper (sm_90a) are in `kernels.gpu` and have run on a device. The forward kernel for Blackwell
(sm_100a), which has not, is in `kernels.experimental.blackwell`; only programs for such a GPU use it.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from garrulax.kernels import blocks, large_scores, picking
from garrulax.kernels.call import Gradients, LogSumExp, Operands, Options
from garrulax.kernels.gpu.backward import backward, backward_lists
from garrulax.kernels.gpu.block_lists import RequestLists, lists_of
from garrulax.kernels.gpu.forward import forward
from garrulax.kernels.gpu.forward_sizes import HopperForwardSizes, choose_sizes
from garrulax.kernels.gpu.products import pad_widths
from garrulax.kernels.passes import ForwardBackward

WIDEST = 256  # columns of one of Hopper's matrix instructions
HOPPER, BLACKWELL = "sm_90", "sm_100"
CAPABILITIES = {HOPPER: "9.0", BLACKWELL: "10.0"}


@dataclasses.dataclass(frozen=True)
class GPUAttention(ForwardBackward):
    """Attention for bfloat16 and float16, heads up to 256 wide, any lengths and masks; deterministic.

    Gradients of a request with a bias or relative positions are computed by XLA: the kernels keep gradients of scores
    in registers only, and to sum them up over rows and heads would cost more than the kernels gain. On Blackwell heads
    are 64 or 128 wide, without a bias and relative positions, and all gradients are computed by XLA.

    Attributes:
        sizes: Of the forward pass on Hopper; None chooses them by the widths of the heads.
        interpret: Replaces Hopper's matrix products by JAX's, so that Mosaic GPU's interpreter can run the kernels on
            a CPU.
        architecture: The GPU whose kernels are taken. None takes those of the GPU that the program is for, and
            Hopper's where that is not known.
    """

    sizes: HopperForwardSizes | None = None
    interpret: bool = False
    architecture: Literal["sm_90", "sm_100"] | None = None

    def unsupported_reason(self, options: Options, operands: Operands) -> str | None:
        """Why it cannot compute this request, or None where it can."""
        o = operands
        dtypes = {x.dtype for x in (o.query, o.key, o.value)}
        if len(dtypes) > 1 or not dtypes <= {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)}:
            return f"queries, keys and values must be all bfloat16 or all float16, not {sorted(map(str, dtypes))}"
        widths = o.query.shape[3], o.value.shape[3]
        if max(widths) > WIDEST:
            return f"heads {max(widths)} wide; {WIDEST} is the widest"
        if self._architecture(o) == BLACKWELL and (reason := _blackwell().unsupported_reason(o)):
            return reason
        if self.interpret:
            return None
        if jax.__version_info__ < (0, 11):
            return f"it needs the Mosaic GPU of jax 0.11 or newer, and this is jax {jax.__version__}"
        written = [known for name, known in CAPABILITIES.items() if self.architecture in (None, name)]
        if (capability := _capability()) not in (None, *written):
            return f"it is written for GPUs of compute capability {' and '.join(written)}, not {capability}"
        return None

    def forward(self, options: Options, operands: Operands) -> tuple[jax.Array, LogSumExp]:
        """Output and lse, as `ForwardBackward.forward` describes them."""
        with jax.enable_x64(False):  # indices in the kernels would be int64, which they do not take
            out, lse = self._forward(options, operands)
            return out, LogSumExp.rounded(lse)

    def _forward(self, options: Options, operands: Operands) -> tuple[jax.Array, jax.Array]:
        T, Cv = operands.query.shape[1], operands.value.shape[3]
        if self._architecture(operands) == BLACKWELL:
            blackwell = _blackwell()
            size = blackwell.BLOCK_Q, blackwell.KEYS
            options, o = blocks.pad_to_blocks(options, operands, *size)
            out, lse = blackwell.forward(options, o, lists_of(options, o, *size))
            return out[:, :T], lse[:, :, :T]
        sizes, options, o = self._padded(options, operands)
        lists = lists_of(options, o, sizes.block_q, sizes.block_k) if o.lists is None else o.lists.forward
        out, lse = forward(options, o, lists, sizes, self.interpret)
        return out[:, :T, :, :Cv], lse[:, :, :T]

    def lists(self, options: Options, operands: Operands) -> RequestLists | None:
        """The blocks that the three kernels for Hopper visit; None on Blackwell. See `ForwardBackward.lists`."""
        if self._architecture(operands) == BLACKWELL:
            return None
        with jax.enable_x64(False):
            gradients = None if self._backward_is_xla(operands) else backward_lists(options, operands)
            sizes, options, o = self._padded(options, operands)
            return RequestLists(lists_of(options, o, sizes.block_q, sizes.block_k), gradients)

    def backward(
        self, options: Options, operands: Operands, lse: LogSumExp, delta: jax.Array, cotangent: jax.Array
    ) -> Gradients:
        """Gradients, as `ForwardBackward.backward` describes them."""
        if self._backward_is_xla(operands):
            return large_scores.backward_by_xla(options, operands, lse, delta, cotangent)
        with jax.enable_x64(False):
            return backward(options, operands, lse.value, delta, cotangent, self.interpret)

    def _padded(self, options: Options, operands: Operands) -> tuple[HopperForwardSizes, Options, Operands]:
        """The sizes of Hopper's forward pass, and the request padded to whole blocks of them."""
        wide = pad_widths(operands)
        sizes = self.sizes or choose_sizes(options, wide)
        return sizes, *blocks.pad_to_blocks(options, wide, sizes.block_q, sizes.block_k)

    def _backward_is_xla(self, operands: Operands) -> bool:
        return operands.bias is not None or operands.steps is not None or self._architecture(operands) == BLACKWELL

    def _architecture(self, operands: Operands) -> str:
        return self.architecture or picking.architecture(picking.target_device(operands)) or HOPPER


def _blackwell() -> Any:
    """The kernels for Blackwell, imported only where they are used."""
    from garrulax.kernels.experimental import blackwell

    return blackwell


def _capability() -> str | None:
    """Compute capability of the GPU that programs run on; None where there is none."""
    return jax.local_devices()[0].compute_capability if jax.default_backend() == "gpu" else None
