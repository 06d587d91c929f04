"""Decoding attention: every implementation against the dense formula in float64, and its parts against each other."""

import dataclasses

import jax
import jax.numpy as jnp
import kernel_cases as cases
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from garrulax.kernels.attention import attention
from garrulax.kernels.decode import MAX_QUERIES, REGISTRY, decode, request
from garrulax.kernels.decode.xla import XlaDecode
from garrulax.kernels.experimental.tpu_decode import TpuDecode, step_list
from garrulax.kernels.mask import INF, PAD_KEY, SAME_SEGMENT, Band, KRange, Mask
from garrulax.kernels.parts import merge
from garrulax.kernels.relative import t5

pytestmark = pytest.mark.usefixtures("quick_compilation")
B, H, K, C, CV = 2, 6, 3, 16, 24
SMALL = TpuDecode(step_bytes=1, interpret=True)  # 128 slots a step
KERNELS = {
    "xla": XlaDecode(),
    "tpu": SMALL,
    "tpu-split": dataclasses.replace(SMALL, splits=3),
}
CAUSAL = Band("rank", 0, INF) & SAME_SEGMENT
#: What `make test` runs where splitting the work adds no code of its own: without it.
kernels = pytest.mark.parametrize(
    "kernel",
    [pytest.param(k, marks=[pytest.mark.slow] * (name == "tpu-split"), id=name) for name, k in KERNELS.items()],
)


def arrays(T, S, seed=0, heads=H, kv_heads=K):
    """query [B, T, H, C], key [B, K, S, C], value [B, K, S, Cv]; float32."""
    r = np.random.default_rng(seed)
    shapes = (B, T, heads, C), (B, kv_heads, S, C), (B, kv_heads, S, CV)
    return [jnp.asarray(r.normal(size=s), jnp.float32) for s in shapes]


