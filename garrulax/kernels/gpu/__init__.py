"""Attention on Hopper (sm_90a) and Blackwell (sm_100a) GPUs, with Mosaic GPU."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from garrulax.kernels import blocks, picking
from garrulax.kernels.call import Gradients, Operands, Options
from garrulax.kernels.gpu import blackwell
from garrulax.kernels.gpu.backward import backward
from garrulax.kernels.gpu.forward import Sizes, forward, sizes
from garrulax.kernels.gpu.rows import Rows, rows
from garrulax.kernels.passes import ForwardBackward
from garrulax.kernels.xla import Chunked

WIDEST = 256  # columns of one of Hopper's matrix instructions
HOPPER, BLACKWELL = "sm_90", "sm_100"
CAPABILITIES = {HOPPER: "9.0", BLACKWELL: "10.0"}


@dataclasses.dataclass(frozen=True)
class Kernel(ForwardBackward):
    """For bfloat16 and float16, heads up to 256 wide, any lengths and masks; deterministic. On Blackwell, heads 64 or
    128 wide, without a bias and relative positions.

    Gradients of a request with a bias or relative positions are XLA's: sums over rows and heads of what the kernels
    keep in registers would cost them more than they gain. So are all gradients on Blackwell, which has no kernels for
    them.

    sizes: of the forward pass on Hopper; None: by the widths of the heads.
    interpret: Hopper's matrix products are JAX's own, so that Mosaic GPU's interpreter can run it without a GPU.
    architecture: whose kernels are taken, "sm_90" or "sm_100"; None: those of the GPU that the program is for, and
    Hopper's where that is not known.
    """

    sizes: Sizes | None = None
    interpret: bool = False
    architecture: Literal["sm_90", "sm_100"] | None = None

    def unsupported_reason(self, options: Options, operands: Operands) -> str | None:
        """What it cannot compute: other dtypes, wider heads, on other GPUs, with an older jax."""
        o = operands
        dtypes = {x.dtype for x in (o.query, o.key, o.value)}
        if len(dtypes) > 1 or not dtypes <= {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)}:
            return f"queries, keys and values must be all bfloat16 or all float16, not {sorted(map(str, dtypes))}"
        widths = o.query.shape[3], o.value.shape[3]
        if max(widths) > WIDEST:
            return f"heads {max(widths)} wide; {WIDEST} is the widest"
        if self._architecture(o) == BLACKWELL and (reason := blackwell.unsupported_reason(o)):
            return reason
        if self.interpret:
            return None
        if jax.__version_info__ < (0, 11):
            return f"it needs the Mosaic GPU of jax 0.11 or newer, and this is jax {jax.__version__}"
        written = [known for name, known in CAPABILITIES.items() if self.architecture in (None, name)]
        if (capability := _capability()) not in (None, *written):
            return f"it is written for GPUs of compute capability {' and '.join(written)}, not {capability}"
        return None

    def forward(self, options: Options, operands: Operands) -> tuple[jax.Array, jax.Array]:
        """As `ForwardBackward.forward`."""
        T, Cv = operands.query.shape[1], operands.value.shape[3]
        if self._architecture(operands) == BLACKWELL:
            size = blackwell.BLOCK_Q, blackwell.KEYS
            options, o = blocks.pad_to_blocks(options, operands, *size)
            out, lse = blackwell.forward(options, o, _rows(options, o, *size))
            return out[:, :T], lse[:, :, :T]
        wide = _wide(operands)
        chosen = self.sizes or sizes(wide)
        size = chosen.block_q, chosen.block_k
        options, o = blocks.pad_to_blocks(options, wide, *size)
        out, lse = forward(options, o, _rows(options, o, *size), chosen, self.interpret)
        return out[:, :T, :, :Cv], lse[:, :, :T]

    def backward(
        self, options: Options, operands: Operands, lse: jax.Array, delta: jax.Array, cotangent: jax.Array
    ) -> Gradients:
        """As `ForwardBackward.backward`."""
        if operands.bias is not None or operands.steps is not None or self._architecture(operands) == BLACKWELL:
            return Chunked().backward(options, operands, lse, delta, cotangent)
        return backward(self, options, operands, lse, delta, cotangent)

    def _architecture(self, operands: Operands) -> str:
        return self.architecture or picking.architecture(picking.target_device(operands)) or HOPPER


def _rows(options: Options, o: Operands, block_q: int, block_k: int) -> Rows:
    shape = o.query.shape[0], o.query.shape[1] // block_q, o.key.shape[1] // block_k
    return rows(options.rule, o.query_streams, o.key_streams, block_q, block_k, shape)


def _wide(o: Operands) -> Operands:
    """Heads with zeros behind them up to a multiple of 16, the least that matrix instructions take."""

    def fill(x):
        return blocks.pad_axis(x, -x.shape[3] % 16, 3)

    return dataclasses.replace(o, query=fill(o.query), key=fill(o.key), value=fill(o.value))


def _capability() -> str | None:
    """Compute capability of the GPU that programs run on; None where there is none."""
    return jax.local_devices()[0].compute_capability if jax.default_backend() == "gpu" else None
