"""The training step compiled for eight TPUs that are not there: what moves between them, and what is never gathered."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tpu_compiler import NEEDS_LIBTPU

pytestmark = [pytest.mark.slow, NEEDS_LIBTPU]
ROOT = Path(__file__).parent.parent
SMALL = 2**18  # bytes: norms, biases and sums, and what is known of tokens (ids, positions, masks)


@functools.cache
def compiled(axes, strategy, optimizer):
    """What aot/compile_step.py prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "aot" / "compile_step.py"), "v5e:2x4", axes, strategy, optimizer]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def of_kind(result, kind, *axes):
    """The collectives of a kind over these mesh axes, the small ones left out."""
    chosen = (c for c in result["collectives"] if c["kind"] == kind and set(c["axes"]) & set(axes))
    return [c for c in chosen if c["bytes"] > SMALL]


CASES = [
    ("fsdp=8", "fsdp", "adamw"),
    ("data=2,fsdp=4", "hsdp", "adamw"),
    ("fsdp=4,tensor=2", "fsdp+tp", "adamw"),
    ("fsdp=4,tensor=2", "fsdp+tp+sp", "muon"),
]


@pytest.mark.parametrize("case", CASES)
def test_parameters_are_gathered_and_gradients_reduced_one_by_one(case):
    result = compiled(*case)
    gathers = of_kind(result, "all-gather", "fsdp")
    assert gathers
    # The layers are gathered in loops, one parameter at a time, and in 16 bits: never the model.
    assert max(c["bytes"] for c in gathers) <= result["largest"] < result["model"] / 3
    assert sum(c["hidden"] for c in gathers) >= len(gathers) / 3  # beside products
    sums = of_kind(result, "all-reduce", "fsdp")
    if "tensor" in case[0]:
        assert sum(c["sent"] for c in of_kind(result, "reduce-scatter", "fsdp")) > 0
        assert not sums  # no device gets a whole gradient
    else:  # libtpu sums gradients of one layer, or of both tables, where a reduce-scatter would do: docs/parallel.md
        assert max(c["bytes"] for c in sums) <= 2.1 * result["largest"] < result["model"]


@pytest.mark.parametrize("case", CASES)
def test_the_state_is_donated(case):
    result = compiled(*case)
    assert result["donated"] >= result["arguments"] - 3 * 8 * 1024 * 4 - 4096  # all but the batch


def test_tensor_parallelism_sums_activations_and_sequence_parallelism_scatters_them():
    sums, scattered = (compiled("fsdp=4,tensor=2", s, o) for s, o in (("fsdp+tp", "adamw"), ("fsdp+tp+sp", "muon")))
    assert of_kind(sums, "all-reduce", "tensor")
    assert not of_kind(scattered, "all-reduce", "tensor")
    assert of_kind(scattered, "reduce-scatter", "tensor")
    assert of_kind(scattered, "all-gather", "tensor")


def test_muon_moves_its_matrices_once_there_and_once_back():
    result = compiled("fsdp=4,tensor=2", "fsdp+tp+sp", "muon")
    moved = sum(c["sent"] for c in result["collectives"] if c["kind"] == "all-to-all")
    # An eighth of them on each device, in 16 bits; 3/4 of that over fsdp and 1/2 over tensor, there and back; the six
    # matrices of the feed-forward layers are filled up to eight.
    assert 0 < moved <= 2 * (result["model"] / 8) * (3 / 4 + 1 / 2) * 8 / 6


def test_sampling_moves_neither_weights_nor_caches():
    """Each device multiplies its parts of the weights; a step sends activations and logits only."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "aot" / "compile_writing.py"), "v5e:2x4", "fsdp=4,tensor=2"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["largest"][0] <= result["logits"] < min(result["matrix"], result["keys"]), result
    assert result["temporary"] < result["keys"], result  # no copy of a cache