def exact(query, key, value, seen, *, scale=C**-0.5, softcap=None, added=0.0, sinks=None):
    """Output and lse in float64, of the formula. seen: bool [B, T, S]; added: what broadcasts to [B, H, T, S]."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    G = query.shape[2] // key.shape[1]
    x = np.einsum("bthc,bhsc->bhts", query, np.repeat(key, G, 1)) * scale
    x = (x if softcap is None else softcap * np.tanh(x / softcap)) + added
    e = np.where(np.asarray(seen)[:, None], np.exp(x), 0)
    total = e.sum(-1) + (0 if sinks is None else np.exp(np.asarray(sinks, np.float64))[:, None])
    out = np.einsum("bhts,bhsc->bthc", e / np.where(total == 0, 1, total)[..., None], np.repeat(value, G, 1))
    with np.errstate(divide="ignore"):
        return out, np.log(total)


def causal(T, S, used):
    """T new tokens, the last of `used` [B] slots of S."""
    slot = np.broadcast_to(np.arange(S), (B, S))
    rank = np.asarray(used)[:, None] - T + np.arange(T)
    key = {"rank": slot, "segment": np.where(slot < np.asarray(used)[:, None], 0, PAD_KEY), "position": slot}
    query = {"rank": rank, "segment": 0 * rank, "position": rank}
    return Mask(*({n: jnp.asarray(s, jnp.int32) for n, s in x.items()} for x in (query, key)), CAUSAL)


def paged(key, value, mask, page, seed=3):
    """The same cache in shuffled pages, twice as many as are needed; the spare ones hold something else, and what
    lies behind the last slot repeats it, for lengths to leave out."""
    r = np.random.default_rng(seed)
    S = key.shape[2]
    N = -(-S // page)
    table = r.permutation(2 * B * N)[: B * N].reshape(B, N)

    def cut(x, axis):
        x = np.asarray(x)
        x = np.pad(x, [(0, N * page - S if i == axis else 0) for i in range(x.ndim)], mode="edge")
        x = np.moveaxis(x.reshape(*x.shape[:axis], N, page, *x.shape[axis + 1 :]), axis, 1)
        pool = np.full((2 * B * N, *x.shape[2:]), 77, x.dtype)
        pool[table] = x
        return jnp.asarray(pool)

    streams = {name: cut(s, 1) for name, s in mask.key_streams().items()}
    return cut(key, 2), cut(value, 2), Mask(mask.query, streams, mask.rule), jnp.asarray(table, jnp.int32)


def assert_close(got, expected, bound=2e-6):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    assert (np.isneginf(got) == np.isneginf(expected)).all()
    finite = np.isfinite(expected)
    assert np.isfinite(got[finite]).all()
    assert np.abs(got[finite] - expected[finite]).max() <= bound * max(1.0, np.abs(expected[finite]).max())


def both(kernel, query, key, value, **more):
    """Output and lse of an implementation, under jit."""
    names = "mask", "table", "lengths", "key_scales", "value_scales", "alibi", "relative", "sinks", "scale", "softcap"

    @jax.jit
    def run(arrays):
        options, cached = request(*arrays, *(more.get(name) for name in names))
        assert kernel.unsupported_reason(options, cached) is None
        return kernel(options, cached)

    return run((query, key, value))


@pytest.mark.parametrize(
    ("kernel", "T", "S"),
    [
        pytest.param(kernel, *size, marks=() if size in quick[name] else pytest.mark.slow, id=f"{size}-{name}")
        for quick in [{"xla": [(3, 129), (1, 1)], "tpu": [], "tpu-split": [(3, 129)]}]
        for name, kernel in KERNELS.items()
        for size in [(1, 300), (3, 129), (1, 1)]
    ],
)
def test_ragged_lengths(kernel, T, S):
    q, k, v = arrays(T, S)
    lengths = jnp.array([S, max(T, S // 3)], jnp.int32)
    mask = causal(T, S, lengths)
    got = both(
        kernel,
        q,
        k,
        v,
        mask=Mask(mask.query, {**mask.key, "segment": 0 * mask.key["segment"]}, mask.rule),
        lengths=lengths,
    )
    for x, y in zip(got, exact(q, k, v, mask.dense()), strict=True):
        assert_close(x, y)
    got = both(kernel, q, k, v, lengths=lengths)  # without a mask, the lengths decide
    seen = np.broadcast_to(np.arange(S) < np.asarray(lengths)[:, None, None], (B, T, S))
    for x, y in zip(got, exact(q, k, v, seen), strict=True):
        assert_close(x, y)


@pytest.mark.parametrize(
    ("kernel", "page"),
    [
        pytest.param(kernel, page, marks=() if page == quick[name] else pytest.mark.slow, id=f"{page}-{name}")
        for quick in [{"xla": 24, "tpu": 24, "tpu-split": None}]
        for name, kernel in KERNELS.items()
        for page in (24, 128)
    ],
)
def test_pages(kernel, page):
    T, S = 2, 300
    q, k, v = arrays(T, S)
    lengths = jnp.array([S, 130], jnp.int32)
    mask = causal(T, S, lengths)
    expected = exact(q, k, v, mask.dense())
    key, value, mask, table = paged(k, v, mask, page)
    table = jnp.where(jnp.arange(table.shape[1]) * page < lengths[:, None], table, -1)
    got = both(kernel, q, key, value, mask=mask, table=table, lengths=lengths)
    for x, y in zip(got, expected, strict=True):
        assert_close(x, y)


EXTRAS = {
    "softcap": {"softcap": 2.0},
    "scale": {"scale": 0.3},
    "alibi": {"alibi": jnp.asarray(2.0 ** -np.arange(1, H + 1), jnp.float32)},
}
EXTRAS["all"] = {name: x for options in EXTRAS.values() for name, x in options.items()}


@pytest.mark.parametrize("kernel", [XlaDecode(), SMALL], ids=["xla", "tpu"])
@pytest.mark.parametrize("extra", cases.some(EXTRAS, "all"))
def test_extras(kernel, extra):
    T, S = 3, 200
    q, k, v = arrays(T, S)
    mask, options = causal(T, S, [S, 150]), dict(EXTRAS[extra])
    got = both(kernel, q, k, v, mask=mask, **options)
    if options.pop("alibi", None) is not None:
        distance = mask.key["position"][:, None, :] - mask.query["position"][:, :, None]
        slopes = np.asarray(EXTRAS["alibi"]["alibi"], np.float64)
        options["added"] = slopes[:, None, None] * np.asarray(distance)[:, None]
    for x, y in zip(got, exact(q, k, v, mask.dense(), **options), strict=True):
        assert_close(x, y)


def test_widths_that_fill_lanes():
    """Where the width is a multiple of 128 the kernel reads [slots, width] blocks, elsewhere [width, slots]."""
    r = np.random.default_rng(0)
    q, k = (jnp.asarray(r.normal(size=s), jnp.float32) for s in ((B, 2, H, 128), (B, K, 200, 128)))
    mask = causal(2, 200, [200, 90])
    for x, y in zip(both(SMALL, q, k, k, mask=mask), exact(q, k, k, mask.dense(), scale=128**-0.5), strict=True):
        assert_close(x, y)


@pytest.mark.parametrize("kernel", [None, SMALL], ids=["xla", "tpu"])
def test_sinks(kernel):
    q, k, v = arrays(2, 100)
    sinks, mask = jnp.linspace(-1, 2, H), causal(2, 100, [100, 1])
    got = jax.jit(lambda *x: decode(*x, mask=mask, sinks=sinks, implementation=kernel))(q, k, v)
    assert_close(got, exact(q, k, v, mask.dense(), sinks=sinks)[0])


@kernels
def test_rows_that_see_nothing(kernel):
    T, S = 3, 200
    q, k, v = arrays(T, S)
    mask = causal(T, S, [1, 0])  # the first row's last token sees one slot, nobody else any
    out, lse = both(kernel, q, k, v, mask=mask)
    assert (np.asarray(out)[1] == 0).all()
    assert np.isneginf(np.asarray(lse)[1]).all()
    for x, y in zip((out, lse), exact(q, k, v, mask.dense()), strict=True):
        assert_close(x, y)


@kernels
@pytest.mark.parametrize("T", [40])
def test_trees_are_verified_as_decoding_one_by_one(kernel, T):
    S = 150
    mask = cases.tree(T, S)
    q, k, v = arrays(T, S)
    got = both(kernel, q, k, v, mask=mask)[0]
    for node in (9, 39):  # a node alone, over a cache of its ancestors
        path = np.flatnonzero(np.asarray(mask.dense())[0, node])
        alone = decode(q[:, node : node + 1], k[:, :, path], v[:, :, path])
        assert_close(got[:, node : node + 1], alone, 5e-6)


@kernels
def test_each_row_is_that_of_reading_the_whole_text(kernel):
    S = 140
    mask = cases.window(S)
    q, k, v = arrays(S, S)
    whole = jax.jit(attention)(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask=mask)
    for T, at in ((1, 50), (4, 136)):
        query = {name: s[:, at : at + T] for name, s in mask.query.items()}
        got = both(kernel, q[:, at : at + T], k, v, mask=Mask(query, mask.key_streams(), mask.rule))[0]
        assert_close(got, whole[:, at : at + T])


@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [
        pytest.param(kernel, dtype, marks=() if dtype in quick else pytest.mark.slow, id=f"{dtype.__name__}-{name}")
        for name, quick in (("xla", (jnp.int8, jnp.float8_e4m3fn)), ("tpu", (jnp.int8,)))
        for kernel in [KERNELS[name]]
        for dtype in (jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2)
    ],
)
def test_quantised_caches(kernel, dtype):
    """Within what rounding may do: |error of a score| <= scale |q|₁ e_k, with e the greatest error of an entry; scores
    off by d change probabilities by factors within exp(±2 d), and these and e_v add up in the output."""
    T, S = 2, 200
    q, k, v = arrays(T, S)
    mask = causal(T, S, [S, 90])
    (k8, ks), (v8, vs) = (quantised(x, dtype) for x in (k, v))
    got = both(kernel, q, k8, v8, mask=mask, key_scales=ks, value_scales=vs)
    back = [np.asarray(x8, np.float64) * np.asarray(s)[..., None] for x8, s in ((k8, ks), (v8, vs))]
    for x, y in zip(got, exact(q, *back, mask.dense()), strict=True):  # what is stored, exactly
        assert_close(x, y, 5e-6)
    e_k, e_v = (np.abs(x - np.asarray(y)).max() for x, y in zip(back, (k, v), strict=True))
    d = C**-0.5 * np.abs(q).sum(-1).max() * e_k
    bound = (np.exp(2 * d) - 1) * np.abs(v).max() + e_v
    expected = exact(q, k, v, mask.dense())[0]
    assert 0 < np.abs(np.asarray(got[0]) - expected).max() <= bound


def quantised(x, dtype):
    """x with its greatest entry of each slot at the dtype's greatest, and the scales."""
    most = 127 if dtype == jnp.int8 else float(jnp.finfo(dtype).max)
    scales = jnp.abs(x).max(axis=-1) / most
    x = x / scales[..., None]
    return (jnp.round(x) if dtype == jnp.int8 else x).astype(dtype), scales


