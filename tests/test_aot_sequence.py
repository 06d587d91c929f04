"""Context parallelism compiled for TPUs that are not there: the way that is chosen is the cheaper one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from tpu_compiler import NEEDS_LIBTPU

from garrulax.kernels.call import Operands, Options
from garrulax.kernels.mask import All
from garrulax.kernels.sequence import MOST_GATHERED, choose_strategy

pytestmark = [pytest.mark.slow, NEEDS_LIBTPU]
ROOT = Path(__file__).parent.parent
#: Query heads, key/value heads, their width, and tokens of the whole text.
SHAPES = {
    "data=2,sequence=4": [(32, 32, 128, 4096), (32, 32, 128, 16384)],
    "sequence=8": [(32, 1, 128, 32768), (32, 8, 128, 32768), (32, 32, 128, 32768)],
}


@pytest.mark.parametrize("axes", SHAPES)
def test_the_chosen_way_is_the_cheaper_one_of_both_as_compiled(axes):
    """It takes less time; the ring is chosen where gathering would take `MOST_GATHERED` more bytes than it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "aot" / "compile_sequence.py"), "v5e:2x4", axes]
    command += [",".join(map(str, shape)) for shape in SHAPES[axes]]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    found = {(tuple(line["shape"]), line["way"]): line for line in lines}
    parts, chosen = int(axes[-1]), set()
    for shape in SHAPES[axes]:
        gather, ring = found[shape, "gather"], found[shape, "ring"]
        affordable = gather["temporary"] - ring["temporary"] <= MOST_GATHERED
        faster = gather["seconds"] <= ring["seconds"]
        H, K, C, T = shape
        arrays = (jax.ShapeDtypeStruct((1, T // parts, n, C), jnp.bfloat16) for n in (H, K, K))
        way = choose_strategy(Options(All(), 1.0), Operands(*arrays, {}, {}), parts)
        assert way == ("gather" if faster and affordable else "ring"), (gather, ring)
        assert ring["exposed"] < 0.05 * ring["seconds"], ring  # keys arrive beside the computation
        chosen.add(way)
    assert chosen == ({"gather"} if parts == 4 else {"gather", "ring"})
