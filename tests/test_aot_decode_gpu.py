"""Decoding attention compiled ahead of time for an H100 that is not there: `make aot-gpu`. A process a program."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parent / "aot" / "compile_decode_gpu.py"
HALF = 233472 // 2 - 1024  # bytes of shared memory that a program has if two are to share a multiprocessor
REGISTERS = 65536 // 128  # that a thread has of a multiprocessor, where one program of 128 runs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _gpu_compiler():
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        pytest.skip("needs the CUDA build of jax: pip install 'jax[cuda13]'")


def compiled(**request):
    """The kernels of a request, by name."""
    command = [sys.executable, str(SCRIPT), "h100", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return {kernel.pop("kernel"): kernel for kernel in json.loads(done.stdout.splitlines()[-1])}


SHARING = {
    **{f"width {width}": {"width": width} for width in (64, 80, 96, 128)},
    "float16": {"width": 128, "dtype": "float16"},
    "int8": {"width": 128, "cache": "int8"},
    "fp8 in small pages": {"width": 128, "cache": "float8_e4m3fn", "page": 16},
    "pages": {"width": 128, "page": 64},
    "tree in small pages": {"width": 64, "drafts": 8, "page": 16, "mask": "tree"},
    "softcap, window, ALiBi": {"width": 128, "mask": "window", "softcap": 30.0, "alibi": True},
    "a rule with a not and an all": {"width": 64, "mask": "other"},
    "a length that is no multiple": {"width": 96, "length": 8200},
    "short": {"width": 128, "length": 256, "batch": 64},
    "short, int8": {"width": 128, "length": 256, "batch": 64, "cache": "int8"},
}
ALONE = {
    "width 256": {"width": 256},
    "width 256, int8": {"width": 256, "cache": "int8"},
    "values of another width": {"width": 192, "value_width": 128},
    "short, few": {"width": 128, "length": 256, "batch": 2, "kv_heads": 32},
}


@pytest.mark.parametrize("request_", SHARING.values(), ids=SHARING)
def test_two_programs_a_multiprocessor(request_):
    """Their rings hold 96 KiB at least, so that 64 KiB are on their way while each computes one block."""
    for kernel in compiled(**request_).values():
        assert kernel["spilled_bytes"] == 0
        assert not kernel["serialized"]
        assert kernel["shared_bytes"] <= HALF
        assert kernel["registers"] <= REGISTERS // 2


@pytest.mark.parametrize("request_", ALONE.values(), ids=ALONE)
def test_one_program_a_multiprocessor(request_):
    kernel = compiled(**request_)["decode_attention"]
    assert kernel["spilled_bytes"] <= (32 if "cache" in request_ else 0)  # a few words outside the products
    assert not kernel["serialized"]
    assert HALF < kernel["shared_bytes"] <= 2 * HALF
    assert kernel["matrix_instructions"] == request_["width"] // 16 + 4


@pytest.mark.parametrize("rows", [1, 8])
def test_a_step_launches_few_kernels(rows):
    """A layer adds 4 products with weights, which are read where they lie, and 9 kernels beside them."""
    command = [sys.executable, str(SCRIPT.with_name("compile_decode_step.py")), "h100", str(rows)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["layer"]["products"] == 4
    assert result["layer"]["kernels"] <= 13
    assert result["layer"]["copies"] == 0
    assert result["rest"]["conditionals"] <= 1  # the host waits for its decision
    assert result["rest"]["kernels"] <= 34
    assert result["temporary"] < 1 << 24
