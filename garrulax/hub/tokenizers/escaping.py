"""Messages that cannot forge control tokens while a chat template runs, but read to it like the originals.

Users write messages, and a message that spells `<|im_end|>` must not end a message. So while a template runs, the first
and last characters of control tokens are replaced, in all messages, by private characters, one for one. Whatever the
template does with a message (strip, split, replace, join), all control tokens in its output then come from the
template. Afterwards the private characters are replaced back.

A template may also look into a message: `'</think>' in text`, `text.split('</think>')`. What it looks for may be a
control token, so these questions are answered for the original texts: `equal`, `contains` and `search` put the original
characters back for as long as they look. The answers are true or false, or indices, which are the same in both texts,
or parts of the text, which are cut out of the escaped one.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from garrulax.core.text import whole_characters

Original = Callable[[str], str]  # an escaped text -> the original text, of the same length
_CUTS_START = ("strip", "lstrip", "removeprefix")
#: The methods of texts that look for other texts.
SEARCHES = frozenset(
    ("startswith", "endswith", "find", "rfind", "index", "rindex", "count", "strip", "lstrip", "rstrip", "removeprefix",
     "removesuffix", "split", "rsplit", "partition", "rpartition", "replace")
)  # fmt: skip


class Escaper:
    """Replaces the first and last characters of control tokens by private characters, and back.

    Args:
        specials: The control tokens.
        used: All texts that the template will see, in any form that JSON can write: their characters are not private.
    """

    def __init__(self, specials: Iterable[str], used: Any):
        self._specials = specials = list(filter(None, specials))
        ends = sorted({end for content in specials for end in (content[0], content[-1])})
        taken = set(json.dumps(used, ensure_ascii=False, default=str))
        private = (chr(code) for code in range(0x100000, 0x10FFFE) if chr(code) not in taken)
        self._to_private = dict(zip(map(ord, ends), private, strict=False))
        self._from_private = {ord(private): chr(end) for end, private in self._to_private.items()}

    def escape(self, value: Any, key: str = "") -> Any:
        """Plain data with all its texts escaped, except keys and roles that are words: templates compare those."""
        if isinstance(value, str):
            value = whole_characters(value)
            return value if key == "role" and self._is_word(value) else value.translate(self._to_private)
        if value is None or type(value) in (bool, int, float):
            return value
        if isinstance(value, Mapping):
            named = {whole_characters(str(name)): entry for name, entry in value.items()}
            return {
                name if self._is_word(name) else name.translate(self._to_private): self.escape(entry, name)
                for name, entry in named.items()
            }
        if isinstance(value, list | tuple):
            return [self.escape(entry) for entry in value]
        raise ValueError(f"a chat template takes texts, numbers, lists and dicts, not {type(value).__name__}")

    def _is_word(self, text: str) -> bool:
        return bool(re.fullmatch(r"[\w-]+", text)) and not any(content in text for content in self._specials)

    def original(self, text: str) -> str:
        """The text with its original characters; as long as `text`, so that positions stay valid."""
        return text if text.isascii() else text.translate(self._from_private)


def equal(original: Original, a: Any, b: Any) -> bool:
    """`a == b`, of the original texts."""
    return original(a) == original(b) if isinstance(a, str) and isinstance(b, str) else a == b


def contains(original: Original, whole: Any, part: Any) -> bool:
    """`part in whole`, of the original texts."""
    if not isinstance(part, str):
        return part in whole
    if isinstance(whole, str):
        return original(part) in original(whole)
    return part in whole or (isinstance(whole, list | tuple | dict) and any(equal(original, part, x) for x in whole))


def search(original: Original, text: str, method: str, *args: Any, **kwargs: Any) -> Any:
    """`text.method(*args)` for a method of `SEARCHES`: it looks at original texts and returns parts of `text`."""
    real = original(text)
    if method == "replace":
        old, new, *count = *args, *kwargs.values()
        if not old:
            return text.replace(old, new, *count)
        return new.join(search(original, text, "split", old, *count))
    args, kwargs = _originals(original, args), {name: _originals(original, x) for name, x in kwargs.items()}
    found = getattr(real, method)(*args, **kwargs)
    if isinstance(found, str):  # the text without something at its start or end
        start = len(real) - len(real.lstrip(*args) if method == "strip" else found) if method in _CUTS_START else 0
        return text[start : start + len(found)]
    if not isinstance(found, list | tuple):
        return found
    separator = args[0] if args else kwargs.get("sep")
    parts, at = [], 0
    for part in found:
        if separator is None:  # white space, which has no one length
            at = real.index(part, at)
        parts.append(text[at : at + len(part)])
        at += len(part) + (len(separator) if separator is not None and "split" in method else 0)
    return type(found)(parts)


def _originals(original: Original, value: Any) -> Any:
    if isinstance(value, str):
        return original(value)
    return tuple(_originals(original, x) for x in value) if isinstance(value, tuple) else value
