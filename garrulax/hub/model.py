"""A loaded model: configuration, parameters, tokenizer."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from garrulax.core.config import ModelConfig
from garrulax.core.spec import Tree
from garrulax.hub.tokenizers import Tokenizer
from garrulax.models.prefix import Prefix, SoftPrompt


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A configuration, its parameters, and the tokenizer of its texts.

    Attributes:
        config: The Config of a family.
        params: The tree of arrays that `garrulax.forward` takes, stacked or unstacked.
        tokenizer: The tokenizer, or None.
        generation: The content of generation_config.json as loaded; `garrulax.save` writes it back. Its end tokens are
            in `config.eos`, which decides. Nothing else in it has an effect: temperature and the like are arguments of
            `garrulax.generate`.
        prefix: Keys and values, or embeddings, that stand before every text (`models.prefix`); None without. Only
            `generate` and `stream` take a model with a prefix; others refuse it.
        adapter: What adapter_config.json says, or will say, of the adapter in `params`; empty without one.
        adapters: By name, models with other adapters of the same weights; `garrulax.generate(adapter=...)` chooses.

    Example:
        >>> import jax, garrulax as gx
        >>> config = gx.preset("gpt2-tiny", layers=1, width=32, heads=2)
        >>> model = gx.Model(config, gx.init(config, jax.random.key(0)))
        >>> model.replace(params=gx.unstack(model.params)).config == config
        True
    """

    config: ModelConfig
    params: Tree = dataclasses.field(repr=False)
    tokenizer: Tokenizer | None = None
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)
    prefix: Prefix | SoftPrompt | None = dataclasses.field(default=None, repr=False)
    adapter: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)
    adapters: "Mapping[str, Model]" = dataclasses.field(default_factory=dict, repr=False)

    def replace(self, **changes: Any) -> "Model":
        """A copy with the given fields changed."""
        return dataclasses.replace(self, **changes)
