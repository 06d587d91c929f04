"""Glitch tokens: tokens of the vocabulary that training never or hardly saw, found from the embeddings alone.

Training leaves the row of such a token where it began, or moves all such rows alike. In an untied input table they do
not move (weight decay shrinks them). In an output table they drift in one common direction, which lowers the logits of
all tokens that never occur. So the untrained rows lie together, spread only by their initial noise, and the trained
rows lie elsewhere. The score of a row is its distance from the centre of the untrained rows; a low score is suspect.

Sources: Rumbelow & Watkins 2023, "SolidGoldMagikarp" (tokens nearest to the centroid of all embeddings); Land &
Bartolo 2024 (arXiv 2405.05417), section 2.2 (distance from the mean of unused rows; the common direction of the output
side). Their method begins with a list of unused tokens; this one finds the centre without it (`_find_untrained`).
"""

import dataclasses
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from garrulax.core.dtypes import at_least_float32
from garrulax.core.leaf import Leaf
from garrulax.models.unpack import ModelLike, TokenizerLike, unpack_model

SIDES = {"input": "tokens", "output": "head"}  # side -> name of its table in the parameters

#: Least distance, as a share of the mean distance. Smaller ones are rounded up to it, since 0 has no logarithm.
MIN_DISTANCE = 0.01

# The next three constants decide whether a cut parts two groups or runs through a single one (`split`).

#: Least distance between the centres of the groups, in sums of their standard deviations. A single group that is cut in
#: the middle gives 1.5 if it is normally distributed and 1.7 if it is uniformly distributed.
_MIN_SEPARATION = 2.0
#: Greatest standard deviation of a near group with more than half of the rows, in units of pure noise's. Untrained rows
#: are noise and trained rows vary more. Without the limit, trained rows would be flagged where a few others lie apart.
_MAX_MAJORITY_STD = 1.25
#: Least gain in log likelihood, in ln N. The Bayesian information criterion asks for 1.5 (half of ln N for each of the
#: three more parameters); twice as much is asked for because the best of many cuts is taken.
_MIN_GAIN = 3.0

#: Greatest number of moves of the centre to the mean of the near group (`_find_untrained`). It mostly takes a few.
_MAX_MOVES = 10
#: Number of rows whose mean is the last start of the search: so few that they belong to one group (`_starts`).
_FARTHEST = 3

Finding = tuple[float, str, np.ndarray, float | None]  # gain in nats, start, distances [V], threshold


@dataclasses.dataclass(frozen=True, eq=False)
class Side:
    """The scores of one embedding table.

    Attributes:
        scores: float64 [V], distance of each row from the centre of the untrained rows, divided by the mean distance.
        threshold: Rows with a score up to this one look untrained; None if no group of rows stands apart.
        start: The start of the search that found the centre.
    """

    scores: np.ndarray = dataclasses.field(repr=False)
    threshold: float | None
    start: str

    @property
    def flagged(self) -> np.ndarray:
        """Whether each row looks untrained: bool [V]."""
        return self.scores <= (-math.inf if self.threshold is None else self.threshold)


@dataclasses.dataclass(frozen=True)
class GlitchToken:
    """One token of the ranking.

    Attributes:
        rank: Place in the ranking, from 1, the most suspect.
        id: Token id.
        text: Text of the token, with bytes that are not UTF-8 as \\xNN, or name of a control token; None without a
            tokenizer.
        kind: "text", "control", or "padding" for a row beyond the tokenizer's vocabulary.
        scores: Score by side.
        flagged: The sides on which the token looks untrained.
    """

    rank: int
    id: int
    text: str | None
    kind: str
    scores: dict[str, float]
    flagged: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class GlitchTokens:
    """The result of `glitch_tokens`.

    Attributes:
        tokens: The ranking.
        count: Number of tokens of the vocabulary, without padding rows, that look untrained on at least one side.
        vocab: Number of tokens of the vocabulary, without padding rows.
        sides: Scores by side.
    """

    tokens: tuple[GlitchToken, ...]
    count: int
    vocab: int
    sides: dict[str, Side]


