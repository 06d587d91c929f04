"""Which row of which corpus is the n-th row of a mixture: a function of n, so that a resumed run needs only its step.

After any number of rows, each corpus has had its share of them to within a row or two: the rows are dealt out, not
drawn. With two corpora, the first has had round(n w) of n rows. The rows that it did not get are dealt out among the
others in the same way.
"""

from collections.abc import Sequence

import numpy as np

_ONE = 2**24  # weights are fractions of this; row numbers up to 2**39 fit


def fractions(weights: Sequence[float]) -> np.ndarray:
    """The fraction that each corpus takes of the rows which the corpora before it have left.

    Args:
        weights: Not negative, not all zero; only their ratios count.

    Returns:
        int64, in units of 2**-24.
    """
    shares = np.asarray(weights, np.float64)
    left = np.cumsum(shares[::-1])[::-1]  # of this corpus and those after it
    # All that is left goes to the last corpus that has a weight, exactly.
    return np.round(np.divide(shares, left, out=np.zeros_like(shares), where=left > 0) * _ONE).astype(np.int64)


def deal(rows: np.ndarray, fractions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The corpus of each row of a mixture, and the number of the row among those of that corpus.

    Args:
        rows: int64 [N], row numbers in the mixture.
        fractions: From `fractions`.

    Returns:
        corpus, int64 [N], and index, int64 [N]. Over all rows, each corpus has the indices 0, 1, 2, ... once, in order.

    Example:
        >>> deal(np.arange(4), fractions([0.5, 0.5]))[0].tolist()
        [0, 1, 0, 1]
    """
    corpus, index = np.zeros(len(rows), np.int64), np.array(rows, np.int64)
    open_ = np.arange(len(rows))  # rows that no corpus has taken yet
    for number, fraction in enumerate(fractions):
        left = index[open_]  # their numbers among the rows that the corpora before have left
        taken = (left * fraction + _ONE // 2) // _ONE  # rows of this corpus before each
        takes = ((left + 1) * fraction + _ONE // 2) // _ONE > taken
        corpus[open_[takes]], index[open_[takes]] = number, taken[takes]
        index[open_[~takes]] = (left - taken)[~takes]
        open_ = open_[~takes]
    return corpus, index
