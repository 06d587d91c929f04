"""DPO and SFT steps have the losses of TRL's trainers, step after step: same model, rows and optimizer, float32."""

import pathlib
import sys

import pytest

pytest.importorskip("torch", reason="`make parity` installs torch and transformers")
pytest.importorskip("trl", reason="`pip install trl` beside what `make parity` installs")
import numpy as np

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))
import align_trl  # noqa: E402
from measuring import measure  # noqa: E402


@pytest.mark.parametrize("method", ["dpo", "sft"])
def test_losses_of_trl(method, tmp_path):
    align_trl.write(tmp_path, {**align_trl.SIZES["tiny"], "steps": 8})
    ours = align_trl.ours(tmp_path, method)["losses"]
    command = [sys.executable, str(align_trl.PEER), str(tmp_path), method, str(align_trl.RATE), str(align_trl.DECAY)]
    theirs = measure(command)["losses"]
    assert len(ours) == len(theirs) == 8
    assert np.ptp(theirs) > 1e-2, "the losses of different batches differ"
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
