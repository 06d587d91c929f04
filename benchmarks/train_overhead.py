"""Times the trainer with its features on against the bare step, in short turns within one process.

    python benchmarks/train_overhead.py [--turns 120] [--sizes small medium] [--without save,ema,...]

The trainer is `loop.train`: it makes packed batches of a mixture of two corpora, logs norms of every block, throughput,
goodput and memory, skips spikes, averages the parameters, and saves checkpoints with digests. The bare step is
`step.make_train_step` on such batches, made beforehand. Between the trainer's turns of a few steps as many bare steps
run: a turn takes a fraction of a second, because the speed of a machine changes within seconds. The trainer logs once a
turn (`log_every`).

Each turn of the trainer is divided by the mean of the bare turns before and after it. Printed are the median of these
ratios over the turns in which nothing is saved, its standard error (1.253 standard deviations, estimated from the
quartiles, divided by the root of the number of turns) and the quartiles; of the clock (wall), and of the processors
(cpu, all threads). A save lasts longer than a turn. Its cost is what the turns during which it runs, of both sides,
take longer than those around it, in bare steps: the median over the saves.
"""

import argparse
import dataclasses
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import train_step
from input_pipeline import made

from garrulax.hub.tokenizers import GLM_SPECIALS, ByteTokenizer
from garrulax.models import gpt
from garrulax.train import batches, freed_memory, loop, objectives, optimizers, settings, state, step

#: Steps of a turn, and turns from one save to the next.
SIZES = {"small": (10, 10), "medium": (2, 10)}
FEATURES = {
    "skip": {"skip_steps": "spikes"},
    "ema": {"ema": 0.999},
    "log": {},
    "save": {},
}
CLOCKS = ("wall", "cpu")
NEVER = 10**9


def now() -> np.ndarray:
    """Seconds of each of the clocks."""
    return np.array([time.perf_counter(), time.process_time()])


def wait_for_all() -> None:
    """Waits until no array is being computed."""
    jax.block_until_ready([x for x in jax.live_arrays() if not x.is_deleted()])


class Turns:
    """The batches of the trainer, which runs a turn of the bare step before each of its own turns.

    Attributes:
        trainer: Seconds of each of the trainer's turns, [2] of both clocks.
        bare: Seconds of the bare turns: the one before the trainer's first turn, and the one after each.
        saves: Of each of the trainer's turns, whether a save ran in it or in the bare turn after it.
    """

    def __init__(self, batch_at: Callable, bare_steps: Callable[[], None], first: int, size: int, checkpoints: Path):
        self.batch_at, self.bare_steps, self.first, self.size = batch_at, bare_steps, first, size
        self.checkpoints = checkpoints
        self.trainer: list[np.ndarray] = []
        self.bare: list[np.ndarray] = []
        self.saves: list[bool] = []
        self.begin, self.before = np.zeros(2), (False, set[str]())

    def __call__(self, i: int):
        if i >= self.first and (i - self.first) % self.size == 0:
            wait_for_all()
            end = now()
            wait_for_all()  # once more: what looking through the arrays takes is no part of the turn
            end -= now() - end
            begin = now()
            self.bare_steps()
            after = now()
            names = {path.name for path in self.checkpoints.iterdir()}
            seen = any(".writing" in name for name in names), names
            if self.bare:
                self.trainer.append(end - self.begin)
                self.saves.append(self.before[0] or seen[0] or bool(names - self.before[1]))
            self.bare.append(after - begin)
            self.before, self.begin = seen, now()
        return self.batch_at(i)


def bare(config, run: settings.Settings, ready: list, steps: int) -> Callable[[], None]:
    """A function that runs `steps` bare steps, each waited for as the trainer waits: one step later."""
    optimizer = optimizers.make_optimizer(run, gpt.parameters(config))
    update = step.make_train_step(config, run, optimizer, objectives.causal_lm)
    held = [state.init_state(config, optimizer, 0)]
    batch_of = itertools.cycle(ready)

    def go() -> None:
        before = None
        for _ in range(steps):
            held[0], metrics = update(held[0], batches.on_devices(next(batch_of), None, 1))
            jax.block_until_ready(before)
            before = metrics
        jax.block_until_ready(held[0])

    return go


