"""Glitch tokens: tokens of the vocabulary that training never or hardly met, found from the embeddings alone.

A row that training left alone stays where it began, or moves only as all such rows do: not at all in an input table of
its own (weight decay shrinks it), along one common direction in an output table, which pushes down whatever never
comes. So untrained rows lie together, no wider than their initial noise, and trained rows lie apart. A row's score is
its distance from where the untrained ones lie; small is suspect.

Sources: Rumbelow & Watkins 2023, "SolidGoldMagikarp" (tokens nearest to the centroid of all embeddings); Land &
Bartolo 2024 (arXiv 2405.05417), section 2.2 (distance to the mean of unused rows; the common direction of the output
side). Theirs needs a list of unused tokens to begin with; here the centre is found by itself (`_search`).
"""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from garrulax import models
from garrulax.core.spec import Tree

SIDES = {"input": "tokens", "output": "head"}  # side -> name of its table in the parameters
_NEAREST = 0.01  # log distances end at this share of the mean: a row of zeros may be at no distance at all
_APART = 2.0  # means of the two groups, in sums of their standard deviations
_NARROW = 1.25  # a majority may be this much wider than noise
_ROUNDS = 10  # of moving the centre to the mean of the rows found

Finding = tuple[float, str, np.ndarray, float | None]  # gain in nats, start, distances [V], threshold


@dataclasses.dataclass(frozen=True, eq=False)
class Side:
    """One table of embeddings. scores: float64 [V], each row's distance from where untrained rows lie, over the mean.

    threshold: scores up to it are those of untrained rows; None where no group of rows stands apart.
    start: where the search began that ended there (`_search`).
    """

    scores: np.ndarray = dataclasses.field(repr=False)
    threshold: float | None
    start: str

    @property
    def flagged(self) -> np.ndarray:
        """Which rows look untrained: bool [V]."""
        return self.scores <= (-math.inf if self.threshold is None else self.threshold)


@dataclasses.dataclass(frozen=True)
class GlitchToken:
    """One token. rank: from 1, the most suspect. scores: by side. flagged: the sides where it looks untrained.

    text: what it stands for, with bytes that are no UTF-8 as \\xNN, or the name of a control token; None without a
    tokenizer. kind: "text", "control", or "padding" for a row beyond the tokenizer's vocabulary.
    """

    rank: int
    id: int
    text: str | None
    kind: str
    scores: dict[str, float]
    flagged: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class GlitchTokens:
    """What `glitch_tokens` finds. tokens: ranked. count: how many of the vocabulary's `vocab` tokens (padding rows are
    none) look untrained on any side. sides: by name.
    """

    tokens: tuple[GlitchToken, ...]
    count: int
    vocab: int
    sides: dict[str, Side]


def glitch_tokens(model: Any, *, top: int | None = None, side: str | None = None) -> GlitchTokens:
    """The tokens that training never or hardly met, most suspect first.

    model: what `garrulax.load` returns, or (params, config); stacked or not, of any dtype, sharded or not. top: list so
    many, flagged or not; None lists the flagged ones. side: "input" or "output" alone; a tied table is the input's.

    Rows beyond the tokenizer's vocabulary take no part in finding the threshold and come last. Every step is one
    pass over a table in float32 (float64 stays) that makes nothing of the table's size. Where no group of rows
    stands apart, nothing is flagged: so in a model without glitch tokens, and in one that was not trained at all.

    Raises TypeError for what is no model, ValueError for an unknown side or top and for embeddings that are not finite.
    """
    params, config, tokenizer = _unpack(model)
    tables = {name: params[place] for name, place in SIDES.items() if place in params}
    if side is not None and side not in tables:
        raise ValueError(f"side {side!r} is not there: the tables of this model are {', '.join(tables)}")
    if top is not None and top < 1:
        raise ValueError(f"top={top} must be at least 1")
    ordinary = np.arange(config.vocab) < (config.vocab if tokenizer is None else tokenizer.vocab)
    sides = {name: _search(table, ordinary, name) for name, table in tables.items() if side in (None, name)}
    flagged = np.any([s.flagged for s in sides.values()], axis=0)
    order = np.lexsort((np.min([s.scores for s in sides.values()], axis=0), ~ordinary))
    listed = order[flagged[order]] if top is None else order[:top]
    text = _texts(tokenizer)
    tokens = tuple(_token(rank, int(id), sides, text) for rank, id in enumerate(listed, 1))
    return GlitchTokens(tokens, int((flagged & ordinary).sum()), int(ordinary.sum()), sides)


