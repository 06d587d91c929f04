"""Who attends to whom: predicates over per-token integer streams.

A mask is a small static tree of rules (`Band`, `Same`, `KRange`, `Bits`, ... under `&`, `|`, `~`) over streams: int32
arrays [B, T] of the queries and [B, S] of the keys. The same tree has two evaluators: `evaluate` gives the exact
answer for every pair, `classify` bounds the answer for a whole block of pairs from the streams' (min, max, and, or) in
it, so that a kernel can skip blocks without a T x S array ever existing.
`kernels.masks` builds the masks of the literature, docs/attention.md shows them.

Streams used by the families
  rank     order of generation: a query sees keys of its own or a lower rank (all of GLM's part A has one rank)
  choice   0 in a text, 1, 2, ... in several continuations of it that do not see one another
  segment  document in a packed row; PAD (-1) marks padding, which sees nothing and is seen by nothing
  position where a token stands in its own text, for windows and ALiBi (`layers.cache.admit` adds it)
  reach    of queries only: how many tokens back one sees, itself included
  phase    position modulo the stride of a layer of GPT-3: equal phases see each other (`kernels.masks.within`)
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

INF = 2**30  # larger than any position, small enough that differences of two do not overflow int32
PAD = -1  # segment of a padding query
PAD_KEY = -2  # segment of a padding key or an empty cache slot: equal to no query's

Streams = dict[str, jax.Array]


class Bounds(NamedTuple):
    """What is known of a stream in one block: least and greatest value, and bitwise and and or of all values."""

    low: jax.Array
    high: jax.Array
    all_bits: jax.Array
    any_bits: jax.Array


class Reads(NamedTuple):
    """Names of the streams that a rule reads of the queries and of the keys."""

    query: frozenset[str]
    key: frozenset[str]

    def __or__(self, other: "Reads") -> "Reads":
        return Reads(self.query | other.query, self.key | other.key)


class Rule:
    """A predicate of (query, key); rules combine with `&`, `|` and `~`."""

    def __and__(self, other: "Rule") -> "Rule":
        return And(self, other)

    def __or__(self, other: "Rule") -> "Rule":
        return Or(self, other)

    def __invert__(self) -> "Rule":
        return Not(self)

    def streams(self) -> Reads:
        """Names of the streams that the rule reads."""
        raise TypeError(f"{type(self).__name__} must define streams()")

    def evaluate(self, query: Streams, key: Streams) -> jax.Array:
        """The predicate of query streams [..., T, 1] and key streams [..., 1, S], broadcastable to [..., T, S]."""
        raise TypeError(f"{type(self).__name__} must define evaluate()")

    def classify(self, query: dict[str, Bounds], key: dict[str, Bounds]) -> tuple[jax.Array, jax.Array]:
        """(any, all) for a block: `any` False means no pair attends, `all` True means every pair does.

        Conservative: what cannot be excluded counts as possible, what cannot be proved as not all.
        """
        raise TypeError(f"{type(self).__name__} must define classify()")


@dataclasses.dataclass(frozen=True)
class All(Rule):
    """Every pair."""

    def streams(self):
        return Reads(frozenset(), frozenset())

    def evaluate(self, query, key):
        return jnp.ones((), bool)

    def classify(self, query, key):
        return jnp.ones((1, 1, 1), bool), jnp.ones((1, 1, 1), bool)


@dataclasses.dataclass(frozen=True)
class Band(Rule):
    """low <= query - key <= high of one stream. `Band(s, 0, INF)` is causal in s; `Band(s, 0, 0)` is equality.

    of: the stream of the keys, where it is not called as that of the queries.
    """

    stream: str
    low: int
    high: int
    of: str | None = None

    def streams(self):
        return Reads(frozenset({self.stream}), frozenset({self.of or self.stream}))

    def evaluate(self, query, key):
        q, k = query[self.stream], key[self.of or self.stream]
        if self.low == self.high == 0:
            return q == k
        # The bounds are taken off the queries alone, not off every pair.
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
    """query == key of one stream in which negative numbers are padding: no negative number is both a query's and a
    key's. Unlike `Band(stream, 0, 0)` it knows that a block of one document and padding holds nothing between."""

    stream: str

    def streams(self):
        return Reads(frozenset({self.stream}), frozenset({self.stream}))

    def evaluate(self, query, key):
        return query[self.stream] == key[self.stream]

    def classify(self, query, key):
        q, k = query[self.stream], key[self.stream]
        # The bitwise and of numbers, some of them not negative, is at most the least of these.
        least_q, least_k = (jnp.where(b.low < 0, b.all_bits, b.low) for b in (q, k))
        some = (q.high >= 0) & (k.high >= 0) & (least_q <= k.high) & (least_k <= q.high)
        return some, (q.low >= 0) & (q.low == k.high) & (q.high == k.low)


