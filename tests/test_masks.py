"""The mask algebra: its two evaluators against brute force, on random rules and streams."""

import operator

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from garrulax.kernels import masks
from garrulax.kernels.mask import INF, And, Band, Bits, Bounds, KRange, Mask, Not, Or, Within

STREAMS = ("a", "b")
edges = st.integers(-6, 6)


def bands(stream):
    ends = st.tuples(st.one_of(edges, st.just(-INF)), st.one_of(edges, st.just(INF)))
    return ends.map(lambda ends: Band(stream, *ends))


leaves = st.sampled_from(STREAMS).flatmap(
    lambda s: st.one_of(
        bands(s),
        st.tuples(edges, edges).map(lambda e: KRange(s, *e)),
        st.just(Bits(s)),
        st.sampled_from(STREAMS).map(lambda reach: Within(s, reach)),
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
values = st.lists(st.one_of(st.integers(-5, 9), st.integers(-(2**29), 2**29)), min_size=4, max_size=4)
streams = st.fixed_dictionaries(dict.fromkeys(STREAMS, values))


def holds(rule, query, key):
    """The rule for one query and one key, dicts of Python integers, written independently of the code."""
    match rule:
        case Band(stream, low, high):
            return low <= query[stream] - key[stream] <= high
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
    return np.array([[holds(rule, at(query, i), at(key, j)) for j in range(4)] for i in range(4)])


@settings(max_examples=150, deadline=None)
@given(rules, streams, streams)
def test_evaluate_equals_brute_force(rule, query, key):
    mask = Mask(
        {name: np.array([s], np.int32) for name, s in query.items()},
        {name: np.array([s], np.int32) for name, s in key.items()},
        rule,
    )
    np.testing.assert_array_equal(mask.dense()[0], brute(rule, query, key))
    assert rule.streams().query | rule.streams().key <= set(STREAMS)


def bounds(streams):
    out = {}
    for name, s in streams.items():
        s = np.array(s, np.int32)
        out[name] = Bounds(s.min(), s.max(), np.bitwise_and.reduce(s), np.bitwise_or.reduce(s))
    return out


@settings(max_examples=400, deadline=None)
@given(rules, streams, streams)
def test_classify_is_conservative(rule, query, key):
    """`any` may be False only where no pair attends, `all` True only where every pair does."""
    exact = brute(rule, query, key)
    some, every = rule.classify(bounds(query), bounds(key))
    assert some or not exact.any()
    assert exact.all() or not every


@settings(max_examples=100, deadline=None)
@given(leaves, st.integers(-5, 9), st.integers(-5, 9))
def test_classify_is_exact_for_single_pairs(rule, query, key):
    """Otherwise always answering (True, False) would pass."""
    one = {name: [query] for name in STREAMS}, {name: [key] for name in STREAMS}
    exact = holds(rule, at(one[0], 0), at(one[1], 0))
    assert tuple(map(bool, rule.classify(bounds(one[0]), bounds(one[1])))) == (exact, exact)


def test_classify_skips_and_fills_blocks_of_a_causal_mask():
    rule, block = masks.CAUSAL, 4

    def verdict(i, j):
        def part(n):
            return bounds({"rank": range(n * block, (n + 1) * block), "segment": [0] * block})

        return tuple(map(bool, rule.classify(part(i), part(j))))

    got = [[verdict(i, j) for j in range(3)] for i in range(3)]
    partial, full, empty = (True, False), (True, True), (False, False)
    assert got == [[partial, empty, empty], [full, partial, empty], [full, full, partial]]


def seen(mask):
    return np.asarray(mask.dense())


def test_causal():
    np.testing.assert_array_equal(seen(masks.causal(2, 5)), np.tril(np.ones((2, 5, 5), bool)))
    np.testing.assert_array_equal(seen(masks.causal_from(jnp.zeros((2, 5), int))), np.tril(np.ones((2, 5, 5), bool)))
    np.testing.assert_array_equal(masks.causal_from(jnp.zeros((1, 3), int), 4).query["rank"], [[4, 5, 6]])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.booleans(), min_size=6, max_size=6))
def test_padding_sees_nothing_and_is_not_seen(valid):
    valid = np.array([valid])
    expected = np.tril(np.ones((6, 6), bool)) & valid[0][:, None] & valid[0][None, :]
    np.testing.assert_array_equal(seen(masks.padded(jnp.asarray(valid)))[0], expected)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-1, 3), min_size=6, max_size=6))
def test_packed_documents_see_themselves(segment):
    s = np.array(segment)
    expected = np.tril(np.ones((6, 6), bool)) & (s[:, None] == s[None, :]) & (s[:, None] >= 0)
    np.testing.assert_array_equal(seen(masks.packed(jnp.asarray(s[None])))[0], expected)


@pytest.mark.parametrize("context", [0, 1, 3, 6])
def test_prefix(context):
    """THUDM/GLM mpu/transformer.py: lower triangle, and columns below `sep` for every row."""
    expected = np.tril(np.ones((6, 6), bool))
    expected[:, :context] = True
    np.testing.assert_array_equal(seen(masks.prefix(jnp.array([context]), 6))[0], expected)


def test_a_missing_stream_is_named():
    mask = Mask({"rank": jnp.zeros((1, 3), int)}, rule=masks.CAUSAL & Bits("ancestors"))
    with pytest.raises(ValueError, match=r"\['ancestors'\]"):
        mask.dense()
