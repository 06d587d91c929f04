"""Attention on Hopper GPUs (sm_90a), with Mosaic GPU."""

import dataclasses

import jax
import jax.numpy as jnp

from garrulax.kernels import blocks
from garrulax.kernels.call import Gradients, Operands, Options
from garrulax.kernels.gpu.backward import backward
from garrulax.kernels.gpu.forward import Sizes, forward, sizes
from garrulax.kernels.gpu.rows import rows
from garrulax.kernels.passes import TwoPasses
from garrulax.kernels.xla import Chunked

WIDEST = 256  # columns of one matrix instruction


@dataclasses.dataclass(frozen=True)
class Kernel(TwoPasses):
    """For bfloat16 and float16, heads up to 256 wide, any lengths and masks; deterministic.

    Gradients of a request with a bias or relative positions are XLA's: sums over rows and heads of what the kernels
    keep in registers would cost them more than they gain.

    sizes: of the forward pass; None: by the widths of the heads.
    interpret: matrix products are JAX's own, so that Mosaic GPU's interpreter can run the kernels without a GPU.
    """

    sizes: Sizes | None = None
    interpret: bool = False

    def refusal(self, options: Options, operands: Operands) -> str | None:
        """What it cannot compute: other dtypes, wider heads, on other GPUs, with an older jax."""
        o = operands
        dtypes = {x.dtype for x in (o.query, o.key, o.value)}
        if len(dtypes) > 1 or not dtypes <= {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)}:
            return f"queries, keys and values must be all bfloat16 or all float16, not {sorted(map(str, dtypes))}"
        widths = o.query.shape[3], o.value.shape[3]
        if max(widths) > WIDEST:
            return f"heads {max(widths)} wide; {WIDEST} is the widest"
        if self.interpret:
            return None
        if jax.__version_info__ < (0, 11):
            return f"it needs the Mosaic GPU of jax 0.11 or newer, and this is jax {jax.__version__}"
        if (capability := _capability()) not in (None, "9.0"):
            return f"it is written for GPUs of compute capability 9.0, not {capability}"
        return None

    def forward(self, options: Options, operands: Operands) -> tuple[jax.Array, jax.Array]:
        """As `TwoPasses.forward`."""
        T, Cv = operands.query.shape[1], operands.value.shape[3]
        wide = _wide(operands)
        size = self.sizes or sizes(wide)
        options, o = blocks.fill_up(options, wide, size.block_q, size.block_k)
        shape = o.query.shape[0], o.query.shape[1] // size.block_q, o.key.shape[1] // size.block_k
        lists = rows(options.rule, o.query_streams, o.key_streams, size.block_q, size.block_k, shape)
        out, lse = forward(options, o, lists, size, self.interpret)
        return out[:, :T, :, :Cv], lse[:, :, :T]

    def backward(
        self, options: Options, operands: Operands, lse: jax.Array, delta: jax.Array, cotangent: jax.Array
    ) -> Gradients:
        """As `TwoPasses.backward`."""
        if operands.bias is not None or operands.steps is not None:
            return Chunked().backward(options, operands, lse, delta, cotangent)
        return backward(self, options, operands, lse, delta, cotangent)


def _wide(o: Operands) -> Operands:
    """Heads with zeros behind them up to a multiple of 16, the least that matrix instructions take."""

    def fill(x):
        return blocks.fill(x, -x.shape[3] % 16, 3)

    return dataclasses.replace(o, query=fill(o.query), key=fill(o.key), value=fill(o.value))


def _capability() -> str | None:
    """Compute capability of the GPU that programs run on; None where there is none."""
    return jax.local_devices()[0].compute_capability if jax.default_backend() == "gpu" else None
