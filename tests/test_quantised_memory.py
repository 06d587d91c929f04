"""A quarter of ChatGLM-6B as int4 in a process with little memory."""

import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

import garrulax as gx
from garrulax.core import spec
from garrulax.core.codes import Form
from garrulax.core.quantised import Quantised
from garrulax.hub.quantised.parameters import sides
from garrulax.models import parameters
from garrulax.quantisation.planned import planned_bytes

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parent.parent
LAYERS = 7  # of 28
BESIDE = 3 << 28  # bytes: Python, JAX, its threads, compiling, and the cache
SERVE = """
import resource, sys
folder, dtype, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
import garrulax as gx
model = gx.load(folder, dtype=None if dtype == "codes" else dtype)
ids = [5, 6, 7, 130001, 130004]
print(gx.generate((model.params, model.config), ids, max_new_tokens=4, temperature=0.0, end_tokens=()).tokens)
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmData")][0])
"""


def random_codes(config):
    """Parameters of random int4 codes in groups of 128, and a table of int8; no float weight is made."""
    rng = np.random.default_rng(0)

    def one(s):
        if s.role == "vector":
            return np.ones(s.shape, np.float32) if s.init is spec.ones else np.zeros(s.shape, np.float32)
        table = s.role == "embedding"
        inner, outer = sides(s)
        inputs, outputs = np.prod(inner), np.prod(outer)
        form = Form("int", 8 if table else 4, int(inputs) if table else 128, inner, outer, not table)
        lead = (s.layers,) if s.layers else ()
        codes = rng.integers(0, 256, (*lead, outputs, inputs * form.bits // 8), np.uint8)
        scale = np.full((*lead, outputs, inputs // form.group), 1e-3, np.float32 if table else np.float16)
        return Quantised(codes.view(np.int8) if table else codes, scale, None, None, None, form)

    return spec.map_specs(one, parameters(config))


@pytest.mark.skipif(sys.platform != "linux", reason="Linux limits the data of a process")
def test_a_quarter_of_chatglm_6b_runs_in_little_memory(tmp_path):
    """The control is the same folder as bfloat16, which the same limit stops; its codes are half of the limit."""
    config = gx.preset("chatglm-6b", layers=LAYERS)
    params = random_codes(config)
    codes = sum(x.nbytes for x in jax.tree.leaves(params))
    assert codes == planned_bytes(config, "int4") < 1.25 * 2**30
    gx.save(gx.Model(config, params), tmp_path / "a", quantised="garrulax")
    del params
    limit = codes + BESIDE
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "OPENBLAS_NUM_THREADS": "1"}

    def serve(dtype):
        command = [sys.executable, "-c", SERVE, str(tmp_path / "a"), dtype, str(limit)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    done = serve("codes")
    assert done.returncode == 0, done.stderr[-2000:]
    tokens, used = done.stdout.splitlines()[-2:]
    assert len(tokens.split(",")) == 4
    assert int(used) * 1024 < limit
    stopped = serve("bfloat16")
    assert stopped.returncode != 0
    assert re.search("(?i)MemoryError|bad_alloc|RESOURCE_EXHAUSTED|allocate|out of memory", stopped.stderr), (
        stopped.stderr
    )
