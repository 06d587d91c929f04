"""Requests for every implementation of attention, and their comparison with the dense formula in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from garrulax.kernels.attention import attention
from garrulax.kernels.mask import INF, PAD, SAME_SEGMENT, All, Band, Bits, KRange, Mask, Within
from garrulax.kernels.relative import t5

B = 2
LOWEST = float(np.finfo(np.float32).min)
CAUSAL = Band("rank", 0, INF)


def _row(length):
    return np.broadcast_to(np.arange(length), (B, length))


def _documents(length):
    """Segment, start and position of documents of different lengths, padding behind the second row's."""
    cuts = [0.3, 0.45, 0.9], [0.1, 0.6, 0.8]
    segment = np.stack([np.searchsorted(np.array(c) * length, np.arange(length), side="right") for c in cuts])
    start = np.stack([np.searchsorted(s, s) for s in segment])
    position = _row(length) - start
    segment[1][segment[1] == 3] = PAD
    return segment, start, position


def _self(rule, **streams):
    streams = {name: jnp.asarray(s, jnp.int32) for name, s in streams.items()}
    return Mask(streams, None, rule)


def causal(T):
    return _self(CAUSAL, rank=_row(T))


def bidirectional(T):
    """An encoder's: all tokens of a text, rows of different lengths."""
    return _self(SAME_SEGMENT, segment=np.where(_row(T) < np.array([[T], [T // 3 + 1]]), 0, PAD))


def prefix(T):
    """Prefix-LM: the first tokens have one rank."""
    index, context = _row(T), np.array([[T // 3], [T // 2 + 3]])
    return _self(CAUSAL & SAME_SEGMENT, rank=np.where(index < context, 0, index + 1), segment=0 * index)


def packed(T):
    segment, _, _ = _documents(T)
    return _self(CAUSAL & SAME_SEGMENT, rank=_row(T), segment=segment)


def infilling(T):
    """Packed documents, the first 60 % of each one part A."""
    segment, start, position = _documents(T)
    length = np.stack([np.bincount(s - s.min())[s - s.min()] for s in segment])
    rank = np.where(position < 0.6 * length, start, _row(T) + 1)
    return _self(CAUSAL & SAME_SEGMENT, rank=rank, segment=segment)


def window(T):
    segment, _, position = _documents(T)
    return _self(Band("position", 0, T // 5) & SAME_SEGMENT, segment=segment, position=position)


def sinks_and_window(T):
    near = Band("position", -INF, T // 6) | KRange("position", 0, 3)
    return _self(Band("position", 0, INF) & near, position=_row(T))


def banded_and_strided(T):
    """GPT-3's locally banded layers with Child et al.'s strided ones; the width of the band is a stream."""
    rule = Band("position", 0, INF) & (Within() | Band("phase", 0, 0))
    position = _row(T)
    return _self(rule, position=position, phase=position % 16, reach=np.full_like(position, 20))


def fixed(T):
    """Sparse Transformer, fixed: the own block of 32, and the last 4 of every earlier one."""
    position = _row(T)
    rule = CAUSAL & (Band("block", 0, 0) | KRange("rest", 0, 3))
    return _self(rule, rank=position, block=position // 32, rest=31 - position % 32)


def bigbird(T):
    """Global tokens, a window of blocks and two random blocks for every block of 16."""
    r = np.random.default_rng(7)
    block = _row(T) // 16
    chosen = {f"random{i}": r.integers(0, block.max() + 1, (B, block.max() + 1)) for i in range(2)}
    chosen = {name: np.take_along_axis(x, block, 1) for name, x in chosen.items()}
    first = (_row(T) < 8).astype(int)
    rule = KRange("first", 1, 1) | Bits("first") | Band("block", -1, 1)
    rule = rule | Band("random0", 0, 0, "block") | Band("random1", 0, 0, "block") | ~Band("first", -INF, 0, "zero")
    return _self(rule, block=block, first=first, zero=0 * first, **chosen)


def outside(T):
    """Everything but the own document and the far past: Not."""
    segment, _, _ = _documents(T)
    return _self(~SAME_SEGMENT & ~Band("rank", T // 2, INF), rank=_row(T), segment=np.abs(segment))


def nothing(T):
    """Queries of the first half of the first row, and of the whole second row, see nothing."""
    segment = np.where((_row(T) < T // 2) | (np.arange(B)[:, None] == 1), PAD, 0)
    return _self(CAUSAL & SAME_SEGMENT, rank=_row(T), segment=segment)


def everything(T):
    return Mask({"rank": jnp.asarray(_row(T), jnp.int32)}, None, All())


def some(names, *quick):
    """Parameters of a test, values or tuples of them: all `names`, of which `make test` runs the `quick` ones only."""
    slow = {"marks": pytest.mark.slow}
    return [
        name if name in quick else pytest.param(*(name if isinstance(name, tuple) else (name,)), **slow)
        for name in names
    ]


#: Masks with every kind of rule, with rows that see nothing, and without a rule: for implementations of attention,
#: which evaluate the rules that others test.
QUICK = ("everything", "packed", "sinks_and_window", "bigbird", "nothing")

#: Masks of T tokens among themselves.
CASES = {
    f.__name__: f
    for f in (
        everything, causal, bidirectional, prefix, packed, infilling, window, sinks_and_window, banded_and_strided,
        fixed, bigbird, outside, nothing,
    )
}  # fmt: skip


def cached(T, S):
    """T new tokens behind a cache of S slots, of which the two rows fill different shares; causal."""
    used = np.array([[S - T], [(S - T) // 2]])
    slot = _row(S)
    segment = np.where((slot < used) | (slot >= S - T), 0, -2)
    rank = np.where(slot < used, slot, slot - (S - T) + used)
    key = {"rank": jnp.asarray(rank, jnp.int32), "segment": jnp.asarray(segment, jnp.int32)}
    return Mask({name: s[:, S - T :] for name, s in key.items()}, key, CAUSAL & SAME_SEGMENT)


def tree(T, S):
    """T nodes of a tree of drafts behind a cache of S - T slots: bits of the ancestors; bit 30 is the cache's."""
    r = np.random.default_rng(T)
    ancestors = np.zeros(T, np.int64)
    for i in range(T):
        ancestors[i] = (ancestors[r.integers(0, i)] if i else 0) | 1 << i
    words = [(ancestors >> (30 * i)) & (2**30 - 1) for i in range(-(-T // 30))]
    own = [((1 << np.arange(T)) >> (30 * i)) & (2**30 - 1) for i in range(len(words))]
    words[0], cache = words[0] | 1 << 30, np.full(S - T, 1 << 30)
    query, key, rule = {}, {}, None
    for i, (q, k) in enumerate(zip(words, own, strict=True)):
        name = f"bits{i}"
        query[name] = jnp.asarray(np.broadcast_to(q, (B, T)), jnp.int32)
        slots = np.concatenate([cache if i == 0 else 0 * cache, k])
        key[name] = jnp.asarray(np.broadcast_to(slots, (B, S)), jnp.int32)
        rule = Bits(name) if rule is None else rule | Bits(name)
    return Mask(query, key, rule)


#: What can be asked for beside a mask; the arguments of `attention` for H heads of T queries and S keys.
def extra(name, H, T, S, seed=11):
    r = np.random.default_rng(seed)
    return {
        "softcap": lambda: {"softcap": 2.0},
        "scale": lambda: {"scale": 0.3},
        "alibi": lambda: {"alibi": 2.0 ** -np.arange(1, H + 1)},
        "sinks": lambda: {"sinks": r.normal(size=H)},
        "relative": lambda: {"relative": t5(jnp.asarray(r.normal(size=(32, H))), bidirectional=True, max_distance=64)},
        "bias": lambda: {"bias": r.normal(size=(B, H, T, S))},
        "shared_bias": lambda: {"bias": r.normal(size=(1, 1, T, S))},
        "key_bias": lambda: {"bias": r.normal(size=(B, H, 1, S))},
        "dropout": lambda: {"dropout": 0.2, "dropout_key": jax.random.key(5)},
    }[name]()


EXTRAS = ("softcap", "scale", "alibi", "sinks", "relative", "bias", "shared_bias", "key_bias", "dropout")


def with_positions(mask):
    """The mask with a stream `position` of both sides, for distances, where it has none."""
    if "position" in mask.query:
        return mask
    key = mask.key_streams()
    T, S = (next(iter(s.values())).shape[1] for s in (mask.query, key))
    slots = jnp.asarray(_row(S), jnp.int32)
    return Mask({**mask.query, "position": slots[:, S - T :]}, {**key, "position": slots}, mask.rule)


def inputs(T, S, H, K, C, Cv=None, seed=0):
    """query, key, value and the cotangent of the output, float64."""
    r = np.random.default_rng(seed)
    widths = ((T, H, C), (S, K, C), (S, K, Cv or C), (T, H, Cv or C))
    return [r.normal(size=(B, *shape)) for shape in widths]


def run(operands, cotangent, mask, options, implementation=None):
    """Output, and the gradients of query, key, value and of the learned options, under jit."""
    learned = {name: options[name] for name in ("bias", "sinks", "relative") if name in options}
    rest = {name: x for name, x in options.items() if name not in learned}
    call = functools.partial(attention, implementation=implementation, **rest)

    @jax.jit
    def both(operands, learned, mask, cotangent):
        out, back = jax.vjp(lambda x, y: call(*x, mask=mask, **y), operands, learned)
        return out, back(cotangent.astype(out.dtype))

    return both(tuple(operands), learned, mask, cotangent)


def assert_agrees(implementation, mask, shape, *, extras=(), dtype=jnp.float32, bound=2e-6, seed=0):
    """Output and every gradient of the implementation, against the dense formula in float64: the greatest error
    relative to the greatest value. shape: (T, S, H, K, C) or (T, S, H, K, C, Cv). Returns the greatest of them."""
    T, S, H = shape[:3]
    if {"alibi", "relative"} & set(extras):
        mask = with_positions(mask)
    with jax.enable_x64(True):
        options = {name: x for e in extras for name, x in extra(e, H, T, S).items()}
        rounded = [np.asarray(jnp.asarray(x, dtype), np.float64) for x in inputs(*shape, seed=seed)]
        expected = run([jnp.asarray(x) for x in rounded[:3]], jnp.asarray(rounded[3]), mask, options, "dense")
        expected = jax.tree.map(np.asarray, expected)

    def ours(x):
        return jnp.asarray(x, jnp.float32) if getattr(x, "dtype", None) == np.float64 else x

    options = jax.tree.map(ours, options)
    got = run(
        [jnp.asarray(x, dtype) for x in rounded[:3]], jnp.asarray(rounded[3], dtype), mask, options, implementation
    )
    errors = jax.tree.map(_relative_error, got, expected)
    worst = max(jax.tree.leaves(errors))
    assert worst <= bound, errors
    return worst


def _relative_error(got, expected):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    assert np.isfinite(got).all()
    return float(np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-3))


def huge_scores(biases=(-1e9, 1e9, LOWEST), dtype=jnp.float32):
    """A request whose rows of scores are all near -1e6 (the second head) or have these biases (every other query).

    In the first batch row the bias is on attended keys only, so that masked ones have the higher scores.

    Returns:
        query, key, value, bias and cotangent; the mask; output and gradients of the first four by the formula in
        float64, with scores rounded to float32. The gradient of a query's first channel in the second head is left out
        (0): there errors are as large as the keys.
    """
    T, H, C = 40, 2, 16
    mask = packed(T)
    attends = np.asarray(mask.dense())[:, None]  # [B, 1, T, T]
    query, key, value, cotangent = inputs(T, T, H, H, C)
    query[:, :, 1], key[:, :, 1, 0] = np.eye(C)[0] * 1024, -4096  # times each other over sqrt(C): -2**20
    bias = np.zeros((B, 1, T, T))
    for i, number in enumerate(biases):
        bias[:, :, 1 + 2 * i :: 2 * len(biases)] = number
    bias[0] *= attends[0]
    query, key, value, cotangent = (jnp.asarray(x, dtype) for x in (query, key, value, cotangent))
    bias = jnp.asarray(bias, jnp.float32)
    q, k, v, added, g = (np.asarray(x, np.float64) for x in (query, key, value, bias, cotangent))
    x = np.where(attends, np.float32(np.float32(np.einsum("bthc,bshc->bhts", q, k) / np.sqrt(C)) + added), -np.inf)
    top = x.max(axis=-1, keepdims=True)
    p = np.exp(np.float64(x) - np.where(np.isinf(top), 0, top))
    p /= np.maximum(p.sum(axis=-1, keepdims=True), 1)  # the sum is 0 for padding, else at least 1
    dp = np.einsum("bthc,bshc->bhts", g, v)
    ds = p * (dp - (p * dp).sum(axis=-1, keepdims=True))
    dq, dk = (np.einsum(f"bhts,{spec}", ds, x) / np.sqrt(C) for spec, x in (("bshc->bthc", k), ("bthc->bshc", q)))
    dq[:, :, 1, 0] = 0
    gradients = dq, dk, np.einsum("bhts,bthc->bshc", p, g), ds.sum(axis=1, keepdims=True)
    return (query, key, value, bias, cotangent), mask, (np.einsum("bhts,bshc->bthc", p, v), gradients)


def assert_huge_scores_agree(implementation, bound, place=lambda operands, mask: (operands, mask), **request):
    """Output and gradients against `huge_scores`. place: puts operands and mask onto a mesh."""
    operands, mask, expected = huge_scores(**request)
    (query, key, value, bias, cotangent), mask = place(operands, mask)
    out, ((dq, dk, dv), learned) = run((query, key, value), cotangent, mask, {"bias": bias}, implementation)
    got = out, (np.array(dq), dk, dv, learned["bias"])
    got[1][0][:, :, 1, 0] = 0
    errors = jax.tree.map(_relative_error, got, expected)
    assert max(jax.tree.leaves(errors)) <= bound, errors
