"""Times the trainer with its features on against the bare step, in turns within one process.

    python benchmarks/train_overhead.py [--blocks 12] [--sizes small medium] [--without save,ema,...]

The trainer is `loop.train`: it makes packed batches of a mixture of two corpora, logs norms of every block, throughput,
goodput and memory every 10 steps, skips spikes, averages the parameters, and saves checkpoints with digests. The bare
step is `step.make_train_step` on such batches, made beforehand. Between the trainer's blocks of steps as many bare
steps run, so that both meet the same state of the machine. Every second block of the trainer has one save in it, to its
end.

Printed are the medians of a step, of the clock (wall) and of the processors (cpu, all threads), the overhead of the
blocks without a save, the cost of a save in bare steps, and both together at the default interval of
`checkpoint_every`.
"""

import argparse
import dataclasses
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import train_step
from input_pipeline import made

from garrulax.hub.tokenizers import GLM_SPECIALS, ByteTokenizer
from garrulax.models import gpt
from garrulax.train import batches, loop, objectives, optimizers, settings, state, step
from garrulax.train.checkpoint import saved_steps

#: Steps of a block: a few seconds, longer than a save takes.
BLOCK = {"small": 60, "medium": 8}
FEATURES = {
    "skip": {"skip_steps": "spikes"},
    "ema": {"ema": 0.999},
    "log": {"log_every": 10},
    "save": {},
}
NEVER = 10**9


class Turns:
    """The batches of the trainer, and the clock of both sides.

    Attributes:
        blocks: Seconds a step of each pair of blocks, by clock: trainer, bare.
    """

    def __init__(self, batch_at: Callable, bare_steps: Callable[[], None], first: int, size: int):
        self.batch_at, self.bare_steps, self.first, self.size = batch_at, bare_steps, first, size
        self.blocks: list[dict[str, tuple[float, float]]] = []
        self.begin: tuple[float, float] | None = None

    def __call__(self, i: int):
        if i >= self.first and (i - self.first) % self.size == 0:
            jax.block_until_ready([x for x in jax.live_arrays() if not x.is_deleted()])
            end = time.perf_counter(), time.process_time()
            self.bare_steps()
            after = time.perf_counter(), time.process_time()
            if self.begin is not None:
                trainer = [(e - b) / self.size for b, e in zip(self.begin, end, strict=True)]
                bare = [(a - e) / self.size for e, a in zip(end, after, strict=True)]
                self.blocks.append(dict(zip(("wall", "cpu"), zip(trainer, bare, strict=True), strict=True)))
            self.begin = time.perf_counter(), time.process_time()
        return self.batch_at(i)


def bare(config, run: settings.Settings, ready: list, steps: int) -> Callable[[], None]:
    """A function that runs `steps` bare steps, each waited for as the trainer waits: one step later."""
    optimizer = optimizers.make_optimizer(run, gpt.parameters(config))
    update = step.make_train_step(config, run, optimizer, objectives.causal_lm)
    now = state.init_state(config, optimizer, 0)

    def go() -> None:
        nonlocal now
        before = None
        for _, batch in zip(range(steps), itertools.cycle(ready), strict=False):
            now, metrics = update(now, batches.on_devices(batch, None, 1))
            jax.block_until_ready(before)
            before = metrics
        jax.block_until_ready(now)

    return go


def compare(size: str, blocks: int, features: list[str]) -> None:
    a, block = train_step.SIZES[size], BLOCK[size]
    config = gpt.Config(**{k: a[k] for k in ("layers", "heads", "width")}, context=a["context"] + 1, vocab=300)
    first = 2 * block - 2  # saves come two steps after a block's begin
    plain = {"optimizer": "adamw", "batch": a["batch"], "window": a["context"], "steps": first + block * blocks + 1,
             "eval_tokens": 1, "eval_every": NEVER, "log_every": NEVER, "checkpoint_every": NEVER,
             "packing": "first_fit", "corpus": ("a:0.7", "b:0.3")}  # fmt: skip
    full = {k: v for name in features for k, v in FEATURES[name].items()}
    if "save" in features:
        full["checkpoint_every"] = 2 * block
    run = settings.Settings(**plain | full)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        corpora = [made(folder / "a", 3_000_000, 600, 0), made(folder / "b", 1_500_000, 200, 2)]
        data = batches.make_data(corpora, run, config, ByteTokenizer(GLM_SPECIALS))
        ready = [data.batch_at(i) for i in range(16)]
        steps = bare(config, settings.Settings(**plain), ready, block)
        steps()
        turns = Turns(data.batch_at, steps, first, block)
        with open("/dev/null", "w") as nowhere:
            loop.train(loop.Run(config, run, dataclasses.replace(data, batch_at=turns), folder / "run"), out=nowhere)
        if "save" in features and not saved_steps(folder / "run" / "checkpoints"):
            raise SystemExit("no checkpoint was saved")
    quiet = turns.blocks[1::2] if "save" in features else turns.blocks
    for clock in ("wall", "cpu"):
        step_time = statistics.median(b for _, b in (pair[clock] for pair in turns.blocks))
        ratios = sorted(t / b - 1 for t, b in (pair[clock] for pair in quiet))
        line = (f"{size:7} {clock:5} bare {1e3 * step_time:8.2f} ms  without a save {statistics.median(ratios):+.1%} "
                f"({ratios[0]:+.1%} to {ratios[-1]:+.1%})")  # fmt: skip
        if "save" in features:
            with_save = statistics.median(t - b for t, b in (pair[clock] for pair in turns.blocks[::2]))
            without = statistics.median(t - b for t, b in (pair[clock] for pair in quiet))
            cost, every = block * (with_save - without) / step_time, settings.Settings().checkpoint_every
            line += f"  a save {cost:.1f} steps  together, saving every {every} steps, " \
                    f"{statistics.median(ratios) + cost / every:+.1%}"  # fmt: skip
        print(line, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=12, help="blocks of the trainer, half of them with a save")
    parser.add_argument("--sizes", nargs="+", choices=BLOCK, default=list(BLOCK))
    parser.add_argument("--without", default="", help=f"features to leave out, of {', '.join(FEATURES)}")
    args = parser.parse_args()
    for each in args.sizes:
        compare(each, args.blocks, [name for name in FEATURES if name not in args.without.split(",")])