def _unpack(model: Any) -> tuple[Tree, Any, Any]:
    if isinstance(model, tuple) and len(model) == 2:
        params, config, tokenizer = *model, None
    elif all(hasattr(model, name) for name in ("params", "config", "tokenizer")):
        params, config, tokenizer = model.params, model.config, model.tokenizer
    else:
        raise TypeError(f"a model is what gx.load returns, or a tuple (params, config), not {type(model).__name__}")
    models.family(config)
    return params, config, tokenizer


def _texts(tokenizer: Any) -> Callable[[int], tuple[str | None, str]]:
    """id -> (text, kind)."""
    if tokenizer is None:
        return lambda id: (None, "text")
    names = {id: name for name, id in tokenizer.specials.items()}

    def text(id: int) -> tuple[str, str]:
        if id >= tokenizer.vocab:
            return "", "padding"
        if id in names:
            return names[id], "control"
        return tokenizer.token_bytes(id).decode("utf-8", "backslashreplace"), "text"

    return text


def _token(rank: int, id: int, sides: dict[str, Side], text: Callable[[int], tuple[str | None, str]]) -> GlitchToken:
    scores = {name: float(s.scores[id]) for name, s in sides.items()}
    return GlitchToken(rank, id, *text(id), scores, tuple(name for name, s in sides.items() if s.flagged[id]))


def _search(table: jax.Array, ordinary: np.ndarray, name: str) -> Side:
    """Finds where the untrained rows lie, from every likely place, and keeps the clearest finding.

    From a start the nearest group is split off, the centre moved to its mean, and so on until nothing changes.
    ordinary: bool [V], the rows that are no padding. name: of the side, for errors.
    """
    finite = np.isfinite(_on_host(_distances(table, np.zeros(table.shape[1]))))
    if not finite.all():
        raise ValueError(f"the {name} embedding of token {finite.argmin()} is not finite")
    findings: list[Finding] = []
    for start, centre in _starts(table, ordinary):
        distances = _on_host(_distances(table, centre))
        nothing: Finding = (0.0, start, distances, None)
        finding = nothing
        members = np.zeros_like(ordinary)
        for _ in range(_ROUNDS):
            found = split(distances[ordinary], table.shape[1])
            if found is None:  # not a group about its own mean
                finding = nothing
                break
            threshold, gain = found
            finding = (gain, start, distances, threshold)
            before, members = members, ordinary & (distances <= threshold)
            if members.sum() < 2 or (members == before).all():
                break
            distances = _on_host(_distances(table, _mean(table, members)))
            distances[members] *= members.sum() / (members.sum() - 1)  # as from the mean of the others
        findings.append(finding)
    _, start, distances, limit = max(findings, key=lambda finding: finding[0])
    mean = float(distances[ordinary].mean()) or 1.0
    return Side(distances / mean, None if limit is None else limit / mean, start)


def _starts(table: jax.Array, ordinary: np.ndarray) -> Iterator[tuple[str, jax.Array]]:
    mean = _mean(table, ordinary)
    yield "the mean of all rows", mean
    yield "the origin", jnp.zeros_like(mean)  # where rows begin, and where weight decay takes them
    if not ordinary.all():
        yield "the padding rows", _mean(table, ~ordinary)
    # Where an output table pushes what never comes it pushes most rows, so their mean points there; none go as far.
    reach = np.where(ordinary, _on_host(_reach(table, mean)), -np.inf)
    farthest = np.zeros_like(ordinary)
    farthest[np.argsort(reach)[-3:]] = True
    yield "the rows farthest along the mean", _mean(table, farthest)


