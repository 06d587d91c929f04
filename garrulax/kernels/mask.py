"""Masks: which query may attend to which key, as predicates over integers of the tokens.

A mask is a rule and streams. Streams are int32 arrays with one number per token: [B, T] for the queries, [B, S] for the
keys. The rule is a small static tree of predicates (`Band`, `Same`, `KRange`, `Bits`, `Within`) joined by `&`, `|` and
`~`. It is evaluated in two ways:

- `evaluate` gives the exact answer for every (query, key) pair;
- `classify` takes the minimum, maximum, bitwise AND and bitwise OR of each stream in a block of queries and a block of
  keys, and says whether any pair of the block attends and whether all do. Kernels use it to skip blocks, so that no
  array of T x S elements is ever needed.

`kernels.masks` builds the masks of the literature; docs/attention.md shows them.

Streams that the model families use:

- `rank`: order of generation. A query attends to keys of the same or a lower rank; GLM's part A has one rank.
- `choice`: 0 in a text, 1, 2, ... in several continuations of it that do not attend to one another.
- `segment`: document of a packed row. PAD (-1) is padding, which attends to nothing and is attended to by nothing.
- `position`: place of a token in its own text, for windows and ALiBi (`layers.cache.admit` adds it).
- `reach`: of queries only: the size of the query's window, itself included.
- `phase`: position modulo the stride of a layer of GPT-3: tokens of one phase attend to each other (`masks.within`).
"""

import abc
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from garrulax.core.dtypes import as_int32
from garrulax.core.records import Record

INF = 2**30  # larger than any position, small enough that differences of two do not overflow int32
PAD = -1  # segment of a padding query
PAD_KEY = -2  # segment of a padding key or an empty cache slot: equals no query's segment

Streams = dict[str, jax.Array]


class StreamBounds(NamedTuple):
    """Bounds of a stream in each block: minimum, maximum, and bitwise AND and OR of its values."""

    low: jax.Array
    high: jax.Array
    all_bits: jax.Array
    any_bits: jax.Array


class StreamNames(NamedTuple):
    """Names of the streams that a rule reads of the queries and of the keys."""

    query: frozenset[str]
    key: frozenset[str]

    def __or__(self, other: "StreamNames") -> "StreamNames":
        return StreamNames(self.query | other.query, self.key | other.key)


class Rule(abc.ABC):
    """A predicate of (query, key). Rules combine with `&`, `|` and `~`."""

    def __and__(self, other: "Rule") -> "Rule":
        return And(self, other)

    def __or__(self, other: "Rule") -> "Rule":
        return Or(self, other)

    def __invert__(self) -> "Rule":
        return Not(self)

    @abc.abstractmethod
    def streams(self) -> StreamNames:
        """Names of the streams that the rule reads."""

    @abc.abstractmethod
    def evaluate(self, query: Streams, key: Streams) -> jax.Array:
        """The predicate for query streams [..., T, 1] and key streams [..., 1, S]: bool, broadcastable to [..., T, S].

        True where the query may attend to the key.
        """

    @abc.abstractmethod
    def classify(self, query: dict[str, StreamBounds], key: dict[str, StreamBounds]) -> tuple[jax.Array, jax.Array]:
        """(any, all) for blocks of pairs, from the bounds of their streams.

        `any` is False only where no pair attends, `all` is True only where every pair does. Bounds cannot decide every
        block: an undecided one gets (True, False), which costs time but is always correct.
        """


@dataclasses.dataclass(frozen=True)
class All(Rule):
    """True for every pair."""

    def streams(self):
        return StreamNames(frozenset(), frozenset())

    def evaluate(self, query, key):
        return jnp.ones((), bool)

    def classify(self, query, key):
        return jnp.ones((1, 1, 1), bool), jnp.ones((1, 1, 1), bool)


