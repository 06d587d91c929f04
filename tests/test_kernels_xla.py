"""The chunked implementation against the dense formula in float64."""

import functools

import jax
import jax.numpy as jnp
import kernel_cases as cases
import numpy as np
import pytest

from garrulax.kernels import attention, causal
from garrulax.kernels.mask import Mask
from garrulax.kernels.xla import Chunked

pytestmark = pytest.mark.usefixtures("quick_compilation")
SMALL = Chunked(scores=4 * 32 * 32)  # chunks of 32 x 32 for four heads


@pytest.mark.parametrize("case", cases.some(cases.CASES, "bigbird", "nothing"))  # the next tests have others
def test_masks(case):
    cases.assert_agrees(SMALL, cases.CASES[case](100), (100, 100, 4, 2, 16, 24))


@pytest.mark.parametrize("extra", cases.some(cases.EXTRAS, "shared_bias"))  # the next tests have the others
def test_extras(extra):
    cases.assert_agrees(SMALL, cases.window(100), (100, 100, 4, 2, 16), extras=(extra,))


@pytest.mark.parametrize("extras", [cases.EXTRAS[:5], cases.EXTRAS[5:6], cases.EXTRAS[6:]])
def test_without_a_loop(extras):
    cases.assert_agrees(Chunked(), cases.packed(40), (40, 40, 4, 2, 16, 24), extras=extras)


@pytest.mark.parametrize("mask", cases.some([cases.cached, cases.tree], cases.tree))
@pytest.mark.parametrize(
    "implementation", [SMALL, pytest.param(Chunked(), marks=pytest.mark.slow)], ids=["chunks", "at once"]
)
def test_more_keys_than_queries(mask, implementation):
    cases.assert_agrees(implementation, mask(41, 150), (41, 150, 4, 2, 16))


@pytest.mark.parametrize(
    ("T", "S"), cases.some([(1, 700), (33, 33), (64, 64), (17, 210), (129, 16)], (17, 210), (129, 16))
)
def test_lengths(T, S):
    """Chunks that divide the lengths, that do not, and far from square ones; in the last case most of them empty."""
    mask = cases.causal(max(T, S))
    key = mask.key_streams()
    mask = Mask({n: x[:, -T:] for n, x in mask.query.items()}, {n: x[:, :S] for n, x in key.items()}, mask.rule)
    cases.assert_agrees(SMALL, mask, (T, S, 4, 4, 8))


@pytest.mark.parametrize(
    ("H", "K", "C"),
    cases.some([(8, 8, 64), (8, 4, 80), (8, 2, 96), (8, 1, 128), (1, 1, 256), (4, 4, 5)], (8, 4, 80)),
)
def test_heads_and_widths(H, K, C):
    cases.assert_agrees(Chunked(scores=H * 16 * 16), cases.packed(40), (40, 40, H, K, C))


@pytest.mark.parametrize(
    ("dtype", "bound"), cases.some([(jnp.bfloat16, 2e-2), (jnp.float16, 2e-3)], (jnp.bfloat16, 2e-2))
)
def test_half_precision(dtype, bound):
    shape = (100, 100, 4, 2, 32)
    cases.assert_agrees(SMALL, cases.infilling(100), shape, extras=("softcap", "key_bias"), dtype=dtype, bound=bound)


def test_float64_is_exact():
    """Everything at once that can be asked for, in chunks, at the precision of float64."""
    names = ("softcap", "scale", "alibi", "sinks", "relative", "bias", "dropout")
    mask = cases.with_positions(cases.infilling(70))
    with jax.enable_x64(True):
        options = {name: x for e in names for name, x in cases.extra(e, 4, 70, 70).items()}
        options = jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, options)
        *operands, cotangent = (jnp.asarray(x) for x in cases.inputs(70, 70, 4, 2, 16))
        got, expected = (cases.run(operands, cotangent, mask, options, i) for i in (SMALL, "dense"))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert x.dtype == jnp.float64
        np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("implementation", [SMALL, Chunked()], ids=["chunks", "at once"])
@pytest.mark.parametrize("size", [pytest.param(1.0, marks=pytest.mark.slow), 1e17], ids=["usual scores", "huge scores"])
def test_queries_that_see_nothing(implementation, size):
    """Zeros and no gradient, and no NaN anywhere, whatever the scores."""
    T = 100
    mask = cases.nothing(T)
    query, key, value, cotangent = (jnp.asarray(x, jnp.float32) for x in cases.inputs(T, T, 4, 2, 16))
    operands = (size * query, size * key, value)
    out, ((dq, dk, dv), _) = cases.run(operands, cotangent, mask, {}, implementation)
    blind = ~np.asarray(mask.dense()).any(axis=2)
    unseen = ~np.asarray(mask.dense()).any(axis=1)
    assert blind.any()
    for x, dark in ((out, blind), (dq, blind), (dk, unseen), (dv, unseen)):
        x = np.asarray(x)
        assert np.isfinite(x).all()
        assert not x[dark].any()
        assert x[~dark].any()


