"""Prefixes: trained keys and values that stand before every text, while the model stays as it is.

Prefix tuning (Li & Liang 2021) trains the keys and values of P tokens that do not exist; prompt tuning (Lester et al.
2021) trains P embeddings, whose keys and values follow. P-tuning v2 (Liu et al. 2021) is the first under another name;
ChatGLM's code gives the text the positions 0, 1, ..., PEFT the positions P, P + 1, ....

Letters: B batch, T tokens, P tokens of the prefix, L layers, K key/value heads, C head width, S slots.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from garrulax.core.config import ModelConfig
from garrulax.core.spec import Tree
from garrulax.kernels.mask import Mask
from garrulax.layers.cache import Cache
from garrulax.layers.call import default_positions
from garrulax.models.forward_pass import blanks, cache_for, forward, hidden

_BEFORE = -1  # the rank of a prefix: every token attends to it


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
    """Keys and values before every text.

    Attributes:
        key: [L, P, K, C], as they enter the cache: rotary positions do not rotate them.
        value: [L, P, K, C].
        counted: Whether the positions of a text begin at P, as in PEFT, and not at 0, as in ChatGLM.
    """

    key: jax.Array
    value: jax.Array
    counted: bool = dataclasses.field(default=True, metadata={"static": True})

    @property
    def size(self) -> int:
        """P."""
        return self.key.shape[1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SoftPrompt:
    """Embeddings before every text.

    Attributes:
        rows: [P, D].
    """

    rows: jax.Array

    @property
    def size(self) -> int:
        """P."""
        return self.rows.shape[0]


def as_prefix(prefix: Prefix | SoftPrompt, params: Tree, config: ModelConfig) -> Prefix:
    """The keys and values of a prefix; those of a soft prompt are computed by the model, whose first tokens it is."""
    if isinstance(prefix, Prefix):
        return prefix
    table = {**params, "tokens": prefix.rows}
    config = dataclasses.replace(config, vocab=prefix.size)
    cache = cache_for(params, config, 1, prefix.size)
    tokens = jnp.arange(prefix.size, dtype=jnp.int32)[None]
    _, full = hidden(table, tokens, config, cache=cache)
    assert full is not None
    layers = full.layers
    if isinstance(layers, tuple):  # [K, P, C] of each layer
        key, value = (jnp.stack([layer[name] for layer in layers]) for name in ("key", "value"))
    else:
        key, value = (layers[name][:, 0] for name in ("key", "value"))
    return Prefix(key.swapaxes(1, 2), value.swapaxes(1, 2))


def cache_with(prefix: Prefix, params: Tree, config: ModelConfig, batch: int, size: int) -> Cache:
    """A cache whose rows begin with a prefix. It is differentiable in the prefix.

    Args:
        prefix: The keys and values.
        params: Of the model; their form and dtype decide those of the cache.
        config: Of the model.
        batch: B.
        size: Number of slots for the text.

    Raises:
        ValueError: The prefix is for another model.
    """
    layers, P, heads, width = prefix.key.shape
    wanted = (config.layers, config.kv_heads, config.head_dim)
    if (layers, heads, width) != wanted:
        raise ValueError(f"a prefix of {(layers, heads, width)} layers, heads and width is not for a model of {wanted}")
    cache = cache_for(params, config, batch, P + size)
    arrays = {"key": prefix.key, "value": prefix.value}
    new = {name: x.swapaxes(1, 2)[:, None] for name, x in arrays.items()}  # [L, 1, K, P, C]

    def put(x: jax.Array, part: jax.Array) -> jax.Array:
        return x.at[..., :P, :].set(part.astype(x.dtype))

    filled: Any
    if isinstance(cache.layers, tuple):
        rows = {name: jnp.broadcast_to(x, (layers, batch, *x.shape[2:])) for name, x in new.items()}
        filled = tuple(
            {name: put(x, rows[name][i].reshape(-1, P, width)) for name, x in layer.items()}
            for i, layer in enumerate(cache.layers)
        )
    else:
        filled = {name: put(x, new[name]) for name, x in cache.layers.items()}
    place = jnp.arange(P, dtype=jnp.int32) if prefix.counted else jnp.zeros(P, jnp.int32)
    values = {"rank": jnp.int32(_BEFORE), "segment": jnp.int32(0), "position": place}
    streams = {name: x.at[:, :P].set(values[name]) for name, x in cache.streams.items()}
    return dataclasses.replace(cache, layers=filled, streams=streams, used=jnp.full_like(cache.used, P))


def forward_after(
    prefix: Prefix | SoftPrompt,
    params: Tree,
    tokens: jax.Array,
    config: ModelConfig,
    *,
    positions: jax.Array | None = None,
    mask: Mask | None = None,
) -> tuple[jax.Array, Cache]:
    """`forward` of texts behind a prefix.

    Args:
        prefix: The prefix; differentiable.
        params: Of the model.
        tokens: int32 [B, T].
        config: Of the model.
        positions: As for `forward`; None counts from P or from 0, as the prefix says.
        mask: As for `forward`, of the tokens alone.

    Returns:
        Logits [B, T, V], and the cache.
    """
    ready = as_prefix(prefix, params, config)
    cache = cache_with(ready, params, config, *tokens.shape)
    if positions is None and not ready.counted:
        conventions = blanks(config)
        positions = default_positions(tokens, None, 1 if conventions is None else conventions.rows)
    logits, full = forward(params, tokens, config, positions=positions, mask=mask, cache=cache)
    assert full is not None
    return logits, full
