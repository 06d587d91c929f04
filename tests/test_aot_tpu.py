"""The TPU's kernels compiled ahead of time by libtpu for chips that are not there: they fit into VMEM, allocate nothing
that grows with T x T, and take few bundles a block. Static predictions, not measurements: a bundle is a cycle only
where nothing waits for memory."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tpu_compiler import NEEDS_LIBTPU

pytestmark = NEEDS_LIBTPU

ROOT = Path(__file__).parent.parent
BLOCK = 1024 * 1024  # pairs of queries (of all heads of a group) and keys in a block of the default size
RATE = {"v5e": 65536, "v5p": 65536, "v6e": 262144, "tpu7x": 262144}  # products a cycle at the published peak


@functools.cache
def compiled(chip, case, direction):
    """What aot/compile_tpu.py prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "aot" / "compile_tpu.py"), chip, case, direction]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def share(chip, products, width, bundles):
    """Of the published peak, by the bundles that a block takes."""
    return products * BLOCK * width / RATE[chip] / bundles


def hot(chip, case, direction, kernel="attention_forward"):
    return compiled(chip, case, direction)["kernels"][kernel]["hot"]


def assert_no_square(result):
    """Temporaries stay below the float32 scores of one head."""
    assert result["temporary"] < 4 * result["length"] ** 2


@pytest.mark.parametrize(
    ("chip", "least"),
    [
        ("v5p", 0.78),
        pytest.param("v6e", 0.35, marks=pytest.mark.slow),
        pytest.param("v5e", 0.7, marks=pytest.mark.slow),
        pytest.param("tpu7x", 0.35, marks=pytest.mark.slow),
    ],
)
def test_forward(chip, least):
    """Share of the peak on blocks in which everybody attends."""
    assert share(chip, 2, 128, hot(chip, "full128", "forward")) >= least


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5p", "v5e", "v6e", "tpu7x"])
def test_partial_blocks(chip):
    """A block with a mask is not much slower: windows and packed rows have nothing but such blocks, where causal rows
    of 16 blocks have 120 whole ones to 16. The kernel for a mask has both bodies."""
    whole = hot(chip, "full128", "forward")
    both = compiled(chip, "causal128", "backward")["kernels"]["attention_forward"]
    partial = both["hot"] - both["pause"] - whole
    assert (120 * whole + 16 * partial) / 136 >= 0.85 * partial


@pytest.mark.slow
@pytest.mark.parametrize("chip", RATE)
def test_alibi(chip):
    assert hot(chip, "alibi128", "forward") <= 1.1 * hot(chip, "causal128", "forward")


@pytest.mark.parametrize(
    ("chip", "case", "width", "least"),
    [
        pytest.param("v5p", "causal128", 128, 0.75, marks=pytest.mark.slow),
        pytest.param("v6e", "causal256", 256, 0.55, marks=pytest.mark.slow),
        *(pytest.param(chip, "causal128", 128, 0.4, marks=pytest.mark.slow) for chip in ("v5e", "v6e", "tpu7x")),
        *(pytest.param(chip, "causal64", 64, 0.2, marks=pytest.mark.slow) for chip in RATE),
        *(pytest.param(chip, "causal256", 256, 0.4, marks=pytest.mark.slow) for chip in ("v5e", "v5p", "tpu7x")),
    ],
)
def test_forward_and_backward(chip, case, width, least):
    """Both compile, without a T x T array; the backward pass takes its share of the peak in both bodies together."""
    result = compiled(chip, case, "backward")
    assert_no_square(result)
    assert share(chip, 2 * 5, width, result["kernels"]["attention_backward"]["hot"]) >= least


@pytest.mark.slow
@pytest.mark.parametrize("chip", RATE)
@pytest.mark.parametrize(
    "case", ["relative128", "key_bias128", "dropout128", "softcap128", "float32", "float32_256", "float16", "long128"]
)
def test_what_else_compiles(chip, case):
    assert_no_square(compiled(chip, case, "backward"))


@pytest.mark.slow
@pytest.mark.parametrize("chip", RATE)
@pytest.mark.parametrize("case", ["bias128", "causal80", "multiquery64"])
def test_short_texts_compile(chip, case):
    assert "attention_backward" in compiled(chip, case, "backward")["kernels"]


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v4", *RATE])
@pytest.mark.parametrize("case", ["shared128", "shared256"])
def test_many_query_heads_of_one_key_head_compile(chip, case):
    """The gradients of keys and values take several spans; v4 has 16 MiB of VMEM."""
    assert "attention_backward" in compiled(chip, case, "backward")["kernels"]
