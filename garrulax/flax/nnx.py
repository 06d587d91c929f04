"""A configuration as a `flax.nnx.Module`."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from garrulax import models
from garrulax.core import spec
from garrulax.core.config import ModelConfig
from garrulax.layers.cache import Cache


class NNXModel(nnx.Module):
    """The module that `nnx_module` returns.

    Every parameter is an `nnx.Param`, in attributes with the names of the tree of `garrulax.init`:
    `model.blocks.attention.query` is the parameter `blocks/attention/query`.

    Attributes:
        config: A family's Config.
    """

    def __init__(self, config: ModelConfig, params: spec.Tree):
        self.config = nnx.static(config)
        for name, tree in params.items():
            setattr(self, name, _to_nnx(tree))

    def __call__(
        self, tokens: jax.Array, *, rngs: nnx.Rngs | jax.Array | None = None, **options: Any
    ) -> tuple[jax.Array, Cache | None]:
        """Computes logits.

        Args:
            tokens: int32 [B, T].
            rngs: Turns dropout on: an `nnx.Rngs`, whose stream `dropout` is used, or a PRNG key.
            options: Positions, mask, cache, remat and unroll, as in `garrulax.forward`.

        Returns:
            The logits [B, T, V], and the cache or None.
        """
        return models.forward(params_of(self), tokens, self.config, key=_key(rngs), **options)

    def hidden(
        self, tokens: jax.Array, *, rngs: nnx.Rngs | jax.Array | None = None, **options: Any
    ) -> tuple[jax.Array, Cache | None]:
        """Returns the hidden states [B, T, D] after the last norm, for custom heads, and the cache or None.

        Arguments are those of a call.
        """
        return models.hidden(params_of(self), tokens, self.config, key=_key(rngs), **options)


def nnx_module(
    config: ModelConfig, *, rngs: nnx.Rngs | None = None, params: spec.Tree | None = None, dtype: Any = jnp.float32
) -> NNXModel:
    """Returns a configuration as a `flax.nnx.Module`, with new parameters (`rngs`) or given ones (`params`).

    Nothing is allocated under `nnx.eval_shape`.

    Args:
        config: A family's Config.
        rngs: Its stream `params` gives the key of `garrulax.init`.
        params: From `garrulax.init` or `garrulax.load`, stacked or unstacked, on one device or sharded. They are not
            copied.
        dtype: Dtype of new parameters.

    Raises:
        TypeError: `config` is not a Config.
        ValueError: Both or neither of rngs and params are given, or the parameters do not fit the config.

    Example:
        >>> import jax, garrulax as gx
        >>> from flax import nnx
        >>> from garrulax.flax import nnx_module
        >>> model = nnx_module(gx.preset("gpt2-tiny", layers=1, width=32, heads=2, vocab=257), rngs=nnx.Rngs(0))
        >>> logits, _ = model(jax.numpy.array([[5, 17, 3]]))
        >>> logits.shape, model.tokens.shape
        ((1, 3, 257), (257, 32))
    """
    models.family(config)
    if rngs is not None and params is None:
        params = models.init(config, rngs.params(), dtype=dtype)
    elif rngs is not None or params is None:
        raise ValueError("give rngs, for new parameters, or params, for those you have")
    spec.check_params(models.parameters(config), params)
    return NNXModel(config, params)


def params_of(module: nnx.Module) -> spec.Tree:
    """Returns the parameters of an `nnx_module`, or of a part of one, as the tree that `garrulax.forward` takes.

    The leaves are the arrays that the module holds at the time of the call, not copies.

    Example:
        >>> import jax, garrulax as gx
        >>> from garrulax.flax import nnx_module, params_of
        >>> config = gx.preset("gpt2-tiny", layers=1, width=32, heads=2, vocab=257)
        >>> params = gx.init(config, jax.random.key(0))
        >>> params_of(nnx_module(config, params=params))["tokens"] is params["tokens"]
        True
    """
    return {name: _from_nnx(x) for name, x in vars(module).items() if isinstance(x, nnx.Module | nnx.Variable)}


def _to_nnx(tree: spec.Tree) -> Any:
    if isinstance(tree, Mapping):
        return nnx.Dict({name: _to_nnx(x) for name, x in tree.items()})
    if isinstance(tree, tuple):  # unstacked layers
        return nnx.List([_to_nnx(x) for x in tree])
    return nnx.Param(tree)


def _from_nnx(x: Any) -> Any:
    if isinstance(x, nnx.List):
        return tuple(_from_nnx(y) for y in x)
    return x.get_value() if isinstance(x, nnx.Variable) else params_of(x)


def _key(rngs: nnx.Rngs | jax.Array | None) -> jax.Array | None:
    return rngs.dropout() if isinstance(rngs, nnx.Rngs) else rngs
