"""The mask algebra: its two evaluators against brute force, on random rules and streams."""

import operator

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from garrulax.kernels.blocks import block_map
from garrulax.kernels.mask import CAUSAL, INF, All, And, Band, Bits, KRange, Mask, Not, Or, Same, StreamBounds, Within

STREAMS = ("a", "b")
ALL = (*STREAMS, "document")
edges = st.integers(-6, 6)


def bands(stream):
    ends = st.tuples(st.one_of(edges, st.just(-INF)), st.one_of(edges, st.just(INF)), st.sampled_from((None, *STREAMS)))
    return ends.map(lambda ends: Band(stream, *ends))


leaves = st.sampled_from(STREAMS).flatmap(
    lambda s: st.one_of(
        bands(s),
        st.tuples(edges, edges).map(lambda e: KRange(s, *e)),
        st.just(Bits(s)),
        st.sampled_from(STREAMS).map(lambda reach: Within(s, reach)),
        st.just(Same("document")),
        st.just(All()),
    )
)
rules = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda pair: pair[0] & pair[1]),
        st.tuples(inner, inner).map(lambda pair: pair[0] | pair[1]),
        inner.map(operator.invert),
    ),
    max_leaves=6,
)
value = st.one_of(st.integers(-5, 9), st.integers(-(2**29), 2**29))


def streams(length, pad):
    numbers = {**dict.fromkeys(STREAMS, value), "document": st.one_of(st.just(pad), st.integers(0, 9))}
    return st.fixed_dictionaries({n: st.lists(v, min_size=length, max_size=length) for n, v in numbers.items()})


def sides(queries, keys):
    return streams(queries, -1), streams(keys, -2)


def array(streams):
    return {name: jnp.array([s], jnp.int32) for name, s in streams.items()}


def holds(rule, query, key):
    """The rule for one query and one key, dicts of Python integers, written independently of the code."""
    match rule:
        case All():
            return True
        case Band(stream, low, high, of):
            return low <= query[stream] - key[of or stream] <= high
        case Same(stream):
            return query[stream] == key[stream] >= 0
        case KRange(stream, low, high):
            return low <= key[stream] <= high
        case Bits(stream):
            return any(query[stream] >> i & key[stream] >> i & 1 for i in range(32))
        case Within(stream, reach):
            return query[stream] - key[stream] < query[reach]
        case And(left, right):
            return holds(left, query, key) and holds(right, query, key)
        case Or(left, right):
            return holds(left, query, key) or holds(right, query, key)
        case Not(inner):
            return not holds(inner, query, key)


def at(streams, i):
    return {name: s[i] for name, s in streams.items()}


def brute(rule, query, key):
    return np.array(
        [[holds(rule, at(query, i), at(key, j)) for j in range(len(key["a"]))] for i in range(len(query["a"]))]
    )


@settings(max_examples=150, deadline=None)
@given(rules, *sides(4, 5))
def test_evaluate_equals_brute_force(rule, query, key):
    np.testing.assert_array_equal(Mask(array(query), array(key), rule).dense()[0], brute(rule, query, key))


@settings(max_examples=60, deadline=None)
@given(rules, *sides(4, 4))
def test_a_rule_reads_the_streams_that_it_names(rule, query, key):
    """Without the others it gives the same."""
    reads = rule.streams()
    mask = Mask({n: query[n] for n in reads.query}, {n: key[n] for n in reads.key}, rule)
    one = {n: jnp.int32(s[0]) for n, s in mask.query.items()}, {n: jnp.int32(s[0]) for n, s in mask.key.items()}
    assert bool(rule.evaluate(*one).all()) == holds(rule, at(query, 0), at(key, 0))


def bounds(streams):
    out = {}
    for name, s in streams.items():
        s = np.array(s, np.int32)
        out[name] = StreamBounds(s.min(), s.max(), np.bitwise_and.reduce(s), np.bitwise_or.reduce(s))
    return out


@settings(max_examples=150, deadline=None)
@given(rules, *sides(4, 4))
def test_classify_is_conservative(rule, query, key):
    """`any` may be False only where no pair attends, `all` True only where every pair does."""
    exact = brute(rule, query, key)
    some, every = rule.classify(bounds(query), bounds(key))
    assert some or not exact.any()
    assert exact.all() or not every


@settings(max_examples=60, deadline=None)
@given(rules, *sides(6, 8))
def test_block_map_is_conservative(rule, query, key):
    """The same, of all blocks of 3 queries and 2 keys at once."""
    some, every = block_map(rule, array(query), array(key), 3, 2, (1, 2, 4))
    blocks = brute(rule, query, key).reshape(2, 3, 4, 2)
    assert (some[0] | ~blocks.any(axis=(1, 3))).all()
    assert (~every[0] | blocks.all(axis=(1, 3))).all()


@settings(max_examples=100, deadline=None)
@given(leaves, st.integers(-5, 9), st.integers(-5, 9))
def test_classify_is_exact_for_single_pairs(rule, query, key):
    """Otherwise always answering (True, False) would pass."""
    one = {name: [query] for name in ALL}, {name: [key] for name in ALL}
    exact = holds(rule, at(one[0], 0), at(one[1], 0))
    assert tuple(map(bool, rule.classify(bounds(one[0]), bounds(one[1])))) == (exact, exact)


def test_classify_skips_and_fills_blocks_of_a_causal_mask():
    rule, block = CAUSAL, 4

    def verdict(i, j):
        def part(n):
            return bounds({"rank": range(n * block, (n + 1) * block), "segment": [0] * block})

        return tuple(map(bool, rule.classify(part(i), part(j))))

    got = [[verdict(i, j) for j in range(3)] for i in range(3)]
    partial, full, empty = (True, False), (True, True), (False, False)
    assert got == [[partial, empty, empty], [full, partial, empty], [full, full, partial]]


def test_a_missing_stream_is_named():
    mask = Mask({"rank": jnp.zeros((1, 3), int)}, rule=CAUSAL & Bits("ancestors"))
    with pytest.raises(ValueError, match=r"query streams \['ancestors'\], but only \['rank'\] are given"):
        mask.dense()


@pytest.mark.parametrize(
    ("streams", "shapes", "error", "message"),
    [
        ({"rank": jnp.zeros((1, 3), jnp.float32)}, {}, TypeError, "query stream 'rank' is float32, not int32"),
        (
            {"rank": jnp.zeros((1, 3), int)},
            {"query": (1, 4)},
            ValueError,
            r"query stream 'rank' has shape \(1, 3\), not",
        ),
        ({"rank": jnp.zeros((1, 3), int)}, {"key": (5, 16)}, ValueError, r"key stream 'rank' .* not \(5, 16\)"),
    ],
)
def test_streams_that_do_not_fit_are_named(streams, shapes, error, message):
    with pytest.raises(error, match=message):
        Mask(streams, rule=CAUSAL).read(**shapes)
