"""Texts that may hold half a character."""

import re

_HALF = re.compile("[\ud800-\udfff]")


def whole_characters(text: str) -> str:
    """`text` with U+FFFD for each lone surrogate, and two surrogates that belong together joined.

    A surrogate is half of a character in UTF-16. JSON from the web, and file names and arguments that are not UTF-8,
    bring single ones into Python's texts; no tokenizer can encode them and no terminal print them.

    Example:
        >>> from garrulax.core.text import whole_characters
        >>> whole_characters("half \\ud83d of an emoji, and two halves \\ud83d\\ude00")
        'half \ufffd of an emoji, and two halves 😀'
    """
    if text.isascii() or _HALF.search(text) is None:
        return text
    joined = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
    return _HALF.sub("\ufffd", joined)
