"""The GPU kernels compiled ahead of time for GPUs that are not there: `make aot-gpu`. A process a program."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parent / "aot" / "compile_gpu.py"
SHARED_MEMORY = 232448  # bytes that a program may have on sm_90 and sm_100
TENSOR_COLUMNS = 512  # of the tensor memory of sm_100

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _gpu_compiler():
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        pytest.skip("needs the CUDA build of jax: pip install 'jax[cuda13]'")


def compiled(target, **request):
    """The kernels of a request, by name."""
    command = [sys.executable, str(SCRIPT), target, json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return {kernel.pop("kernel"): kernel for kernel in json.loads(done.stdout.splitlines()[-1])}


REQUESTS = {
    **{f"width {width}": {"width": width, "mask": "causal"} for width in (64, 80, 96, 128, 256)},
    "values of another width": {"width": 192, "value_width": 128, "mask": "causal"},
    "float16": {"width": 128, "mask": "causal", "dtype": "float16"},
    "three warpgroups": {"width": 64, "mask": "everything", "length": 16384},
    "all pairs": {"width": 128, "mask": "everything"},
    "window of packed documents": {"width": 128, "mask": "window"},
    "three streams": {"width": 128, "mask": "banded_and_strided"},
    "ALiBi": {"width": 128, "mask": "causal", "alibi": True},
    "relative positions": {"width": 64, "mask": "bidirectional", "relative": True},
    "bias": {"width": 128, "mask": "causal", "bias": True, "length": 512},
    "softcap": {"width": 256, "mask": "window", "softcap": 50.0},
    "dropout": {"width": 64, "mask": "packed", "dropout": 0.1},
}


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_forward_on_hopper(request_):
    kernel = compiled("h100", **request_)["attention_forward"]
    assert kernel["spilled_bytes"] == 0
    assert not kernel["serialized"]
    assert kernel["shared_bytes"] <= SHARED_MEMORY
    assert kernel["matrix_instructions"] > 0


def test_long_causal_rows_of_narrow_heads_on_hopper():
    """Three warpgroups have 160 registers a thread. Some spill, and it is still faster than two."""
    kernel = compiled("h100", width=64, mask="causal", known_causal=True, length=16384)["attention_forward"]
    assert kernel["registers"] == 128
    assert kernel["spilled_bytes"] <= 80


ON_BLACKWELL = {
    **{f"width {width}": {"width": width, "mask": "causal"} for width in (64, 128)},
    "values of another width, float16": {"width": 64, "value_width": 128, "mask": "window", "dtype": "float16"},
    **{name: REQUESTS[name] for name in ("all pairs", "three streams", "ALiBi", "dropout")},
    "softcap": {"width": 128, "mask": "window", "softcap": 50.0},
}


@pytest.mark.parametrize("request_", ON_BLACKWELL.values(), ids=ON_BLACKWELL)
def test_forward_on_blackwell(request_):
    """Products: of 16 columns or keys an instruction; two tiles of scores before the first block, two of both in it."""
    kernel = compiled("b200", **request_)["attention_forward"]
    assert kernel["spilled_bytes"] == 0
    assert not kernel["serialized"]
    assert kernel["shared_bytes"] <= SHARED_MEMORY
    assert kernel["tensor_columns"] <= TENSOR_COLUMNS
    assert kernel["matrix_instructions"] == 2 * (8 + 2 * request_["width"] // 16)
