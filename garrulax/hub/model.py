"""A loaded model: configuration, parameters, tokenizer."""

import dataclasses
from typing import Any

from garrulax.core.config import ModelConfig
from garrulax.core.spec import Tree
from garrulax.hub.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A configuration, its parameters, and the tokenizer of its texts.

    Attributes:
        config: The Config of a family.
        params: The tree of arrays that `garrulax.forward` takes, stacked or unstacked.
        tokenizer: The tokenizer, or None.

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

    def replace(self, **changes: Any) -> "Model":
        """A copy with the given fields changed."""
        return dataclasses.replace(self, **changes)
