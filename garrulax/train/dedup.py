"""Documents that a corpus has before already: the same text (exact), or nearly the same words (near).

Near-duplicates are found by MinHash (Broder 1997): the similarity of two documents is the Jaccard index of their sets
of five consecutive words, estimated from 128 hashes, and locality-sensitive hashing finds the candidates.
"""

import hashlib
import re
from collections.abc import Callable, Iterable
from typing import Any

KINDS = ("none", "exact", "near")
SHINGLE = 5  # consecutive words
_HASHES = 128
_WORD = re.compile(r"\w+")


def duplicates(texts: Iterable[str], kind: str, threshold: float = 0.8) -> set[int]:
    """The indices of the texts of which an earlier one, itself no duplicate, is a copy.

    Memory: 32 bytes a text for "exact", about 2 kB a text for "near".

    Args:
        texts: In order; the first of several copies stays.
        kind: "none", "exact", or "near", which includes exact copies.
        threshold: Least Jaccard index of near-duplicates.

    Raises:
        ImportError: If `kind` is "near" and datasketch is not installed.
        ValueError: For another kind, or a threshold that is not between 0 and 1.

    Example:
        >>> duplicates(["one", "two", "one"], "exact")
        {2}
    """
    if kind not in KINDS:
        raise ValueError(f"dedup={kind!r}: choose from {', '.join(KINDS)}")
    if kind == "none":
        return set()
    is_near = _near(threshold) if kind == "near" else None
    seen: set[bytes] = set()
    found = set()
    for index, text in enumerate(texts):
        digest = hashlib.sha256(text.encode()).digest()[:16]
        if digest in seen or (is_near is not None and is_near(index, text)):
            found.add(index)
        seen.add(digest)
    return found


def shingles(text: str) -> set[str]:
    """The runs of five words in a text, in lower case; of a shorter text, all its words as one."""
    words = _WORD.findall(text.lower())
    return {" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))}


def _near(threshold: float) -> Callable[[int, str], bool]:
    """A function that says whether a text is like one before it, and otherwise remembers the text."""
    if not 0 < threshold <= 1:
        raise ValueError(f"dedup_threshold={threshold} must be above 0 and at most 1")
    try:
        import datasketch
    except ImportError as error:
        raise ImportError("dedup=near finds near-duplicates with datasketch: pip install 'garrulax[dedup]'") from error
    index = datasketch.MinHashLSH(threshold=threshold, num_perm=_HASHES)
    kept: dict[int, Any] = {}

    def is_near(number: int, text: str) -> bool:
        words = shingles(text)
        if words == {""}:  # no words: only exact copies count
            return False
        sketch = datasketch.MinHash(num_perm=_HASHES, seed=1)
        sketch.update_batch([word.encode() for word in sorted(words)])
        if any(kept[other].jaccard(sketch) >= threshold for other in index.query(sketch)):
            return True
        kept[number] = sketch
        index.insert(number, sketch)
        return False

    return is_near