@dataclasses.dataclass(frozen=True)
class Band(Rule):
    """low <= query - key <= high of one stream. `Band(s, 0, INF)` is causal in s; `Band(s, 0, 0)` is equality.

    Attributes:
        stream: Name of the stream of the queries.
        low: Least difference, or -INF.
        high: Greatest difference, or INF.
        of: Name of the stream of the keys; None is the same name.
    """

    stream: str
    low: int
    high: int
    of: str | None = None

    def streams(self):
        return StreamNames(frozenset({self.stream}), frozenset({self.of or self.stream}))

    def evaluate(self, query, key):
        q, k = query[self.stream], key[self.of or self.stream]
        if self.low == self.high == 0:
            return q == k
        # Subtracting from the queries costs T operations, subtracting from the differences T x S.
        if self.high >= INF:
            return q - self.low >= k
        if self.low <= -INF:
            return q - self.high <= k
        return (q - self.low >= k) & (q - self.high <= k)

    def classify(self, query, key):
        q, k = query[self.stream], key[self.of or self.stream]
        most, least = q.high - k.low, q.low - k.high
        return (most >= self.low) & (least <= self.high), (least >= self.low) & (most <= self.high)


@dataclasses.dataclass(frozen=True)
class Same(Rule):
    """query == key of one stream whose negative numbers are padding: no negative number is both a query's and a key's.

    It skips more blocks than `Band(stream, 0, 0)`. In a block of document 5 and padding, minimum and maximum are -1 and
    5, so `Band` cannot exclude the documents 0 to 4; `Same` excludes them by the bitwise AND.
    """

    stream: str

    def streams(self):
        return StreamNames(frozenset({self.stream}), frozenset({self.stream}))

    def evaluate(self, query, key):
        return query[self.stream] == key[self.stream]

    def classify(self, query, key):
        q, k = query[self.stream], key[self.stream]
        # Least document of a block with padding. The bitwise AND is a lower bound of it: ANDing a non-negative number
        # with others never makes it larger.
        least_q, least_k = (jnp.where(b.low < 0, b.all_bits, b.low) for b in (q, k))
        some = (q.high >= 0) & (k.high >= 0) & (least_q <= k.high) & (least_k <= q.high)
        return some, (q.low >= 0) & (q.low == k.high) & (q.high == k.low)


@dataclasses.dataclass(frozen=True)
class KRange(Rule):
    """low <= key <= high of one stream, for any query."""

    stream: str
    low: int
    high: int

    def streams(self):
        return StreamNames(frozenset(), frozenset({self.stream}))

    def evaluate(self, query, key):
        k = key[self.stream]
        return (k >= self.low) & (k <= self.high)

    def classify(self, query, key):
        k = key[self.stream]
        return (k.low <= self.high) & (k.high >= self.low), (k.low >= self.low) & (k.high <= self.high)


@dataclasses.dataclass(frozen=True)
class Bits(Rule):
    """query & key != 0 of one stream: they have a set bit in common."""

    stream: str

    def streams(self):
        return StreamNames(frozenset({self.stream}), frozenset({self.stream}))

    def evaluate(self, query, key):
        return (query[self.stream] & key[self.stream]) != 0

    def classify(self, query, key):
        q, k = query[self.stream], key[self.stream]
        return (q.any_bits & k.any_bits) != 0, (q.all_bits & k.all_bits) != 0


@dataclasses.dataclass(frozen=True)
class Within(Rule):
    """query - key < the query's number in the stream `reach`.

    The width of this window is data, not part of the rule, so layers of one scan may have different widths.
    """

    stream: str = "position"
    reach: str = "reach"

    def streams(self):
        return StreamNames(frozenset({self.stream, self.reach}), frozenset({self.stream}))

    def evaluate(self, query, key):
        return query[self.stream] - key[self.stream] < query[self.reach]

    def classify(self, query, key):
        q, k, reach = query[self.stream], key[self.stream], query[self.reach]
        return q.low - k.high < reach.high, q.high - k.low < reach.low


@dataclasses.dataclass(frozen=True)
class And(Rule):
    """Both rules hold."""

    left: Rule
    right: Rule

    def streams(self):
        return self.left.streams() | self.right.streams()

    def evaluate(self, query, key):
        return self.left.evaluate(query, key) & self.right.evaluate(query, key)

    def classify(self, query, key):
        (any1, all1), (any2, all2) = self.left.classify(query, key), self.right.classify(query, key)
        return any1 & any2, all1 & all2


@dataclasses.dataclass(frozen=True)
class Or(Rule):
    """At least one of the rules holds."""

    left: Rule
    right: Rule

    def streams(self):
        return self.left.streams() | self.right.streams()

    def evaluate(self, query, key):
        return self.left.evaluate(query, key) | self.right.evaluate(query, key)

    def classify(self, query, key):
        (any1, all1), (any2, all2) = self.left.classify(query, key), self.right.classify(query, key)
        return any1 | any2, all1 | all2