def test_quantised_pages():
    T, S, page = 1, 200, 32
    q, k, v = arrays(T, S)
    mask = causal(T, S, [S, 90])
    key, value, mask, table = paged(k, v, mask, page)
    (k8, ks), (v8, vs) = (quantised(x, jnp.int8) for x in (key, value))
    more = {"mask": mask, "table": table, "key_scales": ks, "value_scales": vs}
    for x, y in zip(both(SMALL, q, k8, v8, **more), both(XlaDecode(), q, k8, v8, **more), strict=True):
        assert_close(x, y)


WINDOW = (Band("position", 0, 99) | KRange("position", 0, 3)) & Band("position", 0, INF)


@pytest.mark.parametrize("page", cases.some([0, 16], 16))
def test_what_is_not_seen_is_not_read(page):
    """A window of 100 and 4 sinks: the output without skipping, from only the blocks and pages that they lie in."""
    T, S = 1, 1000
    used = np.array([S, 700])
    q, k, v = arrays(T, S)
    mask = causal(T, S, used)
    mask = Mask(mask.query, mask.key, WINDOW & SAME_SEGMENT)
    expected = exact(q, k, v, mask.dense())
    slots = [{*range(4), *range(u - 100, u)} for u in used]
    more = {"lengths": jnp.asarray(used, jnp.int32)}
    if page:
        k, v, mask, more["table"] = paged(k, v, mask, page)
        spared = np.ones(k.shape[0], bool)
        for row, needed in zip(np.asarray(more["table"]), slots, strict=True):
            spared[row[sorted({s // page for s in needed})]] = False
        spared[0] = False  # read for places of the first steps that need none
        k, v = (x.at[np.flatnonzero(spared)].set(jnp.nan) for x in (k, v))
    else:
        spared = np.ones((B, 8), bool)
        for row, needed in zip(spared, slots, strict=True):
            row[sorted({s // 128 for s in needed})] = False
        blocks = np.repeat(spared, 128, axis=1)[:, None, :S, None]
        k, v = (jnp.where(blocks, jnp.nan, x) for x in (k, v))
    for x, y in zip(both(SMALL, q, k, v, mask=mask, **more), expected, strict=True):
        assert_close(x, y)
    blocks = {(row, s // 128) for row, needed in enumerate(slots) for s in needed}
    assert steps(SMALL, q, k, v, mask, **more) == len(blocks)


def steps(kernel, query, key, value, mask, lengths, table=None):
    options, cached = request(query, key, value, mask, table, lengths, *(None,) * 7)
    plan = kernel.plan(cached)
    return int(jax.jit(lambda x: kernel.steps(plan, *step_list.ordered_streams(options, x, plan.size), x).most)(cached))


def test_work_is_dealt_evenly():
    r = np.random.default_rng(0)
    some = jnp.asarray(r.random((5, 40)) < 0.4)
    listed = jax.jit(step_list.decode_steps, static_argnums=2)
    whole = listed(some, some, 1)
    assert int(whole.most) == int(some.sum())
    parts = listed(some, some, 4)
    assert (np.asarray(parts.shared).sum(axis=0) == np.asarray(some.sum(axis=1))).all()
    assert np.ptp(np.asarray(parts.shared), axis=0).max() <= 1
    words = np.asarray(parts.words).reshape(4, -1)
    live = [w[(w & step_list.IDLE) == 0] for w in words]
    seen = sorted((int(step_list.row_of(x)), int(step_list.column_of(x))) for w in live for x in w)
    assert seen == [tuple(x) for x in np.argwhere(np.asarray(some))]


def test_merging_is_attention_over_all():
    q, k, v = arrays(2, 90)
    mask = causal(2, 90, [90, 20])
    cuts = [slice(0, 40), slice(40, 41), slice(41, 90)]
    parts = [
        both(
            XlaDecode(),
            q,
            k[:, :, c],
            v[:, :, c],
            mask=Mask(mask.query, {n: s[:, c] for n, s in mask.key.items()}, CAUSAL),
        )
        for c in cuts
    ]
    for x, y in zip(jax.jit(merge)(*zip(*parts, strict=True)), exact(q, k, v, mask.dense()), strict=True):
        assert_close(x, y)
    nothing = jnp.full((2, B, H, 2), -jnp.inf)
    gradient = jax.jit(jax.grad(lambda lses: merge([parts[0][0]] * 2, lses)[0].sum()))(nothing)
    assert (gradient == 0).all()


def test_gradients_are_those_of_the_formula():
    q, k, v = arrays(2, 150)
    mask = causal(2, 150, [150, 0])
    sinks = jnp.linspace(-1, 1, H)

    def loss(kernel):
        return lambda q, k, v, sinks: (decode(q, k, v, mask=mask, sinks=sinks, implementation=kernel) ** 2).sum()

    def formula(q, k, v, sinks):
        out = attention(q, *(x.swapaxes(1, 2) for x in (k, v)), mask=mask, sinks=sinks, implementation="dense")
        return (out**2).sum()

    expected = jax.jit(jax.grad(formula, (0, 1, 2, 3)))(q, k, v, sinks)
    for kernel in (XlaDecode(), SMALL):
        got = jax.jit(jax.grad(loss(kernel), (0, 1, 2, 3)))(q, k, v, sinks)
        for x, y in zip(got, expected, strict=True):
            assert_close(x, y, 1e-5)


def test_vmap():
    q, k, v = arrays(1, 130)
    mask = causal(1, 130, [130, 60])
    many = jnp.stack([q, 2 * q])
    got = jax.jit(jax.vmap(lambda x: decode(x, k, v, mask=mask, implementation=SMALL)))(many)
    for x, y in zip(got, many, strict=True):
        assert_close(x, exact(y, k, v, mask.dense())[0])


def test_relative_bias():
    q, k, v = arrays(2, 100)
    mask = causal(2, 100, [100, 60])
    relative = t5(jnp.asarray(np.random.default_rng(1).normal(size=(32, H)), jnp.float32), bidirectional=False)
    got = decode(q, k, v, mask=mask, relative=relative)
    dense = attention(q, *(x.swapaxes(1, 2) for x in (k, v)), mask=mask, relative=relative, implementation="dense")
    assert_close(got, dense)
    with pytest.raises(ValueError, match="relative bias"):
        decode(q, k, v, mask=mask, relative=relative, implementation="pallas_tpu")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_halves(dtype):
    q, k, v = (x.astype(dtype) for x in arrays(2, 140))
    mask = causal(2, 140, [140, 30])
    expected = exact(q, k, v, mask.dense())[0]
    for kernel in (XlaDecode(), SMALL) if dtype == jnp.bfloat16 else (XlaDecode(),):
        got = both(kernel, q, k, v, mask=mask)[0]
        assert got.dtype == dtype
        assert_close(got, expected, 3 * float(jnp.finfo(dtype).eps))


def test_races_and_unwritten_memory():
    """The kernel as the TPU runs it: copies land as late as they may, memory begins as NaN, races are found."""
    careful = pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait", uninitialized_memory="nan")
    T, S, page = 2, 200, 16
    q, k, v = arrays(T, S, heads=2, kv_heads=1)
    mask = causal(T, S, [S, 60])
    expected = exact(q, k, v, mask.dense())
    for splits in (2,):
        kernel = dataclasses.replace(SMALL, splits=splits, interpret=careful)
        for x, y in zip(both(kernel, q, k, v, mask=mask), expected, strict=True):
            assert_close(x, y)
        assert not races_found()
    key, value, mask, table = paged(k, v, mask, page)
    got = both(kernel, q, key, value, mask=mask, table=table, lengths=jnp.array([S, 60], jnp.int32))
    for x, y in zip(got, expected, strict=True):
        assert_close(x, y)
    assert not races_found()


def races_found():
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    state = interpreter.get_races() if hasattr(interpreter, "get_races") else interpreter.races
    return state.races_found


def test_attention_hands_few_queries_over():
    """The same output, by way of `attention`, of a folded cache and of one that is not."""
    S = 100
    for T in (1, MAX_QUERIES, MAX_QUERIES + 1):
        q, k, v = arrays(T, S)
        mask = causal(T, S, [S, 70])
        expected = exact(q, k, v, mask.dense())[0]
        folded = [x.reshape(-1, *x.shape[2:]) for x in (k, v)]
        call = jax.jit(attention)
        assert_close(call(q, *folded, mask=mask), expected)
        assert_close(call(q, *(x.swapaxes(1, 2) for x in (k, v)), mask=mask), expected)


def test_contiguous_caches_are_not_copied():
    S = 4096
    q, k, v = arrays(1, S)
    mask = causal(1, S, [S, S])
    folded = [x.reshape(-1, *x.shape[2:]) for x in (k, v)]
    program = jax.jit(lambda *x: attention(*x, mask=mask)).lower(q, *folded).compile()
    assert program.memory_analysis().temp_size_in_bytes < k.nbytes / 2


def request_of(**changes):
    q, k, v = arrays(1, 32)
    mask = causal(1, 32, [32, 32])
    return decode(**{"query": q, "key": k, "value": v, "mask": mask, **changes})


def test_errors_name_what_is_wrong():
    q, k, v = arrays(1, 32)
    mask = causal(1, 32, [32, 32])
    table, lengths = jnp.zeros((B, 4), jnp.int32), jnp.ones((B,), jnp.int32)
    wrong = [
        (ValueError, "5 query heads are not a multiple of 3", {"query": q[:, :, :5]}),
        (ValueError, "no empty arrays", {"query": q[:, :0]}),
        (ValueError, r"\[batch, length, heads, width\]", {"query": q[0]}),
        (TypeError, "query is int32", {"query": q.astype(jnp.int32)}),
        (TypeError, "query is float8_e5m2", {"query": q.astype(jnp.float8_e5m2)}),
        (TypeError, "int32, int32", {"key": k.astype(jnp.int32), "value": v.astype(jnp.int32)}),
        (TypeError, "one floating or quantised dtype", {"key": k.astype(jnp.bfloat16)}),
        (ValueError, "shapes disagree", {"key": k[:, :, :5]}),
        (ValueError, "shapes disagree", {"key": k[:1], "value": v[:1]}),
        (ValueError, r"\[batch, heads, slots, width\]", {"key": k[0, 0]}),
        (ValueError, "pages", {"key": k[0], "value": v[0], "table": table}),
        (ValueError, "table has shape", {"table": table[:1]}),
        (TypeError, "table is float32", {"table": table.astype(jnp.float32)}),
        (ValueError, "lengths has shape", {"lengths": lengths[:1]}),
        (TypeError, "lengths is float32", {"lengths": lengths.astype(jnp.float32)}),
        (ValueError, "int8 needs key_scales", {"key": k.astype(jnp.int8), "value": v.astype(jnp.int8)}),
        (ValueError, "float32 takes no value_scales", {"value_scales": v[..., 0]}),
        (ValueError, "streams", {"mask": Mask(mask.query, {"rank": mask.key["rank"]}, mask.rule)}),
        (ValueError, "key stream 'rank' has shape", {"mask": Mask(mask.query, None, mask.rule)}),
        (TypeError, "not int32", {"mask": Mask(mask.query, {n: s > 0 for n, s in mask.key.items()}, mask.rule)}),
        (ValueError, "need a mask with the stream 'position'", {"mask": None, "alibi": jnp.ones(H)}),
        (ValueError, "alibi has shape", {"alibi": jnp.ones(H + 1)}),
        (ValueError, "sinks has shape", {"sinks": jnp.ones(1)}),
        (ValueError, "unknown implementation", {"implementation": "fast"}),
    ]
    for kind, message, changes in wrong:
        with pytest.raises(kind, match=message):
            request_of(**changes)


def test_what_the_kernel_refuses():
    q, k, v = arrays(1, 32)
    pages = {"key": k, "value": v, "mask": None, "table": jnp.zeros((B, 4), jnp.int32)}
    wide = arrays(MAX_QUERIES, 32, heads=51)[0]
    for message, changes in (
        ("float16", {"query": q.astype(jnp.float16)}),
        ("pages of 4 slots", {**pages, "key": k[:, :, :4], "value": v[:, :, :4]}),
        ("rows, above", {"query": wide, "mask": None}),
        ("scalar memory", {**pages, "table": jnp.zeros((B, 100_000), jnp.int32)}),
    ):
        with pytest.raises(ValueError, match=message):
            request_of(**changes, implementation="pallas_tpu")


@pytest.mark.parametrize(
    ("kernel", "page"),
    [
        pytest.param(kernel, page, marks=() if (name, page) in quick else pytest.mark.slow, id=f"{page}-{name}")
        for quick in [(("xla", 0), ("xla", 24), ("tpu", 24))]
        for name, kernel in KERNELS.items()
        for page in (0, 24)
    ],
)
def test_what_lies_behind_the_lengths_cannot_reach_the_output(kernel, page):
    q, k, v = arrays(1, 130)
    lengths = jnp.array([130, 37], jnp.int32)
    poison = jnp.arange(130, dtype=jnp.int32)[None, None, :, None] >= lengths[:, None, None, None]
    more = {"lengths": lengths}
    good = bad = (k, v)
    bad = jnp.where(poison, jnp.inf, k), jnp.where(poison, jnp.nan, v)
    if page:
        mask = causal(1, 130, lengths)
        *good, _, table = paged(*good, mask, page)
        *bad, _, _ = paged(*bad, mask, page)
        unowned = np.setdiff1d(np.arange(len(bad[1])), table)  # pages of no sequence, which padding of a table names
        bad[1] = bad[1].at[unowned].set(jnp.nan)
        more["table"] = jnp.concatenate([table, jnp.full((B, 1), int(unowned[0]), jnp.int32)], axis=1)
    for x, y in zip(both(kernel, q, *good, **more), both(kernel, q, *bad, **more), strict=True):
        assert_close(y, x)


def test_the_slower_one_is_left_out(monkeypatch):
    """On Hopper the kernel, for one query of a lone sequence over a long cache, unless it is asked for."""
    asked = dataclasses.replace(REGISTRY, preferred={"cpu": ("pallas_gpu", "xla")})
    monkeypatch.setattr(type(asked.implementation("pallas_gpu")), "unsupported_reason", lambda *_: None)

    def picked(rows, queries, slots, name=None):
        key = jnp.zeros((rows, 1, slots, 16), jnp.bfloat16)
        options, operands = request(jnp.zeros((rows, queries, 2, 16), jnp.bfloat16), key, key, *[None] * 10)
        return type(asked.pick(name, options, operands)).__name__

    cases = [(1, 1, 2**15), (1, 2, 2**15), (2, 1, 2**15), (1, 1, 2**14), (1, 1, 2**15, "pallas_gpu")]
    assert [picked(*case) for case in cases] == ["XlaDecode", *["HopperDecoding"] * 4]