def measured(size: str, count: int, features: list[str]) -> Turns:
    """Trains with some features for `count` turns."""
    a, (block, between) = train_step.SIZES[size], SIZES[size]
    config = gpt.Config(**{k: a[k] for k in ("layers", "heads", "width")}, context=a["context"] + 1, vocab=300)
    plain = {"optimizer": "adamw", "lr": 1e-4, "batch": a["batch"], "window": a["context"],
             "steps": block * (count + 3) + 1, "eval_tokens": 1, "eval_every": NEVER, "log_every": NEVER,
             "checkpoint_every": NEVER, "packing": "first_fit", "corpus": ("a:0.7", "b:0.3")}  # fmt: skip
    full = {k: v for name in features for k, v in FEATURES[name].items()}
    if "log" in features:
        full["log_every"] = block
    if "save" in features:
        full["checkpoint_every"] = between * block
    run = settings.Settings(**plain | full)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        corpora = [made(folder / "a", 3_000_000, 600, 0), made(folder / "b", 1_500_000, 200, 2)]
        data = batches.make_data(corpora, run, config, ByteTokenizer(GLM_SPECIALS))
        steps = bare(config, settings.Settings(**plain), [data.batch_at(i) for i in range(16)], block)
        steps()
        first = 2 * block - block // 2  # so that logging and saving come within turns
        turns = Turns(data.batch_at, steps, first, block, folder / "run" / "checkpoints")
        with open("/dev/null", "w") as nowhere:
            loop.train(loop.Run(config, run, dataclasses.replace(data, batch_at=turns), folder / "run"), out=nowhere)
    return turns


def report(size: str, turns: Turns) -> None:
    """Prints the overhead."""
    trainer, bare_turns, saves = np.array(turns.trainer), np.array(turns.bare), np.array(turns.saves)
    ratios = trainer / ((bare_turns[:-1] + bare_turns[1:]) / 2) - 1
    block, every = SIZES[size][0], settings.Settings().checkpoint_every
    for i, clock in enumerate(CLOCKS):
        quiet = ratios[~saves, i]
        low, median, high = np.quantile(quiet, (0.25, 0.5, 0.75))
        error = 1.253 * (high - low) / 1.349 / math.sqrt(len(quiet))
        step_time = float(np.median(bare_turns[:, i])) / block
        line = (f"{size:7} {clock:5} bare {1e3 * step_time:8.2f} ms  without a save {median:+.2%} ± {error:.2%} "
                f"({low:+.1%} to {high:+.1%}, {len(quiet)} turns of {block} steps)")  # fmt: skip
        if saves.any():
            costs = save_costs(trainer[:, i] + bare_turns[1:, i], saves) / step_time
            cost = statistics.median(costs)
            line += f"  {len(costs)} saves of {cost:.1f} steps ({min(costs):.1f} to {max(costs):.1f})  " \
                    f"together, saving every {every} steps, {median + cost / every:+.2%}"  # fmt: skip
        print(line, flush=True)


def save_costs(times: np.ndarray, saves: np.ndarray) -> np.ndarray:
    """What each run of turns with a save takes longer than as many turns of the median of the six around it."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], saves.astype(int), [0]])))
    costs = []
    for begin, end in edges.reshape(-1, 2):
        around = [j for j in (*range(begin - 3, begin), *range(end, end + 3)) if 0 <= j < len(saves) and not saves[j]]
        costs.append(times[begin:end].sum() - (end - begin) * np.median(times[around]))
    return np.array(costs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=120, help="turns of the trainer")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--without", default="", help=f"features to leave out, of {', '.join(FEATURES)}")
    args = parser.parse_args()
    freed_memory.run_in_the_calling_thread()  # as `garrulax train` does
    for each in args.sizes:
        report(each, measured(each, args.turns, [name for name in FEATURES if name not in args.without.split(",")]))
