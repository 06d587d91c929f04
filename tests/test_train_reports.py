"""Evaluation, progress, metrics and plots."""

import io
import json
import math
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from garrulax import models
from garrulax.train import batches, components, flops, metrics, plots, progress
from garrulax.train.evaluate import Evaluation, make_evaluate
from garrulax.train.settings import Settings
from garrulax.train.tokens import Tokens

pytestmark = pytest.mark.usefixtures("quick_compilation")


def constant_objective(params, batch, config, key, **options):
    """Half a nat for every token below 5, two nats for the others."""
    nll = jnp.where(batch["targets"] < 5, 0.5, 2.0) * batch["weights"]
    return nll.sum() / batch["weights"].sum(), {"tokens": batch["weights"].sum()}


def test_bits_per_byte_of_a_text():
    config = models.gpt.Config(vocab=10, context=4, width=4, layers=1, heads=1)
    ids = np.array([3, 9, 1, 1, 7, 2, 8, 8, 0, 4, 6], np.int32)  # predicted: 5 below 5, 5 above
    dataset = types.SimpleNamespace(
        train=Tokens([ids], 30, np.array([0, 11])),
        valid=Tokens([ids], 30, np.array([0, 11])),
        meta={"corpus": "c", "tokenizer": "t"},
    )
    data = components.causal(dataset, Settings(window=4, batch=2), 0)
    evaluate = make_evaluate(config, constant_objective)
    e = evaluate({"w": jnp.zeros(1)}, data.held_out())
    assert e.tokens == 10
    assert e.loss == pytest.approx(1.25)
    assert e.bits_per_byte == pytest.approx(12.5 / math.log(2) / 30)
    assert e.perplexity == pytest.approx(math.exp(1.25))
    part = evaluate({"w": jnp.zeros(1)}, data.held_out(), tokens=5)  # stops after the first batch of 8
    assert part.tokens == 8
    assert part.bytes == pytest.approx(24)


def test_unknown_bytes_give_no_bits():
    assert Evaluation(1.0, 5, 0.0).bits_per_byte is None
    assert Evaluation(1e6, 5, 0.0).perplexity == math.inf


def test_flops_of_gpt2():
    # 85.0 M matrix weights, 38.6 M of the output; 12 layers, 768 wide, 1024 tokens.
    matrices = 12 * 12 * 768**2 + 50257 * 768
    expected = 6 * matrices + 12 * 12 * 768 * 1024
    assert flops.train_flops_per_token(models.preset("gpt2"), 1024) == expected


@pytest.mark.parametrize(
    ("name", "changes", "keys"),
    [
        ("mistral-7b", {"window": 40}, 32 * 40),  # all 32 layers see 40 of 100 tokens
        ("mistral-7b", {"window": 4000}, 32 * 100),
        ("qwen2-7b", {"window": 30, "window_from": 8}, 8 * 100 + 20 * 30),
        ("gpt3-125m", {"band": 20, "band_stride": 8}, 6 * 100 + 6 * (20 + 10)),
    ],
)
def test_flops_leave_out_what_windows_do(name, changes, keys):
    c = models.preset(name, **changes)
    bare = flops.train_flops_per_token(c, 0)
    assert flops.train_flops_per_token(c, 100) - bare == 3 * 4 * c.width * keys


@pytest.mark.parametrize(
    ("kind", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("TPU v5 lite", 197e12), ("TPU v5", 459e12),
     ("NVIDIA A100-SXM4-80GB", 312e12), ("cpu", None)],
)  # fmt: skip
def test_peaks(kind, peak):
    assert flops.peak_flops(types.SimpleNamespace(device_kind=kind)) == peak


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_live_line_and_lines_that_stay():
    out = Terminal()
    p = progress.Progress(100, 1000, 10**6, 1e10, out)
    p.update(10, 2.5, 0.01, 0.5)
    p.say("hello")
    p.update(20, 2.0, 0.01, None)
    p.close()
    lines = out.getvalue().split("\r\x1b[K")
    assert lines[1] == "step 10/100  loss 2.5000  lr 1.0e-02  2 k tokens/s  2 GFLOP/s (MFU 20.0%)  0:45 left"
    assert lines[2:] == ["hello\n", "step 20/100  loss 2.0000  lr 1.0e-02\n"]