@pytest.mark.parametrize(
    ("implementation", "dtype"),
    cases.some([(x, t) for x in ("chunks", "xla", "dense") for t in (jnp.float32, jnp.bfloat16)],
               ("chunks", jnp.float32)),
)  # fmt: skip
def test_gradients_of_huge_scores(implementation, dtype):
    """Also of repeated queries in the last chunk, and of masked keys with higher scores."""
    passes = Chunked(scores=2 * 16 * 16) if implementation == "chunks" else implementation
    cases.assert_huge_scores_agree(passes, 2e-6 if dtype == jnp.float32 else 2e-2, dtype=dtype)


def test_chunks_without_attention_are_skipped():
    """NaN keys and values in chunks that nobody sees stay there, in both passes."""
    T = 128
    segment = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32) // 64, (cases.B, T))
    mask = cases._self(cases.SAME_SEGMENT, segment=segment)
    query, key, value, cotangent = (jnp.asarray(x, jnp.float32) for x in cases.inputs(T, T, 4, 2, 16))
    key, value = (x.at[:, 64:].set(jnp.nan) for x in (key, value))
    out, ((dq, dk, dv), _) = cases.run((query, key, value), cotangent, mask, {}, SMALL)
    for x in (out, dq, dk, dv):
        assert np.isfinite(x[:, :64]).all()
        assert np.isnan(x[:, 64:]).any()


def test_batch_rows_share_chunks():
    """Short rows, several to a chunk, of which some see nothing of what others see."""
    T = 24
    rows = zip(*(cases.inputs(T, T, 4, 2, 16, seed=i) for i in range(3)), strict=True)
    query, key, value, cotangent = (jnp.asarray(np.concatenate(x), jnp.float32) for x in rows)
    streams = [cases.CASES[name](T).query for name in ("packed", "nothing", "prefix")]
    mask = Mask({n: jnp.concatenate([s[n] for s in streams]) for n in ("rank", "segment")})
    got, expected = (
        cases.run((query, key, value), cotangent, mask, {}, i) for i in (Chunked(scores=3 * 4 * T * T), "dense")
    )
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.slow  # as test_attention_transforms
def test_transformations():
    """vmap, remat and scan give what plain calls give."""
    query, key, value, cotangent = (jnp.asarray(x, jnp.float32) for x in cases.inputs(50, 50, 4, 2, 8))
    mask = cases.packed(50)
    several = jnp.stack([query, 2 * query, -query])

    def pull(query):
        out, back = jax.vjp(lambda q: attention(q, key, value, mask=mask, implementation=SMALL), query)
        return out, back(cotangent)[0]

    def rematerialised(_, query):
        f = jax.checkpoint(lambda q: attention(q, key, value, mask=mask, implementation=SMALL))
        out, back = jax.vjp(f, query)
        return None, (out, back(cotangent)[0])

    expected = jax.tree.map(lambda *x: jnp.stack(x), *(jax.jit(pull)(q) for q in several))
    for got in (jax.jit(jax.vmap(pull))(several), jax.jit(lambda x: jax.lax.scan(rematerialised, None, x)[1])(several)):
        for x, y in zip(got, expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", cases.some(["float32", "bfloat16"], "bfloat16"))
def test_memory_is_linear(dtype):
    """Forward and backward over 16,384 tokens, 8 heads over 2 of width 128: compiled, not run."""

    def both(query, key, value, cotangent, mask):
        f = functools.partial(attention, mask=mask, implementation="xla")
        return jax.vjp(f, query, key, value)[1](cotangent)

    def mebibytes(T):
        shapes = [jax.ShapeDtypeStruct((1, T, H, 128), dtype) for H in (8, 2, 2, 8)]
        mask = jax.eval_shape(lambda: causal(1, T))
        plan = jax.jit(both).lower(*shapes, mask).compile().memory_analysis()
        return plan.temp_size_in_bytes / 2**20

    odd, twice = (mebibytes(T) for T in (16001, 32768))
    assert odd <= 250
    assert twice <= 2.15 * odd


def test_layers_do_not_keep_their_buffers():
    """Layers as straight code: the array that each writes its output into once existed for all layers at once."""

    def forward(x, layers):
        for _ in range(layers):
            x = x + attention(x, x[:, :, :1], x[:, :, :1], mask=causal(1, x.shape[1]), implementation="xla")
        return x

    x = jax.ShapeDtypeStruct((1, 2048, 4, 64), jnp.float32)
    plan = jax.jit(forward, static_argnums=1).lower(x, 3).compile().memory_analysis()
    assert plan.temp_size_in_bytes < 4 * x.size * 4
