"""Feed-forward layers."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from garrulax.core.dtypes import at_least_float32
from garrulax.core.einsum import einsum, gather
from garrulax.core.spec import Tree
from garrulax.kernels import picking


def gelu_tanh(x: jax.Array) -> jax.Array:
    """GELU by the approximation with tanh (Hendrycks & Gimpel 2016), computed in at least float32.

    For the backward pass one array is kept, where JAX would keep the four terms of the product rule: on a CPU the
    slope, since tanh is expensive there; elsewhere x, since arithmetic is cheaper there than memory, and XLA would keep
    a slope in float32 even where x is bfloat16.
    """
    if picking.platform(picking.target_device(x)) == "cpu":
        return _gelu_tanh(x)
    return jax.checkpoint(_gelu_tanh)(x)


@jax.custom_jvp
def _gelu_tanh(x: jax.Array) -> jax.Array:
    return _gelu_and_slope(x)[0]


@_gelu_tanh.defjvp
def _gelu_tanh_jvp(primals, tangents):
    value, slope = _gelu_and_slope(*primals)
    return value, slope * tangents[0]


def _gelu_and_slope(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """GELU and its derivative, in x's dtype."""
    y, factor, cubic = x.astype(at_least_float32(x.dtype)), math.sqrt(2 / math.pi), 0.044715
    t = jnp.tanh(factor * (y + cubic * y**3))
    half = 0.5 * (1 + t)
    slope = half + 0.5 * y * (1 - t * t) * (factor * (1 + 3 * cubic * y**2))
    return (y * half).astype(x.dtype), slope.astype(x.dtype)


#: Activations by their name in Hugging Face configurations.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_fast": gelu_tanh,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


def check_activation(name: str) -> None:
    """Checks the name of an activation.

    Raises:
        ValueError: It is not in `ACTIVATIONS`.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}: choose from {', '.join(sorted(ACTIVATIONS))}")


def mlp(x: jax.Array, p: Tree, activation: str) -> jax.Array:
    """activation(x up + up_bias) down + down_bias. x: [B, T, D]; up: [D, F]; down: [F, D]; biases optional."""
    hidden = ACTIVATIONS[activation](linear("BTD,DF->BTF", x, p, "up"))
    return linear("BTF,FD->BTD", hidden, p, "down")


def gated_mlp(x: jax.Array, p: Tree, activation: str) -> jax.Array:
    """(activation(x gate) * x up) down (Shazeer 2020). x: [B, T, D]; gate, up: [D, F]; down: [F, D]."""
    gate = ACTIVATIONS[activation](linear("BTD,DF->BTF", x, p, "gate"))
    return linear("BTF,FD->BTD", gate * linear("BTD,DF->BTF", x, p, "up"), p, "down")


def linear(pattern: str, x: jax.Array, p: Tree, name: str) -> jax.Array:
    """A linear layer, as `core.spec.Declare.linear` declares it.

    Args:
        pattern: Letters of x, weight and result, such as "BTD,DHC->BTHC".
        x: Activations.
        p: Parameters: the weight under `name`, and its bias under `{name}_bias` where it has one, whose axes are the
            last of the result.
        name: Name of the layer in p.

    Raises:
        KeyError: There is no such parameter.
        ValueError: Shapes do not fit the pattern.
    """
    if name not in p:
        raise KeyError(f"no parameter {name!r} among {', '.join(p)}")
    y = einsum(pattern, x, p[name])
    bias = p.get(f"{name}_bias")
    return y if bias is None else y + gather(bias, y)


def split_heads(pattern: str, x: jax.Array, p: Tree, name: str) -> tuple[jax.Array, ...]:
    """A linear layer, its output split along axis 2: query, key and value of "BTD,DnHC->BTnHC"."""
    y = linear(pattern, x, p, name)
    return tuple(y[:, :, i] for i in range(y.shape[2]))
