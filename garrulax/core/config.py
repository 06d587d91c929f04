"""Checks that every family's Config makes."""

from typing import Any


def check_sizes(config: Any, *names: str) -> None:
    """Raises ValueError for a field that is not a whole number of at least 1."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1")


def check_rates(config: Any, *names: str) -> None:
    """Raises ValueError for a dropout rate outside 0 <= rate < 1."""
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)!r} must be at least 0 and below 1")
