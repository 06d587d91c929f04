import dataclasses
import os
import signal
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
import training

from garrulax.train import loop, metrics, settings
from garrulax.train.interrupts import Interrupts

pytestmark = pytest.mark.usefixtures("quick_compilation", "shared_steps")
CAUSAL = ["dropout=true", "accumulation=2"]
INFILL = ["dropout=true", "accumulation=2", "optimizer=adamw"]


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    """Folder, result and printed text of a run that nothing interrupts."""
    folder, finished = tmp_path_factory.mktemp("causal") / "run", []
    result, printed = training.train(folder, CAUSAL, on_finish=finished.append)
    assert finished == [result]
    return folder, result, printed


def assert_same(a, b):
    assert a.step == b.step
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
    assert a.evaluation == b.evaluation


def with_batches(run, change):
    """The run with `change(step, batch)` in the way of its batches."""
    data = dataclasses.replace(run.data, batch_at=lambda step: change(step, run.data.batch_at(step)))
    return dataclasses.replace(run, data=data)


def test_what_a_run_leaves_behind(causal):
    folder, result, printed = causal
    assert result.finished
    assert result.step == 6
    assert sorted(os.listdir(folder)) == [
        "checkpoints", "environment.json", "events", "lock", "loss.png", "metrics.jsonl", "run.json", "spare",
    ]  # fmt: skip
    assert result.picture == folder / "loss.png"
    records = metrics.read_metrics(folder)
    assert [r["step"] for r in records if "valid_loss" in r] == [3, 6]
    assert [r["step"] for r in records if "loss" in r][-1] == 6
    last = records[-1]
    assert last["valid_loss"] == result.evaluation.loss
    tokens = result.evaluation.tokens
    assert tokens == len(training.TEXT.valid) - 1
    bits = result.evaluation.loss * tokens / np.log(2)
    assert last["bits_per_byte"] == pytest.approx(bits / training.TEXT.valid.bytes, rel=1e-6)
    assert f"held-out loss {result.evaluation.loss:.4f}" in printed
    assert settings.read_run_file(folder) == (
        training.make(folder, CAUSAL).settings,
        training.make(folder, CAUSAL).config,
    )
    assert result.evaluation.loss < 5.3 < records[0]["loss"]  # ln 264 is 5.58
    with pytest.raises(FileExistsError, match="holds a run of 6 steps"):
        training.train(folder, CAUSAL)


def test_going_on_after_ctrl_c_is_exact(tmp_path):
    """Blank infilling; stopped in the fourth step, which is finished and saved."""
    run = training.make(tmp_path / "run", INFILL, training.GLM)

    def interrupt(step, batch):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return batch

    stopped = loop.train(with_batches(run, interrupt))
    assert (stopped.finished, stopped.step, stopped.evaluation) == (False, 4, None)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    result, printed = training.train(tmp_path / "run", INFILL, training.GLM, resume=True)
    assert "resumed" in printed
    assert_same(result, training.train(tmp_path / "straight", INFILL, training.GLM)[0])


KILLED = """
import os, signal, sys
import training
from garrulax.train import loop
from test_train_loop import CAUSAL, with_batches
def change(step, batch):
    if step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return batch
loop.train(with_batches(training.make(sys.argv[1], CAUSAL), change))
"""


def test_going_on_after_kill_9_is_exact(causal, tmp_path):
    """Causal; killed before the sixth step, when the checkpoint of the fourth may or may not be complete. That of the
    third, which is evaluated, is."""
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    same = {"PYTHONPATH": path, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # as this process compiles
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "run")], env={**os.environ, **same})
    assert killed.returncode == -signal.SIGKILL
    result, printed = training.train(tmp_path / "run", CAUSAL, resume=True)
    assert "at step 3" in printed or "at step 4" in printed
    folder, expected, _ = causal
    assert_same(result, expected)
    # No step is recorded twice, though the killed run had gone further than its checkpoint.
    steps = [r["step"] for r in metrics.read_metrics(tmp_path / "run") if "valid_loss" in r]
    assert steps == [r["step"] for r in metrics.read_metrics(folder) if "valid_loss" in r]


def test_an_export_that_was_cut_short_is_made_again(tmp_path):
    words, made = ["export_every=2", "sample_every=2", "steps=4", "eval_every=4"], []

    def export(params, step):
        if step == 2 and not made:
            made.append("cut short")
            raise KeyboardInterrupt
        made.append(step)

    run = training.make(tmp_path / "run", words)
    run = dataclasses.replace(run, export=export, write_samples=lambda params: made.append("sample") or [("a", "b")])
    with pytest.raises(KeyboardInterrupt):
        loop.train(run)
    loop.train(run, resume=True)
    assert made == ["cut short", 2, "sample", 4, "sample"]


def test_a_loss_that_is_not_finite_stops_the_run(causal, tmp_path):
    run = training.make(tmp_path / "run", CAUSAL)

    def spoil(step, batch):
        return {**batch, "weights": batch["weights"] * (np.nan if step == 3 else 1)}

    with pytest.raises(loop.Diverged, match=r"step 4: loss nan.*the checkpoint of step 3 is intact"):
        loop.train(with_batches(run, spoil))
    result, _ = training.train(tmp_path / "run", CAUSAL, resume=True)
    assert_same(result, causal[1])


def test_settings_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match="window=40 is longer than the model's context=32"):
        training.make(tmp_path, ["window=40"])
    with pytest.raises(ValueError, match="the tokenizer has 264 ids, the model's vocab is 100"):
        training.make(tmp_path, ["model.vocab=100"])
    with pytest.raises(ValueError, match="micro-batches of 4 rows cannot be shared by 8 devices"):
        training.train(tmp_path, ["accumulation=2", "mesh=fsdp=8"])
    with pytest.raises(FileNotFoundError, match="not the folder of a run"):
        training.train(tmp_path, resume=True)


def test_second_ctrl_c_aborts_and_sigterm_does_not():
    with Interrupts() as interrupts:
        assert not interrupts.stop_after(1)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.stop_after(2)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_in_another_thread_signals_are_left_alone():
    before, seen = signal.getsignal(signal.SIGINT), []

    def work():
        with Interrupts() as interrupts:
            seen.append((signal.getsignal(signal.SIGINT), interrupts.stop_after(1)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, False)]
