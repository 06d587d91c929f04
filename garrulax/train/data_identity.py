"""Whether a run that is resumed has the data with which it began."""

from collections.abc import Iterable, Mapping
from typing import Any

#: Before the names of hashes of a text that another one has replaced.
INSTEAD_OF = "instead_of."
#: Before the names of hashes of `eval_texts`. A run may gain and lose such a text, but not change it.
EVAL_TEXT = "eval_texts."


def data_differences(current: Mapping[str, str], saved: Mapping[str, str]) -> list[str]:
    """The differences in the data that forbid a run to go on, such as "data.corpus is '1f3a', was '77c0'".

    Args:
        current: Hashes of the data, by name (`batches.Data.identity`).
        saved: Those with which the run began.
    """
    accepted = {name.removeprefix(INSTEAD_OF): value for name, value in current.items() if name.startswith(INSTEAD_OF)}
    if accepted and _lasting(accepted) == _lasting(saved):
        return []  # the user has said that this text may take the place of that one
    both = [name for name in current.keys() & saved.keys() if name.startswith(EVAL_TEXT)]
    now, was = ({**_lasting(x), **{name: x[name] for name in both}} for x in (current, saved))
    return different("data", now, was)


def different(part: str, current: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """A text for every entry that two records have not in common, such as "config.layers is 4, was 6".

    Args:
        part: What the records are of.
        current: One of them.
        saved: The other, which is older.
    """
    names: Iterable[str] = sorted(current.keys() | saved.keys())
    entries = ((name, current.get(name), saved.get(name)) for name in names)
    return [f"{part}.{name} is {now!r}, was {was!r}" for name, now, was in entries if now != was]


def _lasting(hashes: Mapping[str, str]) -> dict[str, str]:
    """The hashes of what every part of a run must have."""
    return {name: value for name, value in hashes.items() if not name.startswith((INSTEAD_OF, EVAL_TEXT))}
