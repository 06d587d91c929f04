"""The kinds of search, as frozen descriptions that `generate` takes; checks of their arguments."""

import dataclasses
import math
import numbers
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax

from garrulax.core.config import ModelConfig
from garrulax.sampling.ends import StopStrings
from garrulax.sampling.transforms.watermarks import Watermark

Score = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class BeamSearch:
    """Beam search; `beam` and `diverse_beam` describe its fields.

    Attributes:
        beams: Number of sequences that are continued, in all groups together.
        groups: Number of groups, which divides `beams`.
        penalty: Of diversity between groups.
        length_penalty: Exponent of the length, by which the scores of finished sequences are divided.
        early_stopping: False, True or "never".
        returned: Number of sequences that are returned.
        score: Function from log-probabilities float32 [B, V] to numbers [B] or [B, V] that are added to them; or None.
    """

    beams: int
    groups: int = 1
    penalty: float = 0.0
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    returned: int = 1
    score: Score | None = None

    @property
    def group(self) -> int:
        """Number of beams of a group."""
        return self.beams // self.groups


@dataclasses.dataclass(frozen=True)
class ContrastiveSearch:
    """Contrastive search; `contrastive` describes its fields."""

    k: int
    alpha: float
    returned: int = 1


@dataclasses.dataclass(frozen=True)
class BestOf:
    """The best of several samples; `best_of` describes its fields."""

    n: int
    returned: int = 1


Search = BeamSearch | ContrastiveSearch | BestOf


def beam(
    beams: int,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    returned: int = 1,
    score: Score | None = None,
) -> BeamSearch:
    """Beam search, with the rules of transformers: `gx.generate(model, prompts, search=gx.beam(4))`.

    In each step the `beams` most probable continuations of all beams that do not end are kept. A continuation that ends
    is finished if it is among the `beams` best ones; its score is the sum of its log-probabilities, divided by
    (number of its new tokens) ** length_penalty. Log-probabilities are those after the transform, which is applied to
    log softmax(logits).

    Args:
        beams: Number of beams.
        length_penalty: 0 compares sums; 1 compares means; larger ones favour long sequences.
        early_stopping: When a prompt is done, besides when all its beams are as long as allowed. True: as soon as
            `beams` sequences are finished. False: when, in addition, the best beam could not beat the worst of them if
            it ended now. "never": when it could not even at its best length.
        returned: Number of sequences to return for each prompt, best first.
        score: Function from the model's log-probabilities, float32 [B, V], of the next token of B beams, to numbers
            that are added to the log-probabilities after the transform: [B, V], or [B] for all tokens alike. Define it
            once: each function is compiled once.

    Returns:
        A description, for the argument `search` of `generate` and `fill`.

    Raises:
        ValueError: A bad argument.

    Example:
        >>> import jax, garrulax as gx
        >>> config = gx.preset("gpt2-tiny", layers=1, width=32, heads=2, vocab=257, eos=None)
        >>> model = (gx.init(config, jax.random.key(0)), config)
        >>> best, second = gx.generate(model, [5, 17, 3], max_new_tokens=4, search=gx.beam(4, returned=2))
        >>> best.score >= second.score, len(best.tokens)
        (True, 4)
    """
    search = BeamSearch(beams, 1, 0.0, _number("length_penalty", length_penalty), early_stopping, returned, score)
    return _checked_beams(search)


def diverse_beam(
    beams: int,
    groups: int,
    penalty: float,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    returned: int = 1,
    score: Score | None = None,
) -> BeamSearch:
    """Beam search in groups that avoid one another's tokens (Vijayakumar et al. 2016, arXiv 1610.02424).

    In each step the groups choose one after another, and the log-probability of a token is lowered by `penalty` for
    each beam of an earlier group that has just chosen it (Hamming diversity), before the transform. The sequences of
    all groups are returned in the order of their scores, which contain the penalties. These are the rules of the group
    beam search that transformers had up to version 4.56.

    Args:
        beams: Number of beams, of all groups together.
        groups: Number of groups.
        penalty: At least 0.
        length_penalty: See `beam`, like the arguments after it.
        early_stopping: Applied to each group by itself.
        returned: Number of sequences to return.
        score: Numbers that are added to the log-probabilities.

    Returns:
        A description, for the argument `search` of `generate` and `fill`.

    Raises:
        ValueError: A bad argument.

    Example:
        >>> import jax, garrulax as gx
        >>> config = gx.preset("gpt2-tiny", layers=1, width=32, heads=2, vocab=257, eos=None)
        >>> model = (gx.init(config, jax.random.key(0)), config)
        >>> search = gx.diverse_beam(4, groups=2, penalty=50.0, returned=4)
        >>> len({c.tokens[0] for c in gx.generate(model, [5, 17, 3], max_new_tokens=3, search=search)}) > 1
        True
    """
    search = BeamSearch(beams, groups, _number("penalty", penalty), length_penalty, early_stopping, returned, score)
    if search.penalty < 0:
        raise ValueError(f"penalty={penalty} must be at least 0")
    if _count("groups", groups) > beams or beams % groups:
        raise ValueError(f"{groups} groups do not divide {beams} beams: give each group the same number of beams")
    return _checked_beams(search)


