"""What a folder on disk holds, in memory."""

import dataclasses
from typing import Any

from garrulax.core.spec import Tree
from garrulax.hub.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A configuration, the parameters that belong to it, and the tokenizer of its texts.

    config: a family's Config. params: the tree that `garrulax.forward` takes, stacked or unstacked.
    tokenizer: None where there is none.
    """

    config: Any
    params: Tree = dataclasses.field(repr=False)
    tokenizer: Tokenizer | None = None

    def replace(self, **changes: Any) -> "Model":
        """A copy with fields changed."""
        return dataclasses.replace(self, **changes)
