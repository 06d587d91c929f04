"""Rotary positions against reference tables, closed forms and the properties that make them rotary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import FOLDER

from garrulax.layers import rope as ropes
from garrulax.layers.rope import Rope

TABLES = np.load(FOLDER / "tables.npz")


@pytest.mark.parametrize(
    ("name", "width", "rope"),
    [
        ("llama31_8b", 128, Rope(theta=5e5, kind="llama3", factor=8.0, original_context=8192)),
        ("llama32_1b", 64, Rope(theta=5e5, kind="llama3", factor=32.0, original_context=8192)),
        ("yarn16", 128, Rope(kind="yarn", factor=16.0, original_context=4096)),
        ("chatglm2", 64, Rope()),
        ("glm4_9b_chat", 64, Rope(theta=10_000.0 * 500)),
    ],
)
def test_frequencies_equal_the_reference_tables(name, width, rope):
    expected = TABLES[f"{name}_inv_freq"]
    np.testing.assert_allclose(ropes.frequencies(rope, width), expected, rtol=1e-6)  # float32


def test_yarns_ramp_ends_at_the_last_entry():
    """One turn in the original context would be at 8 ln(360 / 2 pi) / (2 ln 10) = 7.03, beyond the last entry, 7."""
    rope = Rope(theta=10.0, kind="yarn", factor=4.0, original_context=360)
    plain = 10.0 ** -(np.arange(4) / 4)
    low = 1  # the entry before 32 turns: 8 ln(360 / 64 pi) / (2 ln 10) = 1.01
    slow = np.clip((np.arange(4) - low) / (7 - low), 0, 1)
    np.testing.assert_allclose(ropes.frequencies(rope, 8), plain / 4 * slow + plain * (1 - slow), rtol=1e-6)


def test_yarn_attention_factor():
    rope = Rope(kind="yarn", factor=16.0, original_context=4096)
    assert ropes.amplitude(rope) == pytest.approx(float(TABLES["yarn16_attention_factor"]), rel=1e-7)
    assert ropes.amplitude(Rope(kind="yarn", factor=16.0, original_context=4096, attention_factor=0.5)) == 0.5
    both = Rope(kind="yarn", factor=40.0, original_context=4096, mscale=0.707, mscale_all_dim=1.0)
    assert ropes.amplitude(both) == pytest.approx((0.0707 * np.log(40) + 1) / (0.1 * np.log(40) + 1))


def test_dynamic_stretches_the_base_only_beyond_the_context():
    rope = Rope(kind="dynamic", factor=3.0, original_context=100)
    rows = ropes.frequencies(rope, 16, jnp.array([50, 100, 250]))
    plain = 10_000.0 ** -(np.arange(0, 16, 2) / 16)
    base = 10_000 * (3 * 250 / 100 - 2) ** (16 / 14)
    np.testing.assert_allclose(rows, [plain, plain, base ** -(np.arange(0, 16, 2) / 16)], rtol=2e-6)


def test_longrope_needs_a_factor_for_every_pair():
    rope = Rope(kind="longrope", factor=2.0, original_context=8, short_factors=(1.0,) * 4, long_factors=(2.0,) * 3)
    with pytest.raises(ValueError, match="longrope needs 4 long_factors, not 3"):
        ropes.frequencies(rope, 8, jnp.array([3]))


def turned(x, position, rope=None):
    cosine, sine = ropes.cos_sin(rope or Rope(), jnp.full((1, 1), position), x.shape[-1], None, jnp.float32)
    return np.asarray(ropes.rotate_halves(x[None, None, None], cosine, sine)[0, 0, 0])


@pytest.mark.parametrize("width", [4, 8])
def test_neighbouring_pairs_turn_as_complex_numbers_and_the_rest_stays(width):
    """Su et al. 2021, equation 12, over the first `width` of eight entries."""
    x = np.random.default_rng(1).normal(size=(1, 3, 2, 8)).astype(np.float32)
    positions = jnp.array([[0, 5, 70]])
    got = np.asarray(ropes.rotate_pairs(jnp.asarray(x), *ropes.cos_sin(Rope(), positions, width, None, jnp.float32)))
    z = x[..., 0:width:2] + 1j * x[..., 1:width:2]
    angle = np.asarray(positions)[0, :, None, None] * 10_000.0 ** -(np.arange(0, width, 2) / width)
    turned = z * np.exp(1j * angle)
    np.testing.assert_allclose(got[..., 0:width:2], turned.real, atol=1e-5)
    np.testing.assert_allclose(got[..., 1:width:2], turned.imag, atol=1e-5)
    np.testing.assert_array_equal(got[..., width:], x[..., width:])


def test_rotation_keeps_lengths_and_depends_on_the_distance_alone():
    q, k = np.random.default_rng(0).normal(size=(2, 16)).astype(np.float32)
    assert np.linalg.norm(turned(q, 1000)) == pytest.approx(np.linalg.norm(q), rel=1e-6)
    np.testing.assert_array_equal(turned(q, 0), q)
    scores = [turned(q, 7 + shift) @ turned(k, 3 + shift) for shift in (0, 1, 50, 400)]
    np.testing.assert_allclose(scores, scores[0], rtol=1e-4)
    assert abs(scores[0] - turned(q, 8) @ turned(k, 3)) > 1e-2


def test_halves_are_turned_as_complex_numbers():
    """Entry i and entry i + C/2 are the real and imaginary part of one number, turned by position / theta^(2i/C)."""
    x = np.random.default_rng(1).normal(size=8)
    z = (x[:4] + 1j * x[4:]) * np.exp(1j * 5 * 300.0 ** -(np.arange(4) / 4))
    got = turned(jnp.asarray(x, jnp.float32), 5, Rope(theta=300.0))
    np.testing.assert_allclose(got, np.concatenate([z.real, z.imag]), rtol=1e-5)


def test_tables_are_float32_at_least_and_rotation_keeps_the_dtype():
    cosine, sine = ropes.cos_sin(Rope(), jnp.array([[3, 9]]), 8, None, jnp.bfloat16)
    assert cosine.dtype == sine.dtype == jnp.float32
    assert ropes.rotate_halves(jnp.ones((1, 2, 1, 8), jnp.bfloat16), cosine, sine).dtype == jnp.bfloat16
    with jax.enable_x64(True):
        assert ropes.cos_sin(Rope(), jnp.array([[3]]), 8, None, jnp.float64)[0].dtype == jnp.float64
        dynamic = Rope(kind="dynamic", factor=2.0, original_context=3)
        base = 10_000 * (2 * 7 / 3 - 1) ** (8 / 6)
        np.testing.assert_allclose(ropes.frequencies(dynamic, 8, jnp.int32([7]))[0], base ** -(np.arange(4) / 4), 1e-15)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "ntk"}, "unknown RoPE kind 'ntk'"),
        ({"kind": "linear", "factor": 0.5}, "factor=0.5 must be a number of at least 1"),
        ({"theta": float("nan")}, "theta=nan"),
        ({"theta": -1.0}, "theta=-1.0"),
        ({"kind": "yarn", "factor": 2.0}, "needs original_context"),
        ({"kind": "llama3", "factor": 2.0, "original_context": 8, "low": 4.0}, "low=4.0 must be above 0 and below"),
        ({"kind": "yarn", "factor": 2.0, "original_context": 8, "beta_slow": 40.0}, "beta_slow=40.0"),
        ({"kind": "yarn", "factor": 2.0, "original_context": 8, "attention_factor": 0.0}, "above 0"),
        ({"factor": 2.0}, "'default' does not use factor"),
        ({"kind": "linear", "factor": "2"}, "factor='2' must be a number"),
        ({"kind": "yarn", "factor": 2.0, "original_context": 8.5}, "original_context=8.5 must be a whole number"),
    ],
)
def test_absurd_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Rope(**fields)
