"""A configuration as a `flax.linen.Module`."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen

from garrulax import models
from garrulax.core import spec
from garrulax.core.config import ModelConfig
from garrulax.layers.cache import Cache


class LinenModel(linen.Module):
    """The module that `linen_module` returns. Its `params` collection is the tree of `garrulax.init`.

    Attributes:
        config: A family's Config.
        dtype: Dtype of new parameters.
    """

    config: ModelConfig
    dtype: Any = jnp.float32

    def setup(self):
        """Declares the parameters; `init` calls it."""
        if self.is_initializing():
            for name, tree in models.parameters(self.config).items():
                self.param(name, lambda key, tree=tree: spec.init(tree, key, self.dtype))

    def __call__(self, tokens: jax.Array, **options: Any) -> tuple[jax.Array, Cache | None]:
        """Computes logits.

        Dropout is on in `apply(..., rngs={"dropout": key})`.

        Args:
            tokens: int32 [B, T].
            options: Positions, mask, cache, remat and unroll, as in `garrulax.forward`.

        Returns:
            The logits [B, T, V], and the cache or None.

        Raises:
            ValueError: The parameters do not fit the config.
        """
        return models.forward(self._params(), tokens, self.config, key=self._dropout_key(), **options)

    def hidden(self, tokens: jax.Array, **options: Any) -> tuple[jax.Array, Cache | None]:
        """Returns the hidden states [B, T, D] after the last norm, for custom heads, and the cache or None.

        Arguments and errors are those of a call.
        """
        return models.hidden(self._params(), tokens, self.config, key=self._dropout_key(), **options)

    def _params(self) -> spec.Tree:
        # self.param accepts only leaves like those of `setup`; these may be unstacked, or boxed with metadata.
        params = linen.unbox(self.variables.get("params", {}))
        spec.check_params(models.parameters(self.config), params)
        return params

    def _dropout_key(self) -> jax.Array | None:
        return self.make_rng("dropout") if self.has_rng("dropout") else None


def linen_module(config: ModelConfig, dtype: Any = jnp.float32, name: str | None = None) -> LinenModel:
    """Returns a configuration as a `flax.linen.Module`.

    `module.apply({"params": params}, tokens)` takes the parameters of `garrulax.init` and `garrulax.load`, stacked or
    unstacked. `module.init(key, tokens)["params"]` is such a tree.

    Args:
        config: A family's Config.
        dtype: Dtype of the parameters that `module.init` makes.
        name: Name of the module as a part of another module.

    Raises:
        TypeError: `config` is not a Config.

    Example:
        >>> import jax, garrulax as gx
        >>> from garrulax.flax import linen_module
        >>> config = gx.preset("gpt2-tiny", layers=1, width=32, heads=2, vocab=257)
        >>> tokens = jax.numpy.array([[5, 17, 3]])
        >>> logits, _ = linen_module(config).apply({"params": gx.init(config, jax.random.key(0))}, tokens)
        >>> logits.shape
        (1, 3, 257)
    """
    models.family(config)  # raises TypeError
    return LinenModel(config, dtype, name=name)


def logical_axes(config: ModelConfig) -> spec.Tree:
    """Returns a PartitionSpec of logical axis names ("embed", "heads", ...) for every parameter.

    `flax.linen.logical_to_mesh_sharding(logical_axes(config), mesh, rules)` turns them into NamedShardings by custom
    rules; `core.sharding.shardings` does so by the rules of Garrulax.

    Example:
        >>> import garrulax as gx
        >>> from garrulax.flax import logical_axes
        >>> tuple(logical_axes(gx.preset("gpt2-tiny"))["tokens"])
        ('vocab', 'embed')
    """
    return spec.map_specs(lambda s: jax.P(*s.axes), models.parameters(config))