def test_plain_lines_are_few():
    out = io.StringIO()
    p = progress.Progress(100, 1000, 10**6, None, out)
    for step in range(1, 50):
        p.update(step, 2.5, 0.01, 0.5)
    assert out.getvalue() == "step 1/100  loss 2.5000  lr 1.0e-02  2 k tokens/s  2 GFLOP/s  0:50 left\n"


def test_numbers_for_people():
    assert [progress.si(v) for v in (3, 4567, 1.5e12, 999e6)] == ["3 ", "4.57 k", "1.5 T", "999 M"]
    assert [progress.duration(s) for s in (5, 754, 10921)] == ["0:05", "12:34", "3:02:01"]


def test_speed_counts_training_only(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def after(seconds):
        clock[0] += seconds

    speed = progress.StepTimer()
    after(100)  # compilation
    speed.begin(1)
    after(4)
    speed.stop()
    after(50)  # evaluation
    speed.start()
    after(2)
    assert speed.lap(4) == pytest.approx(2.0)
    assert speed.lap(4) is None
    after(8)
    assert speed.lap(6) == pytest.approx(4.0)
    assert speed.per_step == pytest.approx(0.8 * 2 + 0.2 * 4)


def test_metrics_are_appended_and_cut_at_the_step_of_a_resume(tmp_path):
    with metrics.MetricsLog(tmp_path) as log:
        for step in range(1, 6):
            log.write(step, {"loss": 1 / step, "bits_per_byte": None})
    (tmp_path / metrics.NAME).open("a").write('{"step": 6, "lo')  # killed in the middle of a line
    with metrics.MetricsLog(tmp_path, 3) as log:
        log.write(4, {"loss": 9.0})
    assert [(r["step"], r["loss"]) for r in metrics.read_metrics(tmp_path)] == [
        (1, 1.0),
        (2, 0.5),
        (3, 1 / 3),
        (4, 9.0),
    ]
    assert all("bits_per_byte" not in r for r in metrics.read_metrics(tmp_path))
    assert list((tmp_path / "events").iterdir())


def test_without_tensorboard_the_log_says_so(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    said = []
    with metrics.MetricsLog(tmp_path, say=said.append) as log:
        log.write(1, {"loss": 1.0})
    assert "pip install 'garrulax[plots]'" in said[0]
    assert len(metrics.read_metrics(tmp_path)) == 1


def test_smoothing_of_a_constant_is_the_constant():
    np.testing.assert_allclose(plots.smooth(np.full(100, 3.0)), 3.0)
    np.testing.assert_allclose(plots.smooth(np.arange(100.0))[20:80], np.arange(100.0)[20:80], rtol=1e-5)  # no lag
    noisy = np.random.default_rng(0).normal(size=2000)
    assert plots.smooth(noisy)[100:].std() < 0.3


def test_nothing_to_draw(tmp_path):
    (tmp_path / metrics.NAME).write_text("")
    assert plots.draw(tmp_path, "empty") is None


def test_picture_of_a_run_without_bits(tmp_path):
    (tmp_path / metrics.NAME).write_text(json.dumps({"step": 1, "loss": 2.0}) + "\n")
    assert plots.draw(tmp_path, "one").read_bytes().startswith(b"\x89PNG")


def test_rows_of_a_batch_are_cut_into_micro_batches():
    b = {"tokens": np.arange(24).reshape(6, 4)}
    got = batches.on_devices(b, None, 3)["tokens"]
    np.testing.assert_array_equal(got, b["tokens"].reshape(3, 2, 4))
    assert isinstance(got, jax.Array)
