"""Products of activations, as sums of int8 or bfloat16 digits, with narrow weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

import garrulax as gx
from garrulax.core import digits, half, quantised
from garrulax.core.einsum import einsum

RANDOM = np.random.default_rng(0)


def activations(rows, inputs):
    """Rows of different sizes, in which some entries are a thousand times as large as the others, and one of zeros."""
    x = RANDOM.normal(size=(rows, inputs)) * 10.0 ** RANDOM.uniform(-6, 6, size=(rows, 1))
    x[:, :3] *= 1000
    x[0] = 0
    return x.astype(np.float32)


@pytest.mark.parametrize("contracted", [0, 1])
@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_the_sum_of_products_of_digits_is_the_product(dtype, contracted):
    x = activations(7, 300)
    shape = (300, 41) if contracted == 0 else (41, 300)
    w = RANDOM.integers(-127, 128, shape) if dtype == "int8" else RANDOM.normal(size=shape)
    w = jnp.asarray(w, dtype)
    times = digits.times_int8 if dtype == "int8" else digits.times_bfloat16
    found = jax.jit(times, static_argnums=2)(x, w, contracted)
    wide = np.asarray(w, np.float64)
    expected = x.astype(np.float64) @ (wide if contracted == 0 else wide.T)
    size = np.abs(wide if contracted == 0 else wide.T)
    bound = 4e-7 * np.abs(x).astype(np.float64) @ size  # sums in float32
    if dtype == "int8":  # and the rounding of every activation
        bound += 2.0**-24 * 1.001 * np.abs(x).max(axis=1, keepdims=True) * size.sum(axis=0)
    assert found.dtype == jnp.float32
    assert np.all(np.abs(found - expected) <= bound)
    np.testing.assert_array_equal(found[0], 0)
    # The result of a row of int8 products does not depend on the others to the last bit, alone included.
    if dtype == "int8":
        np.testing.assert_array_equal(times(x[3:4], w, contracted)[0], found[3])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so(bad):
    x = activations(3, 20)
    x[1, 4] = bad
    w = jnp.ones((5, 20), jnp.int8)
    found = digits.times_int8(x, w, 1)
    assert jnp.isnan(found[1]).all()
    assert jnp.isfinite(found[::2]).all()
    found = digits.times_bfloat16(x, w.astype(jnp.bfloat16), 1)
    assert not jnp.isfinite(found[1]).any()
    assert jnp.isfinite(found[::2]).all()


def test_the_most_inputs_are_those_whose_sums_fit():
    most = digits._MOST_INPUTS
    assert digits.can_be_summed(most)
    assert not digits.can_be_summed(most + 1)
    # The greatest sum: every digit is -128, or 127, and every weight -128.
    x, w = np.full((1, most), -1, np.float32), jnp.full((1, most), -128, jnp.int8)
    np.testing.assert_allclose(digits.times_int8(x, w, 1), [[128.0 * most]], rtol=1e-6)


@pytest.mark.parametrize(("flags", "expected"), [("fpu avx512_vnni", True), ("fpu avx2", False), (None, False)])
def test_cpus_are_known_by_their_flags(flags, expected, tmp_path, monkeypatch):
    file = tmp_path / "cpuinfo"
    if flags is not None:
        file.write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    monkeypatch.setattr(digits, "Path", lambda _: file)
    digits.has.cache_clear()
    try:
        assert digits.has("int8") == expected
        assert not digits.has("bfloat16")
    finally:
        digits.has.cache_clear()


@pytest.mark.parametrize("has", [False, True])
@pytest.mark.parametrize("form", ["int8", "w8a8", "bfloat16"])
def test_weights_give_the_same_product_on_either_kind_of_cpu(form, has, monkeypatch):
    monkeypatch.setattr(digits, "has", lambda dtype: has)
    monkeypatch.setattr(quantised, "LEAST", 1)
    monkeypatch.setattr(half, "LEAST", 1)
    config = gx.preset("llama-tiny", layers=1, width=32, heads=2, kv_heads=2, mlp_width=48, vocab=97)
    params = quick.init(config, jax.random.key(0), dtype="bfloat16")
    x = jnp.asarray(activations(4, 32)[None])
    if form == "bfloat16":
        w = half.from_bits(half.as_bits(gx.unstack(params), stacked=False))["blocks"][0]["mlp"]["up"]
        assert (w.numbers is not None) == has
    else:
        w = gx.unstack(gx.quantise((params, config), form)[0])["blocks"][0]["mlp"]["up"]
    found = jax.jit(lambda x, w: einsum("BTD,DF->BTF", x, w))(x, w)
    dense = np.asarray(w.dense(jnp.float32), np.float64)
    rounded = np.asarray(w._as_multiplied(x) if form == "w8a8" else x, np.float64)
    bound = 1e-6 * np.abs(rounded) @ np.abs(dense)
    bound += 2.0**-24 * 1.001 * np.abs(rounded).max(axis=-1, keepdims=True) * np.abs(dense).sum(axis=0)
    assert np.all(np.abs(found - rounded @ dense) <= bound)

    def slope(x):
        return jax.grad(lambda x: jnp.sum(jnp.sin(jnp.arange(48.0)) * einsum("BTD,DF->BTF", x, w)))(x)

    if form == "int8":
        expected = np.broadcast_to(dense @ np.sin(np.arange(48.0)), x.shape)
        np.testing.assert_allclose(slope(x), expected, rtol=1e-4, atol=1e-6)