@dataclasses.dataclass(frozen=True)
class KRange(Rule):
    """low <= key <= high of one stream, whatever the query."""

    stream: str
    low: int
    high: int

    def streams(self):
        return Reads(frozenset(), frozenset({self.stream}))

    def evaluate(self, query, key):
        k = key[self.stream]
        return (k >= self.low) & (k <= self.high)

    def classify(self, query, key):
        k = key[self.stream]
        return (k.low <= self.high) & (k.high >= self.low), (k.low >= self.low) & (k.high <= self.high)


@dataclasses.dataclass(frozen=True)
class Bits(Rule):
    """query and key of one stream share a set bit."""

    stream: str

    def streams(self):
        return Reads(frozenset({self.stream}), frozenset({self.stream}))

    def evaluate(self, query, key):
        return (query[self.stream] & key[self.stream]) != 0

    def classify(self, query, key):
        q, k = query[self.stream], key[self.stream]
        return (q.any_bits & k.any_bits) != 0, (q.all_bits & k.all_bits) != 0


@dataclasses.dataclass(frozen=True)
class Within(Rule):
    """query - key < the query's own entry of the stream `reach`: a window whose width is data, so that layers of one
    scan may have different ones."""

    stream: str = "position"
    reach: str = "reach"

    def streams(self):
        return Reads(frozenset({self.stream, self.reach}), frozenset({self.stream}))

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


@struct.dataclass
class Mask:
    """A rule and the streams it reads.

    rule: static; a new rule compiles anew, new streams do not.
    query: int32 [B, T] by stream name. key: int32 [B, S]; None where the queries are the keys (self-attention).
    causal: static; says that the streams come out as query t seeing the keys 0, 1, ..., t, whatever the data: for
    libraries that know no streams.
    """

    query: Streams
    key: Streams | None = None
    rule: Rule = struct.field(pytree_node=False, default=CAUSAL & SAME_SEGMENT)
    causal: bool = struct.field(pytree_node=False, default=False)

    def key_streams(self) -> Streams:
        """Streams of the keys; those of self-attention are the queries' with padding relabelled, so that
        one padding token does not see another."""
        return as_keys(self.query) if self.key is None else self.key

    def dense(self) -> jax.Array:
        """The mask as bool [B, T, S]: True where the query may attend. Raises ValueError for a missing stream."""
        query, key = self.read()
        (batch, queries), (_, keys) = (next(iter(s.values())).shape for s in (self.query, self.key_streams()))
        seen = self.rule.evaluate(
            {name: s[:, :, None] for name, s in query.items()}, {name: s[:, None, :] for name, s in key.items()}
        )
        return jnp.broadcast_to(seen, (batch, queries, keys))

    def read(
        self, *more: str, query: tuple[int, ...] | None = None, key: tuple[int, ...] | None = None
    ) -> tuple[Streams, Streams]:
        """The streams of queries and of keys that the rule reads, and `more` of both sides.

        query, key: the shapes that they must have; None is any.
        Raises ValueError where one is not given or not of that shape, TypeError where one is not int32.
        """
        reads = self.rule.streams() | Reads(frozenset(more), frozenset(more))
        return (
            _checked("query", self.query, reads.query, query),
            _checked("key", self.key_streams(), reads.key, key),
        )


def _checked(side: str, given: Streams, names: frozenset[str], shape: tuple[int, ...] | None) -> Streams:
    wanted = sorted(names)
    missing = [name for name in wanted if name not in given]
    if missing:
        raise ValueError(f"the mask reads {side} streams {missing}, but only {sorted(given)} are given")
    for name in wanted:
        if shape is not None and given[name].shape != shape:
            raise ValueError(f"{side} stream {name!r} has shape {given[name].shape}, not {shape}")
        if given[name].dtype != jnp.int32:
            raise TypeError(f"{side} stream {name!r} is {given[name].dtype}, not int32")
    return {name: given[name] for name in wanted}


def as_keys(streams: Streams) -> Streams:
    """Streams of tokens as queries turned into their streams as keys: padding gets a segment of its own."""
    if "segment" not in streams:
        return streams
    segment = streams["segment"]
    return {**streams, "segment": jnp.where(segment < 0, PAD_KEY, segment)}
