"""The chunked implementation against the dense formula in float64."""

import kernel_cases as cases
import pytest

from garrulax.kernels.xla import Chunked

SMALL = Chunked(scores=4 * 32 * 32)


@pytest.mark.parametrize("case", cases.CASES)
def test_masks(case):
    cases.assert_agrees(SMALL, cases.CASES[case](100), (100, 100, 4, 2, 16, 24))


@pytest.mark.parametrize("extra", cases.EXTRAS)
def test_extras(extra):
    cases.assert_agrees(SMALL, cases.window(100), (100, 100, 4, 2, 16), extras=(extra,))
