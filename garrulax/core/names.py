"""Suggestions for misspelt names in error messages."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], count: int = 1, cutoff: float = 0.6) -> str:
    """The known names that are most similar to `name`, joined by commas; "" if none is similar enough.

    Args:
        name: As the user wrote it.
        known: All valid names.
        count: Greatest number of names in the answer.
        cutoff: Least similarity, from 0 (any name) to 1 (the same name).

    Example:
        >>> from garrulax.core.names import nearest
        >>> nearest("layer", ["layers", "width"])
        'layers'
    """
    return ", ".join(difflib.get_close_matches(name, list(known), count, cutoff))
