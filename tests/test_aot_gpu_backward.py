"""The backward kernels for Hopper compiled ahead of time: `make aot-gpu`."""

import pytest
from test_aot_gpu import SHARED_MEMORY, _gpu_compiler, compiled  # noqa: F401  (the fixture skips without a compiler)

pytestmark = pytest.mark.slow

REQUESTS = {
    **{f"width {width}": {"width": width, "mask": "causal"} for width in (64, 80, 96, 128, 256)},
    "values of another width": {"width": 192, "value_width": 128, "mask": "causal"},
    "float16": {"width": 128, "mask": "causal", "dtype": "float16"},
    "all pairs": {"width": 128, "mask": "everything"},
    **{f"window of packed documents, {width}": {"width": width, "mask": "window"} for width in (64, 128, 256)},
    "five streams": {"width": 256, "mask": "bigbird"},
    "a rule that is inverted": {"width": 64, "mask": "outside"},
    **{f"ALiBi, {width}": {"width": width, "mask": "causal", "alibi": True} for width in (64, 128, 256)},
    **{f"softcap, {width}": {"width": width, "mask": "window", "softcap": 50.0} for width in (64, 128, 256)},
}


@pytest.mark.parametrize("name", REQUESTS)
def test_backward_on_hopper(name):
    kernels = compiled("h100", gradients=True, **REQUESTS[name])
    for side in ("keys", "queries"):
        kernel = kernels[f"attention_backward_{side}"]
        assert kernel["spilled_bytes"] == 0
        assert not kernel["serialized"]
        assert kernel["shared_bytes"] <= SHARED_MEMORY
        assert kernel["matrix_instructions"] > 0
