"""`detect_watermark`: a test of whether a text was written with a watermark. It needs the key, and no model."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import numpy as np

from garrulax.models.unpack import TokenizerLike
from garrulax.sampling.buckets import bucket
from garrulax.sampling.requests import token_ids
from garrulax.sampling.transforms.watermarks import LONGEST_CONTEXT, Watermark, context_keys, fold


@dataclasses.dataclass(frozen=True)
class Detection:
    """The result of `detect_watermark`.

    Attributes:
        z: Number of standard deviations by which the statistic is above its mean in texts without this watermark.
        p_value: Probability that the statistic of a text without this watermark is as great, exactly.
        scored: Number of tokens that count, n.
        repeated: Number of tokens that do not count, since their n-gram was in the text before.
        statistic: Of green lists the number of green tokens; of the Gumbel scheme the sum of -log(1 - u).

    Example:
        >>> import garrulax as gx
        >>> found = gx.detect_watermark([7, 8, 9, 7, 8, 9, 7, 8], gx.watermark("a secret", context=1))
        >>> isinstance(found, gx.Detection), found.scored, found.repeated
        (True, 3, 4)
    """

    z: float
    p_value: float
    scored: int
    repeated: int
    statistic: float


def detect_watermark(
    text: str | Sequence[int], watermark: Watermark, tokenizer: TokenizerLike | None = None
) -> Detection:
    """Tests whether a text was written with a watermark.

    The first `context` tokens are not scored, since what was before them is unknown, and each n-gram counts once: of
    green lists the token with its context, of the Gumbel scheme the context.

    Args:
        text: The text without its prompt, or its token ids. A text is encoded again, which may give other ids at its
            beginning and where the model wrote a word in unusual pieces; that costs a few tokens.
        watermark: The watermark with which it may have been written; `delta` does not matter.
        tokenizer: The model's tokenizer, such as `model.tokenizer`; needed for a text.

    Returns:
        The Detection. The p-value of a text that is unmarked is at most p with a probability of at most p.

    Raises:
        TypeError: `watermark` is something else.
        ValueError: The text has fewer than context + 1 tokens, is not a text or ids, or has no tokenizer.

    Example:
        >>> import garrulax as gx
        >>> found = gx.detect_watermark(list(range(200)), gx.watermark("a secret"))
        >>> found.scored, found.z < 4
        (196, True)
    """
    if not isinstance(watermark, Watermark):
        raise TypeError(f"watermark={watermark!r:.60} must be what gx.watermark(key) returns")
    ids = token_ids(text, tokenizer, "the text")
    h = watermark.context
    if len(ids) <= h:
        raise ValueError(
            f"the text has {len(ids)} tokens, but a watermark with context={h} can only be found in more than {h}"
        )
    if wrong := [i for i in ids if not 0 <= i < 2**31]:
        raise ValueError(f"the text has token id {wrong[0]}: ids are at least 0")
    of_green = watermark.scheme == "green"
    first: dict[tuple[int, ...], tuple[int, ...]] = {}
    for ngram in zip(*(ids[i:] for i in range(h + 1)), strict=False):
        first.setdefault(ngram if of_green else ngram[:-1], ngram)
    numbers = token_numbers(watermark, np.array([*first.values()], np.int32))
    n = len(numbers)
    repeated = len(ids) - h - n
    if of_green:
        gamma, green = watermark.threshold / 2**32, int(np.sum(numbers < watermark.threshold))
        z = (green - gamma * n) / math.sqrt(n * gamma * (1 - gamma))
        return Detection(z, binomial_tail(green, n, gamma), n, repeated, float(green))
    total = float(-np.log((numbers + 0.5) / 2**32).sum())
    return Detection((total - n) / math.sqrt(n), gamma_tail(total, n), n, repeated, total)


def token_numbers(watermark: Watermark, ngrams: np.ndarray) -> np.ndarray:
    """The pseudorandom number r of the last token of each n-gram: int32 [n, context + 1] to float64 [n]."""
    n, h = len(ngrams), watermark.context
    padded = np.zeros((bucket(n), LONGEST_CONTEXT + 1), np.int32)  # few sizes, so that few programs are compiled
    padded[:n, -h - 1 :] = ngrams
    words = np.array(watermark.words, np.uint32)
    return np.asarray(_numbers(words, padded, np.int32(h)))[:n].astype(np.float64)


@jax.jit
def _numbers(words: jax.Array, ngrams: jax.Array, context: jax.Array) -> jax.Array:
    """uint32 [n], of ngrams int32 [n, LONGEST_CONTEXT + 1]."""
    keys = jax.numpy.broadcast_to(words, (len(ngrams), 2))
    keys = context_keys(keys, ngrams[:, :-1], jax.numpy.broadcast_to(context, len(ngrams)))
    return jax.vmap(fold)(keys, ngrams[:, -1])[:, 0]


def binomial_tail(k: int, n: int, p: float) -> float:
    """Probability of at least k successes in n independent trials of probability p."""
    logs = _log_factorials(n)
    i = np.arange(k, n + 1)
    return _sum_of_exp(logs[n] - logs[i] - logs[n - i] + i * math.log(p) + (n - i) * math.log1p(-p))


def gamma_tail(x: float, n: int) -> float:
    """Probability that the sum of n independent exponential variables of mean 1 is above x.

    It is the probability of fewer than n events of a Poisson process by the time x.
    """
    return _sum_of_exp(np.arange(n) * math.log(x) - x - _log_factorials(n)[:n])


@functools.lru_cache(maxsize=16)
def _log_factorials(n: int) -> np.ndarray:
    """log(0!), ..., log(n!)."""
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])


def _sum_of_exp(x: np.ndarray) -> float:
    top = x.max()
    return min(1.0, math.exp(top) * float(np.exp(x - top).sum()))
