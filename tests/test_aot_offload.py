"""Writing with keys and values in the memory of the host, compiled for a TPU that is not there: they stay there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tpu_compiler import NEEDS_LIBTPU

from garrulax.layers import host_memory

COMPILES = pytest.mark.skipif(not host_memory.COMPILES_FOR_TPUS, reason="XLA for TPUs compiles it before jax 0.12 only")
pytestmark = [pytest.mark.slow, NEEDS_LIBTPU, COMPILES]
ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("what", ["step", "prompt"])
def test_the_cache_is_updated_in_place_on_the_host(what):
    command = [sys.executable, str(ROOT / "tests" / "aot" / "compile_offload.py"), "v5e:2x2", what]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["argument"] == result["alias"] == result["cache"]
    assert result["on_host"] == 0  # no copy of it
    assert result["on_device"] < result["cache"] / 4  # less than the keys of one of two layers
