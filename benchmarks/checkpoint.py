"""Time of checkpoints: how long saving stops training, and how much of saving and restoring the digests take.

    python benchmarks/checkpoint.py [PRESET] [--rounds 5]

The state is that of AdamW in float32: 1.5 GB for gpt2. One step of training, with a batch of 4 rows of 128 tokens, is
measured beside it. Times are wall times and, in brackets, CPU times of the process; medians over the rounds.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import garrulax as gx
from garrulax import models
from garrulax.train import digests
from garrulax.train.checkpoint import Checkpoints
from garrulax.train.freed_memory import run_in_the_calling_thread
from garrulax.train.objectives import OBJECTIVES
from garrulax.train.optimizers import make_optimizer
from garrulax.train.settings import Settings, run_identity
from garrulax.train.state import abstract_state, init_state
from garrulax.train.step import make_train_step


class Clock:
    def __init__(self):
        self.times: dict[str, list[tuple[float, float]]] = {}

    def __call__(self, name, action, *args):
        start, cpu = time.perf_counter(), time.process_time()
        result = jax.block_until_ready(action(*args))
        self.times.setdefault(name, []).append((time.perf_counter() - start, time.process_time() - cpu))
        return result

    def median(self, name):
        return tuple(statistics.median(column) for column in zip(*self.times[name], strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("preset", nargs="?", default="gpt2")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    run_in_the_calling_thread()  # as `garrulax train` does
    config, settings, clock = gx.preset(args.preset), Settings(optimizer="adamw", steps=10), Clock()
    optimizer = make_optimizer(settings, models.parameters(config))
    state = init_state(config, optimizer, 0)
    step = make_train_step(config, settings, optimizer, OBJECTIVES["causal"])
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab, (1, 4, 128)), jnp.int32)
    batch = {"tokens": tokens, "targets": tokens, "weights": jnp.ones(tokens.shape, jnp.float32)}
    state, _ = jax.block_until_ready(step(state, batch))
    size = sum(x.nbytes for x in jax.tree.leaves((state.params, state.opt_state)))
    print(f"{args.preset}: {size / 1e9:.2f} GB of parameters and moments on {jax.devices()[0].device_kind}")
    identity = run_identity(settings, config, {})
    folder = Path(tempfile.mkdtemp(prefix="checkpoints-"))

    def save(saves, state, number):
        clock("training stops", saves.save, state, number)
        saves.wait()

    try:
        for number in range(1, args.rounds + 1):
            state, _ = clock("step", step, state, batch)
            with Checkpoints(folder, identity, keep=1) as saves:
                clock("save", save, saves, state, number)
            saved = folder / str(number)
            clock("digests of a save", digests.of_files, saved, list(digests.read(saved)["files"]))
            clock("digests of a restore", digests.check, saved)
            with Checkpoints(folder, identity) as saves:
                clock("restore", saves.restore, abstract_state(config, optimizer))
    finally:
        shutil.rmtree(folder)
    for name in clock.times:
        print("{:22} {:7.3f} s  ({:.3f} s)".format(name, *clock.median(name)))
    for part, whole in (("digests of a save", "save"), ("digests of a restore", "restore")):
        shares = [p / w for p, w in zip(clock.median(part), clock.median(whole), strict=True)]
        print(f"{part}: {shares[0]:.1%} of its time, {shares[1]:.1%} of its CPU time")
    print(f"load of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs")


if __name__ == "__main__":
    main()
