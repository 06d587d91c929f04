"""A configuration as a `flax.linen.Module`."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen

from garrulax import models
from garrulax.core import spec


class LinenModel(linen.Module):
    """What `linen_module` returns. Its `params` collection is the tree of `garrulax.init`, leaf for leaf.

    config: a family's Config. dtype: of new parameters.
    """

    config: Any
    dtype: Any = jnp.float32

    def setup(self):
        """Declares the parameters, for `init`."""
        if self.is_initializing():
            for name, tree in models.parameters(self.config).items():
                self.param(name, lambda key, tree=tree: spec.init(tree, key, self.dtype))

    def __call__(self, tokens: jax.Array, **options: Any) -> tuple[jax.Array, Any]:
        """(logits [B, T, V], cache or None) of tokens int32 [B, T].

        options: positions, mask, cache, remat, unroll as in `garrulax.forward`; `apply(..., rngs={"dropout": key})`
        gives dropout. Raises ValueError for parameters that do not fit the config.
        """
        return models.forward(self._params(), tokens, self.config, key=self._dropout_key(), **options)

    def hidden(self, tokens: jax.Array, **options: Any) -> tuple[jax.Array, Any]:
        """(hidden states [B, T, D] after the last norm, cache or None), for heads of your own; options as above."""
        return models.hidden(self._params(), tokens, self.config, key=self._dropout_key(), **options)

    def _params(self) -> spec.Tree:
        # Not self.param, which wants the leaves as `init` made them: they may be unstacked, or boxed with metadata.
        params = linen.unbox(self.variables.get("params", {}))
        spec.check_names(models.parameters(self.config), params)
        return params

    def _dropout_key(self) -> jax.Array | None:
        return self.make_rng("dropout") if self.has_rng("dropout") else None


def linen_module(config: Any, dtype: Any = jnp.float32, name: str | None = None) -> LinenModel:
    """A configuration as a `flax.linen.Module`.

    dtype: of the parameters that `module.init(key, tokens)` makes. name: as a part of another module.
    `module.apply({"params": params}, tokens)` takes the parameters of `garrulax.init` and `garrulax.load`, stacked or
    unstacked, and `variables["params"]` is such a tree.
    Raises TypeError for what is no configuration.
    """
    models.family(config)
    return LinenModel(config, dtype, name=name)


def logical_axes(config: Any) -> spec.Tree:
    """A PartitionSpec of logical axis names ("embed", "heads", ...) for every parameter.

    `flax.linen.logical_to_mesh_sharding(logical_axes(config), mesh, rules)` makes NamedShardings of them by rules of
    yours; by those of Garrulax, `core.sharding.shardings` does.
    """
    return spec.map_specs(lambda s: jax.P(*s.axes), models.parameters(config))
