"""cuDNN's attention, called through `jax.nn`, for the requests that it can express exactly."""

import dataclasses

import jax
import jax.numpy as jnp

from garrulax.kernels.call import Operands, Options
from garrulax.kernels.mask import All


@dataclasses.dataclass(frozen=True)
class Cudnn:
    """cuDNN's fused attention, for NVIDIA GPUs from Ampere on.

    cuDNN masks by index and knows no streams, so the mask must be `All()` or causal for any values of the streams
    (`Options.causal`).
    """

    def unsupported_reason(self, options: Options, operands: Operands) -> str | None:
        """Why cuDNN cannot compute this request exactly and without an array of T x S, or None where it can."""
        o = operands
        (T, width), S = (o.query.shape[1], o.query.shape[3]), o.key.shape[1]
        full_bias = o.bias is None or o.bias.shape[2:] == (T, S)
        even = T % 2 == S % 2 == 0
        for unsupported, reason in (
            (not (options.causal or options.rule == All()), "cuDNN has no masks but causal for any data"),
            (options.causal and T != S, "cuDNN's causal mask needs as many keys as queries"),
            (options.softcap is not None, "cuDNN has no softcap"),
            (o.slopes is not None, "cuDNN has no ALiBi without a bias of T x S"),
            (o.steps is not None, "cuDNN has no relative bias without an array of T x S"),
            (o.seeds is not None, "cuDNN drops other probabilities than all other implementations"),
            (o.sinks is not None, "cuDNN has no sinks"),
            (not full_bias, f"cuDNN's bias is [*, *, T, S], not {None if o.bias is None else o.bias.shape}"),
            (o.bias is not None and not even, f"cuDNN's bias needs even lengths, not {T} and {S}"),
            (
                o.query.dtype not in (jnp.bfloat16, jnp.float16),
                f"cuDNN takes bfloat16 and float16, not {o.query.dtype}",
            ),
            (not o.query.dtype == o.key.dtype == o.value.dtype, "cuDNN takes query, key and value of one dtype"),
            (width % 8 or width > 128, f"cuDNN takes head widths that are multiples of 8 up to 128, not {width}"),
            (o.value.shape[3] != width, "cuDNN takes values as wide as the keys"),
        ):
            if unsupported:
                return reason
        return None

    def __call__(self, options: Options, operands: Operands) -> jax.Array:
        """Output [B, T, H, C] in the query's dtype, differentiable."""
        o = operands
        return jax.nn.dot_product_attention(
            o.query,
            o.key,
            o.value,
            bias=None if o.bias is None else o.bias.astype(o.query.dtype),
            is_causal=options.causal,
            scale=options.scale,
            implementation="cudnn",
        )
