"""Two and four real processes over loopback train and save together; another number of them goes on from there."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from garrulax.cli import _parse, main
from garrulax.train import digests
from garrulax.train.checkpoint import saved_steps

pytestmark = pytest.mark.usefixtures("quick_compilation")
TEXT = "".join(f"def f{i}(x):\n    return x * {i} + {i * 7 % 13}\n\n" for i in range(400))
SIZES = ("model.width=32", "model.layers=1", "model.heads=4", "window=32", "batch=8", "tokenizer=bytes", "eval_every=2",
         "optimizer=adamw", "lr=0.003")  # fmt: skip
WRITING = ("sample_every=4", "sample_tokens=4", "sample_prompts=def f")
COMMAND = [sys.executable, "-c", "import sys; from garrulax.cli import main; sys.exit(main())"]


def train(folder, run, *words):
    """The words of a command that trains."""
    return ["train", "gpt2-tiny", *SIZES, f"corpus={folder / 'text'}", *words, "--run", str(folder / run)]


def start(words):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
    environment["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=2"
    return subprocess.Popen([*COMMAND, *words], env=environment, text=True, stderr=subprocess.PIPE)


def finish(process):
    _, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    return error


def samples(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["sample"] for row in rows if "sample" in row]


def held_out(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["valid_loss"] for row in rows if "valid_loss" in row}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("GARRULAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "code.py").write_text(TEXT)
    return tmp_path


def together(count, words, more=()):
    """Processes of one run, with the same words; and the last one with `more`."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    last = [*[[]] * (count - 1), more]
    return [start([*words, *own, f"--distributed=127.0.0.1:{port},{count},{i}"]) for i, own in enumerate(last)]


def pair_of(folder, *words):
    return together(2, train(folder, "pair", "--mesh=fsdp=4", *words))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "dies"), [(signal.SIGKILL, 1), (signal.SIGSTOP, 1), (signal.SIGKILL, 0)])
def test_a_process_that_dies_is_named_within_15_seconds(folder, number, dies):
    pair = pair_of(folder, "steps=100000", "checkpoint_every=10", "eval_every=1000000")
    try:
        while not (folder / "pair" / "checkpoints" / "20").is_dir():
            assert pair[0].poll() is None, pair[0].stderr.read()
            time.sleep(0.05)
        pair[dies].send_signal(number)
        begun = time.perf_counter()
        _, said = pair[1 - dies].communicate(timeout=60)
        assert time.perf_counter() - begun < 15
        assert pair[1 - dies].returncode == 75, said
        assert re.search(rf"process {dies} of 2 ended or cannot be reached; the checkpoint of step \d+ is intact", said)
        assert f"garrulax train --resume {folder / 'pair'}" in said
    finally:
        for process in pair:
            process.kill()
            process.communicate()
    for step in saved_steps(folder / "pair" / "checkpoints"):
        digests.check(folder / "pair" / "checkpoints" / str(step))


def test_two_processes_train_save_and_resume_elsewhere(folder):
    pair = pair_of(folder, "steps=4", "checkpoint_every=2")
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


@pytest.mark.slow
def test_processes_that_disagree_stop_before_they_compile(folder):
    pair = together(2, train(folder, "pair", "--mesh=fsdp=4", "steps=4"), ["batch=16", "lr=0.01"])
    for process in pair:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 2, said
        assert "the processes disagree on batch, lr: process 1 and process 0 have different values" in said
    assert not saved_steps(folder / "pair" / "checkpoints")


@pytest.mark.slow
def test_four_processes_train_as_one_and_two_go_on(folder):
    four = together(4, train(folder, "four", "--mesh=fsdp=4,tensor=2", "steps=4", "checkpoint_every=2", *WRITING))
    errors = [finish(p) for p in four]
    assert re.search(r"held-out loss", errors[0])
    assert not any(error.strip() for error in errors[1:])
    again = together(2, ["train", "--resume", str(folder / "four"), "--mesh=fsdp=2,tensor=2", "steps=6"])
    errors = [finish(p) for p in again]
    assert not errors[1].strip()

    assert main(train(folder, "alone", "steps=4", "mesh=", *WRITING)) == 0  # one process, one device
    assert main(["train", "--resume", str(folder / "alone"), "steps=6"]) == 0
    assert samples(folder / "four") == samples(folder / "alone")
    assert len(samples(folder / "four")) == 1
    found, alone = held_out(folder / "four"), held_out(folder / "alone")
    assert found.keys() == alone.keys() == {2, 4, 6}
    assert max(abs(found[i] - alone[i]) for i in alone) < 1e-4


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        (
            {"SETTINGS": "batch=64 steps=5"},
            {"settings": ["llama-7b", "corpus=/text", "batch=64", "steps=5"], "run": "/r"},
        ),
        ({"RESUME": "1"}, {"settings": [], "resume": "/r"}),
        ({"PEERS": "host:1,2,0"}, {"distributed": "host:1,2,0"}),
    ],
)
def test_launch_files_start_a_line_that_the_command_takes(tmp_path, variables, wanted):
    (tmp_path / "garrulax").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "garrulax").chmod(0o755)
    given = {"RUN": "/r", "MODEL": "llama-7b", "CORPUS": "/text", "MESH": "fsdp=2,tensor=8", **variables}
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **given}
    script = Path(__file__).parent.parent / "examples" / "pods" / "train.sh"
    done = subprocess.run(["sh", script], env=environment, text=True, capture_output=True, check=True)
    found = vars(_parse(done.stdout.splitlines()))
    assert found["mesh"] == "fsdp=2,tensor=8"
    assert found["distributed"] is not None
    assert {name: found[name] for name in wanted} == wanted