def split(distances: np.ndarray, width: int) -> tuple[float, float] | None:
    """(threshold, gain) that part distances [N] from a centre into a near and a far group; None for one group.

    The logarithms are cut where two normal distributions are likeliest (Kittler & Illingworth 1986), among the cuts
    where the groups' centres are 2 sums of their standard deviations apart (of the far group its median, and the
    deviation of those below it: how far trained rows scatter outwards says nothing). Noise in `width` dimensions has
    log distances with a standard deviation of 1/sqrt(2 width): the near group counts as no narrower, and is a
    majority only if it is hardly wider. gain: of log likelihood over one normal distribution, in nats; at least 3 ln N,
    the Bayesian information criterion's price of the three more parameters and as much again for the choice.
    """
    n, mean = len(distances), distances.mean()
    if n < 4 or not mean:
        return None
    order = np.maximum(np.sort(distances) / mean, _NEAREST)
    x = np.log(order)
    one, two = (np.concatenate([[0.0], np.cumsum(x**power)]) for power in (1, 2))
    near = np.arange(1, n)
    far = n - near
    near_mean, far_mean = one[near] / near, (one[n] - one[near]) / far
    near_std = _root(two[near] / near - near_mean**2)
    far_std = _root((two[n] - two[near]) / far - far_mean**2)
    all_std = _root(two[n] / n - (one[n] / n) ** 2)
    noise = 1 / math.sqrt(2 * width)
    spread = np.maximum(near_std, noise)
    gain = n * np.log(all_std) - near * np.log(spread) - far * np.log(far_std)
    gain += near * np.log(near / n) + far * np.log(far / n)
    middle = (near + n) // 2
    median, below = x[middle], middle + 1 - near
    scatter = _root((two[middle + 1] - two[near] - 2 * median * (one[middle + 1] - one[near])) / below + median**2)
    apart = (median - near_mean) / (spread + scatter)
    allowed = (apart >= _APART) & (np.diff(x) > 0) & (far > 1) & ((near <= n / 2) | (near_std <= _NARROW * noise))
    gain = np.where(allowed, gain, -np.inf)
    cut = int(gain.argmax())
    if gain[cut] < 3 * math.log(n):
        return None
    return float(mean * math.sqrt(order[cut] * order[cut + 1])), float(gain[cut])


def _root(variance: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum(variance, 1e-12))  # differences of sums may fall below 0


@jax.jit
def _distances(table: jax.Array, centre: jax.Array) -> jax.Array:  # [V, D], [D] -> [V]
    return _whole(jnp.sqrt(jnp.sum((_wide(table) - centre) ** 2, axis=1)))


@jax.jit
def _reach(table: jax.Array, direction: jax.Array) -> jax.Array:  # [V, D], [D] -> [V]
    return _whole(jnp.sum(_wide(table) * direction, axis=1))


@jax.jit
def _mean(table: jax.Array, rows: jax.Array) -> jax.Array:  # [V, D], bool [V] -> [D]
    weights = rows.astype(jnp.float32)
    return _whole(jnp.sum(_wide(table) * weights[:, None], axis=0) / jnp.sum(weights))


def _on_host(x: jax.Array) -> np.ndarray:
    return np.array(x, np.float64)


def _wide(table: jax.Array) -> jax.Array:  # XLA converts within the sum: no copy of the table
    return table.astype(jnp.promote_types(table.dtype, jnp.float32))


def _whole(x: jax.Array) -> jax.Array:
    """x whole on every device, so that every process can read it; outside of `jax.set_mesh` too."""
    mesh = jax.typeof(x).sharding.mesh
    return x if mesh.empty or not mesh.are_all_axes_explicit else jax.sharding.reshard(x, NamedSharding(mesh, jax.P()))


def plot(found: GlitchTokens, path: str | os.PathLike, title: str = "") -> None:
    """Draws the scores of every side as a histogram with its flagged rows and threshold, and writes a picture to path.

    Raises ImportError without matplotlib (extra `plots`).
    """
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    figure = Figure(figsize=(8, 3.2 * len(found.sides)), dpi=150, layout="constrained")
    panels = figure.subplots(len(found.sides), squeeze=False)[:, 0]
    for axes, (name, side) in zip(panels, found.sides.items(), strict=True):
        scores = np.maximum(side.scores, _NEAREST)
        bins = np.geomspace(scores.min() * 0.9, scores.max() * 1.1, 100)
        axes.hist(scores[~side.flagged], bins, color="#9db8d9", label="trained")
        axes.hist(scores[side.flagged], bins, color="#d1495b", label=f"look untrained: {side.flagged.sum():,}")
        if side.threshold is not None:
            axes.axvline(side.threshold, color="#666666", linewidth=1, linestyle="--")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(f"{title} {name} embeddings".strip(), loc="left", fontsize=10)
        axes.set_xlabel("distance from where untrained rows lie, over the mean")
        axes.set_ylabel("tokens")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(path)
