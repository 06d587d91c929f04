"""Feed-forward layers."""

import jax
import jax.numpy as jnp

from garrulax.core.einsum import einsum, gather

#: Activations by their name in Hugging Face configurations.
ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


def check_activation(name: str) -> None:
    """Raises ValueError for an activation that is not in `ACTIVATIONS`."""
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}: choose from {', '.join(sorted(ACTIVATIONS))}")


def mlp(x: jax.Array, p: dict, activation: str) -> jax.Array:
    """activation(x up + up_bias) down + down_bias. x: [B, T, D]; up: [D, F]; down: [F, D]; biases optional."""
    hidden = ACTIVATIONS[activation](linear("BTD,DF->BTF", x, p, "up"))
    return linear("BTF,FD->BTD", hidden, p, "down")


def gated_mlp(x: jax.Array, p: dict, activation: str) -> jax.Array:
    """(activation(x gate) * x up) down (Shazeer 2020). x: [B, T, D]; gate, up: [D, F]; down: [F, D]."""
    gate = ACTIVATIONS[activation](linear("BTD,DF->BTF", x, p, "gate"))
    return linear("BTF,FD->BTD", gate * linear("BTD,DF->BTF", x, p, "up"), p, "down")


def linear(spec: str, x: jax.Array, p: dict, name: str) -> jax.Array:
    """einsum of x with p[name], plus p[name + "_bias"] where there is one (its axes are the last of the output)."""
    y = einsum(spec, x, p[name])
    bias = p.get(f"{name}_bias")
    return y if bias is None else y + gather(bias, y.dtype)
