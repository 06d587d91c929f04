"""Runs whose process dies, whose files are damaged, whose disk is full: nothing is lost, nothing wrong is believed."""

import argparse
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training

from garrulax.cli import starting
from garrulax.hub.tokenizers import GLM_SPECIALS, ByteTokenizer, load_tokenizer
from garrulax.train import digests, environment, events, interrupts, lock, loop, metrics, progress, settings, spare
from garrulax.train.checkpoint import Checkpoints
from garrulax.train.continuing import changed
from garrulax.train.digests import DamagedError
from garrulax.train.settings import Settings
from garrulax.train.state import TrainState

pytestmark = pytest.mark.usefixtures("quick_compilation", "shared_steps")
STEPS = ["eval_every=100", "eval_tokens=64", "keep=9"]
IDENTITY = {"config": {}, "settings": {}, "data": {}}


def flip(path, place=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 4
    path.write_bytes(content)


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run of six steps with a checkpoint after each two, and its result."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, training.train(folder, STEPS)[0]


@pytest.fixture
def run(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    return tmp_path / "run"


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_a_damaged_checkpoint_is_named_and_an_earlier_one_used(whole, run):
    flip(largest(run / "checkpoints" / "6"))  # the arrays, which Orbax reads without a checksum
    os.truncate(run / "checkpoints" / "4" / "_CHECKPOINT_METADATA", 100)
    result, said = training.train(run, STEPS, resume=True)
    assert "the checkpoint of step 6 is damaged: " in said
    assert "has other bytes than were written; going on from step 2 (6.damaged has it)" in said
    assert "4/_CHECKPOINT_METADATA has 100 bytes instead of" in said
    assert "at step 2" in said
    same(result, whole[1])
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["2", "4", "6"]


def test_every_flip_of_a_checkpoint_is_found(tmp_path):
    state = TrainState(jnp.int32(1), {"w": jnp.arange(300.0)}, (), jax.random.key(7))
    with Checkpoints(tmp_path, IDENTITY) as saves:
        saves.save(state, 1)
    files = [p for p in sorted((tmp_path / "1").rglob("*")) if p.is_file()]
    assert len(files) > 6
    for file in files:
        content = file.read_bytes()
        for place in range(0, len(content), max(1, len(content) // 3)):
            flip(file, place)
            with Checkpoints(tmp_path, IDENTITY) as saves, pytest.raises(DamagedError, match=f"step 1 .*{file.name}"):
                saves.restore(state)
            file.write_bytes(content)
        file.unlink()
        with Checkpoints(tmp_path, IDENTITY) as saves, pytest.raises(DamagedError, match=f"{file.name} is missing"):
            saves.restore(state)
        file.write_bytes(content)
    with Checkpoints(tmp_path, IDENTITY) as saves:
        np.testing.assert_array_equal(saves.restore(state).params["w"], state.params["w"])


def test_a_digest_changes_with_every_kind_of_damage(tmp_path):
    content = np.random.default_rng(0).integers(0, 256, 5 * 2**19 + 77, dtype=np.uint8)  # two matrices and a half
    content[: 2**20] = 7  # pages that are alike

    def digest(changed):
        (tmp_path / "file").write_bytes(changed.tobytes())
        return digests.of_files(tmp_path, ["file"])[0]

    found = {digest(content)}
    for place in (0, 4095, 2**20 - 1, 2**20, 2**21 - 1, 2**21, len(content) - 1):
        for bit in (0, 7):
            changed = content.copy()
            changed[place] ^= 1 << bit
            found.add(digest(changed))
    lost = content.copy()
    lost[:8192] = 0
    found |= {digest(lost), digest(content[:-1]), digest(np.roll(content, 8))}
    for size, distance in ((4096, 2), (4096, 128), (512, 3), (8, 1), (2**16, 1), (2**19, 1)):  # pages, sectors, words
        swapped, first, second = content.copy(), slice(2**20, 2**20 + size), 2**20 + size * distance
        second = slice(second, second + size)
        swapped[first], swapped[second] = content[second], content[first]
        found.add(digest(swapped))
    assert len(found) == 1 + 14 + 3 + 6


def test_digests_of_another_version_are_no_damage(run):
    for file in (run / "checkpoints").rglob(digests.NAME):
        record = digests.read_sealed(file)
        file.write_text(digests.sealed(record | {"digests": 1}))
    with pytest.raises(ValueError, match=r"digests\.json was written by another version of garrulax") as found:
        training.train(run, STEPS, resume=True)
    assert not isinstance(found.value, DamagedError)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["2", "4", "6"]


def test_parameters_alone_in_another_dtype(tmp_path):
    state = TrainState(jnp.int32(1), {"w": jnp.arange(300.0)}, {"m": jnp.ones(3)}, jax.random.key(7))
    with Checkpoints(tmp_path, IDENTITY) as saves:
        saves.save(state, 1)
        saves.wait()
        target = {"w": jax.ShapeDtypeStruct((300,), "bfloat16")}
        got = saves.restore_params(target)
        whole = saves.restore(replace(state, params=target))
    assert set(got) == {"w"}
    for w in (got["w"], whole.params["w"]):
        np.testing.assert_array_equal(w, state.params["w"].astype("bfloat16"))


def test_one_checkpoint_for_every_so_many_minutes_is_kept(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.time", lambda: now[0])
    state = TrainState(jnp.int32(1), {"w": jnp.zeros(2)}, (), jax.random.key(7))
    with Checkpoints(tmp_path, IDENTITY, keep=1, keep_minutes=2) as saves:
        for step in range(1, 7):
            saves.save(state, step)
            saves.wait()
            now[0] += 50
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == [1, 4, 6]  # at 0, 150 and 250 seconds


def test_a_run_without_a_whole_checkpoint_begins_again(whole, run):
    shutil.rmtree(run / "checkpoints")
    result, said = training.train(run, STEPS, resume=True)
    assert "has no whole checkpoint: it begins at step 0" in said
    same(result, whole[1])
    assert [r["loss"] for r in metrics.read_metrics(run) if "loss" in r] == [
        r["loss"] for r in metrics.read_metrics(whole[0]) if "loss" in r
    ]


def test_a_tuned_run_without_a_checkpoint_begins_with_its_weights_again(run):
    s, config = settings.read_run_file(run)
    ByteTokenizer(GLM_SPECIALS).save(run / "tokenizer")
    data = {"corpus": "abc", "tokenizer": load_tokenizer(run / "tokenizer").fingerprint}
    for preset, loaded in (("gpt2", False), ("/models/mine", True)):
        settings.write_run_file(run, replace(s, preset=preset), config, data)
        begun = starting.start(argparse.Namespace(resume=str(run), settings=[], mesh=None, lora=None, new_data=False))
        assert (begun.params is not None) == begun.loaded == loaded
    settings.write_run_file(run, s, config, {**data, "tokenizer": "another"})
    with pytest.raises(DamagedError, match="not the one that the run began with"):
        starting.start(argparse.Namespace(resume=str(run), settings=[], mesh=None, lora=None, new_data=False))


def test_run_json_is_replaced_at_once_and_only_if_it_changed(whole, run, monkeypatch):
    config = training.make(run).config
    s = settings.read_run_file(run)[0]
    data = settings.read_record(run)["data"]
    inode = (run / "run.json").stat().st_ino
    settings.write_run_file(run, s, config, data)
    assert (run / "run.json").stat().st_ino == inode
    before = (run / "run.json").read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(digests.os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        settings.write_run_file(run, replace(s, steps=9), config, data)
    assert (run / "run.json").read_bytes() == before


def test_small_files_are_put_back(run):
    (run / "tokenizer").mkdir()
    (run / "tokenizer" / "tokenizer.json").write_text('{"a": 1}')
    spare.keep(run)
    files = {name: (run / name).read_bytes() for name in ("run.json", "tokenizer/tokenizer.json")}
    assert spare.mend(run) == []
    for name, content in files.items():
        for damage in (lambda path: flip(path), lambda path: os.truncate(path, 3), lambda path: path.unlink()):
            damage(run / name)
            assert [line for line in spare.mend(run) if f"{name} was damaged or missing: put back" in line]
            assert (run / name).read_bytes() == content
    flip(run / "spare" / "run.json")
    assert spare.mend(run) == []
    shutil.rmtree(run / "spare")
    for place in range(10, len(files["run.json"]), 173):  # without the copy the checkpoint has the settings
        flip(run / "run.json", place)
        (said,) = spare.mend(run)
        assert f"{run / 'run.json'} " in said
        assert "the settings are those in the checkpoint of step 6" in said
        assert (run / "run.json").read_bytes() == files["run.json"]
    shutil.rmtree(run / "checkpoints")
    flip(run / "run.json")
    with pytest.raises(DamagedError, match=r"run.json .* there is no other copy of it: remove .* and start"):
        spare.mend(run)


def test_changed_settings_are_told():
    saved = {"steps": 6, "clip": 1.0, "tail_step": None, "lr": 0.1}
    assert changed({**saved, "tail_step": 3}, saved, 6) == []
    said = changed({**saved, "steps": 7, "clip": 0.5}, saved, 6)
    assert said == ["settings changed since the checkpoint of step 6: steps=7 (was 6), clip=0.5 (was 1.0)"]


def test_metrics_lose_no_more_than_a_damaged_line(run):
    lines = (run / "metrics.jsonl").read_bytes().splitlines()
    assert len(lines) > 1
    damaged = [b"\xff{", *lines, b"7", b"[" * 10**5]
    (run / "metrics.jsonl").write_bytes(b"\n".join(damaged) + b'\n{"step": 6, "lo')
    said = []
    with metrics.MetricsLog(run, 6, said.append) as log:
        log.write(7, {"loss": 1.0})
    assert (run / "metrics.jsonl").read_bytes().splitlines() == [*lines, b'{"step": 7, "loss": 1.0}']
    assert "3 damaged lines are left out" in said[0]
    assert len((run / "metrics.jsonl.damaged").read_bytes().splitlines()) == 3


def told(folder):
    """(step, name, value) of all events."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("*")):
        content, at = path.read_bytes(), 0
        while at < len(content):
            size = int.from_bytes(content[at : at + 8], "little")
            event = Event.FromString(content[at + 12 : at + 12 + size])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            at += size + 16
    return found


def test_events_are_complete_after_a_kill_and_a_clock_set_back(tmp_path, monkeypatch):
    now = [2e9]
    monkeypatch.setattr("time.time", lambda: now[0])
    log = metrics.MetricsLog(tmp_path)
    for step in (10, 20, 30):
        log.write(step, {"loss": step / 8})
        assert told(tmp_path / "events")[-1] == (step, "loss", step / 8)  # on disk at once: a kill costs nothing
    first = [p.name for p in (tmp_path / "events").iterdir()]
    now[0] -= 86400
    with metrics.MetricsLog(tmp_path, 20) as log:
        log.write(30, {"loss": 4.0})
    assert [p.name for p in (tmp_path / "events").iterdir()] != first
    assert told(tmp_path / "events") == [(10, "loss", 1.25), (20, "loss", 2.5), (30, "loss", 4.0)]
    times = dict(events._times(next((tmp_path / "events").iterdir())))
    assert (times[10], times[30]) == (2e9, 2e9 - 86400)


def test_texts_are_events_also_after_a_resume(tmp_path):
    with metrics.MetricsLog(tmp_path) as log:
        log.write(1, {"loss": 0.5, "sample": "ein Häher"})
    with metrics.MetricsLog(tmp_path, 1):
        pass
    assert told(tmp_path / "events") == [(1, "loss", 0.5), (1, "sample/text_summary", 0.0)]
    (file,) = (tmp_path / "events").iterdir()
    assert "ein Häher".encode() in file.read_bytes()


def test_events_that_cannot_be_written_stop_nothing(tmp_path):
    said = []
    with metrics.MetricsLog(tmp_path, say=said.append) as log:

        class Full:
            def write(self, *_):
                raise OSError(28, "No space left on device")

            flush = close = write

        log._events._writer = Full()
        for step in range(30):
            log.write(step, {"loss": 1.0})
    assert len(metrics.read_metrics(tmp_path)) == 30
    assert len(said) == 1
    assert "no more TensorBoard events" in said[0]
    assert "No space left on device" in said[0]


def test_a_second_training_is_refused(run):
    refused = pytest.raises(lock.FolderInUseError, match=f"run is in use by the training {os.getpid()} on ")
    with lock.held(run), lock.held(run), refused:  # the loop holds it inside of the command
        lock._locked(run).__enter__()  # another open file is refused as another process is
    assert not lock._held
    with lock.held(run.with_name("new")):
        assert (run.with_name("new") / "lock").exists()
    assert not run.with_name("new").exists()  # nothing else was put there


def test_progress_that_nobody_reads_is_dropped(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    closed = io.StringIO()
    closed.close()
    for out in (os.fdopen(writer, "w"), open("/dev/full", "w"), closed, None):  # noqa: SIM115
        if out is None:
            monkeypatch.setattr(sys, "stderr", None)
        shown = progress.Progress(10, 1, 1, None, out)
        shown.say("a line")
        shown.update(1, 1.0, 1.0, None)
        shown.close()
        assert not progress.write("a line", out)


def test_sighup_is_like_sigterm_unless_it_is_ignored(tmp_path):
    before = signal.getsignal(signal.SIGHUP)
    run = training.make(tmp_path / "run", STEPS)

    def batch_at(step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGHUP)
        return run.data.batch_at(step)

    result = loop.train(replace(run, data=replace(run.data, batch_at=batch_at)), out=io.StringIO())
    assert (result.step, result.finished) == (3, False)
    assert (tmp_path / "run" / "checkpoints" / "3").is_dir()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupts.Interrupts() as ignoring:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not ignoring.stop_after(1)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 3], ids=["held-out text", "further text"])
def test_a_signal_ends_an_evaluation(whole, tmp_path, number):
    run = training.make(tmp_path / "run", ["eval_every=2", "checkpoint_every=100"])
    passes = []

    def held_out():
        passes.append(1)
        for batch in run.data.held_out():
            if len(passes) == number:  # the first is the check before step 1
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    data = replace(run.data, held_out=held_out, eval_texts={"again": held_out})
    result = loop.train(replace(run, data=data), out=io.StringIO())
    assert (result.step, result.finished, result.evaluation) == (2, False, None)
    assert not any("valid_loss" in r for r in metrics.read_metrics(tmp_path / "run"))  # all texts are read again
    result, _ = training.train(tmp_path / "run", ["eval_every=2", "checkpoint_every=100"], resume=True)
    same(result, whole[1])
    assert [r["step"] for r in metrics.read_metrics(tmp_path / "run") if "valid_loss" in r] == [2, 4, 6]


def test_a_full_disk_names_the_metrics(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with metrics.MetricsLog(tmp_path) as log:
        log.write(1, {"loss": 1.0})
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (40, limit[1]))
            with pytest.raises(OSError, match=r"metrics.jsonl cannot be written: .*; the checkpoints are intact"):
                log.write(2, {"loss": 1.0})
            with pytest.raises(OSError, match=r"File too large.*environment.json"):
                environment.write_environment(tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
            signal.signal(signal.SIGXFSZ, before)
    assert metrics.read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}]


def test_streams_that_are_closed_are_opened_to_nothing():
    code = "from garrulax.cli import _open_standard_streams as o; o(); print(open('/dev/null').fileno())"
    done = subprocess.run(["sh", "-c", f'{sys.executable} -c "{code}" 2>&- <&-'], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})  # fmt: skip
    assert done.returncode == 0
    assert int(done.stdout.split()[-1]) > 2


def test_identity_survives_json():
    identity = settings.run_identity(Settings(), training.make("x").config, {"corpus": "a"})
    text = digests.sealed(identity)
    assert {k: v for k, v in json.loads(text).items() if k != "checksum"} == identity
