"""T5's relative position bias against a restatement in whole numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from garrulax.kernels import Mask, attention
from garrulax.kernels.mask import All
from garrulax.kernels.relative import t5


def bucket(distance, buckets, bidirectional, max_distance):
    """Raffel et al. 2020, 2.1, by comparing powers: the k-th of n logarithmic buckets begins at the least distance d
    with (d / exact)^n >= (max_distance / exact)^k."""
    if bidirectional:
        buckets //= 2
        base, d = (buckets if distance > 0 else 0), abs(distance)
    else:
        base, d = 0, max(-distance, 0)
    exact, n = buckets // 2, buckets - buckets // 2
    if d < exact:
        return base + d
    return base + exact + sum(d**n * exact**k >= exact**n * max_distance**k for k in range(1, n))


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 16), (12, 50), (33, 100), (64, 256)])
def test_steps_are_the_buckets(buckets, max_distance, bidirectional):
    table = jnp.arange(2 * buckets, dtype=jnp.float32).reshape(buckets, 2)
    bias = t5(table, bidirectional=bidirectional, max_distance=max_distance)
    distances = np.arange(-2 * max_distance, 2 * max_distance)
    got = np.asarray(bias.steps)[np.searchsorted(bias.starts, distances, side="right")]
    expected = [bucket(int(d), buckets, bidirectional, max_distance) for d in distances]
    np.testing.assert_array_equal(got, np.asarray(table)[expected])


def test_it_is_a_bias_of_every_pair_and_its_table_learns():
    """The same as attention with the whole bias, and the gradient of the table."""
    r = np.random.default_rng(0)
    T, H = 24, 2
    q, k, v, w = (jnp.asarray(r.normal(size=(1, T, H, 8)), jnp.float32) for _ in range(4))
    table = jnp.asarray(r.normal(size=(8, H)), jnp.float32)
    position = jnp.arange(T)[None]
    mask = Mask({"position": position}, rule=All())
    buckets = np.array([[bucket(j - i, 8, True, 16) for j in range(T)] for i in range(T)])

    def ours(table):
        relative = t5(table, bidirectional=True, max_distance=16)
        return jnp.sum(w * attention(q, k, v, mask=mask, relative=relative))

    def spread(table):
        return jnp.sum(w * attention(q, k, v, bias=jnp.moveaxis(table[buckets], 2, 0)[None], implementation="dense"))

    (got, slope), (expected, slope2) = (jax.jit(jax.value_and_grad(f))(table) for f in (ours, spread))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    np.testing.assert_allclose(slope, slope2, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("buckets", "bidirectional", "max_distance"), [(1, False, 128), (3, True, 128), (32, True, 8), (32, False, 16)]
)
def test_tables_without_logarithmic_buckets_are_refused(buckets, bidirectional, max_distance):
    with pytest.raises(ValueError, match="no logarithmic buckets"):
        t5(jnp.zeros((buckets, 2)), bidirectional=bidirectional, max_distance=max_distance)
