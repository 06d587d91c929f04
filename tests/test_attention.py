"""kernels.attention against a dense formula in float64 numpy, forward and backward."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from garrulax.kernels import attention, masks
from garrulax.kernels.mask import CAUSAL, Mask
from garrulax.kernels.xla import Chunked
from garrulax.layers.attention import alibi_slopes
from garrulax.layers.call import mask_and_cache

pytestmark = pytest.mark.usefixtures("quick_compilation")

B, T, C = 2, 6, 8
TABLES = np.load(pathlib.Path(__file__).parent / "oracles" / "tables.npz")  # slopes by the original authors' code


def dense(query, key, value, seen, scale=None, softcap=None, bias=None, weight=None):
    """Output, and the gradients of sum(output * weight), of the textbook formula in float64, one head at a time."""
    heads, kv_heads = query.shape[2], key.shape[2]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out = np.zeros((*query.shape[:3], value.shape[-1]))
    dq, dk, dv = np.zeros(query.shape), np.zeros(key.shape), np.zeros(value.shape)
    for b in range(len(query)):
        for h in range(heads):
            g = h // (heads // kv_heads)
            q, k, v = query[b, :, h], key[b, :, g], value[b, :, g]
            raw = q @ k.T * scale
            slope = np.ones_like(raw)
            if softcap is not None:
                slope = 1 - np.tanh(raw / softcap) ** 2
                raw = softcap * np.tanh(raw / softcap)
            if bias is not None:
                raw = raw + np.broadcast_to(bias, (len(query), heads, *raw.shape))[b, h]
            p = np.zeros_like(raw)
            for t in range(len(q)):
                keys = seen[b, t]
                if keys.any():
                    e = np.exp(raw[t, keys] - raw[t, keys].max())
                    p[t, keys] = e / e.sum()
            out[b, :, h] = p @ v
            if weight is not None:
                w = weight[b, :, h]
                dv[b, :, g] += p.T @ w
                dp = w @ v.T
                ds = p * (dp - (dp * p).sum(-1, keepdims=True)) * slope * scale
                dq[b, :, h] += ds @ k
                dk[b, :, g] += ds.T @ q
    return out, (dq, dk, dv)


def inputs(heads, kv_heads, keys=T):
    r = np.random.default_rng(heads * 10 + kv_heads)
    return [
        r.normal(size=(B, length, count, C)) * 2
        for length, count in ((T, heads), (keys, kv_heads), (keys, kv_heads), (T, heads))
    ]


MASKS = {
    "none": None,
    "causal": masks.causal(B, T),
    "padded": masks.padded(jnp.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])),
    "prefix": masks.prefix(jnp.array([3, 5]), T),
    "packed": masks.packed(jnp.array([[0, 0, 1, 1, 1, 2], [-1, 4, 4, 4, 4, -1]])),
}


@functools.partial(jax.jit, static_argnames=("softcap", "scale"))
def ours(query, key, value, weight, mask, **options):
    def total(*operands):
        out = attention(*operands, mask=mask, **options)
        return jnp.sum(out * weight), out

    (_, out), gradients = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(query, key, value)
    return out, gradients


def check(heads, kv_heads, mask, bound=2e-6, **options):
    *operands, weight = inputs(heads, kv_heads)
    seen = np.ones((B, T, T), bool) if mask is None else np.asarray(mask.dense())
    expected, gradients = dense(*operands, seen, weight=weight, **options)
    got, got_gradients = ours(*(jnp.asarray(x, jnp.float32) for x in (*operands, weight)), mask, **options)
    assert np.abs(got - expected).max() <= bound * np.abs(expected).max()
    for a, b in zip(got_gradients, gradients, strict=True):
        assert np.abs(a - b).max() <= 2 * bound * np.abs(b).max()
    return np.asarray(got), [np.asarray(g) for g in got_gradients], seen


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (4, 1)])
def test_forward_and_gradients(heads, kv_heads, mask):
    check(heads, kv_heads, MASKS[mask])


def test_softcap_bias_and_scale():
    bias = np.random.default_rng(5).normal(size=(1, 4, T, T)).astype(np.float32)
    check(4, 2, MASKS["causal"], softcap=1.5)
    check(4, 2, MASKS["causal"], scale=0.1)
    check(4, 2, MASKS["padded"], bias=bias, softcap=2.0, scale=0.7)
    check(4, 2, None, bias=bias[:, :1, :1])


def test_float64():
    with jax.enable_x64(True):
        *operands, weight = inputs(6, 3)
        seen = np.asarray(MASKS["prefix"].dense())
        expected, gradients = dense(*operands, seen, weight=weight)
        got, got_gradients = ours(*map(jnp.asarray, (*operands, weight)), MASKS["prefix"])
        np.testing.assert_allclose(got, expected, atol=1e-13)
        for a, b in zip(got_gradients, gradients, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-13)


@pytest.mark.parametrize("mask", ["padded", "packed"])
def test_rows_without_keys_are_zero_and_have_zero_gradients(mask):
    got, (dq, dk, dv), seen = check(4, 2, MASKS[mask])
    empty, unseen = ~seen.any(2), ~seen.any(1)
    assert empty.any()
    assert not got[empty].any()
    assert not dq[empty].any()
    assert not dk[unseen].any()
    assert not dv[unseen].any()


def test_large_scores_stay_finite():
    """Scores of +-1e4 in a float32 softmax, and a row whose keys are all far below the unseen ones."""
    query, key, value, _ = (jnp.asarray(x, jnp.float32) for x in inputs(2, 2))
    out, gradients = ours(query * 1e3, key * 1e3, value, jnp.ones_like(query), MASKS["causal"])
    assert all(np.isfinite(x).all() for x in (out, *gradients))
    np.testing.assert_allclose(out[:, 0], value[:, 0], rtol=1e-6)  # the first query sees one key, whatever its score


def test_bfloat16_keeps_its_dtype_and_a_float32_softmax():
    operands = [jnp.asarray(x, jnp.bfloat16) for x in inputs(4, 2)[:3]]
    out = attention(*operands, mask=MASKS["causal"])
    assert out.dtype == jnp.bfloat16
    expected, _ = dense(*(np.asarray(x, np.float64) for x in operands), np.asarray(MASKS["causal"].dense()))
    assert np.abs(np.asarray(out, np.float64) - expected).max() <= 2**-7 * np.abs(expected).max()


def test_different_query_and_key_lengths():
    """As with a cache: three queries over nine keys."""
    r = np.random.default_rng(3)
    query, key, value = r.normal(size=(B, 3, 4, C)), r.normal(size=(B, 9, 2, C)), r.normal(size=(B, 9, 2, 5))
    mask = masks.Mask(
        {"rank": jnp.full((B, 3), 6) + jnp.arange(3)}, {"rank": jnp.tile(jnp.arange(9), (B, 1))}, masks.CAUSAL
    )
    expected, _ = dense(query, key, value, np.asarray(mask.dense()))
    got = attention(*(jnp.asarray(x, jnp.float32) for x in (query, key, value)), mask=mask)
    np.testing.assert_allclose(got, expected, atol=3e-6)


def test_dropout_drops_probabilities_and_keeps_their_mean():
    """With values one-hot in the keys, the output is the probabilities."""
    keys = 64
    query, key = jnp.zeros((1, 256, 1, keys)), jnp.zeros((1, keys, 1, keys))
    value = jnp.eye(keys)[None, :, None]
    run = functools.partial(attention, query, key, value, dropout=0.25)
    np.testing.assert_allclose(run(), 1 / keys, rtol=1e-6)
    dropped = np.asarray(run(dropout_key=jax.random.key(0)))
    kept = dropped > 0
    np.testing.assert_allclose(dropped[kept], 1 / keys / 0.75, rtol=1e-6)
    assert kept.mean() == pytest.approx(0.75, abs=5 * (0.25 * 0.75 / kept.size) ** 0.5)
    assert not np.array_equal(dropped, run(dropout_key=jax.random.key(1)))


def zeros(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


QKV = (zeros(2, 3, 4, 8),) * 3
RANK = zeros(2, 3, dtype=int)


@pytest.mark.parametrize(
    ("operands", "options", "error", "message"),
    [
        ((zeros(2, 3, 4), zeros(2, 3, 4, 8), zeros(2, 3, 4, 8)), {}, ValueError, r"query \(2, 3, 4\)"),
        ((zeros(2, 3, 4, 8), zeros(2, 3, 3, 8), zeros(2, 3, 3, 8)), {}, ValueError, "4 query heads are not a multiple"),
        ((zeros(2, 3, 4, 8), zeros(2, 3, 4, 6), zeros(2, 3, 4, 6)), {}, ValueError, "disagree"),
        ((zeros(2, 3, 4, 8), zeros(1, 3, 4, 8), zeros(1, 3, 4, 8)), {}, ValueError, "disagree"),
        ((zeros(2, 3, 4, 8), zeros(2, 5, 4, 8), zeros(2, 4, 4, 8)), {}, ValueError, "disagree"),
        ((zeros(2, 3, 4, 8), zeros(2, 0, 4, 8), zeros(2, 0, 4, 8)), {}, ValueError, "no empty arrays"),
        ((zeros(2, 3, 4, 8, dtype=jnp.int32), zeros(2, 3, 4, 8), zeros(2, 3, 4, 8)), {}, TypeError, "query is int32"),
        (QKV, {"mask": masks.causal(2, 4)}, ValueError, r"'rank' has shape \(2, 4\), not \(2, 3"),
        (QKV, {"mask": Mask({"rank": RANK})}, ValueError, r"query streams \['segment'\], but only \['rank'\]"),
        (QKV, {"mask": Mask({"rank": zeros(2, 3)}, rule=CAUSAL)}, TypeError, "query stream 'rank' is float32"),
        (QKV, {"mask": Mask({"rank": RANK}, {"rank": RANK[:1]}, CAUSAL)}, ValueError, r"key stream 'rank' .* \(1, 3"),
        (QKV, {"mask": np.ones((3, 3), bool)}, TypeError, "mask is a kernels.Mask .* not ndarray"),
        (QKV, {"mask": masks.causal(2, 3), "alibi": zeros(4)}, ValueError, "need a mask with the stream 'position'"),
        (QKV, {"mask": [masks.causal(2, 3)] * 3}, ValueError, "3 masks do not divide 4 query heads"),
        (QKV, {"implementation": "flash"}, ValueError, "'flash' of attention: choose from"),
    ],
)  # fmt: skip
def test_misfits_are_named(operands, options, error, message):
    """When the program is traced, before anything is computed."""
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda *x: attention(*x, **options), *operands)


@pytest.mark.parametrize("stride", [0, 3])
def test_a_window_counts_positions_not_slots(stride):
    """Two documents packed with a gap; every layer of a scan may have its own reach."""
    segment = jnp.array([[0, 0, 0, 0, masks.PAD, 1, 1, 1, 1, 1]])
    position = jnp.array([[0, 1, 2, 3, 0, 0, 1, 2, 3, 4]])
    mask, _ = mask_and_cache(segment, position, masks.packed(segment), None)
    for reach in (1, 2, masks.INF):
        seen = np.asarray(jax.jit(lambda n: masks.within(mask, n, stride).dense())(reach))[0]
        for i, j in np.ndindex(seen.shape):
            same = segment[0, i] == segment[0, j] >= 0 and j <= i
            far = int(position[0, i] - position[0, j])
            assert seen[i, j] == bool(same and (far < reach or (stride and far % stride == 0)))


@pytest.mark.parametrize("heads", [4, 6, 8, 12, 16, 32, 40, 71, 112])
def test_alibi_slopes(heads):
    np.testing.assert_allclose(alibi_slopes(heads), TABLES[f"alibi_{heads}"], rtol=1e-14)


def test_alibi_is_a_bias_of_distances():
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 5, 4, 8)) for i in range(3))
    slopes, position = jnp.asarray(alibi_slopes(4), jnp.float32), jnp.array([[0, 1, 2, 3, 4], [0, 0, 1, 2, 3]])
    mask, _ = mask_and_cache(position, position, masks.padded(jnp.array([[1] * 5, [0, 1, 1, 1, 1]])), None)
    distance = (position[:, None, :] - position[:, :, None]).astype(jnp.float32)
    bias = slopes[:, None, None] * distance[:, None]
    np.testing.assert_allclose(
        attention(q, k, v, mask=mask, alibi=slopes), attention(q, k, v, mask=mask, bias=bias), rtol=1e-6
    )
    with pytest.raises(ValueError, match=r"alibi has shape \(4,\) for 2 heads"):
        attention(q[:, :, :2], k[:, :, :2], v[:, :, :2], mask=mask, alibi=slopes)
    with pytest.raises(ValueError, match="stream 'position'"):
        attention(q, k, v, alibi=slopes)


@pytest.mark.parametrize("bias", [-np.inf, np.finfo(np.float32).min], ids=["infinity", "lowest"])
@pytest.mark.parametrize("implementation", ["dense", "xla", Chunked(scores=4 * 8 * 8)], ids=["dense", "xla", "chunks"])
def test_a_bias_that_closes_a_row(implementation, bias):
    """-inf closes it: zeros. float32's lowest number, as in additive masks, is a number: the mean of the values."""
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 24, 4, 8), jnp.float32) for i in range(3))
    row = jnp.zeros((1, 1, 24, 24), jnp.float32).at[:, :, 3].set(bias)

    def run(*x):
        return attention(*x[:3], bias=x[3], implementation=implementation)

    out, back = jax.vjp(run, q, k, v, row)
    np.testing.assert_allclose(out[:, 3], 0 * v[:, 3] if np.isinf(bias) else v.mean(axis=1), atol=1e-6)
    assert all(np.isfinite(x).all() for x in back(jnp.ones_like(out)))


