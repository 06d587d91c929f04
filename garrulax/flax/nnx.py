"""A configuration as a `flax.nnx.Module`."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from garrulax import models
from garrulax.core import spec


class NNXModel(nnx.Module):
    """What `nnx_module` returns: every parameter an `nnx.Param` in attributes named as in the tree of `garrulax.init`.

    `model.blocks.attention.query` is the parameter `blocks/attention/query`; `model.config` the configuration.
    """

    def __init__(self, config: Any, params: spec.Tree):
        self.config = nnx.static(config)
        for name, tree in params.items():
            setattr(self, name, _wrapped(tree))

    def __call__(
        self, tokens: jax.Array, *, rngs: nnx.Rngs | jax.Array | None = None, **options: Any
    ) -> tuple[jax.Array, Any]:
        """(logits [B, T, V], cache or None) of tokens int32 [B, T].

        rngs: gives dropout, by its stream `dropout`; or a PRNG key. options: positions, mask, cache, remat, unroll as
        in `garrulax.forward`.
        """
        return models.forward(params_of(self), tokens, self.config, key=_key(rngs), **options)

    def hidden(
        self, tokens: jax.Array, *, rngs: nnx.Rngs | jax.Array | None = None, **options: Any
    ) -> tuple[jax.Array, Any]:
        """(hidden states [B, T, D] after the last norm, cache or None), for heads of your own; options as above."""
        return models.hidden(params_of(self), tokens, self.config, key=_key(rngs), **options)


def nnx_module(
    config: Any, *, rngs: nnx.Rngs | None = None, params: spec.Tree | None = None, dtype: Any = jnp.float32
) -> NNXModel:
    """A configuration as a `flax.nnx.Module`, with new parameters (rngs) or with those you have (params).

    rngs: its stream `params` gives the key of `garrulax.init`. dtype: of new parameters. params: as from
    `garrulax.init` or `garrulax.load`, stacked or unstacked, perhaps sharded; they are not copied. Nothing is
    allocated under `nnx.eval_shape`.

    Raises ValueError unless exactly one of rngs and params is given, and where the parameters do not fit the config.
    """
    models.family(config)
    if rngs is not None and params is None:
        params = models.init(config, rngs.params(), dtype=dtype)
    elif rngs is not None or params is None:
        raise ValueError("give rngs, for new parameters, or params, for those you have")
    spec.check_names(models.parameters(config), params)
    return NNXModel(config, params)


def params_of(module: nnx.Module) -> spec.Tree:
    """The parameters of an `nnx_module`, or of a part of one, as the tree that `garrulax.forward` and `save` take.

    The leaves are the arrays that the module holds at the moment, not copies.
    """
    return {name: _unwrapped(x) for name, x in vars(module).items() if isinstance(x, nnx.Module | nnx.Variable)}


def _wrapped(tree: spec.Tree) -> Any:
    if isinstance(tree, Mapping):
        return nnx.Dict({name: _wrapped(x) for name, x in tree.items()})
    if isinstance(tree, tuple):  # unstacked layers
        return nnx.List([_wrapped(x) for x in tree])
    return nnx.Param(tree)


def _unwrapped(x: Any) -> Any:
    if isinstance(x, nnx.List):
        return tuple(_unwrapped(y) for y in x)
    return x.get_value() if isinstance(x, nnx.Variable) else params_of(x)


def _key(rngs: nnx.Rngs | jax.Array | None) -> jax.Array | None:
    return rngs.dropout() if isinstance(rngs, nnx.Rngs) else rngs
