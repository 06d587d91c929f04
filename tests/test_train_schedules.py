import math

import jax
import numpy as np
import pytest

from garrulax.train.schedules import make_schedule


def values(*args, **options):
    schedule = make_schedule(*args, **options)
    return np.array([schedule(s) for s in range(args[2])])


def test_constant():
    np.testing.assert_allclose(values("constant", 2.0, 6, warmup=3), [2 / 3, 4 / 3, 2, 2, 2, 2], rtol=1e-6)


def test_linear():
    np.testing.assert_allclose(values("linear", 1.0, 8, warmup=4), [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25], rtol=1e-6)


def test_cosine():
    got = values("cosine", 3.0, 100, warmup=0.1, min_ratio=0.2)
    expected = [3 * (0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * (s - 10) / 90))) for s in range(10, 100)]
    np.testing.assert_allclose(got[10:], expected, rtol=1e-5)
    np.testing.assert_allclose(got[:10], 3 * np.arange(1, 11) / 10, rtol=1e-6)


def test_warmup_stable_decay():
    got = values("wsd", 1.0, 20, warmup=4, min_ratio=0.5, decay=0.25)
    np.testing.assert_allclose(got[:4], [0.25, 0.5, 0.75, 1], rtol=1e-6)
    np.testing.assert_allclose(got[4:15], 1)
    np.testing.assert_allclose(got[15:], [1, 0.9, 0.8, 0.7, 0.6], rtol=1e-6)


def test_inverse_square_root():
    """Vaswani et al. 2017, eq. 3, up to the factor of the peak: min(n ** -0.5, n * w ** -1.5), steps n from 1."""
    n, w = np.arange(1, 101), 8
    expected = 3 * np.sqrt(w) * np.minimum(n**-0.5, n * w**-1.5)
    np.testing.assert_allclose(values("inverse_sqrt", 3.0, 100, warmup=8), expected, rtol=1e-6)
    np.testing.assert_allclose(
        values("inverse_sqrt", 3.0, 100, warmup=8, min_ratio=0.4)[8:], np.maximum(1.2, expected)[8:], rtol=1e-6
    )
    # A run that goes on from any step follows the same curve, whatever its number of steps.
    tail = make_schedule("inverse_sqrt", 3.0, 500, warmup=0.3, tail=(50, expected[50] / 3))
    np.testing.assert_allclose([tail(s) for s in range(50, 100)], expected[50:], rtol=1e-6)


def test_warmup_linear():
    """By the formula, with s = 1 where x <= w: the fall goes on during the warm-up."""
    x, w = np.arange(1000) / 1000, 0.1
    s = (x <= w).astype(float)
    expected = 5 * (s * x / w + (1 - s)) * (1 - x)
    np.testing.assert_allclose(values("warmup_linear", 5.0, 1000, warmup=w), expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(values("warmup_linear", 5.0, 1000, warmup=100), expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(values("warmup_linear", 1.0, 4, min_ratio=0.2), [1, 0.8, 0.6, 0.4], rtol=1e-6)


def test_works_on_traced_steps():
    schedule = make_schedule("cosine", 1.0, 10, warmup=2)
    np.testing.assert_allclose(jax.jit(schedule)(5), schedule(5), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "cosin"}, "unknown schedule 'cosin'"),
        ({"kind": "wsd", "warmup": 8, "decay": 0.5}, "longer than"),
        ({"kind": "warmup_linear", "warmup": 11}, "warmup=11 .* longer than the 10 steps"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(**{"peak": 1.0, "steps": 10, **options})
