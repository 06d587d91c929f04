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

TEXT = "".join(f"def f{i}(x):\n    return x * {i} + {i * 7 % 13}\n\n" for i in range(400))
SIZES = ("model.width=32", "model.layers=2", "model.heads=4", "window=32", "batch=8", "tokenizer=bytes", "eval_every=2")
COMMAND = [sys.executable, "-c", "import sys; from garrulax.cli import main; sys.exit(main())"]


def start(folder, run, *words, devices=2):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "GARRULAX_CACHE": str(folder / "cache")}
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    words = (
        ["train", *words]
        if "--resume" in words
        else ["train", "gpt2-tiny", *SIZES, f"corpus={folder / 'text'}", *words]
    )
    place = [] if "--resume" in words else ["--run", str(folder / run)]
    return subprocess.Popen([*COMMAND, *words, *place], env=environment, text=True, stderr=subprocess.PIPE)


def finish(process):
    _, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    return error


def held_out(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["valid_loss"] for row in rows if "valid_loss" in row}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "code.py").write_text(TEXT)
    return tmp_path


def test_two_processes_train_save_and_resume_elsewhere(folder):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    meeting = [f"--distributed=127.0.0.1:{port},2,{i}" for i in range(2)]
    pair = [start(folder, "pair", "--mesh=fsdp=4", "steps=4", "checkpoint_every=2", m) for m in meeting]
    errors = [finish(p) for p in pair]
    assert re.search(r"held-out loss", errors[0])
    assert not errors[1].strip()  # only the first process speaks

    finish(start(folder, "alone", "--mesh=fsdp=2,tensor=2", "steps=4", devices=4))
    together, alone = held_out(folder / "pair"), held_out(folder / "alone")
    assert together.keys() == alone.keys() == {2, 4}
    assert max(abs(together[i] - alone[i]) for i in alone) < 1e-4
    ours, theirs = (load_file(folder / run / "model" / "model.safetensors") for run in ("pair", "alone"))
    assert max(np.abs(ours[k] - theirs[k]).max() for k in ours) < 2e-3

    finish(start(folder, "pair", "--resume", str(folder / "pair"), "steps=6", "mesh="))
    assert held_out(folder / "pair").keys() == {2, 4, 6}
