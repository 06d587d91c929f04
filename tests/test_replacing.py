"""A saved model replaces an older one at once, and what killed processes left beside it goes."""

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from garrulax.hub import replacing as module
from garrulax.hub.replacing import replacing


def save(folder, text, check=lambda folder: None):
    with replacing(folder, check) as temporary:
        (temporary / "model").write_text(text)


def test_a_folder_is_exchanged_and_leftovers_of_dead_processes_go(tmp_path):
    for name in (".m.00000000.new", ".m.00000001.old", ".m.00000002.new", ".m2.00000000.new", ".m.notes.new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model").write_text(name)
    living = os.open(tmp_path / ".m.00000002.new", os.O_RDONLY)
    fcntl.flock(living, fcntl.LOCK_EX)
    save(tmp_path / "m", "first")
    inode = (tmp_path / "m").stat().st_ino
    save(tmp_path / "m", "second")
    assert (tmp_path / "m" / "model").read_text() == "second"
    assert (tmp_path / "m").stat().st_ino != inode
    assert sorted(p.name for p in tmp_path.iterdir()) == [".m.00000002.new", ".m.notes.new", ".m2.00000000.new", "m"]
    os.close(living)
    save(tmp_path / "m", "third")
    assert not (tmp_path / ".m.00000002.new").exists()


def test_an_older_folder_without_its_name_is_put_back(tmp_path):
    (tmp_path / ".m.00000001.old").mkdir()
    (tmp_path / ".m.00000001.old" / "model").write_text("older")

    def check(folder):
        assert (folder / "model").read_text() == "older"

    with pytest.raises(RuntimeError), replacing(tmp_path / "m", check):
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


KILLED = """
import importlib.util, os, signal, sys
from pathlib import Path
file, moment, name = sys.argv[1:]
spec = importlib.util.spec_from_file_location("replacing", file)  # without all that the package imports
replacing = importlib.util.module_from_spec(spec)
spec.loader.exec_module(replacing)
def exchanged(*names):
    if moment == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    done = real(*names)
    os.kill(os.getpid(), signal.SIGKILL)
real, replacing._exchanged = replacing._exchanged, exchanged
with replacing.replacing(Path(name), lambda folder: None) as temporary:
    (temporary / "model").write_text("new")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="folders cannot be exchanged")
@pytest.mark.parametrize(("moment", "text"), [("before", "older"), ("after", "new")])
def test_there_is_a_model_at_every_moment(tmp_path, moment, text):
    save(tmp_path / "m", "older")
    done = subprocess.run([sys.executable, "-c", KILLED, module.__file__, moment, str(tmp_path / "m")])
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "m" / "model").read_text() == text
    assert len(list(tmp_path.iterdir())) == 2
    save(tmp_path / "m", "newest")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_mount_point_is_refused():
    with pytest.raises(ValueError, match="/dev/shm is a mount point, which cannot be replaced: choose a folder in it"):
        save(Path("/dev/shm"), "")