@dataclasses.dataclass(frozen=True)
class Not(Rule):
    """The rule does not hold."""

    rule: Rule

    def streams(self):
        return self.rule.streams()

    def evaluate(self, query, key):
        return self.rule.evaluate(query, key) ^ True  # not ~, which Mosaic GPU cannot compile for a bool

    def classify(self, query, key):
        some, every = self.rule.classify(query, key)
        return ~every, ~some


CAUSAL = Band("rank", 0, INF)
SAME_SEGMENT = Same("segment")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask(Record):
    """A rule and the streams that it reads.

    Attributes:
        query: int32 [B, T] by stream name.
        key: int32 [B, S] by stream name; None where the queries are the keys (self-attention).
        rule: Static: another rule compiles another program, other streams do not.
        causal: Static. True only if the mask is plainly causal (query t attends to the keys 0, 1, ..., t) for any
            values of the streams. Libraries without masks (cuDNN) then use their own causal mask.

    Example:
        >>> import jax, garrulax as gx
        >>> rank = jax.numpy.array([[0, 1, 2, 3]])
        >>> segment = jax.numpy.array([[0, 0, 1, -1]])  # two documents, and padding
        >>> mask = gx.Mask({"rank": rank, "segment": segment})  # causal within each document
        >>> mask.dense()[0].astype(int).tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    """

    query: Streams
    key: Streams | None = None
    rule: Rule = dataclasses.field(default=CAUSAL & SAME_SEGMENT, metadata={"static": True})
    causal: bool = dataclasses.field(default=False, metadata={"static": True})

    def key_streams(self) -> Streams:
        """Streams of the keys.

        In self-attention they are the queries' streams, with another segment for padding: equal segments attend to each
        other, and two padding tokens must not.
        """
        return as_keys(self.query) if self.key is None else self.key

    def dense(self) -> jax.Array:
        """The mask as an array, bool [B, T, S]: True where the query may attend to the key.

        Raises ValueError for a missing stream.
        """
        query, key = self.read()
        (batch, queries), (_, keys) = (next(iter(s.values())).shape for s in (self.query, self.key_streams()))
        allowed = self.rule.evaluate(
            {name: s[:, :, None] for name, s in query.items()}, {name: s[:, None, :] for name, s in key.items()}
        )
        return jnp.broadcast_to(allowed, (batch, queries, keys))

    def read(
        self, *more: str, query: tuple[int, ...] | None = None, key: tuple[int, ...] | None = None
    ) -> tuple[Streams, Streams]:
        """The streams that the rule reads, checked.

        Args:
            more: Names of further streams to return, of queries and of keys.
            query: Shape that the streams of the queries must have; None is any.
            key: Shape that the streams of the keys must have; None is any.

        Returns:
            The streams of the queries and those of the keys.

        Raises:
            ValueError: For a missing stream or one of another shape.
            TypeError: For a stream that is not int32.
        """
        names = self.rule.streams() | StreamNames(frozenset(more), frozenset(more))
        return (
            _checked("query", self.query, names.query, query),
            _checked("key", self.key_streams(), names.key, key),
        )


def _checked(side: str, given: Streams, names: frozenset[str], shape: tuple[int, ...] | None) -> Streams:
    wanted = sorted(names)
    missing = [name for name in wanted if name not in given]
    if missing:
        raise ValueError(f"the mask reads {side} streams {missing}, but only {sorted(given)} are given")
    streams = {name: as_int32(given[name]) for name in wanted}
    for name, stream in streams.items():
        if shape is not None and stream.shape != shape:
            raise ValueError(f"{side} stream {name!r} has shape {stream.shape}, not {shape}")
        if stream.dtype != jnp.int32:
            raise TypeError(f"{side} stream {name!r} is {stream.dtype}, not int32")
    return streams


def as_keys(streams: Streams) -> Streams:
    """Streams of the queries as streams of the keys: the segment of padding becomes PAD_KEY."""
    if "segment" not in streams:
        return streams
    segment = streams["segment"]
    return {**streams, "segment": jnp.where(segment < 0, PAD_KEY, segment)}
