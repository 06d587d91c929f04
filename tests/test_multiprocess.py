"""Two real processes over loopback train and save together; one process on another mesh goes on from there."""

import json
import os
import re
import socket
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from garrulax.cli import main

pytestmark = pytest.mark.usefixtures("quick_compilation")
TEXT = "".join(f"def f{i}(x):\n    return x * {i} + {i * 7 % 13}\n\n" for i in range(400))
SIZES = ("model.width=32", "model.layers=1", "model.heads=4", "window=32", "batch=8", "tokenizer=bytes", "eval_every=2",
         "optimizer=adamw", "lr=0.003")  # fmt: skip
COMMAND = [sys.executable, "-c", "import sys; from garrulax.cli import main; sys.exit(main())"]


def train(folder, run, *words):
    """The words of a command that trains."""
    return ["train", "gpt2-tiny", *SIZES, f"corpus={folder / 'text'}", *words, "--run", str(folder / run)]


def start(words):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    return subprocess.Popen([*COMMAND, *words], env=environment, text=True, stderr=subprocess.PIPE)


def finish(process):
    _, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    return error


def held_out(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["valid_loss"] for row in rows if "valid_loss" in row}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("GARRULAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "code.py").write_text(TEXT)
    return tmp_path


def test_two_processes_train_save_and_resume_elsewhere(folder):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    meeting = [f"--distributed=127.0.0.1:{port},2,{i}" for i in range(2)]
    pair = [start(train(folder, "pair", "--mesh=fsdp=4", "steps=4", "checkpoint_every=2", m)) for m in meeting]
    errors = [finish(p) for p in pair]
    assert re.search(r"held-out loss", errors[0])
    assert not errors[1].strip()  # only the first process speaks

    assert main(train(folder, "alone", "--mesh=fsdp=4,tensor=2", "steps=4")) == 0  # this process has eight devices
    together, alone = held_out(folder / "pair"), held_out(folder / "alone")
    assert together.keys() == alone.keys() == {2, 4}
    assert max(abs(together[i] - alone[i]) for i in alone) < 1e-4
    ours, theirs = (load_file(folder / run / "model" / "model.safetensors") for run in ("pair", "alone"))
    assert max(np.abs(ours[k] - theirs[k]).max() for k in ours) < 2e-3

    assert main(["train", "--resume", str(folder / "pair"), "steps=6", "mesh="]) == 0
    assert held_out(folder / "pair").keys() == {2, 4, 6}
