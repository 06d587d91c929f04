import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from garrulax import models
from garrulax.core.sharding import make_mesh
from garrulax.train import settings
from garrulax.train.checkpoint import Checkpoints
from garrulax.train.optimizers import make_optimizer
from garrulax.train.settings import Settings
from garrulax.train.state import TrainState, abstract_state, init_state

CONFIG = models.gpt.Config(vocab=48, context=8, width=16, layers=2, heads=4)
IDENTITY = settings.run_identity(Settings(), CONFIG, {"corpus": "abc", "tokenizer": "def"})


def small(value):
    return TrainState(jnp.int32(value), {"w": jnp.full((3, 4), float(value))}, (), jax.random.key(7))


@pytest.mark.slow
def test_restored_state_is_the_same_on_any_mesh(tmp_path):
    optimizer = make_optimizer(Settings(), models.gpt.parameters(CONFIG))
    state = init_state(CONFIG, optimizer, 3)
    saved = jax.tree.map(np.asarray, (state.step, state.params, state.opt_state, jax.random.key_data(state.key)))
    with Checkpoints(tmp_path, IDENTITY) as saves:
        saves.save(state, 0)
    meshes = [None, make_mesh("fsdp=4,tensor=2")]
    for mesh in meshes:
        target = abstract_state(CONFIG, optimizer, mesh=mesh)
        with Checkpoints(tmp_path, IDENTITY) as saves:
            got = saves.restore(target)
        jax.tree.map(
            np.testing.assert_array_equal,
            (got.step, got.params, got.opt_state, jax.random.key_data(got.key)),
            saved,
        )
        jax.tree.map(lambda x, t: x.sharding.is_equivalent_to(t.sharding, x.ndim) or pytest.fail(str(x)), got, target)


def test_keeps_the_latest_and_the_best(tmp_path):
    with Checkpoints(tmp_path, IDENTITY, keep=2) as saves:
        assert saves.latest is saves.best is None
        for step, loss in [(1, 3.0), (2, 1.0), (3, None), (4, 2.0), (5, 2.5)]:
            saves.save(small(step), step, loss)
            saves.save(small(-1), step, loss)  # a step is written once
    with Checkpoints(tmp_path, IDENTITY, losses={2: 9.0}) as saves:  # a damaged log does not decide on the best
        assert (saves.latest, saves.best) == (5, 2)
        assert sorted(int(p.name) for p in tmp_path.iterdir()) == [2, 4, 5]
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), small(0))
        assert int(saves.restore(target).step) == 5
        assert float(saves.restore(target, 2).params["w"][0, 0]) == 2
        with pytest.raises(FileNotFoundError, match="no checkpoint of step 3, only of 2, 4, 5"):
            saves.restore(target, 3)


def test_of_another_run_is_refused(tmp_path):
    with Checkpoints(tmp_path, IDENTITY) as saves:
        saves.save(small(1), 1)
    other = {**IDENTITY, "config": {**IDENTITY["config"], "layers": 5}, "data": {**IDENTITY["data"], "corpus": "xyz"}}
    with (
        Checkpoints(tmp_path, other) as saves,
        pytest.raises(ValueError, match=r"config.layers is 5, was 2; data.corpus is 'xyz', was 'abc'"),
    ):
        saves.restore(small(0))
    other = {**other, "family": "llama"}
    with Checkpoints(tmp_path, other) as saves, pytest.raises(ValueError, match=r"family is llama, was gpt\. Put the"):
        saves.restore(small(0))


def test_an_empty_folder_has_none(tmp_path):
    with Checkpoints(tmp_path / "new", IDENTITY) as saves, pytest.raises(FileNotFoundError, match="holds no complete"):
        saves.restore(small(0))


SAVES = """
import sys, resource, signal
import jax, jax.numpy as jnp
from garrulax.train.checkpoint import Checkpoints
from garrulax.train.state import TrainState
folder, megabytes, limit = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
def state(i):
    w = jax.random.normal(jax.random.key(i), (megabytes * 16, 2**14))
    return TrainState(jnp.int32(i), {"w": w}, (), jax.random.key(0))
identity = {"config": {}, "settings": {}, "data": {}}
try:
    with Checkpoints(folder, identity) as saves:
        start = (saves.latest or 0) + 1
        for i in range(start, start + 100):
            saves.save(state(i), i)
            print(i, flush=True)
            if limit and i == 2:
                saves.wait()
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
except OSError as error:
    print("OSError:", error, flush=True)
    sys.exit(1)
"""


def saver(folder, megabytes, limit=0):
    return subprocess.Popen(
        [sys.executable, "-c", SAVES, str(folder), str(megabytes), str(limit)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "XLA_FLAGS": "", "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def check_whole(folder, megabytes, least):
    target = TrainState(jnp.int32(0), {"w": jnp.zeros((megabytes * 16, 2**14))}, (), jax.random.key(0))
    with Checkpoints(folder, {"config": {}, "settings": {}, "data": {}}) as saves:
        state = saves.restore(target)
        assert int(state.step) == saves.latest >= least
    expected = jax.random.normal(jax.random.key(int(state.step)), (megabytes * 16, 2**14))
    np.testing.assert_array_equal(state.params["w"], expected)
    assert not [p.name for p in folder.iterdir() if not p.name.isdigit()]  # what the dead process left is gone
    return int(state.step)


def kill_while_saving(folder, delay, megabytes):
    process = saver(folder, megabytes)
    for _ in range(2):
        assert process.stdout.readline(), process.stderr.read()
    last = int(process.stdout.readline())  # the save of this step has begun, the one before it is complete
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return check_whole(folder, megabytes, last - 1)


def test_a_killed_process_leaves_the_last_checkpoint(tmp_path):
    kill_while_saving(tmp_path, 0.02, 16)


@pytest.mark.slow
def test_killed_again_and_again(tmp_path):
    steps = [kill_while_saving(tmp_path, 0.03 * i, 64) for i in range(10)]
    assert steps == sorted(steps)
    assert steps[-1] > steps[0]


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    process = saver(tmp_path, 4, limit=100_000)
    out, err = process.communicate(timeout=120)
    last = out.strip().splitlines()[-1]
    assert process.returncode == 1, err
    assert last.startswith("OSError: a checkpoint could not be written")
    assert "complete are those of step 1, 2" in last
    assert check_whole(tmp_path, 4, 2) == 2
