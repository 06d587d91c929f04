"""Frozen dataclasses with a method that changes fields."""

import dataclasses
from typing import Any, Self


class Record:
    """Base of frozen dataclasses that users change copies of."""

    def replace(self, **changes: Any) -> Self:
        """A copy with the given fields changed."""
        whole: Any = self  # a dataclass, which the types do not say
        changed: Self = dataclasses.replace(whole, **changes)
        return changed