@pytest.mark.parametrize("implementation", ["dense", "xla", Chunked(scores=4 * 8 * 8)], ids=["dense", "xla", "chunks"])
def test_padding_that_is_not_a_number_does_not_reach_other_tokens(implementation):
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 24, 4, 8), jnp.float32) for i in range(3))
    segment = np.zeros((2, 24), np.int32)
    segment[0, 19:] = segment[1, :3] = -1
    mask = masks.packed(jnp.asarray(segment))
    bad = [jnp.where(segment[:, :, None, None] < 0, jnp.nan, x) for x in (k, v)]
    out = attention(q, *bad, mask=mask, implementation=implementation)
    np.testing.assert_array_equal(out, attention(q, k, v, mask=mask, implementation=implementation))


def test_second_derivatives_need_the_dense_implementation():
    q = jax.random.normal(jax.random.key(0), (1, 3, 1, 4), jnp.float32)

    def twice(implementation):
        def loss(x):
            return jnp.sum(jnp.sin(attention(x, q, q, mask=masks.causal(1, 3), implementation=implementation)))

        return jax.jit(jax.grad(lambda x: jnp.sum(jax.grad(loss)(x) ** 2)))(q)

    def difference(x, step=1e-3):  # of the first derivative along the direction of all ones
        def loss(y):
            return jnp.sum(jnp.sin(attention(y, q, q, mask=masks.causal(1, 3), implementation="dense")))

        first = jax.jit(jax.grad(loss))
        return (jnp.sum(first(x + step) ** 2) - jnp.sum(first(x - step) ** 2)) / (2 * step)

    np.testing.assert_allclose(twice("dense").sum(), difference(q), rtol=2e-3)
    with pytest.raises(NotImplementedError, match='implementation="dense"'):
        twice("xla")
