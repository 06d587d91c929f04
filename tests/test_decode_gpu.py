"""Decoding attention for Hopper GPUs in Pallas' GPU interpreter, which runs its copies, barriers and indices on a CPU;
its products are XLA's. Compared with the formula in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import kernel_cases as cases
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import params as interpreter

from garrulax.kernels.call import Options
from garrulax.kernels.decode import decode
from garrulax.kernels.decode.call import DecodeOperands
from garrulax.kernels.decode.gpu import HopperDecoding
from garrulax.kernels.decode.gpu.splits import active_blocks, split_blocks, whole_sequences
from garrulax.kernels.mask import CAUSAL, INF, SAME_SEGMENT, All, Band, Bits, KRange, Mask

pytestmark = pytest.mark.usefixtures("quick_compilation")

KERNEL = HopperDecoding(stages=2, programs=2, waves=1, least=1, whole=0, interpret=True)
UNSPLIT = HopperDecoding(interpret=True)  # a program for each sequence and head of caches of up to 8 blocks


def request(lengths, T=1, H=2, K=1, S=200, C=32, Cv=None, dtype=jnp.bfloat16, seed=0, **more):
    """Queries behind a contiguous cache, of which `lengths` slots count, with the streams that the rules here read."""
    r, B = np.random.default_rng(seed), len(lengths)
    lengths = np.array(lengths)

    def normal(*shape):
        return jnp.asarray(r.normal(size=shape), dtype)

    slot = np.broadcast_to(np.arange(S), (B, S))
    last = lengths[:, None] - T + np.arange(T)
    return DecodeOperands(
        normal(B, T, H, C),
        normal(B, K, S, C),
        normal(B, K, S, Cv or C),
        {name: jnp.asarray(last, jnp.int32) for name in ("rank", "position")},
        {name: jnp.asarray(slot, jnp.int32) for name in ("rank", "position")},
        lengths=jnp.asarray(lengths, jnp.int32),
        **more,
    )


def quantised(cached, dtype):
    """The cache in 8 bits an entry, every slot of a head with scales of its own."""
    r, changed = np.random.default_rng(9), {}
    for name in ("key", "value"):
        scales = r.uniform(0.5, 2, cached.key.shape[:3]) / (40 if dtype == jnp.int8 else 1)
        x = np.asarray(getattr(cached, name), np.float32) / scales[..., None]
        changed[name] = jnp.asarray(np.clip(np.round(x), -127, 127) if dtype == jnp.int8 else x, dtype)
        changed[f"{name}_scales"] = jnp.asarray(scales, jnp.float32)
    return dataclasses.replace(cached, **changed)


def dense(options, cached):
    """The formula: output [B, T, H, Cv] and lse [B, H, T], float64."""
    q, k, v = (np.asarray(x).astype(np.float64) for x in (cached.query, cached.key, cached.value))
    if cached.key_scales is not None:
        k, v = k * np.asarray(cached.key_scales)[..., None], v * np.asarray(cached.value_scales)[..., None]
    (B, T, H, _), S = q.shape, k.shape[2]
    k, v = (np.repeat(x, H // x.shape[1], axis=1) for x in (k, v))
    x = options.scale * np.einsum("bthc,bhsc->bhts", q, k)
    if options.softcap is not None:
        x = options.softcap * np.tanh(x / options.softcap)
    query = {name: np.asarray(s)[:, :, None] for name, s in cached.query_streams.items()}
    key = {name: np.asarray(s)[:, None, :] for name, s in cached.key_streams.items()}
    if cached.slopes is not None:
        x += np.asarray(cached.slopes, np.float64)[:, None, None] * (key["position"] - query["position"])[:, None]
    seen = np.broadcast_to(np.asarray(options.rule.evaluate(query, key)), (B, T, S))
    if cached.lengths is not None:
        seen = seen & (np.arange(S) < np.asarray(cached.lengths)[:, None, None])
    p = np.where(seen[:, None], np.exp(x), 0)
    total = p.sum(axis=-1)
    out = np.einsum("bhts,bhsc->bthc", p / np.where(total == 0, 1, total)[..., None], np.where(np.isnan(v), 0, v))
    with np.errstate(divide="ignore"):
        return out, np.log(total)


def run(options, cached, kernel=KERNEL):
    assert kernel.unsupported_reason(options, cached) is None
    with interpreter.force_gpu_interpret_mode(interpreter.InterpretGPUParams()):
        return jax.block_until_ready(jax.jit(functools.partial(kernel, options))(cached))


def assert_agrees(options, cached, kernel=KERNEL, contiguous=None):
    out, lse = run(options, cached, kernel)
    expected, expected_lse = dense(options, contiguous or cached)
    assert out.dtype == cached.query.dtype
    assert lse.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=0.02, rtol=0.01)
    np.testing.assert_allclose(np.asarray(lse, np.float64), expected_lse, atol=2e-5, rtol=1e-5)
    return out, lse


def options(rule=CAUSAL, **more):
    return Options(rule, scale=0.3, **more)


def paged(cached, page, seed=3):
    """The cache in pages that lie in any order, some of them nobody's; entries behind the lengths name no page."""
    r = np.random.default_rng(seed)
    B, S = cached.key.shape[0], cached.key.shape[2]
    n = -(-S // page)
    table = r.permutation(B * n + 3)[: B * n].reshape(B, n)

    def put(x, axis):  # x [B, ..., S at axis, ...]
        x = np.moveaxis(np.asarray(x), axis, 1)
        x = np.pad(x, [(0, 0), (0, n * page - S)] + [(0, 0)] * (x.ndim - 2)).reshape(B, n, page, *x.shape[2:])
        pool = np.ones((B * n + 3, *x.shape[2:]), x.dtype)
        pool[table] = x
        return jnp.asarray(np.moveaxis(pool, 1, axis))

    used = np.arange(n) * page < np.asarray(cached.lengths)[:, None]
    return dataclasses.replace(
        cached,
        key=put(cached.key, 2),
        value=put(cached.value, 2),
        key_streams={name: put(s, 1) for name, s in cached.key_streams.items()},
        key_scales=None if cached.key_scales is None else put(cached.key_scales, 2),
        value_scales=None if cached.value_scales is None else put(cached.value_scales, 2),
        table=jnp.asarray(np.where(used, table, -1), jnp.int32),
    )


@pytest.mark.parametrize(
    ("widths", "heads", "dtype"),
    [
        pytest.param((64, 64), (2, 1), jnp.bfloat16, marks=pytest.mark.slow),
        ((80, 80), (4, 2), jnp.float16),
        pytest.param((96, 16), (8, 1), jnp.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_ragged_lengths(widths, heads, dtype):
    """Of any length, the cache's end inside a block, one sequence empty."""
    (C, Cv), (H, K) = widths, heads
    assert_agrees(options(), request([200, 1, 0, 130], H=H, K=K, C=C, Cv=Cv, dtype=dtype))


def test_no_lengths_and_no_rule():
    """Everything is seen; the cache is shorter than a block."""
    cached = dataclasses.replace(request([40, 40], S=40), lengths=None, query_streams={}, key_streams={})
    assert_agrees(options(All()), cached)
    assert_agrees(options(All()), quantised(cached, jnp.int8))


def test_drafts_and_empty_rows():
    """Several queries a sequence, more rows than one program takes, and some that see nothing."""
    cached = request([150, 70], T=33)
    rank = cached.query_streams["rank"].at[0, :5].set(-1)
    cached = dataclasses.replace(cached, query_streams={**cached.query_streams, "rank": rank})
    out, lse = assert_agrees(options(), cached)
    assert (out[0, :5] == 0).all()
    assert jnp.isneginf(lse[0, :, :5]).all()


@pytest.mark.parametrize("page", [16, *(pytest.param(size, marks=pytest.mark.slow) for size in (64, 128))])
def test_pages_in_any_order(page):
    """The same bits as the contiguous cache gives."""
    contiguous = request([200, 70])
    got = assert_agrees(options(), paged(contiguous, page), contiguous=contiguous)
    padded = -200 % 64
    whole = dataclasses.replace(
        contiguous,
        **{n: jnp.pad(getattr(contiguous, n), [(0, 0), (0, 0), (0, padded), (0, 0)]) for n in ("key", "value")},
        key_streams={n: jnp.pad(s, [(0, 0), (0, padded)]) for n, s in contiguous.key_streams.items()},
    )
    for ours, theirs in zip(got, run(options(), whole), strict=True):
        np.testing.assert_array_equal(np.asarray(ours, np.float32), np.asarray(theirs, np.float32))


@pytest.mark.parametrize("programs", [pytest.param(1, marks=pytest.mark.slow), 12])
def test_pieces_equal_one_pass(programs):
    """One piece a sequence, and one a block."""
    cached = request([300, 33], S=300)
    assert_agrees(options(), cached, dataclasses.replace(KERNEL, programs=programs))


def test_window_and_sinks_skip_blocks():
    """What no query sees is not even read: it holds NaN."""
    rule = Band("position", 0, INF) & (Band("position", 0, 70) | KRange("position", 0, 3))
    cached = request([640, 500], T=2, S=640)
    n = 640 // 64
    blocks, counts = active_blocks(rule, cached.query_streams, cached.key_streams, cached.lengths, 64, (2, n))
    key = {name: np.asarray(s)[:, None] for name, s in cached.key_streams.items()}
    query = {name: np.asarray(s)[:, :, None] for name, s in cached.query_streams.items()}
    seen = np.asarray(rule.evaluate(query, key)) & (np.arange(640) < np.asarray(cached.lengths)[:, None, None])
    by_block = seen.reshape(2, 2, n, 64).any(axis=(1, 3))
    assert by_block.sum(axis=1).tolist() == [3, 3] == counts.tolist()
    for b in range(2):
        listed = [int(x) >> 1 for x in blocks[b, : counts[b]]]
        assert listed == np.flatnonzero(by_block[b]).tolist()
        full = [int(x) & 1 for x in blocks[b, : counts[b]]]
        assert full == [int(seen.reshape(2, 2, n, 64)[b, :, i].all()) for i in listed]
    hole = jnp.asarray(~np.repeat(by_block, 64, axis=1))[:, None, :, None]
    poisoned = {n: jnp.where(hole, jnp.nan, getattr(cached, n)) for n in ("key", "value")}
    out, _ = run(options(rule), dataclasses.replace(cached, **poisoned))
    expected, _ = dense(options(rule), cached)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=0.02, rtol=0.01)


@pytest.mark.parametrize("cache", [jnp.bfloat16, pytest.param(jnp.float8_e4m3fn, marks=pytest.mark.slow)])
def test_slots_behind_the_length_may_hold_anything(cache):
    """Also in the last block: NaN there, in the entries and in their scales, changes nothing."""
    cached = request([70, 1], S=192)
    cached = cached if cache == jnp.bfloat16 else quantised(cached, cache)
    behind = jnp.arange(192) >= cached.lengths[:, None, None]  # [B, 1, S]
    poisoned = {
        name: jnp.where(behind.reshape(2, 1, 192, *(1,) * (x.ndim - 3)), jnp.asarray(jnp.nan, x.dtype), x)
        for name in ("key", "value", "key_scales", "value_scales")
        if (x := getattr(cached, name)) is not None
    }
    for got, want in zip(run(options(), dataclasses.replace(cached, **poisoned)), run(options(), cached), strict=True):
        np.testing.assert_array_equal(got, want)


def test_tree_of_drafts():
    """Drafts see the cache and their own ancestors: two words of bits."""
    T, S = 40, 180
    r = np.random.default_rng(1)
    parent = [int(r.integers(0, i)) if i else -1 for i in range(T)]
    ancestors = np.eye(T, dtype=bool)
    for i in range(1, T):
        ancestors[i] |= ancestors[parent[i]]
    words = [(ancestors[:, i : i + 30] << np.arange(len(ancestors[0, i : i + 30]))).sum(axis=1) for i in (0, 30)]
    own = [np.where(np.arange(T) // 30 == i, 1 << np.arange(T) % 30, 0) for i in (0, 1)]
    cached = request([S], T=T, H=2, K=2, S=S)
    query = {"a": words[0] | 1 << 30, "b": words[1]}
    key = {"a": np.append(np.full(S - T, 1 << 30), own[0]), "b": np.append(np.zeros(S - T, int), own[1])}
    cached = dataclasses.replace(
        cached,
        query_streams={name: jnp.asarray(x, jnp.int32)[None] for name, x in query.items()},
        key_streams={name: jnp.asarray(x, jnp.int32)[None] for name, x in key.items()},
    )
    rule = Bits("a") | Bits("b")
    seen = np.asarray(
        rule.evaluate(
            {name: x[:, :, None] for name, x in cached.query_streams.items()},
            {name: x[:, None] for name, x in cached.key_streams.items()},
        )
    )
    np.testing.assert_array_equal(seen[0], np.concatenate([np.ones((T, S - T), bool), ancestors], axis=1))
    assert_agrees(options(rule), cached)


def test_softcap_and_alibi():
    """In blocks that are cut and in others."""
    cached = request([200, 77], T=3, H=4, K=2, slopes=jnp.asarray([0.5, 0.25, 0.1, 0.02], jnp.float32))
    assert_agrees(options(softcap=2.0), cached)


@pytest.mark.parametrize("pages", cases.some([False, True], True))
@pytest.mark.parametrize("dtype", cases.some([jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2], jnp.int8))
def test_quantised(dtype, pages):
    """With the scales in the kernel, also of pages: those of one block side by side."""
    cached = quantised(request([200, 70], H=4, K=2), dtype)
    assert_agrees(options(), paged(cached, 16) if pages else cached, contiguous=cached)


def test_as_an_implementation():
    """Behind `decode`, with learned sinks."""
    cached = request([150, 100], H=4, K=2, C=64)
    arrays = cached.query, cached.key, cached.value

    def call(implementation, query, key, value, streams, lengths):
        mask = Mask(*streams, CAUSAL)
        sinks = jnp.asarray([1.0, 0.0, -1.0, 2.0])
        return decode(query, key, value, mask=mask, lengths=lengths, sinks=sinks, implementation=implementation)

    streams = {"rank": cached.query_streams["rank"]}, {"rank": cached.key_streams["rank"]}
    rest = (*arrays, streams, cached.lengths)
    expected = jax.jit(functools.partial(call, "xla"))(*rest)
    with interpreter.force_gpu_interpret_mode(interpreter.InterpretGPUParams()):
        got = jax.block_until_ready(jax.jit(functools.partial(call, KERNEL))(*rest))
    np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(expected, np.float32), atol=0.02, rtol=0.01)


def test_other_rules():
    """A rule that reads no query, one with All in it, and one of two streams."""
    cached = request([150, 100])
    segment = {"segment": jnp.zeros((2, 1), jnp.int32)}, {"segment": jnp.asarray(np.arange(200)[None] // 90 % 2)}
    segment[1]["segment"] = jnp.broadcast_to(segment[1]["segment"], (2, 200)).astype(jnp.int32)
    assert_agrees(options(KRange("rank", 7, 90)), dataclasses.replace(cached, query_streams={}))
    cached = dataclasses.replace(
        cached,
        query_streams={**cached.query_streams, **segment[0]},
        key_streams={**cached.key_streams, **segment[1]},
    )
    assert_agrees(options(CAUSAL & ~SAME_SEGMENT & All()), cached)


@pytest.mark.parametrize("cache", cases.some([jnp.bfloat16, jnp.int8], jnp.bfloat16))
def test_short_caches_are_not_split(cache):
    """Ragged lengths, one sequence empty, drafts of which some see nothing, and NaN behind the lengths."""
    cached = request([200, 3, 0, 130], T=3, H=4, K=2)
    rank = cached.query_streams["rank"].at[3, 0].set(-1)
    cached = dataclasses.replace(cached, query_streams={**cached.query_streams, "rank": rank})
    if cache == jnp.bfloat16:
        behind = jnp.arange(200)[:, None] >= cached.lengths[:, None, None, None]
        value = jnp.where(behind, jnp.nan, cached.value)
        out, lse = run(options(), dataclasses.replace(cached, value=value), UNSPLIT)
        expected, expected_lse = dense(options(), cached)
        np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=0.02, rtol=0.01)
        np.testing.assert_allclose(np.asarray(lse, np.float64), expected_lse, atol=2e-5, rtol=1e-5)
    else:
        assert_agrees(options(), quantised(cached, cache), UNSPLIT)


def test_a_short_cache_is_read_from_its_first_to_its_last_active_block():
    cached = request([400, 90], S=512)
    rule = Band("position", 0, INF) & Band("position", 0, 70)
    streams = cached.query_streams, cached.key_streams
    blocks, splits = whole_sequences(rule, *streams, cached.lengths, 64, (2, 8))
    seen = np.asarray(
        rule.evaluate(
            *(
                {k: np.asarray(v).reshape(2, *s) for k, v in x.items()}
                for x, s in zip(streams, ((-1, 1), (1, -1)), strict=True)
            )
        )
    )
    seen = (seen & (np.arange(512) < np.asarray(cached.lengths)[:, None, None])).reshape(2, 8, 64)
    active = [np.flatnonzero(row) for row in seen.any(axis=2)]
    assert splits.start.tolist() == [x[0] for x in active]
    assert splits.stop.tolist() == [x[-1] + 1 for x in active]
    np.testing.assert_array_equal(blocks, 2 * np.arange(8) + seen.all(axis=2))


def test_pieces_are_whole():
    """Every entry of every list is in one piece, and pieces are of about one size."""
    r = np.random.default_rng(5)
    for counts in ([0, 0, 0], [1, 900, 3], r.integers(0, 300, 17)):
        for aim, fewest, least in ((4, 1, 1), (132, 33, 8)):
            got = jax.jit(split_blocks, static_argnums=(1, 2, 3))(jnp.asarray(counts, jnp.int32), aim, fewest, least)
            cut, first, parts = jax.tree.map(np.asarray, got)
            sizes = cut.stop - cut.start
            assert len(sizes) == aim + len(counts)
            found = [(int(s), i) for s, a, b in zip(*cut, strict=True) for i in range(a, b)]
            assert found == [(s, i) for s, n in enumerate(counts) for i in range(n)]
            assert (sizes[: parts.sum()] > 0).all()
            assert (sizes[parts.sum() :] == 0).all()
            for b, n in enumerate(parts):
                assert (cut.sequence[first[b] : first[b] + n] == b).all()
            most = max(-(-sum(counts) // aim), min(least, -(-sum(counts) // fewest)), 1)
            assert sizes.max() <= most


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: {"query": c.query.astype(jnp.float32)}, "queries of float32"),
        (lambda c: {"key": c.key.astype(jnp.float16)}, "a cache of float16 and bfloat16"),
        (lambda c: {"key": c.key[..., :24]}, "head width of 24"),
        (lambda c: {"table": jnp.zeros((2, 1), jnp.int32)}, "pages of 200 slots"),
        (lambda c: {n: getattr(c, n).astype(jnp.int8)[..., :16] for n in ("key", "value")}, "head width of 16"),
        (lambda c: {"key": c.key.astype(jnp.int8)}, "a cache of int8 and bfloat16"),
        (lambda c: {"steps": jnp.zeros((2, 2))}, "bias in steps"),
    ],
)
def test_refusals(change, reason):
    cached = request([150, 100])
    assert reason in HopperDecoding().unsupported_reason(options(), dataclasses.replace(cached, **change(cached)))