def glitch_tokens(model: ModelLike, *, top: int | None = None, side: str | None = None) -> GlitchTokens:
    """Ranks the tokens that training never or hardly saw, the most suspect first.

    If no group of rows stands apart, no token is flagged. This is so in a model without glitch tokens, and in one that
    was not trained at all. Rows beyond the tokenizer's vocabulary have no influence on the threshold, and come last.

    Every step is one pass over a table in float32 (or float64 if the table is) without a temporary array of the table's
    size.

    Args:
        model: From `gx.load`, or (params, config), with parameters of any dtype, stacked or not, sharded or not. Only
            the embedding tables are read.
        top: Number of tokens to list, flagged or not; None lists the flagged ones.
        side: "input" or "output" to search one table only. A tied table counts as input.

    Returns:
        The ranking, and the scores of all tokens.

    Raises:
        TypeError: `model` is not a model.
        ValueError: An unknown side, a top below 1, or embeddings that are not finite.

    Example:
        >>> import jax, garrulax as gx
        >>> config = gx.preset("gpt2-tiny", layers=1, width=32, heads=2, vocab=257, eos=None)
        >>> params = gx.init(config, jax.random.key(0))
        >>> params["tokens"] = params["tokens"].at[7:9].set(0.0)
        >>> found = gx.glitch_tokens((params, config))
        >>> [token.id for token in found.tokens], found.count, found.vocab
        ([7, 8], 2, 257)
    """
    params, config, tokenizer = unpack_model(model)
    tables = {name: params[table] for name, table in SIDES.items() if table in params}
    if side is not None and side not in tables:
        raise ValueError(f"side {side!r} is not there: the tables of this model are {', '.join(tables)}")
    if top is not None and top < 1:
        raise ValueError(f"top={top} must be at least 1")
    ordinary = np.arange(config.vocab) < (config.vocab if tokenizer is None else tokenizer.vocab)  # [V], not padding
    sides = {name: _find_untrained(table, ordinary, name) for name, table in tables.items() if side in (None, name)}
    flagged = np.any([s.flagged for s in sides.values()], axis=0)  # [V]
    order = np.lexsort((np.min([s.scores for s in sides.values()], axis=0), ~ordinary))  # padding last, then by score
    ids = order[flagged[order]] if top is None else order[:top]
    text_and_kind = _text_and_kind(tokenizer)
    tokens = tuple(
        GlitchToken(
            rank,
            id,
            *text_and_kind(id),
            {name: float(s.scores[id]) for name, s in sides.items()},
            tuple(name for name, s in sides.items() if s.flagged[id]),
        )
        for rank, id in enumerate(ids.tolist(), 1)
    )
    return GlitchTokens(tokens, int((flagged & ordinary).sum()), int(ordinary.sum()), sides)


def _text_and_kind(tokenizer: TokenizerLike | None) -> Callable[[int], tuple[str | None, str]]:
    """Returns the function from a token id to its text and kind."""
    if tokenizer is None:
        return lambda id: (None, "text")
    names = {id: name for name, id in tokenizer.specials.items()}

    def text_and_kind(id: int) -> tuple[str, str]:
        if id >= tokenizer.vocab:
            return "", "padding"
        if id in names:
            return names[id], "control"
        return tokenizer.token_bytes(id).decode("utf-8", "backslashreplace"), "text"

    return text_and_kind


def _find_untrained(table: jax.Array, ordinary: np.ndarray, name: str) -> Side:
    """Searches for the group of untrained rows from every likely centre and returns the finding with the greatest gain.

    From each start: split off the group of rows nearest to the centre, move the centre to their mean, and repeat until
    the group does not change. ordinary: bool [V], False for padding rows. name: of the side, for errors.
    """
    finite = np.isfinite(_to_host(_distances(table, np.zeros(table.shape[1]))))
    if not finite.all():
        raise ValueError(f"the {name} embedding of token {finite.argmin()} is not finite")
    findings: list[Finding] = []
    for start, centre in _starts(table, ordinary):
        distances = _to_host(_distances(table, centre))  # [V]
        nothing: Finding = (0.0, start, distances, None)
        finding = nothing
        members = np.zeros_like(ordinary)  # [V], the near group
        for _ in range(_MAX_MOVES):
            found = split(distances[ordinary], table.shape[1])
            if found is None:  # the rows near the start are not a group around their own mean
                finding = nothing
                break
            threshold, gain = found
            finding = (gain, start, distances, threshold)
            before, members = members, ordinary & (distances <= threshold)
            if members.sum() < 2 or (members == before).all():
                break
            distances = _to_host(_distances(table, _mean(table, members)))
            # A member pulls the mean towards itself: this gives its distance from the mean of the other members.
            distances[members] *= members.sum() / (members.sum() - 1)
        findings.append(finding)
    _, start, distances, limit = max(findings, key=lambda finding: finding[0])
    mean = float(distances[ordinary].mean()) or 1.0
    return Side(distances / mean, None if limit is None else limit / mean, start)