def contrastive(k: int, alpha: float) -> ContrastiveSearch:
    """Contrastive search (Su et al. 2022, arXiv 2202.06417), which avoids repetition without sampling.

    Of the k most probable next tokens, the one is written that has the greatest (1 - alpha) p - alpha s: p is its
    probability, and s the greatest cosine similarity between its hidden state in the last layer and those of the tokens
    before it. `fill` does not take it: from one blank to the next it keeps keys and values, and no hidden states.

    Args:
        k: Number of candidates.
        alpha: From 0, which is greedy, to 1.

    Returns:
        A description, for the argument `search` of `generate`.

    Raises:
        ValueError: A bad argument.

    Example:
        >>> import jax, garrulax as gx
        >>> config = gx.preset("gpt2-tiny", layers=1, width=32, heads=2, vocab=257, eos=None)
        >>> model = (gx.init(config, jax.random.key(0)), config)
        >>> len(gx.generate(model, [5, 17, 3], max_new_tokens=4, search=gx.contrastive(4, 0.6)).tokens)
        4
    """
    if not 0 <= _number("alpha", alpha) <= 1:
        raise ValueError(f"alpha={alpha} must be from 0 to 1")
    return ContrastiveSearch(_count("k", k), float(alpha))


def best_of(n: int, returned: int = 1) -> BestOf:
    """Draws n samples for each prompt and returns the best of them.

    The samples are those that `generate` draws with the seeds seed, seed + 1, ..., seed + n - 1; the prompt is read
    once. The score of a sample is the mean of the log-probabilities of its tokens in the model's own distribution, so
    that samples of different lengths can be compared. In `fill` a sample is a text with all its blanks filled, and its
    score is the mean over the tokens of all answers.

    Args:
        n: Number of samples.
        returned: Number of samples to return for each prompt, best first; `fill` returns one.

    Returns:
        A description, for the argument `search` of `generate` and `fill`.

    Raises:
        ValueError: A bad argument.

    Example:
        >>> import jax, garrulax as gx
        >>> config = gx.preset("gpt2-tiny", layers=1, width=32, heads=2, vocab=257, eos=None)
        >>> model = (gx.init(config, jax.random.key(0)), config)
        >>> samples = gx.generate(model, [5, 17, 3], max_new_tokens=4, search=gx.best_of(3, returned=3))
        >>> samples[0].score == max(sample.score for sample in samples)
        True
    """
    _at_most("returned", returned, "n", _count("n", n))
    return BestOf(n, returned)


def check(
    search: Any,
    config: ModelConfig,
    temperatures: Sequence[float],
    limits: Sequence[int],
    stops: StopStrings,
    watermarks: Sequence[Watermark | None] = (),
) -> None:
    """Checks that a search fits the other arguments of `generate`.

    Args:
        search: The argument `search`.
        config: The family's Config.
        temperatures: The temperature of each prompt.
        limits: Greatest number of new tokens of each prompt.
        stops: The stop strings.
        watermarks: The watermark of each prompt.

    Raises:
        TypeError: `search` is no description.
        ValueError: It does not fit the vocabulary, the temperature, stop strings or watermarks.
    """
    if not isinstance(search, Search):
        raise TypeError(f"search must be gx.beam(...), gx.diverse_beam(...), gx.contrastive(...) or gx.best_of(...), "
                        f"not {search!r:.60}")  # fmt: skip
    if isinstance(search, ContrastiveSearch) and search.k > config.vocab:
        raise ValueError(f"contrastive: k={search.k} is more than the {config.vocab} tokens of the vocabulary")
    if isinstance(search, BeamSearch) and search.beams > config.vocab ** max(limits):
        raise ValueError(
            f"{search.beams} beams are more than there are texts of {max(limits)} tokens of this vocabulary of "
            f"{config.vocab}: take fewer"
        )
    if isinstance(search, BeamSearch) and stops:
        raise ValueError("beam search cannot end at stop strings: leave stop out, or give end_tokens")
    if isinstance(search, BeamSearch) and any(t != 1 for t in temperatures):
        raise ValueError("beam search draws nothing at random: leave temperature out")
    if any(t == 0 for t in temperatures):
        reason = "makes all samples the same" if isinstance(search, BestOf) else "leaves one candidate"
        raise ValueError(f"temperature=0 {reason}: leave it out")
    if any(mark is not None and mark.scheme == "gumbel" for mark in watermarks):
        raise ValueError('a watermark with scheme="gumbel" leaves a search one candidate: take scheme="green"')


def _checked_beams(search: BeamSearch) -> BeamSearch:
    _count("beams", search.beams)
    _number("length_penalty", search.length_penalty)
    _at_most("returned", search.returned, "beams", search.beams)
    if not (isinstance(search.early_stopping, bool) or search.early_stopping == "never"):
        raise ValueError(f'early_stopping={search.early_stopping!r} must be False, True or "never"')
    if search.score is not None and not callable(search.score):
        raise ValueError(f"score must be a function, not {search.score!r:.60}")
    return search


def _count(name: str, value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if isinstance(value, bool) or number < 1:
        raise ValueError(f"{name}={value!r:.60} must be a whole number of at least 1")
    return number


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r:.60} must be a number")
    return float(value)


def _at_most(name: str, value: Any, other: str, most: int) -> None:
    if _count(name, value) > most:
        raise ValueError(f"{name}={value} is more than {other}={most}: at most so many sequences are kept")