def _starts(table: jax.Array, ordinary: np.ndarray) -> Iterator[tuple[str, jax.Array]]:
    """Yields the name and the centre [D] of each start of the search."""
    mean = _mean(table, ordinary)
    yield "the mean of all rows", mean
    yield "the origin", jnp.zeros_like(mean)  # rows begin around it, and weight decay moves them towards it
    if not ordinary.all():
        yield "the padding rows", _mean(table, ~ordinary)
    # In an output table all untrained rows drift in one direction. They dominate the mean of all rows, and they are
    # farthest along it.
    along_mean = np.where(ordinary, _to_host(_projections(table, mean)), -np.inf)  # [V]
    farthest = np.zeros_like(ordinary)
    farthest[np.argsort(along_mean)[-_FARTHEST:]] = True
    yield "the rows farthest along the mean", _mean(table, farthest)


def split(distances: np.ndarray, width: int) -> tuple[float, float] | None:
    """Splits rows into a group near a centre and a group far from it.

    The logarithms of the distances are cut where two normal distributions are most likely (Kittler & Illingworth 1986).
    Only cuts between two separate groups are considered (see the constants above). For the distance between the groups,
    the far one is described by its median and the deviation of the rows below it: trained rows may lie outwards as far
    as they like.

    The log distance of noise in `width` dimensions has a standard deviation of about 1/sqrt(2 width); a near group that
    is narrower counts as this wide.

    Args:
        distances: float64 [N], distances from the centre.
        width: D, number of dimensions of a row.

    Returns:
        The threshold, and the gain in log likelihood (nats) over one normal distribution; None if there is one group.
    """
    n, mean = len(distances), distances.mean()
    if n < 4 or not mean:
        return None
    order = np.maximum(np.sort(distances) / mean, MIN_DISTANCE)
    x = np.log(order)  # [N], rising
    # The sum and the sum of squares of the first i entries give the moments of both groups for every cut at once.
    sums, squares = (np.concatenate([[0.0], np.cumsum(x**power)]) for power in (1, 2))  # [N + 1]
    near = np.arange(1, n)  # [N - 1], size of the near group for each cut, like all arrays below
    far = n - near
    near_mean, far_mean = sums[near] / near, (sums[n] - sums[near]) / far
    near_std = _root(squares[near] / near - near_mean**2)
    far_std = _root((squares[n] - squares[near]) / far - far_mean**2)
    all_std = _root(squares[n] / n - (sums[n] / n) ** 2)
    noise_std = 1 / math.sqrt(2 * width)
    near_width = np.maximum(near_std, noise_std)
    gain = n * np.log(all_std) - near * np.log(near_width) - far * np.log(far_std)
    gain += near * np.log(near / n) + far * np.log(far / n)
    middle = (near + n) // 2
    far_median, below_median = x[middle], middle + 1 - near  # value; number of rows
    far_width = _root(
        (squares[middle + 1] - squares[near] - 2 * far_median * (sums[middle + 1] - sums[near])) / below_median
        + far_median**2
    )
    separate = (far_median - near_mean) / (near_width + far_width) >= _MIN_SEPARATION
    minority_or_noise = (near <= n / 2) | (near_std <= _MAX_MAJORITY_STD * noise_std)
    allowed = separate & minority_or_noise & (np.diff(x) > 0) & (far > 1)
    gain = np.where(allowed, gain, -np.inf)
    cut = int(gain.argmax())
    if gain[cut] < _MIN_GAIN * math.log(n):
        return None
    return float(mean * math.sqrt(order[cut] * order[cut + 1])), float(gain[cut])


def _root(variance: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum(variance, 1e-12))  # differences of sums may fall below 0


@jax.jit
def _distances(table: jax.Array, centre: jax.Array) -> jax.Array:  # [V, D], [D] -> [V]
    return _replicated(jnp.sqrt(jnp.sum((_promoted(table) - centre) ** 2, axis=1)))


@jax.jit
def _projections(table: jax.Array, direction: jax.Array) -> jax.Array:  # [V, D], [D] -> [V]
    return _replicated(jnp.sum(_promoted(table) * direction, axis=1))


@jax.jit
def _mean(table: jax.Array, rows: jax.Array) -> jax.Array:  # [V, D], bool [V] -> [D]
    weights = rows.astype(jnp.float32)
    return _replicated(jnp.sum(_promoted(table) * weights[:, None], axis=0) / jnp.sum(weights))


def _to_host(x: jax.Array) -> np.ndarray:
    return np.array(x, np.float64)


def _promoted(table: jax.Array | Leaf) -> jax.Array:
    """The table in at least float32. XLA converts each entry inside the sum, so there is no copy of the table."""
    dtype = at_least_float32(table.dtype)
    return table.dense(dtype) if isinstance(table, Leaf) else table.astype(dtype)


def _replicated(x: jax.Array) -> jax.Array:
    """x on every device, so that every process can read all of it. Also works outside of `jax.set_mesh`."""
    mesh = jax.typeof(x).sharding.mesh
    return x if mesh.empty or not mesh.are_all_axes_explicit else jax.sharding.reshard(x, NamedSharding(mesh, jax.P()))
